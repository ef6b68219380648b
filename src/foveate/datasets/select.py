"""Prepare from what is prepared: rows kept by difficulty and size, and preference pairs from answers with rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.answers import RIGHT, CorrectnessRule, ScoredAnswer, answer_files, answers_by_id
from foveate.data.demos import CHOSEN, REJECTED
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, infer_schema, publish, sha256, task_row
from foveate.datasets.tables import publish_tables
from foveate.records import DataError, Task, require


@dataclass(frozen=True, slots=True)
class Limits:
    """Which rows stay. accuracy: the share of right answers, both ends included (MMPR-Tiny: 0.2 to 0.8); answers: the
    fewest answers that tell it; prompt_tokens: the longest prompt, images included; short_side, long_side: the fewest
    pixels of the shorter and the most of the longer side of every picture. None leaves a measure out."""

    accuracy: tuple[float, float] | None = None
    answers: int = 1
    prompt_tokens: int | None = None
    short_side: int | None = None
    long_side: int | None = None

    def __post_init__(self) -> None:
        if self.accuracy is not None:
            low, high = self.accuracy
            require(0 <= low <= high <= 1, f"setting accuracy: must be two growing numbers in 0..1, not {low}, {high}")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The measure of a task: prompt tokens (0 without `length`), the shortest and the longest side of its pictures."""

    length: Callable[[Task], int] | None

    def __call__(self, task: Task) -> tuple[int, int | None, int | None]:
        sides = [side for image in task.images for side in (image.width, image.height)]
        tokens = self.length(task) if self.length is not None else 0
        return tokens, min(sides, default=None), max(sides, default=None)


