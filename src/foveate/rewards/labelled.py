"""Answers of several parts that say what each is: `center (2, -3), radius 4`, `x = 4, y = 3`, `(x, y) = (4, 3)`.

All functions read the form of `foveate.rewards.latex.tidy`.
"""

from __future__ import annotations

import re
from itertools import permutations

from foveate.rewards.brackets import SEPARATOR, entries_of, parts_of
from foveate.rewards.phrases import Same

_SYMBOL = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\{\w+\}|\w))?"
_TUPLE = re.compile(rf"\(\s*({_SYMBOL}(?:\s*,\s*{_SYMBOL})+)\s*\)\s*=\s*(\(.*\))")
_EQUATION = re.compile(rf"({_SYMBOL})\s*=\s*([^=]+)")
_PART = re.compile(
    r"(?P<label>[A-Za-z][A-Za-z' -]{0,80}?)\s*[=:]?\s*(?P<value>(?:[-+]?\s*(?:\d|\\(?:frac|sqrt|pi)(?![A-Za-z]))|\().*)"
)
_AROUND = frozenset((
    "the", "a", "an", "its", "his", "her", "their", "with", "has", "have", "is", "are", "was", "at", "of", "equals",
    "equal", "to", "located", "circle", "sphere", "line", "function", "graph", "it", "and",
))  # fmt: skip
"""Words beside a label that name nothing: `the circle has its center at`."""
_MOST_PARTS = 4


def same_parts(given: str, wanted: str, same: Same) -> bool | None:
    """The verdict on two answers whose parts are labelled, in any order; None for others, and where it is not certain
    which part belongs to which. A letter stands for the word that it begins: `r` for the radius."""
    tuples = [_TUPLE.fullmatch(text) for text in (given, wanted)]
    if any(tuples):
        one, other = _assignments(given), _assignments(wanted)
        if one is None or other is None:
            return None
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    named = _labelled(given), _labelled(wanted)
    if not named[0] or not named[1] or len(named[0]) != len(named[1]):
        return None
    if not any(len(word) > 2 for part in named[0] + named[1] for word in part[0]):
        return None
    orders = [
        order
        for order in permutations(named[1])
        if all(_may_be(a[0], b[0]) for a, b in zip(named[0], order, strict=True))
    ]
    if len(orders) != 1:
        return None
    return all(same(a[1], b[1]) for a, b in zip(named[0], orders[0], strict=True))


def _assignments(text: str) -> dict[str, str] | None:
    """The values by name of `(x, y) = (4, 3)` or of `x = 4, y = 3`."""
    if found := _TUPLE.fullmatch(text):
        names, values = [name.strip() for name in found[1].split(",")], entries_of(found[2])[2]
    else:
        equations = [_EQUATION.fullmatch(part) for part in parts_of(text, SEPARATOR)]
        pairs = [(one[1], one[2]) for one in equations if one]
        names, values = [name for name, _ in pairs], [value.strip() for _, value in pairs]
        if len(pairs) != len(equations):
            return None
    return dict(zip(names, values, strict=True)) if len({*names}) == len(names) == len(values) > 1 else None


def _labelled(text: str) -> list[tuple[frozenset[str], str]]:
    """The words of the label and the value of each part; empty where a part has none."""
    parts = parts_of(text, SEPARATOR)
    if not 2 <= len(parts) <= _MOST_PARTS:
        return []
    found = [_PART.fullmatch(part) for part in parts]
    labels = [
        (frozenset(one["label"].casefold().replace("centre", "center").split()) - _AROUND, one["value"])
        for one in found
        if one
    ]
    return labels if len(labels) == len(parts) and all(words for words, _ in labels) else []


def _may_be(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two labels may name the same: one has all words of the other, or is the letter that begins it."""
    if one <= other or other <= one:
        return True
    short, long = sorted((one, other), key=lambda words: max(map(len, words)))
    letter, word = min(short), min(long)
    return len(short) == len(long) == len(letter) == 1 and word.startswith(letter) and "-" not in word
