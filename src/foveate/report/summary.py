"""The result of a run in numbers and plain sentences: the comparison of its first and last evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.evaluate.predictions import BOX_SIZES, EXPRESSION_LENGTHS, Evaluation, Paired, mean, paired, summarise

FIGURES = (("greedy", "accuracy"), ("greedy", "mean_iou"), ("sampled", "accuracy"), ("sampled", "mean_iou"))
MAX_TAG_VALUES, MOST_VALUES = 40, 8
ORDERED = {"box size": [name for _, name in BOX_SIZES], "words": [name for _, name in EXPRESSION_LENGTHS]}
"""Values of a tag in an order of their own; others go by how many rows have them."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of the table: before and after, None where it was not measured. `percent` says how to show it."""

    label: str
    rows: int
    before: float | None
    after: float | None
    percent: bool

    @property
    def difference(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True, slots=True)
class TagTable:
    """The accuracies of the rows of each value of one tag, greedy and sampled."""

    tag: str
    greedy: tuple[Change, ...]
    sampled: tuple[Change, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Before and after. With a single evaluation `paired` is None and every `after` is None."""

    measure: str
    percent: bool
    before_step: int
    after_step: int | None
    before_name: str
    after_name: str
    rows: int
    samples: int
    overall: tuple[Change, ...]
    by_tag: tuple[TagTable, ...]
    by_score: TagTable | None
    """Where right and wrong are not defined: the share of the answers whose score is at least each of some values."""
    paired: Paired | None
    sentences: tuple[str, ...]


def compare_evaluations(evaluations: Sequence[Evaluation]) -> Comparison | None:
    """The first evaluation against the last one, None without any that holds a row."""
    filled = [evaluation for evaluation in evaluations if evaluation.predictions]
    if not filled:
        return None
    before, after = filled[0], filled[-1] if len(filled) > 1 else None
    first = summarise(before.predictions, before.step)
    last = summarise(after.predictions, after.step) if after else None
    measure, percent = _measure(before)
    change = paired(before.predictions, after.predictions) if after else None
    overall = _overall(first, last, measure, percent)
    return Comparison(
        measure=measure,
        percent=percent,
        before_step=before.step,
        after_step=after.step if after else None,
        before_name=before.name,
        after_name=after.name if after else "",
        rows=(last or first)["rows"],
        samples=(last or first)["sampled"]["samples"],
        overall=overall,
        by_tag=_by_tag(first, last, percent),
        by_score=None if percent else _by_score(before, after),
        paired=change,
        sentences=_sentences(filled, overall[0], change, percent),
    )


def format_figure(value: float | None, percent: bool) -> str:
    """`41.0 %` or `0.410`; an en dash for what was not measured."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"


def format_difference(value: float | None, percent: bool) -> str:
    """The same with its sign, in percentage points: `+26.2`; a true minus sign."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if percent else f"{value:+.3f}"
    return text.replace("-", "−")


def _measure(evaluation: Evaluation) -> tuple[str, bool]:
    """The name of the accuracy of these rows, and whether it is a share."""
    from foveate.rewards.boxes import HIT_IOU

    decided = [row.shown for row in evaluation.predictions if row.shown.right is not None]
    if not decided:
        return "mean score", False
    return (f"accuracy at IoU {HIT_IOU:g}" if all(one.iou is not None for one in decided) else "accuracy"), True


def _overall(first: dict[str, Any], last: dict[str, Any] | None, measure: str, percent: bool) -> tuple[Change, ...]:
    changes = []
    for way, figure in FIGURES:
        label = f"{way.capitalize()} {measure if figure == 'accuracy' else 'mean IoU'}"
        name = "score" if figure == "accuracy" and not percent else figure
        before, after = first[way][name], last[way][name] if last else None
        if before is not None or after is not None:
            rows = (last or first)["rows"]
            changes.append(Change(label, rows, before, after, percent and figure == "accuracy"))
    return tuple(changes)


def _by_tag(first: dict[str, Any], last: dict[str, Any] | None, percent: bool) -> tuple[TagTable, ...]:
    greedy_name, sampled_name = (f"{way}_{'accuracy' if percent else 'score'}" for way in ("greedy", "sampled"))
    nothing = {"rows": 0, greedy_name: None, sampled_name: None}
    tables = []
    for tag, values in (last or first)["by_tag"].items():
        if len(values) < 2:  # every row has it, or lacks it: the overall figures again
            continue
        natural = ORDERED.get(tag, ())
        ranks = {value: natural.index(value) if value in natural else -values[value]["rows"] for value in values}
        shown = sorted(values, key=lambda value: (ranks[value], value))[:MAX_TAG_VALUES]
        columns: dict[str, list[Change]] = {greedy_name: [], sampled_name: []}
        for value in shown:
            old = first["by_tag"].get(tag, {}).get(value, nothing)
            new = values[value] if last else nothing
            for figure, changes in columns.items():
                changes.append(Change(value, values[value]["rows"], old[figure], new[figure], percent))
        greedy, sampled = (tuple(changes) for changes in columns.values())
        tables.append(TagTable(tag, greedy, sampled, len(values) - len(shown)))
    return tuple(tables)


def _by_score(before: Evaluation, after: Evaluation | None) -> TagTable | None:
    """None where all answers score alike. Of values that the same answers reach, the highest is shown."""
    scores = [(_scores(one, greedy=True), _scores(one, greedy=False)) for one in (before, after) if one is not None]
    known = [value for pair in scores for own in pair for value in own]
    if not known or min(known) == max(known):
        return None
    columns: tuple[list[Change], list[Change]] = ([], [])
    seen: set[tuple[float | None, ...]] = set()
    for least in reversed(_round_values(min(known), max(known))):
        shares = [tuple(mean(float(value >= least) for value in own) for own in pair) for pair in scores]
        if (found := tuple(share for pair in shares for share in pair)) in seen:
            continue
        seen.add(found)
        for way, changes in enumerate(columns):
            last = shares[1][way] if after is not None else None
            rows = len((after or before).predictions)
            changes.insert(0, Change(f"at least {least:g}", rows, shares[0][way], last, percent=True))
    return TagTable("score", *map(tuple, columns), left_out=0)


def _scores(evaluation: Evaluation, *, greedy: bool) -> list[float]:
    """The scores of the greedy or of the sampled answers that were graded."""
    answers = [answer for row in evaluation.predictions for answer in row.answers if answer.greedy == greedy]
    return [answer.score for answer in answers if answer.score is not None]


def _round_values(low: float, high: float) -> list[float]:
    """Quarters of 1 for scores from 0 to 1, else at most eight multiples of a round number above the lowest score."""
    if low >= 0 and high <= 1:
        return [0.25, 0.5, 0.75, 1.0]
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(size for size in (step / 5, step / 2, step, 2 * step) if (high - low) / size <= MOST_VALUES)
    return [round(step * index, 12) for index in range(math.floor(low / step) + 1, math.floor(high / step) + 1)]


def _sentences(
    evaluations: Sequence[Evaluation], headline: Change, change: Paired | None, percent: bool
) -> tuple[str, ...]:
    """The result in words: what happened, how sure that is, and whether an earlier step was better."""
    first, last = evaluations[0], evaluations[-1]
    before, after = format_figure(headline.before, percent), format_figure(headline.after, percent)
    rows = f"{len(last.predictions)} held-out question{'s' if len(last.predictions) != 1 else ''}"
    what = headline.label
    if headline.difference is None:
        moment = "" if first.step == 0 or first.label else f" after {_steps(first.step)}"
        return (f"{what} is {before} on {rows}{moment}.",)
    if last.label:
        figures = "; ".join(f"{one.label} {format_figure(_greedy(one), percent)}" for one in evaluations)
        certainty = (_certainty(change, percent),) if change is not None else ()
        return (f"{what} on {rows}: {figures}.", *certainty)
    span = f"after {_steps(last.step)}" if first.step == 0 else f"from step {first.step} to step {last.step}"
    if before == after:
        sentences = [f"{what} stayed at {before} on {rows} {span}."]
    else:
        verb = "rose" if headline.difference > 0 else "fell"
        sentences = [f"{what} {verb} from {before} to {after} on {rows} {span}."]
    if change is not None:
        sentences.append(_certainty(change, percent))
    best = max(evaluations, key=lambda evaluation: _greedy(evaluation))
    if best is not last and best is not first and format_figure(_greedy(best), percent) != after:
        sentences.append(f"The best evaluation was {format_figure(_greedy(best), percent)} at step {best.step}.")
    return tuple(sentences)


def _certainty(change: Paired, percent: bool) -> str:
    unit = " points" if percent else ""
    low, high = (format_difference(value, percent) for value in change.interval)
    turned = f"{len(change.better)} turned from wrong to right, {len(change.worse)} from right to wrong"
    if not percent:
        turned = f"{len(change.better)} scored higher, {len(change.worse)} lower"
    verdict = "so chance alone could explain it" if change.is_noise else "so chance alone does not explain it"
    return f"{turned}; the 95 % interval of the difference is {low} to {high}{unit}, {verdict}."


def _greedy(evaluation: Evaluation) -> float:
    return mean(row.value for row in evaluation.predictions) or 0.0


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"
