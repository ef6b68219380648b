"""The figures of one model: means with intervals, avg@k, pass@k, majority, best-of-N, thresholds, splits, frames."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from foveate.data.answers import ScoredAnswer, ScoredRow
from foveate.evaluate.predictions import bootstrap, is_decided, lost_grades, mean, seen_image_tokens, summarise
from foveate.records import Task
from foveate.rewards.boxes import BOX_FRAME, FRAME, Box, in_thousandths, iou, parse_box, picture_size
from foveate.rewards.refcoco import BoxFrame, answer_box
from foveate.rewards.text import final_answer, plain

logger = logging.getLogger(__name__)

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
SPLITS = (
    "refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB",
    "refcocog_val", "refcocog_test",
)  # fmt: skip
"""The eight splits, in the order of the published tables."""
FRAMES: tuple[BoxFrame, ...] = ("thousandths", "pixels", "fractions")
_FEW_BOXES, _CLEARLY = 8, 0.1


def summary_statistics(rows: Sequence[ScoredRow], seed: int = 0) -> dict[str, Any]:
    """Everything that the summary says of one model. An interval is [low, high], see `bootstrap`."""
    values = [row.value for row in rows]
    tags = summarise(rows, 0)["by_tag"]
    overlaps = [row.shown.iou for row in rows if row.shown.iou is not None]
    drawn = [row for row in rows if row.sampled]
    found: dict[str, Any] = {
        "rows": len(rows),
        **lost_grades(rows),
        **seen_image_tokens(rows),
        "score": mean(row.shown.score for row in rows),
        "decoding": sorted({"greedy" if row.shown.greedy else "sampled" for row in rows}),
    }
    interval = bootstrap(values, seed)
    found |= (
        {"accuracy": {"value": mean(values), "interval": interval}}
        if is_decided(rows)
        else {"score_interval": interval}
    )
    if tags:
        found["by_tag"] = tags
    if overlaps:
        found["mean_iou"] = {"value": mean(overlaps), "interval": bootstrap(overlaps, seed)}
        found["with_box"] = mean(float(row.shown.box is not None) for row in rows)
        found["accuracy_at"] = {f"{t:g}": mean(float(one >= t) for one in overlaps) for t in THRESHOLDS}
        found["frames"] = {frame: mean(_iou_in(row, frame) for row in rows) for frame in FRAMES}
        found["splits"] = refcoco_splits(rows)
    if drawn:
        found["sampled"], found["parallel"] = _sampled(drawn, seed)
    return found


def warn_of_lost_answers(rows: Sequence[ScoredRow], name: str) -> None:
    """Warn of answers that could not be graded, and of an evaluation in which none could be read: no box, no option, no
    final answer at all."""
    for count in lost_grades(rows).values():
        logger.warning(
            "%s: %d answers could not be graded; they count as wrong in the accuracy, and not at all in the mean score",
            name, count,
        )  # fmt: skip
    parsed = [answer.parts["parsed"] for row in rows for answer in row.answers if "parsed" in answer.parts]
    if parsed and not any(parsed):
        note = next((answer.note for row in rows for answer in row.answers if answer.note), "nothing to grade")
        logger.warning(
            "%s: none of %d answers could be read (%s), so all of them count as wrong; the first one is %r. Look at "
            "the prompt, the longest answer, and the settings of the reward",
            name, len(parsed), note, rows[0].shown.text[:80],
        )  # fmt: skip


def pass_at(n: int, correct: int, k: int) -> float:
    """The chance that of k answers drawn from n, of which `correct` are right, at least one is (Chen et al. 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _sampled(rows: Sequence[ScoredRow], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """avg@n, pass@k for powers of two and n, the vote, and best-of-n where answers have a rank. And of those ways to
    use n answers to a question, by the same names, the mean with its interval, and the difference to the vote, which is
    paired by question."""
    n = min(len(row.sampled) for row in rows)
    right = [[answer.correctness for answer in row.sampled[:n]] for row in rows]
    share = all(value in (0.0, 1.0) for one in right for value in one)
    ks = sorted({k for k in (1 << power for power in range(n.bit_length())) if k <= n} | {n})
    ways = {f"avg@{n}": [sum(one) / n for one in right]}
    if share:
        ways[f"pass@{n}"] = [float(any(one)) for one in right]
    voted = ways[f"majority@{n}"] = [vote(row, n).correctness for row in rows]
    ranks = [[-math.inf if answer.rank is None else answer.rank for answer in row.sampled[:n]] for row in rows]
    if all(max(one) > -math.inf for one in ranks):
        pairs = zip(right, ranks, strict=True)
        ways[f"best_of@{n}"] = [values[one.index(max(one))] for values, one in pairs]
    passes = {f"pass@{k}": mean(pass_at(n, int(sum(one)), k) for one in right) for k in ks} if share else {}
    return {"n": n, **{name: mean(values) for name, values in ways.items()}, **passes}, {
        name: {
            **_with_bootstrap(values, seed),
            "over_majority": _with_bootstrap([a - b for a, b in zip(values, voted, strict=True)], seed),
        }
        for name, values in ways.items()
    }


def _with_bootstrap(values: Sequence[float], seed: int) -> dict[str, Any]:
    return {"value": mean(values), "interval": bootstrap(values, seed)}


def vote(row: ScoredRow, n: int) -> ScoredAnswer:
    """The answer that most of the first n agree with, the earliest of these. Boxes agree by overlap: the one with the
    largest total IoU to all of them. Others agree if their final answers are the same text; what has none has no vote.
    """
    answers = row.sampled[:n]
    if row.shown.iou is not None:
        boxes = [parse_box(answer.text) for answer in answers]
        support = [sum(iou(box, other) for other in boxes if other) if box else -1.0 for box in boxes]
        return answers[support.index(max(support))]
    finals = [final_answer(answer.text, "text") for answer in answers]
    votes = Counter(plain(final) for final in finals if final)
    if not votes:
        return answers[0]
    winner = votes.most_common(1)[0][0]
    return next(answer for answer, final in zip(answers, finals, strict=True) if final and plain(final) == winner)


# ------------------------------------------------------------------------------------------------------- grounding


def refcoco_split(row: ScoredRow) -> str | None:
    """Which of the eight RefCOCO splits a row belongs to, by the name of its dataset or the start of its id."""
    for name in (row.tags.get("dataset", ""), row.source, row.id):
        found = re.match(r"(refcoco(?:\+|_?plus|g)?)_?(val|testA|testB|test)(?![a-zA-Z])", name)
        if found:
            split = f"{re.sub('_?plus', '+', found[1])}_{found[2]}"
            return split if split in SPLITS else None
    return None


def refcoco_splits(rows: Sequence[ScoredRow]) -> dict[str, Any] | None:
    """Accuracy of each RefCOCO split, and the mean over splits only where all eight are there; None without any."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        split = refcoco_split(row)
        if split is not None:
            groups.setdefault(split, []).append(row.value)
    if not groups:
        return None
    accuracy = {name: mean(groups[name]) for name in SPLITS if name in groups}
    counts = {name: len(groups[name]) for name in accuracy}
    whole = len(accuracy) == len(SPLITS)
    average = mean(value for value in accuracy.values() if value is not None) if whole else None
    return {
        "accuracy": accuracy,
        "rows": counts,
        "mean_of_8": average,
        "missing": [s for s in SPLITS if s not in groups],
    }


def likely_frame(found: Mapping[str, Any], rows: int) -> BoxFrame | None:
    """The frame in which the answers fit far better than in thousandths, or None: a sign that they stand in it."""
    means: Mapping[BoxFrame, float] = found["frames"]
    best = max(FRAMES, key=lambda frame: means[frame])
    return best if rows >= _FEW_BOXES and means[best] > means["thousandths"] + _CLEARLY else None


def _iou_in(row: ScoredRow, frame: BoxFrame) -> float:
    if row.shown.iou is None:
        return 0.0
    width, height = row.images[0].width, row.images[0].height
    box = answer_box(row.shown.text, "last", frame, width, height)
    x1, y1, x2, y2 = (v / FRAME * side for v, side in zip(row.ground_truth, (width, height) * 2, strict=True))
    return iou(box, (x1, y1, x2, y2)) if box is not None else 0.0


BoxReader = Callable[[str, Task], Box | None]
"""From an answer to its box in thousandths of the image."""


def model_box(text: str, task: Task) -> Box | None:
    """The last box of an answer, from the frame of the model's family where the task says it."""
    box = parse_box(text)
    return in_thousandths(box, task) if box is not None and BOX_FRAME in task.meta else box


def box_reader(name: str, settings: Mapping[str, Any]) -> BoxReader:
    """The reader of boxes that follows the rule and frame of a reward."""
    rule = settings.get("rule", "first") if name == "refcoco" else "last"
    frame = settings.get("frame" if name == "refcoco" else "answer_frame", "thousandths")

    def read(text: str, task: Task) -> Box | None:
        if rule == "last" and frame in ("thousandths", "model"):
            return model_box(text, task)
        width, height = picture_size(task)
        box = answer_box(text, rule, frame, width, height, task.meta.get(BOX_FRAME))
        if box is None:
            return None
        x1, y1, x2, y2 = (v * FRAME / side for v, side in zip(box, (width, height) * 2, strict=True))
        return x1, y1, x2, y2

    return read
