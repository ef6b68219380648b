"""Boxes: their frames, one IoU and the grounding reward, shared by training, evaluation and report.

A box is (x1, y1, x2, y2). Answers and ground truths stand in the 0..1000 frame: thousandths of the image's width for
x and of its height for y.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.registry import Share
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.box_text import Box, ordered_box, parse_box

Kind = Literal["mix", "sigmoid", "penalty", "normalized_exp", "eval", "giou"]
TruthFrame = Literal["thousandths", "pixels"]
AnswerFrame = Literal["thousandths", "pixels", "model"]
BOX_FRAME = "box_frame"
"""The entry of `task.meta` with the largest x and y of boxes as the model's family writes them."""

FRAME = 1000.0
HIT_IOU = 0.5
"""The IoU with the true box from which a box counts as right: Precision@1 of RefCOCO."""

# Of the "penalty" kind: a free length in words, a price per started block of words above it, and a price for a stutter.
_FREE_WORDS, _BLOCK_WORDS, _BLOCK_PRICE = 512, 50, 0.01
_STUTTER, _STUTTER_PRICE = 7, 0.3
_SIGMOID_SLOPE = 8.0
_TINY = 8  # pixels of an image up to which a box within one pixel may be meant so
_EXP_RATE = math.log(16.0)


# ------------------------------------------------------------------------------------------------------- geometry


def to_whole_pixels(box: Box, width: int, height: int, frame: TruthFrame = "thousandths") -> Box:
    """A box of the 0..1000 frame, or of the pixels themselves, in whole pixels of a `width` x `height` image.

    Coordinates are rounded (halves to even), held to 0..width-1 and 0..height-1, and a side of length zero is widened
    to one pixel: the frame in which the predecessor's reward compares, so a box over the whole image is one pixel
    narrower than the image. For drawing and evaluation, scale without rounding.
    """
    scales = (width, height) if frame == "thousandths" else (FRAME, FRAME)
    x1, x2 = _pixel_side(box[0], box[2], width, scales[0])
    y1, y2 = _pixel_side(box[1], box[3], height, scales[1])
    return x1, y1, x2, y2


def _pixel_side(low: float, high: float, size: int, scale: float) -> tuple[float, float]:
    first, last = (min(max(round(value / FRAME * scale), 0), size - 1) for value in (low, high))
    if first < last:
        return first, last
    return (first, first + 1) if first < size - 1 else (first - 1, first)


def answer_in_pixels(box: Box, task: Task, frame: AnswerFrame) -> Box:
    """The box of an answer in whole pixels of the image; "model" is the frame of the model's family, which an encoder
    has put into `task.meta`. Raises DataError where nothing says that frame, or the size of the image."""
    width, height = picture_size(task)
    if frame != "model":
        return to_whole_pixels(box, width, height, frame)
    return to_whole_pixels(in_thousandths(box, task), width, height)


def in_thousandths(box: Box, task: Task) -> Box:
    """A box in the frame of the model's family, in thousandths of the image's sides."""
    if BOX_FRAME not in task.meta:
        raise DataError(
            f"{task.where}: nothing says the frame of the model's boxes; set another answer_frame than model"
        )
    right, bottom = task.meta[BOX_FRAME]
    return box[0] * FRAME / right, box[1] * FRAME / bottom, box[2] * FRAME / right, box[3] * FRAME / bottom


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in one frame; sides are x2 - x1. Two boxes of no area have IoU 0."""
    union, intersection = _union_and_intersection(a, b)
    return intersection / union if union > 0 else 0.0


def giou(a: Box, b: Box) -> float:
    """Generalised IoU in -1..1 (Rezatofighi et al. 2019): IoU less the share of the enclosing box outside the union."""
    union, intersection = _union_and_intersection(a, b)
    hull = _area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return intersection / union - (hull - union) / hull if union > 0 else 0.0


def _union_and_intersection(a: Box, b: Box) -> tuple[float, float]:
    overlap = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    intersection = _area(overlap)
    return _area(a) + _area(b) - intersection, intersection


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


# --------------------------------------------------------------------------------------------------- ground truth


def truth_box(task: Task) -> Box:
    """The ground truth of a grounding task, in the 0..1000 frame.

    The answer may be a list, a tuple, a NumPy array or their JSON text. Raises DataError unless it is four finite
    numbers.
    """
    numbers = four_numbers(task.answer)
    if numbers is None:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {_not_a_box(task.answer)}")
    return ordered_box(*numbers)


def check_box(task: Task, *, truth_frame: TruthFrame = "thousandths") -> list[tuple[str, str]]:
    """The faults of a grounding task, as (field, what is wrong): its ground truth must be a box inside the image, and
    the size of the image must be known."""
    numbers = four_numbers(task.answer)
    fault = _not_a_box(task.answer) if numbers is None else box_fault(numbers, task, truth_frame)
    return [(GROUND_TRUTH, fault)] * bool(fault) + size_faults(task)


def box_fault(box: Box, task: Task, frame: TruthFrame) -> str:
    """The fault of a box of the ground truth: no area, outside the image, or in fractions of its sides, which no
    frame takes; empty if it is sound."""
    if box[2] <= box[0] or box[3] <= box[1]:
        return f"{_shown(box)} has no area: x2 must be greater than x1, and y2 greater than y1"
    if frame == "thousandths":
        right, bottom, allowed = FRAME, FRAME, "0..1000 of its sides"
    elif size_faults(task):
        return ""
    else:
        right, bottom = picture_size(task)
        allowed = f"pixels of {right:g} x {bottom:g}"
    if min(box) > -0.01 and max(box) < 1.01 and max(right, bottom) > _TINY:
        return (
            f"{_shown(box)} looks like fractions of the sides, and truth_frame is {frame}: coordinates are {allowed}; "
            "multiply them"
        )
    if min(box) < 0 or box[2] > right or box[3] > bottom:
        return f"{_shown(box)} lies outside the image: coordinates are {allowed}"
    return ""


def size_faults(task: Task) -> list[tuple[str, str]]:
    """The fault of a task that does not say how large its image is."""
    if task.images or {"width", "height"} <= task.meta.keys():
        return []
    return [("images", "a grounding task needs an image, or extra_info.width and extra_info.height")]


def four_numbers(value: Any) -> Box | None:
    """A list, tuple, NumPy array or JSON text of four finite numbers as they stand, or None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        return None
    if any(isinstance(number, bool) or not isinstance(number, int | float | np.number) for number in value):
        return None
    try:
        x1, y1, x2, y2 = (float(number) for number in value)
    except OverflowError:  # JSON has whole numbers of any size
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def _not_a_box(value: Any) -> str:
    return (
        f"{_shown(value)} is not a box: it must be four finite numbers [x1, y1, x2, y2] in 0..1000; the reward "
        "grounding (the default) wants boxes: name another one with reward.name, such as exact (`foveate rewards`)"
    )


