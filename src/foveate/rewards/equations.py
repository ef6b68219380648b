"""Answers that are equations, and what an equation says of a value: `x = 5`, `AB = 5`, `f(x) = 2x`.

All functions read the form of `foveate.rewards.latex.tidy`.
"""

from __future__ import annotations

import re

from foveate.rewards.brackets import SEPARATOR, parts_of
from foveate.rewards.names import same_wording, wording
from foveate.rewards.numbers import decimal_of
from foveate.rewards.phrases import Same

_TERM = re.compile(r"\d+\s*[A-Za-z]|[A-Za-z]\s*\^")
_SYMBOL = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\{[^{}]*\}|\w))?'*")
_CALL = re.compile(
    r"[A-Za-z](?:'|\^\{?-1\}?)?\s*\([^()]*\)|\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)|\|?[A-Za-z][A-Za-z ]*\|?|[A-Z]_\{.*\}"
)
_EQUALS = re.compile(r"(?<![<>!:\\=])=(?!=)|\\in(?![A-Za-z])")
REJECTED = re.compile(
    r"n't\b|\b(?:not|never|instead|unlike|contradicts?|fails?\s+(?:for|at|if))\b|^\W*(?:if|unless|initially|otherwise|assum(?:e|ing)|suppose|let)\b"
    r"|\b(?:we|I|must|should|can|to)\s+(?:then\s+|also\s+)?"
    r"(?:avoid|discard|eliminate|exclude|ignore|neglect|reject|rule\s+out)\b",
    re.IGNORECASE,
)
"""Words with which a sentence names a value that it does not give."""
_OPERATION = re.compile(r"\\(?:int|lim|sum|prod)(?![A-Za-z])|\\frac\s*\{d[^{}]*\}\s*\{d[a-z]\}")
"""What begins a side that asks for a value: `\\int 6x dx = 3x^2 + C`."""
_LENGTH = re.compile(r"[A-Z]{2}")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")


def same_equations(given: str, wanted: str, asked: str, same: Same) -> bool | None:
    """The verdict on answers of which one or both are equations; None where none is, or mathematics must say it."""
    answer, truth = sides(given), sides(wanted)
    if len(answer) == len(truth) == 1:
        return None
    if _has_several(given) != _has_several(wanted):
        return False
    if any(REJECTED.search(side) for side in (answer[0], truth[0])):
        return False
    ends = decimal_of(answer[0]), decimal_of(answer[-1])
    if len(answer) > 1 and None not in ends and ends[0] != ends[1]:
        return False
    if len(truth) == 1:
        labelled = not _TERM.search(answer[0]) or _is_label(answer[0]) or _OPERATION.match(answer[0])
        return bool(labelled or same(answer[0], answer[-1])) and same(answer[-1], wanted)
    if len(answer) == 1:
        return _is_label(truth[0]) and same(given, truth[-1])
    if not (_is_label(answer[0]) and _is_label(truth[0])):
        return None
    if len(answer) == len(truth) == 2 and _is_label(answer[1]) and _is_label(truth[1]):
        return any(
            _same_label(answer[0], truth[i], asked) and _same_label(answer[1], truth[1 - i], asked) for i in (0, 1)
        )
    if _same_label(answer[0], truth[0], asked) and same(answer[-1], truth[-1]):
        return True
    return None if _VARIABLE.search(answer[-1] + truth[-1]) else False


def _has_several(text: str) -> bool:
    """Whether a text is a list of equations for values of different names."""
    parts = parts_of(text, SEPARATOR)
    names = [parts_of(part, _EQUALS)[0] for part in parts if _EQUALS.search(part)] if len(parts) > 1 else []
    return len(names) == len(parts) and all(map(_SYMBOL.fullmatch, names)) and len({*names}) > 1


def sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of them, the label of a value first; the text alone if it is none."""
    found = parts_of(text, _EQUALS)
    return found[::-1] if len(found) == 2 and _is_label(found[1]) and not _is_label(found[0]) else found


def _is_label(side: str) -> bool:
    """Whether the side of an equation only says what has the value: a symbol, a name, a call, words."""
    return bool(_SYMBOL.fullmatch(side) or _CALL.fullmatch(side)) or wording(side, "") is not None


def _same_label(one: str, other: str, asked: str) -> bool:
    """Whether two labels may stand for the same: two symbols, and two names, must be equal."""
    if one.replace(" ", "") == other.replace(" ", ""):
        return True
    if _SYMBOL.fullmatch(one) and _SYMBOL.fullmatch(other):
        return one.partition("_")[0] == other or other.partition("_")[0] == one
    if _LENGTH.fullmatch(one) and _LENGTH.fullmatch(other):
        return sorted(one) == sorted(other)
    if "(" in one and "(" in other:
        return False
    return same_wording(one, other, asked) is not False or bool(_CALL.fullmatch(one)) != bool(_CALL.fullmatch(other))
