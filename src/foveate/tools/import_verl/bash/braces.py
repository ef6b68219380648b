"""Brace expansion: `{a,b}` and `{1..3}`, before anything else is expanded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from foveate.tools.import_verl.bash.syntax import Parameter, Text, Word, WordPart
from foveate.tools.import_verl.bash.values import Unreadable

_RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})(?:\.\.(-?\d{1,9}))?|([A-Za-z])\.\.([A-Za-z])")
_IN_NAME = re.compile(r"\w", re.ASCII)
_MOST = 10_000
Item = WordPart | str  # an unquoted character, or something that no brace is in


def expand_braces(word: Word) -> list[Word]:
    if not any(isinstance(part, Text) and not part.quoted and "{" in part.text for part in word.parts):
        return [word]
    items: list[Item] = []
    for part in word.parts:
        items += list(part.text) if isinstance(part, Text) and not part.quoted else [part]
    return [Word(_parts(found), word.line) for found in _expand(items)]


def _parts(items: Sequence[Item]) -> tuple[WordPart, ...]:
    """The parts of an alternative; `$a{b,c}` is `$ab` and `$ac`."""
    parts = list[WordPart]()
    for item in items:
        last = parts[-1] if parts else None
        if not isinstance(item, str):
            parts.append(item)
        elif isinstance(last, Parameter) and last.bare and not last.quoted and _IN_NAME.fullmatch(item):
            parts[-1] = replace(last, name=last.name + item)
        else:
            parts.append(Text(item, False))
    return tuple(parts)


def _expand(items: list[Item]) -> list[list[Item]]:
    for start, item in enumerate(items):
        if item != "{":
            continue
        commas, end = _inside(items, start)
        if end is None:
            continue
        if not commas:
            alternatives = _range(items[start + 1 : end])
            if alternatives is None:
                continue
        else:
            bounds = [start, *commas, end]
            alternatives = [items[left + 1 : right] for left, right in pairwise(bounds)]
            alternatives = [found for alternative in alternatives for found in _expand(alternative)]
        rests = _expand(items[end + 1 :])
        if len(alternatives) * len(rests) > _MOST:
            raise Unreadable(f"braces that expand to more than {_MOST} words")
        return [[*items[:start], *middle, *rest] for middle in alternatives for rest in rests]
    return [items]


def _inside(items: list[Item], start: int) -> tuple[list[int], int | None]:
    """The places of the commas of a brace, and of its end (None: it is not closed)."""
    depth, commas = 0, list[int]()
    for at in range(start, len(items)):
        if items[at] == "{":
            depth += 1
        elif items[at] == "}":
            depth -= 1
            if depth == 0:
                return commas, at
        elif items[at] == "," and depth == 1:
            commas.append(at)
    return [], None


def _range(items: list[Item]) -> list[list[Item]] | None:
    if not all(isinstance(item, str) for item in items):
        return None
    match = _RANGE.fullmatch("".join(str(item) for item in items))
    if match is None:
        return None
    if match[4]:
        first, last, step = ord(match[4]), ord(match[5]), 1
    else:
        first, last, step = int(match[1]), int(match[2]), abs(int(match[3] or 1)) or 1
    if abs(last - first) // step > _MOST:
        raise Unreadable(f"braces that expand to more than {_MOST} words")
    numbers = range(first, last + (1 if last >= first else -1), step if last >= first else -step)
    ends = () if match[4] else (match[1].lstrip("-"), match[2].lstrip("-"))
    padded = any(len(end) > 1 and end.startswith("0") for end in ends)
    width = max(len(match[1]), len(match[2])) if padded else 0
    return [list(chr(number) if match[4] else f"{number:0{width}d}") for number in numbers]
