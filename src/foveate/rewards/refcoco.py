"""RefCOCO's own rule: which box of an answer counts, in which frame it stands, and when it is a hit.

Precision@1: the box hits where its IoU with the true one is at least 0.5, both in pixels and unrounded. The training
reward (`foveate.rewards.boxes`) compares in whole pixels instead, as the predecessor did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.rewards.box_text import Box, ordered_box, parse_box
from foveate.rewards.boxes import BOX_FRAME, FRAME, HIT_IOU, iou, picture_size, truth_box

Rule = Literal["first", "last", "vlmevalkit"]
BoxFrame = Literal["thousandths", "pixels", "fractions", "model"]

_PER_MILLE = 4.0
"""From this sum of the four coordinates on, the first-box rule reads per mille; below, fractions of the sides."""
_MOST_FRACTION = 1.5
"""Up to this largest coordinate VLMEvalKit reads fractions of the sides, up to 1000 thousandths, above pixels."""
_ANY_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FOUR = re.compile(rf"\[\s*({_ANY_NUMBER.pattern})" + rf"(?:\s*,\s*|\s+)({_ANY_NUMBER.pattern})" * 3 + r"\s*\]")


def refcoco(text: str, task: Task, *, rule: Rule = "first", frame: BoxFrame = "thousandths") -> Score:
    """1 for a hit, 0 for a miss, by one of three rules.

    first: the rule of InternVL's published evaluation. The first bracket with three commas counts, as far as its four
    fields are numbers, corners in the order in which they stand; a sum below 4 means fractions of the sides. Computed
    in float32, as there, so that boxes on the threshold fall to the same side.
    last: the last box counts, inside `<answer>` first (`box_text.parse_box`), corners in any order.
    vlmevalkit: the rule of VLMEvalKit's RefCOCO. The first bracket that holds exactly four numbers counts, or else the
    first four numbers of the text, wherever they stand; in the frame thousandths the largest of them tells
    fractions (up to 1.5), thousandths (up to 1000) and pixels; the box is held inside the image, corners in any order.

    frame: what the coordinates of answers are; pixels for models such as Qwen2.5-VL, model for the frame of the
    model's family where the task says it (in process). The ground truth stands in thousandths. Parts: iou, hit,
    parsed. Raises DataError for a ground truth that is no box, a task without a size and an unknown frame.
    """
    width, height = picture_size(task)
    truth = _scaled(truth_box(task), "thousandths", width, height)
    own = task.meta.get(BOX_FRAME)
    if frame == "model" and own is None:
        raise DataError(f"{task.where}: nothing says the frame of the model's boxes; set another frame than model")
    box = answer_box(text, rule, frame, width, height, own)
    measure = iou if rule == "vlmevalkit" else _overlap
    overlap = 0.0 if box is None else measure(box, truth)
    hit = float(overlap >= HIT_IOU)
    note = "no box in the answer" if box is None else ""
    return Score(hit, {"iou": overlap, "hit": hit, "parsed": float(box is not None)}, note)


def answer_box(
    text: str, rule: Rule, frame: BoxFrame, width: int, height: int, own: Sequence[float] | None = None
) -> Box | None:
    """The box of an answer in pixels of a `width` x `height` image, or None. `own` holds the largest x and y of the
    frame "model"."""
    if rule == "vlmevalkit":
        return _vlmevalkit_box(text, frame, width, height, own)
    box = parse_box(text) if rule == "last" else _first_box(text)
    if box is None:
        return None
    if frame == "model":
        assert own is not None
        right, bottom = own
        box, frame = (box[0] / right, box[1] / bottom, box[2] / right, box[3] / bottom), "fractions"
    elif rule == "first" and frame == "thousandths" and np.float32(sum(map(np.float32, box))) < _PER_MILLE:
        frame = "fractions"
    return _scaled(box, frame, width, height)


def _first_box(text: str) -> Box | None:
    fields = first_fields(text)
    if fields is None:
        return None
    try:
        x1, y1, x2, y2 = map(float, fields)
    except ValueError:  # a field is no number
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def first_fields(text: str) -> list[str] | None:
    r"""The groups of the first match of `\[+(.*?),(.*?),(.*?),(.*?)\]`, the published pattern, or None: in the first
    line that has three commas and then a bracket behind its first bracket. Searched piece by piece: the pattern itself
    takes seconds for an answer of a hundred open brackets."""
    for line in text.split("\n"):
        *fields, rest = line[line.find("[") :].lstrip("[").split(",", 3) if "[" in line else ("",)
        last, closed, _ = rest.partition("]")
        if len(fields) == 3 and closed:
            return [*fields, last]
    return None


def _vlmevalkit_box(text: str, frame: BoxFrame, width: int, height: int, own: Sequence[float] | None) -> Box | None:
    found = _FOUR.search(text)
    numbers = [float(number) for number in (found.groups() if found else _ANY_NUMBER.findall(text)[:4])]
    if len(numbers) < 4 or not all(map(math.isfinite, numbers)):
        return None
    largest = max(map(abs, numbers))
    if frame == "thousandths" and not _MOST_FRACTION < largest <= FRAME:
        frame = "fractions" if largest <= _MOST_FRACTION else "pixels"
    right, bottom = own if frame == "model" and own else {"thousandths": (FRAME, FRAME)}.get(frame, (1.0, 1.0))
    scales = (1.0, 1.0) if frame == "pixels" else (width, height)
    x1, y1, x2, y2 = (
        min(max(value / largest_value * scale, 0.0), side)
        for value, largest_value, scale, side in zip(
            numbers, (right, bottom) * 2, scales * 2, (width, height) * 2, strict=True
        )
    )
    return ordered_box(x1, y1, x2, y2)


def _scaled(box: Box, frame: BoxFrame, width: int, height: int) -> Box:
    if frame == "pixels":
        return box
    sides = np.asarray((width, height, width, height), dtype=np.float32)
    if frame == "fractions":
        x1, y1, x2, y2 = (np.asarray(box, dtype=np.float32) * sides).tolist()
    else:
        x1, y1, x2, y2 = (np.asarray(box, dtype=np.float32) / np.float32(FRAME) * sides).tolist()
    return x1, y1, x2, y2


def _overlap(box: Box, truth: Box) -> float:
    """IoU in float32; 0 where a side is negative or nothing has an area."""
    a, b = np.asarray(box, dtype=np.float32), np.asarray(truth, dtype=np.float32)
    corner = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inside = np.maximum(corner, np.float32(0)).prod(dtype=np.float32)
    union = (a[2:] - a[:2]).prod(dtype=np.float32) + (b[2:] - b[:2]).prod(dtype=np.float32) - inside
    return max(float(inside / union), 0.0) if union > 0 else 0.0
