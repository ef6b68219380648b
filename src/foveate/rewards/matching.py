"""The reward of answers with several boxes: boxes are paired with the ground truth before they are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.registry import Share
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.box_text import Box, parse_boxes
from foveate.rewards.boxes import (
    AnswerFrame,
    TruthFrame,
    answer_in_pixels,
    box_fault,
    four_numbers,
    iou,
    picture_size,
    size_faults,
    to_whole_pixels,
)

_TELLING_SIDE = 800  # pixels; in larger images most boxes in thousandths would lie inside as pixels
_BOX_NAMES = ("bbox_2d", "bbox", "box")
BoxesKind = Literal["f1", "located"]
MOST_BOXES = 200
"""Boxes of an answer that are looked at; what follows counts as wrong without being compared."""


def best_pairs(value: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column) that use no row and no column twice and have the greatest total value, by row.

    The Hungarian method with potentials and shortest augmenting paths (Jonker and Volgenant 1987): min(R, C) pairs of
    an (R, C) matrix of finite numbers in O(min(R, C)^2 max(R, C)).
    """
    gain_RC = np.asarray(value, dtype=np.float64)
    if gain_RC.size == 0:
        return []
    if gain_RC.shape[0] > gain_RC.shape[1]:
        return sorted((row, column) for column, row in best_pairs(gain_RC.T.tolist()))
    cost_RC = gain_RC.max() - gain_RC
    rows, columns = cost_RC.shape
    row_of = np.full(columns, -1)
    u_R, v_C = np.zeros(rows), np.zeros(columns)
    for row in range(rows):
        _assign(row, cost_RC, row_of, u_R, v_C)
    return sorted((int(row), column) for column, row in enumerate(row_of) if row >= 0)


def _assign(start: int, cost_RC: np.ndarray, row_of: np.ndarray, u_R: np.ndarray, v_C: np.ndarray) -> None:
    """Give a column to row `start` along the cheapest path of reassignments; updates the column owners `row_of` and the
    potentials of rows and columns in place."""
    columns = cost_RC.shape[1]
    distance_C = np.full(columns, np.inf)
    before_C = np.full(columns, start)
    done_C = np.zeros(columns, dtype=bool)
    row, reached = start, 0.0
    while True:
        through_C = reached + cost_RC[row] - u_R[row] - v_C
        closer_C = ~done_C & (through_C < distance_C)
        distance_C[closer_C] = through_C[closer_C]
        before_C[closer_C] = row
        column = int(np.argmin(np.where(done_C, np.inf, distance_C)))
        reached = distance_C[column]
        done_C[column] = True
        if row_of[column] < 0:
            break
        row = int(row_of[column])
    u_R[start] += reached
    for visited in np.flatnonzero(done_C):
        if row_of[visited] >= 0:
            u_R[row_of[visited]] += reached - distance_C[visited]
        v_C[visited] -= reached - distance_C[visited]
    while column >= 0:
        row = int(before_C[column])
        taken = np.flatnonzero(row_of == row)
        row_of[column] = row
        column = int(taken[0]) if row != start else -1