def prepare_filter(
    sources: Sequence[Path],
    out: Path,
    limits: Limits,
    *,
    name: str = "train",
    rollouts: Sequence[Path] = (),
    correctness_rule: CorrectnessRule = RIGHT,
    length: Callable[[Task], int] | None = None,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """The rows within `limits` as NAME.parquet with a manifest, in the order of the sources.

    length: the number of prompt tokens of a task (`Encoder.length`), for limits.prompt_tokens. rollouts: see
    `answers_by_id`, for limits.accuracy; rows without answers are left out. Then extra_info.accuracy and
    extra_info.answers are added, which a curriculum can go by. Raises DataError for limits that nothing can measure,
    bad rows, ids that are not unique, and if no row is left.
    """
    require(Path(name).name == name, f"setting name: {name!r} is no name of a file")
    require(limits.accuracy is None or bool(rollouts), "a limit on accuracy needs the rollouts of a model")
    require(limits.prompt_tokens is None or length is not None, "a limit on prompt tokens needs a model folder")
    table, found = reading(sources, measure=Sizes(length))
    counts = {"rows read": len(table)}
    kept = _by_size(found.measures, limits, counts)
    accuracy: dict[str, dict[str, Any]] = {}
    if limits.accuracy is not None:
        accuracy = {
            key: _accuracy(answers, correctness_rule) for key, answers in answers_by_id(rollouts).items() if answers
        }
        kept = _by_accuracy(table, kept, accuracy, limits, counts)
    require(bool(kept), f"{table.names}: no row is within the limits ({_shown(counts)})")
    return publish_tables(
        {name: table.select(kept)},
        out,
        problems=found.problems,
        settings={
            "limits": asdict(limits),
            **({"columns": dict(reading.columns)} if reading.columns else {}),
            **({"right": asdict(correctness_rule), "rollouts": _hashes(rollouts)} if rollouts else {}),
        },
        counts=counts,
        extra=(lambda task_id: accuracy[task_id]) if accuracy else None,
    )


def _by_size(measures: Sequence[Any], limits: Limits, counts: dict[str, int]) -> list[int]:
    kept = []
    refused = dict.fromkeys(("prompt too long", "picture too small", "picture too large"), 0)
    for index, (tokens, shortest, longest) in enumerate(measures):
        if limits.prompt_tokens is not None and tokens > limits.prompt_tokens:
            refused["prompt too long"] += 1
        elif limits.short_side is not None and shortest is not None and shortest < limits.short_side:
            refused["picture too small"] += 1
        elif limits.long_side is not None and longest is not None and longest > limits.long_side:
            refused["picture too large"] += 1
        else:
            kept.append(index)
    counts.update({reason: count for reason, count in refused.items() if count})
    return kept


def _accuracy(answers: Sequence[ScoredAnswer], correctness_rule: CorrectnessRule) -> dict[str, Any]:
    return {"accuracy": sum(map(correctness_rule, answers)) / len(answers), "answers": len(answers)}


def _by_accuracy(
    table: TaskTable,
    rows: Sequence[int],
    accuracy: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    counts: dict[str, int],
) -> list[int]:
    assert limits.accuracy is not None
    low, high = limits.accuracy
    part = table.select(rows)
    reasons = {"without enough answers": 0, "too hard": 0, "too easy": 0}
    kept = []
    for task_id, position in rows_by_id(part).items():
        known = accuracy.get(task_id)
        if known is None or known["answers"] < limits.answers:
            reasons["without enough answers"] += 1
        elif known["accuracy"] < low:
            reasons["too hard"] += 1
        elif known["accuracy"] > high:
            reasons["too easy"] += 1
        else:
            kept.append(rows[position])
    counts.update(reasons)
    return kept


# -------------------------------------------------------------------------------------------------------------- pairs


def prepare_pairs(
    sources: Sequence[Path],
    out: Path,
    *,
    rollouts: Sequence[Path],
    max_per_prompt: int = 15,
    correctness_rule: CorrectnessRule = RIGHT,
    seed: int = 0,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """Preference pairs as pairs.parquet with a manifest: for each row a right answer and a wrong one, at most
    `max_per_prompt` of all such pairs, drawn at random by `seed` and the row (MMPR's correctness pairs take 15).

    Equal texts count once; a right answer that was cut is not chosen. The rows have extra_info.chosen and
    extra_info.rejected. Raises DataError for bad rows, ids that are not unique, and if there is no pair.
    """
    require(max_per_prompt >= 1, f"setting max_per_prompt: must be at least 1, not {max_per_prompt}")
    table, found = reading(sources)
    answers = answers_by_id(rollouts)
    drawn: dict[int, list[tuple[str, str]]] = {}
    counts: dict[str, int] = dict.fromkeys(("prompts", PAIRED, ALL_RIGHT, ALL_WRONG, ALL_CUT, UNANSWERED), 0)
    for task_id, index in rows_by_id(table).items():
        rng = np.random.default_rng((seed, index))
        given = answers.get(task_id, [])
        pairs = _draw_pairs(given, correctness_rule, max_per_prompt, rng)
        if pairs:
            drawn[index] = pairs
        counts["prompts"] += 1
        counts[_outcome(given, correctness_rule, bool(pairs))] += 1
    require(bool(drawn), f"{table.names}: {_no_pairs(counts)} ({_shown(counts)})")
    schema = infer_schema(_pair_rows(table, drawn, pictures=False))
    return publish(
        out,
        {"pairs": _pair_rows(table, drawn)},
        schema,
        total=sum(map(len, drawn.values())),
        sources=table.files,
        settings={
            "max_per_prompt": max_per_prompt,
            "right": asdict(correctness_rule),
            "seed": seed,
            "rollouts": _hashes(rollouts),
            **({"columns": dict(reading.columns)} if reading.columns else {}),
        },
        problems=found.problems,
        counts=counts,
    )


PAIRED = "prompts with a right and a wrong answer"
ALL_RIGHT, ALL_WRONG = "all answers right", "all answers wrong"
ALL_CUT, UNANSWERED = "all right answers cut", "without answers"


def _outcome(answers: Sequence[ScoredAnswer], correctness_rule: CorrectnessRule, paired: bool) -> str:
    """The count that a prompt belongs to."""
    if not answers:
        return UNANSWERED
    if paired:
        return PAIRED
    right = [answer for answer in answers if correctness_rule(answer)]
    if not right:
        return ALL_WRONG
    return ALL_CUT if not any(answer.finish == "stop" for answer in right) else ALL_RIGHT


def _no_pairs(counts: Mapping[str, int]) -> str:
    """What was found in place of pairs, and what to change."""
    advice = {
        ALL_RIGHT: "nearly all are right; take harder prompts, more answers for each, or a higher threshold",
        ALL_WRONG: "nearly all are wrong; take a better start, more answers for each, or a lower threshold",
        ALL_CUT: "right answers reached the token limit and are not chosen; raise rollout.max_tokens",
        UNANSWERED: "the answers belong to other rows; give the rollouts of these files",
    }
    answered = [name for name in (ALL_RIGHT, ALL_WRONG, ALL_CUT) if counts[name]]
    most = max(answered, key=lambda name: counts[name], default=UNANSWERED)
    return f"no row has both a right and a wrong answer: {advice[most]}"


def _draw_pairs(
    answers: Sequence[ScoredAnswer], correctness_rule: CorrectnessRule, most: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    right = list(
        dict.fromkeys(answer.text for answer in answers if correctness_rule(answer) and answer.finish == "stop")
    )
    wrong = list(
        dict.fromkeys(answer.text for answer in answers if not correctness_rule(answer) and answer.text not in right)
    )
    wrong = [text for text in wrong if text.strip()]
    chosen = rng.permutation(len(right) * len(wrong))[:most]
    return [(right[number // len(wrong)], wrong[number % len(wrong)]) for number in sorted(chosen.tolist())]


def _pair_rows(
    table: TaskTable, drawn: Mapping[int, Sequence[tuple[str, str]]], pictures: bool = True
) -> Iterator[dict[str, Any]]:
    for task, pairs in zip(table.select(list(drawn)), drawn.values(), strict=True):
        for number, (chosen, rejected) in enumerate(pairs):
            numbered = replace(task, id=f"{task.id}-{number}")
            yield task_row(numbered, pictures=pictures, **{CHOSEN: chosen, REJECTED: rejected, "prompt_id": task.id})


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    return {str(file): sha256(file) for path in paths for file in answer_files(path)}


def rows_by_id(table: TaskTable) -> dict[str, int]:
    """The row of each id. Raises DataError for ids that stand for several rows."""
    rows: dict[str, int] = {}
    for index, task in enumerate(table):
        if task.id in rows:
            raise DataError(
                f"{task.where}: the id {task.id!r} is also that of {table[rows[task.id]].where}; answers are matched "
                "to rows by id, so give each row an extra_info.id of its own"
            )
        rows[task.id] = index
    return rows
