"""When something happens in a video: spans of time in an answer against those of the ground truth, by temporal IoU."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.registry import Share
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.plain_text import answer_part, tagged_answer

TimeSpan = tuple[float, float]

_HIT = 0.5
_MOST = 64
"""Spans of an answer that count, the last ones."""
_TIME = r"(?:(?:\d{1,3}:)?\d{1,3}:\d{2}(?:\.\d{1,6})?|\d{1,9}(?:\.\d{1,6})?)"
_UNIT = r"s|secs?|seconds?|mins?|minutes?|h|hrs?|hours?"
_FOREIGN = r"%|(?:ms|milliseconds?|m|frames?)\b"
"""Units behind two numbers that are no time of a video in seconds, minutes or hours."""
_JOIN = (
    r"(?:-{1,2}>|[-−–—~→;]|,(?:\s(?:and|to|until)\b)?|(?:up\s)?to\b|until\b|till\b|through\b|and(?:\slasts\suntil)?\b"
    r"|(?=\nend))"
)
_END = r"(?:[\"']?(?:ends?|stops?)(?:[_ ]?time)?[\"']?\s?(?:[:=]|at\b)?\s?)?[\"']?(?:t\s?=\s?|second\s)?"
_SPANS = re.compile(
    rf"(?<![\w.:−-])(?<!frame\s)(?<!frames\s)({_TIME})(?:\s?({_UNIT})\b)?\s?[\"']?\s?({_JOIN})\s?[\"']?{_END}({_TIME})"
    rf"(?![\d:]|\.\d|\s?(?:{_FOREIGN})|[-−–]\d)(?:\s?({_UNIT})\b)?",
    re.IGNORECASE,
)
_MIXED = re.compile(
    r"(?<![\w.:])(\d{1,3})\s?(?:m|mins?|minutes?)\s?(?:and\s)?(\d{1,2}(?:\.\d{1,6})?)\s?(?:s|secs?|seconds?)\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*\*|[$`]")


def temporal_iou(text: str, task: Task, *, alpha: Share = 0.0, threshold: Share = _HIT) -> Score:
    """Score the span of time that an answer gives: alpha [iou >= threshold] + (1 - alpha) iou.

    A span is two times with a dash, a comma, `to`, `until` or `and` between them, in seconds (`12.5`, `12.5 s`), with
    another unit (`1 min 2 s`, `2 minutes`) or as a clock (`1:02.5`, `0:01:02`), also as `"start": 1, "end": 2`. Frames,
    percent and negative numbers are no times. If anything stands behind `</think>`, only that counts,
    and a span inside `<answer>...</answer>` goes before all outside. The last span counts; where the ground truth has
    several, all do, and the IoU is that of their unions: a span too many costs as much as one that is missing.

    Parts: time_iou; hit, 1 from IoU 0.5 whatever the threshold; parsed, 1 if a span was found. Raises DataError for a
    ground truth that is no span."""
    truth = _spans_of(task.answer)
    if truth is None:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {_not_a_span(task.answer)}")
    said = answer_part(text)
    given = _spans_in(tagged_answer(said) or "") or _spans_in(said)
    counted = given[-_MOST:] if len(truth) > 1 else given[-1:]
    given = [(begin, end) for begin, end in counted if end > begin]
    if not given:
        return Score(0.0, {"time_iou": 0.0, "hit": 0.0, "parsed": 0.0}, note="no span of time in the answer")
    overlap = span_iou(given, truth)
    value = alpha * (overlap >= threshold) + (1 - alpha) * overlap
    return Score(value, {"time_iou": overlap, "hit": float(overlap >= _HIT), "parsed": 1.0})


def check_span(task: Task) -> list[tuple[str, str]]:
    """The faults of a task of spans, as (field, what is wrong): a ground truth that is no span, or that ends behind the
    end of the task's video."""
    spans = _spans_of(task.answer)
    if spans is None:
        return [(GROUND_TRUTH, _not_a_span(task.answer))]
    if len(task.videos) == 1:
        length = task.videos[0].frames / task.videos[0].fps
        if (last := max(end for _, end in spans)) > length + 1:
            return [(GROUND_TRUTH, f"ends at {last:g} s, and the video has {length:.1f} s; spans are in seconds")]
    return []


def span_iou(one: Sequence[TimeSpan], other: Sequence[TimeSpan]) -> float:
    """The time in both unions of spans by the time in either."""
    ends = sorted({end for span in (*one, *other) for end in span})
    both = either = 0.0
    for begin, end in pairwise(ends):  # between ends nothing changes
        inside = [any(first <= begin and end <= last for first, last in spans) for spans in (one, other)]
        both += (end - begin) * all(inside)
        either += (end - begin) * any(inside)
    return both / either if either else 0.0


def _spans_in(text: str) -> list[TimeSpan]:
    """The spans in a text. Two times that do not rise are an empty one if a dash or a word stands between them, and
    none if a comma or `and` does."""
    plain = _MARKUP.sub("", unicodedata.normalize("NFKC", text))
    plain = _MIXED.sub(lambda match: str(60 * int(match[1]) + float(match[2])), plain)
    found: list[TimeSpan] = []
    for begin, unit, join, end, last in _SPANS.findall(plain):
        span = _seconds(begin, unit or last), _seconds(end, last or unit)
        if span[1] > span[0] or not join.startswith((",", ";", "and")):
            found.append(span)
    return found


def _seconds(text: str, unit: str) -> float:
    """The seconds of a number of some unit, or of a clock."""
    if ":" not in text:
        return float(text) * {"m": 60, "h": 3600}.get(unit[:1].lower(), 1)
    seconds = 0.0
    for part in text.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def _spans_of(value: Any) -> list[TimeSpan] | None:
    """The spans of a ground truth: [start, end], a list of such, or {start, end}; also as their JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        value = [value.get("start"), value.get("end")]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    pair: Any = value
    spans: Any = [value] if not isinstance(value[0], Sequence | Mapping | np.ndarray) else value
    if spans is not value:
        return [(float(pair[0]), float(pair[1]))] if _is_span(pair) else None
    inner = [_spans_of(span) if not isinstance(span, str) else None for span in spans]
    return [span for found in inner for span in found or ()] if all(inner) else None


def _is_span(value: Sequence[Any]) -> bool:
    numbers = [one for one in value if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(value) != 2 or len(numbers) != 2:
        return False
    return all(-1e12 < one < 1e12 and math.isfinite(one) for one in numbers) and 0 <= value[0] < value[1]


def _not_a_span(value: Any) -> str:
    return f"{value!r:.80} is no span of time: it must be [start, end] in seconds, with 0 <= start < end, or several"