def boxes_reward(
    text: str,
    task: Task,
    *,
    kind: BoxesKind = "f1",
    alpha: Share = 0.5,
    threshold: Share = 0.5,
    answer_frame: AnswerFrame = "thousandths",
    truth_frame: TruthFrame = "thousandths",
) -> Score:
    """Score all boxes of an answer against all boxes of the ground truth.

    Boxes are paired so that the total IoU is greatest (`best_pairs`). With p boxes in the answer, k in the ground truth
    and t the threshold, f1 is 2 [pairs with IoU >= t] / (p + k), soft_f1 is 2 (sum of the IoU of the pairs) / (p + k),
    and the value is alpha f1 + (1 - alpha) soft_f1. For one box on each side that is the "mix" of the grounding reward.
    Both are 1 where nothing is to be found and the answer gives no box.

    The kind "located" is Vero's (arXiv 2604.04917): m + 0.75 f1 - 0.25 (w + l), held to 0..1, with m the mean IoU of
    the pairs that hit, w the share of the answer's boxes without a hit and l that of the true ones.

    Parts: f1, soft_f1, precision, recall, boxes (p), parsed (1 if p > 0). Raises DataError for a ground truth that is
    no list of boxes and for a task without a size.
    """
    if kind not in get_args(BoxesKind):
        raise DataError(f"reward boxes, setting kind: unknown kind {kind!r}; allowed: {', '.join(get_args(BoxesKind))}")
    width, height = picture_size(task)
    truth = [to_whole_pixels(box, width, height, truth_frame) for box in truth_boxes(task)]
    answer = parse_boxes(text)
    given = [answer_in_pixels(box, task, answer_frame) for box in answer[:MOST_BOXES]]
    iou_PK = [[iou(a, b) for b in truth] for a in given]
    # "located" pairs for the most hits, and among these for the greatest IoU
    gain_PK = [[v + MOST_BOXES if v >= threshold else 0.0 for v in row] for row in iou_PK]
    overlaps = [iou_PK[i][j] for i, j in best_pairs(iou_PK if kind == "f1" else gain_PK)]
    hits = sum(overlap >= threshold for overlap in overlaps)
    total = len(answer) + len(truth)
    f1 = 2 * hits / total if total else 1.0
    soft = 2 * sum(overlaps) / total if total else 1.0
    parts = {
        "f1": f1,
        "soft_f1": soft,
        "precision": hits / len(answer) if answer else float(not truth),
        "recall": hits / len(truth) if truth else float(not answer),
        "boxes": float(len(answer)),
        "parsed": float(bool(answer)),
    }
    note = "no box in the answer" if truth and not answer else ""
    value = alpha * f1 + (1.0 - alpha) * soft
    if kind == "located":
        value = _located([overlap for overlap in overlaps if overlap >= threshold], len(answer), len(truth), f1)
    return Score(value, parts, note)


def _located(hits: Sequence[float], given: int, wanted: int, f1: float) -> float:
    """The value of the kind "located": from the IoU of the pairs that hit, and the numbers of boxes."""
    mean = sum(hits) / len(hits) if hits else float(not given and not wanted)
    missed = sum((count - len(hits)) / count for count in (given, wanted) if count)
    return min(max(mean + 0.75 * f1 - 0.25 * missed, 0.0), 1.0)


def truth_boxes(task: Task) -> list[Box]:
    """The ground truth of a task with any number of boxes: a list of boxes (also as a NumPy array or JSON text), or one
    box. Raises DataError for anything else."""
    boxes = _boxes(task.answer)
    if boxes is None:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {_not_boxes(task.answer)}")
    return boxes


def check_boxes(task: Task, *, truth_frame: TruthFrame = "thousandths") -> list[tuple[str, str]]:
    """The faults of a task with several boxes, as (field, what is wrong)."""
    boxes = _boxes(task.answer)
    if boxes is None:
        return [(GROUND_TRUTH, _not_boxes(task.answer)), *size_faults(task)]
    faults = [(f"{GROUND_TRUTH}[{i}]", box_fault(box, task, truth_frame)) for i, box in enumerate(boxes)]
    return [(field, fault) for field, fault in faults if fault] + size_faults(task)


def also_pixels(task: Task) -> bool | None:
    """Whether the boxes of a ground truth in thousandths also lie inside the image as pixels; None where that says
    nothing: no boxes, no size, or an image of more than 800 x 800 pixels."""
    boxes = _boxes(task.answer)
    if not boxes or size_faults(task) or min(size := picture_size(task)) > _TELLING_SIDE:
        return None
    return all(box[2] <= size[0] and box[3] <= size[1] for box in boxes)


def _boxes(value: Any) -> list[Box] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return None
    boxes = [four_numbers(value)] if four_numbers(value) else [four_numbers(_of_object(box)) for box in value]
    return [box for box in boxes if box] if all(boxes) else None


def _of_object(value: Any) -> Any:
    """The box of an object that names it, such as `{"bbox_2d": [..], "label": ..}`; anything else as it is."""
    found = [value[name] for name in _BOX_NAMES if name in value] if isinstance(value, dict) else []
    return found[0] if found else value


def _not_boxes(value: Any) -> str:
    return f"{value!r:.80} is no list of boxes: it must be [[x1, y1, x2, y2], ...] of finite numbers"
