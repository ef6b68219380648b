"""Actions on a screen: a click as a point in a box, and an action on a web page as a mapping."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from foveate.records import Score, Task
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.box_text import Box, Coordinates, parse_point
from foveate.rewards.boxes import (
    FRAME,
    AnswerFrame,
    TruthFrame,
    in_thousandths,
    picture_size,
)
from foveate.rewards.matching import check_boxes, truth_boxes
from foveate.rewards.text import NO_ANSWER, final_answer

ACTION, MARK, VALUE = "ACTION", "MARK", "VALUE"
_FENCE = re.compile(r"```(?:json|python)?\s*(.*?)```", re.DOTALL)
_LONGEST = 10_000


def click_reward(
    text: str,
    task: Task,
    *,
    answer_frame: AnswerFrame = "thousandths",
    truth_frame: TruthFrame = "thousandths",
) -> Score:
    """1 if the point of the answer lies in a box of the ground truth, its border included, else 0 (ScreenSpot: Cheng et
    al. 2024). A box in the answer stands for its centre (`box_text.parse_point`). The frames are those of
    `boxes.grounding_reward`; nothing is rounded.

    Parts: accuracy; distance, from the point to the centre of the nearest box, in thousandths of the sides; parsed.
    Raises DataError for a ground truth without a box, and for a task without a size where a frame needs it.
    """
    boxes = [_in_frame(box, task, truth_frame) for box in truth_boxes(task)]
    found = parse_point(text)
    if found is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note="no point in the answer")
    x, y = _point_in_frame(found, task, answer_frame)
    inside = float(any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes))
    away = min((math.hypot(x - (x1 + x2) / 2, y - (y1 + y2) / 2) for x1, y1, x2, y2 in boxes), default=0.0)
    return Score(inside, {"accuracy": inside, "distance": min(away, 1e6), "parsed": 1.0})


def _in_frame(box: Box, task: Task, frame: TruthFrame) -> Box:
    if frame == "thousandths":
        return box
    width, height = picture_size(task)
    x1, y1, x2, y2 = (value * FRAME / side for value, side in zip(box, (width, height) * 2, strict=True))
    return x1, y1, x2, y2


def _point_in_frame(point: Coordinates, task: Task, frame: AnswerFrame) -> Coordinates:
    box = (*point, *point)
    return (in_thousandths(box, task) if frame == "model" else _in_frame(box, task, frame))[:2]


def check_click(task: Task, *, truth_frame: TruthFrame = "thousandths") -> list[tuple[str, str]]:
    """The faults of a click task, as (field, what is wrong): its ground truth must be one box or more."""
    faults = check_boxes(task, truth_frame=truth_frame)
    if not faults and not truth_boxes(task):
        return [(GROUND_TRUTH, "holds no box; a click needs one or more")]
    return faults


# --------------------------------------------------------------------------------------------------------- web action


def web_action(text: str, task: Task) -> Score:
    """The share of what the ground truth says about an action that the answer has right (Vero, arXiv 2604.04917).

    Both are mappings, as JSON or as Python writes them, with the keys ACTION, MARK (the element) and VALUE (the text to
    type or the option to select), in any letter case. A MARK of -1 and a VALUE of None are not asked for. Values are
    compared as numbers where both are, else as texts; names of actions in any letter case.
    Parts: accuracy, 1 if all is right; each asked key in small letters; parsed, 1 if the answer is a mapping.
    """
    wanted = asked_of(mapping_in(task.answer) or {})
    answer = final_answer(text, "text")
    given = mapping_in(answer) if answer is not None else None
    if given is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=NO_ANSWER if answer is None else "no action in it")
    parts = {key.lower(): float(key in given and _same(key, value, given[key])) for key, value in wanted.items()}
    share = sum(parts.values()) / len(parts) if parts else 0.0
    return Score(share, {"accuracy": float(share == 1.0), **parts, "parsed": 1.0})


def asked_of(action: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that an action of the ground truth asks for."""
    nothing = {MARK: ("-1",), VALUE: ("none", "")}
    return {
        key: action[key]
        for key in (ACTION, MARK, VALUE)
        if key in action and action[key] is not None and str(action[key]).strip().casefold() not in nothing.get(key, ())
    }


def mapping_in(value: Any) -> dict[str, Any] | None:
    """A mapping with its keys in capitals; of a text the one that it is, also in a fenced block. None without one."""
    if isinstance(value, str):
        fenced = _FENCE.findall(value)
        value = _read((fenced[-1] if fenced else value).strip())
    return {str(key).strip().upper(): entry for key, entry in value.items()} if isinstance(value, Mapping) else None


def _read(text: str) -> Any:
    start, end = text.find("{"), text.rfind("}")
    if not -1 < start < end or end - start > _LONGEST:
        return None
    inside = text[start : end + 1].replace(r"\{", "{").replace(r"\}", "}")
    try:
        return json.loads(inside)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(inside)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _same(key: str, wanted: Any, given: Any) -> bool:
    one, other = str(wanted).strip(), str(given).strip()
    if key == ACTION:
        return one.casefold() == other.casefold()
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def check_action(task: Task) -> list[tuple[str, str]]:
    """The faults of a web action, as (field, what is wrong)."""
    action = mapping_in(task.answer)
    if action is not None and asked_of(action):
        return []
    return [(GROUND_TRUTH, f"{task.answer!r:.80} is no action: it must be a mapping with {ACTION}, {MARK} or {VALUE}")]
