"""Boxes as answers write them: brackets of four numbers, two corners, or coordinates by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from foveate.rewards.plain_text import answer_part, tagged_answer

Box = tuple[float, float, float, float]
Coordinates = tuple[float, float]

_LONGEST_GAP = 16
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_CORNER = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_BETWEEN_CORNERS = re.compile(r"[\s,;]*(?:to|and|-)?\s*(?:[\"']?[A-Za-z_-]{1,15}[\"']?\s*[:=]?\s*)?")
_NUMBER = re.compile(r"(?:[-+]|(?<![A-Za-z0-9_.]))(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_RANGE = re.compile(r"\d-\d|\d\s+-\s+\d")
"""Two numbers with a dash between them, which is no sign of the second."""
_APART = re.compile(
    r"(?:[^\w.]|_)*(?:(?:and|to|[xywh]_?\d?|[xy]_?(?:min|max)|left|top|right|bottom|width|height)\b[^\w.]*)?", re.I
)
"""What may stand between the coordinates of a box without brackets: marks, and the names of coordinates."""
_NAMED = re.compile(rf"(?<![A-Za-z])([A-Za-z]{{1,8}}_?[A-Za-z]{{0,8}}\d?)[\"']?\s*[:=]\s*({_NUMBER.pattern})")
_CENTRES = (("cx", "cy"), ("centerx", "centery"), ("xcenter", "ycenter"), ("xc", "yc"))
_SIZED = (("x", "y"), ("left", "top"), *_CENTRES)
_NAMES = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("left", "top", "right", "bottom"),
    *((x, y, *size) for x, y in _SIZED for size in (("width", "height"), ("w", "h"))),
)
_Found = tuple[int, list[float]]


def parse_box(text: str, which: Literal["last", "first"] = "last") -> Box | None:
    """The box that an answer gives, as it stands in the text but with x1 <= x2 and y1 <= y2, or None.

    A box is an innermost `[...]` that holds four numbers (the first four count), two corners `[x1, y1], [x2, y2]` (also
    in round brackets), or four coordinates by name: `{"x1": .., "y1": .., "x2": .., "y2": ..}`, xmin, left, or a corner
    or centre with width and height. The last one counts, or the first. If anything stands behind `</think>`, only that
    counts; a box inside `<answer>...</answer>` goes before everything outside of it. Text without any square bracket
    may give its last four numbers if no words stand between them; digits of names and ranges are no coordinates.
    Numbers that overflow to infinity make no box.
    """
    text = answer_part(text)
    return _box_in(tagged_answer(text, which) or "", which) or _box_in(text, which)


def parse_boxes(text: str) -> list[Box]:
    """Every box of an answer in order, as `parse_box` reads them, but a bracket must hold four numbers and no more.
    Boxes inside the last `<answer>...</answer>` go before everything outside of it."""
    text = answer_part(text)
    return _boxes_in(tagged_answer(text) or "") or _boxes_in(text)


def parse_point(text: str, which: Literal["last", "first"] = "last") -> Coordinates | None:
    """The point that an answer gives, as it stands in the text, or None.

    A point is an innermost bracket, square or round, that holds two numbers, or `x` and `y` by name
    (`<point x="12" y="34">`). A box, as `parse_box` reads it, stands for its centre. The last one counts, or the first;
    behind `</think>` and inside `<answer>` first, as with boxes. Text without any of these may be two numbers.
    """
    text = answer_part(text)
    for part in (tagged_answer(text, which) or "", text):
        found = sorted(_points(part))
        if found:
            return found[-1 if which == "last" else 0][1]
    numbers = [*_NUMBER.finditer(text)]
    if len(numbers) == 2 and _APART.fullmatch(text[numbers[0].end() : numbers[1].start()]):
        return _point(float(numbers[0].group()), float(numbers[1].group()))
    return None


def _points(text: str) -> Iterator[tuple[int, Coordinates]]:
    corners = [*_corners(text)]
    boxes = [*((place, numbers) for place, numbers in _brackets(text) if len(numbers) == 4), *corners, *_named(text)]
    for place, (x1, y1, x2, y2) in boxes:
        if point := _point((x1 + x2) / 2, (y1 + y2) / 2):
            yield place, point
    first = {place for place, _ in corners}
    is_second = False
    for found in _CORNER.finditer(text):
        numbers = _numbers(_NAMED.sub(lambda one: f" {one[2]} ", found[1]))
        if len(numbers) == 2:
            is_first = not is_second and found.start() in first
            if not (is_first or is_second) and (point := _point(*numbers)):
                yield found.start(), point
            is_second = is_first
    values: dict[str, float] = {}
    for found in _NAMED.finditer(text):
        values[found[1].lower()] = float(found[2])
        if {"x", "y"} <= values.keys():
            if point := _point(values["x"], values["y"]):
                yield found.start(), point
            values = {}


def _point(x: float, y: float) -> Coordinates | None:
    return (x, y) if math.isfinite(x) and math.isfinite(y) else None


def _boxes_in(text: str) -> list[Box]:
    found = [(place, numbers) for place, numbers in _brackets(text) if len(numbers) == 4]
    return [box for _, numbers in sorted((*found, *_corners(text), *_named(text))) if (box := _box(numbers))]


def _box_in(text: str, which: str) -> Box | None:
    brackets = _brackets(text)
    found = sorted((*brackets, *_corners(text), *_named(text)))
    fours = [numbers for _, numbers in found if len(numbers) >= 4]
    if not brackets and not fours:
        fours = [_last_row(text)]
    return _box((fours or [[]])[-1 if which == "last" else 0][:4])


def _last_row(text: str) -> list[float]:
    """The last four numbers of a text that has no words between them."""
    found = [*_NUMBER.finditer(text)][-4:]
    gaps = [text[before.end() : after.start()] for before, after in pairwise(found)]
    joined = all(len(gap) <= _LONGEST_GAP and _APART.fullmatch(gap) for gap in gaps)
    return [float(number.group()) for number in found] if joined else []


def _brackets(text: str) -> list[_Found]:
    """The numbers of every innermost square bracket, with its place. A bracket of names holds no bare numbers."""
    return [(found.start(), _numbers(_NAMED.sub(" ", found[1]))) for found in _BRACKET.finditer(text)]


def _corners(text: str) -> Iterator[_Found]:
    """The numbers of two brackets of two numbers that stand side by side, with their place; of exactly two."""
    row: list[tuple[re.Match[str], list[float]]] = []
    for found in [*_CORNER.finditer(text), None]:
        numbers = _numbers(found[1]) if found else []
        joined = row and found and _BETWEEN_CORNERS.fullmatch(text, row[-1][0].end(), found.start())
        if not (joined and len(numbers) == 2):
            if len(row) == 2:
                yield row[0][0].start(), row[0][1] + row[1][1]
            row = []
        if found and len(numbers) == 2:
            row.append((found, numbers))


def _named(text: str) -> Iterator[_Found]:
    """The coordinates that are given by name, in the order of a box, with their place."""
    values: dict[str, float] = {}
    for found in _NAMED.finditer(text):
        values[found[1].lower().replace("_", "")] = float(found[2])
        for names in _NAMES:
            if all(name in values for name in names):
                yield found.start(), _corners_of(names, [values[name] for name in names])
                values = {}


def _corners_of(names: tuple[str, ...], values: list[float]) -> list[float]:
    """The coordinates of both corners, from these or from the size and one corner or the centre."""
    x, y, right, bottom = values
    if names[2] not in ("width", "w"):
        return values
    if names[:2] in _CENTRES:
        x, y = x - right / 2, y - bottom / 2
    return [x, y, x + right, y + bottom]


def _numbers(text: str) -> list[float]:
    if _RANGE.search(text):
        return []
    return [float(number) for number in _NUMBER.findall(text)]


def _box(numbers: list[float]) -> Box | None:
    if len(numbers) < 4 or not all(map(math.isfinite, numbers)):
        return None
    return ordered_box(*numbers)


def ordered_box(x1: float, y1: float, x2: float, y2: float) -> Box:
    """A box with its corners in order."""
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