def _shown(value: Any) -> str:
    text = str(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --------------------------------------------------------------------------------------------------------- reward


def grounding_reward(
    text: str,
    task: Task,
    *,
    kind: Kind = "mix",
    alpha: Share = 0.5,
    threshold: Share = 0.5,
    answer_frame: AnswerFrame = "thousandths",
    truth_frame: TruthFrame = "thousandths",
) -> Score:
    """Score the box in an answer by its IoU with the ground truth.

    Both boxes are compared in whole pixels (see `to_whole_pixels`) of the image, whose size is `task.meta["width"]` and
    `["height"]` or, without them, that of the first image. The frames say whether answer and ground truth stand in
    thousandths of the sides or in those pixels already; answers may also stand in the frame of the model's family
    ("model": pixels of the resized image for Qwen2.5-VL). With t the threshold, the value is
    - mix: alpha [iou >= t] + (1 - alpha) iou
    - sigmoid: 1 / (1 + exp(-8 (iou - t)))
    - penalty: mix, less 0.01 for every started 50 words above 512, less 0.3 if a word stands 7 times in a row
    - normalized_exp: (1 - 16^-iou) / (1 - 1/16)
    - eval: [iou >= t]
    - giou: (1 + GIoU) / 2, which also tells disjoint boxes apart
    An answer without a box is worth 0, and the note says so. The kind is what was asked for on every split: other
    implementations silently turn to "eval" for tasks whose split is "test"; here the settings say it.

    Parts: iou; hit, 1 from IoU 0.5 whatever the threshold; parsed, 1 if a box was found. Raises DataError for a ground
    truth that is no box, a task without a size and an unknown kind.
    """
    if kind not in get_args(Kind):
        raise DataError(f"reward grounding, setting kind: unknown kind {kind!r}; allowed: {', '.join(get_args(Kind))}")
    width, height = picture_size(task)
    truth = to_whole_pixels(truth_box(task), width, height, truth_frame)
    answer = parse_box(text)
    if answer is None:
        return Score(0.0, {"iou": 0.0, "hit": 0.0, "parsed": 0.0}, note="no box in the answer")
    box = answer_in_pixels(answer, task, answer_frame)
    overlap = iou(box, truth)
    value = (1.0 + giou(box, truth)) / 2.0 if kind == "giou" else _value(overlap, text, kind, alpha, threshold)
    return Score(value, {"iou": overlap, "hit": float(overlap >= HIT_IOU), "parsed": 1.0})


def picture_size(task: Task) -> tuple[int, int]:
    """Width and height in pixels of the image that a grounding task is about, or DataError if nothing says them."""
    if {"width", "height"} <= task.meta.keys():
        return int(task.meta["width"]), int(task.meta["height"])
    if not task.images:
        raise DataError(f"{task.where}, field images: a grounding task needs an image, or extra_info.width and .height")
    return task.images[0].width, task.images[0].height


def _value(overlap: float, text: str, kind: Kind, alpha: float, threshold: float) -> float:
    hit = float(overlap >= threshold)
    mix = alpha * hit + (1.0 - alpha) * overlap
    if kind == "sigmoid":
        return 1.0 / (1.0 + math.exp(-_SIGMOID_SLOPE * (overlap - threshold)))
    if kind == "normalized_exp":
        return (1.0 - math.exp(-_EXP_RATE * overlap)) / (1.0 - math.exp(-_EXP_RATE))
    if kind == "penalty":
        return mix - _wordiness(text.split())
    return hit if kind == "eval" else mix


def _wordiness(words: list[str]) -> float:
    """The amount that the "penalty" kind takes off for a long or stuttering answer."""
    price = _BLOCK_PRICE * math.ceil(max(len(words) - _FREE_WORDS, 0) / _BLOCK_WORDS)
    run = longest = 1
    for before, word in pairwise(words):
        run = run + 1 if word == before else 1
        longest = max(longest, run)
    return price + (_STUTTER_PRICE if longest >= _STUTTER else 0.0)
