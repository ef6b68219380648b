r"""Conditions on one variable as unions of intervals: `x < 1 or x \ge 3`, `x > 0 and x \ne 2`, chains of inequalities.

All functions read and write the form of `foveate.rewards.latex.tidy`.
"""

from __future__ import annotations

import re
from fractions import Fraction

_RELATION = re.compile(r"\s*(\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt|neq|ne)(?![A-Za-z])|[<>])\s*")
_SIGNS = {"<": "<", "\\lt": "<", ">": ">", "\\gt": ">"}
MIRROR = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_OR = re.compile(r"\s+or\s+|\s*\\(?:lor|vee)(?![A-Za-z])\s*|\s*[,;]\s*")
_VARIABLE = re.compile(r"[A-Za-z]|\\[a-z]+")
_MAGNITUDE = re.compile(r"\|\s*([A-Za-z])\s*\|")
_SUBJECT = re.compile(rf"{_VARIABLE.pattern}|{_MAGNITUDE.pattern}")
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
_AND = re.compile(r",?\s+(?:and|but)\s+|\s*\\(?:land|wedge)(?![A-Za-z])\s*|\s*,\s*")
_LIMIT = re.compile(r"\d+(?:\.\d+)?|\\(?:frac|sqrt|pi)[\w{}\\]*")
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)|(-?)(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))")
_BOTH_SIGNS = re.compile(r"\\pm\s*(?=[\d\\])")
_EXCLUDED = re.compile(r",?\s+(?:and|or)\s+|\s*,\s*")


def as_intervals(text: str) -> tuple[str, str] | None:
    r"""Conditions on one variable, joined by `or`, as that variable and a union of intervals: `x < 1 or x \ge 3` is
    `(-\infty,1) \cup [3,\infty)`. None for anything else."""
    if spared := _with_exceptions(text):
        return spared
    found = [_interval(part) for part in _OR.split(_joined(text))]
    names = {one[0] for one in found if one}
    if None in found or len(names) != 1:
        return None
    return names.pop(), r" \cup ".join(one[1] for one in found if one)


def _with_exceptions(text: str) -> tuple[str, str] | None:
    r"""`x \ge -1 and x \ne 2` as its variable and `[-1,2) \cup (2,\infty)`: conditions that all hold, of which one
    at least excludes a number. None for other conditions, and where an end is no number."""
    names: set[str] = set()
    excluded: list[str] = []
    ranges: list[tuple[list[str], list[str]]] = []
    for part in _AND.split(text):
        terms, signs = _turned(*chain(part))
        if not signs and excluded:
            excluded.append(part)  # `x \ne 1, 2`
        elif signs == ["\\ne"]:
            names.add(terms[0])
            excluded.append(terms[1])
        elif len(signs) == 1 or (len(signs) == 2 and set(signs) <= {"<", "\\le"}):
            names.add(terms[len(signs) - 1])
            ranges.append((terms, signs))
        else:
            return None
    if not excluded or len(names) != 1 or not _VARIABLE.fullmatch(min(names)):
        return None
    lows, highs = [("-\\infty", False)], [("\\infty", False)]
    for terms, signs in ranges:
        below = (terms[0], signs[0]) if len(signs) == 2 else (terms[1], MIRROR[signs[0]])
        for (end, sign), ends in ((below, lows), ((terms[-1], signs[-1]), highs)):
            if sign in ("<", "\\le"):
                ends.append((end, sign == "\\le"))
    alone = not ranges and len(excluded) == 1 and "\\pm" not in excluded[0]
    if alone or len(lows) > 2 or len(highs) > 2:
        return None
    union = union_without(", ".join(excluded), lows[-1], highs[-1])
    return None if union is None else (names.pop(), union)


def union_without(
    excluded: str, low: tuple[str, bool] = ("-\\infty", False), high: tuple[str, bool] = ("\\infty", False)
) -> str | None:
    """The interval from one end to another, each with whether it belongs to it, as a union without the numbers of a
    list such as `2 and 3`; None where one of them is no number."""
    values = [_BOTH_SIGNS.sub(sign, one).strip() for one in _EXCLUDED.split(excluded)
              for sign in (("", "-") if _BOTH_SIGNS.match(one) else ("",))]  # fmt: skip
    numbers = [_number(value) for value in values]
    ends = [_number(end[0]) for end in (low, high)]
    known = [end is not None or "infty" in text for end, (text, _) in zip(ends, (low, high), strict=True)]
    if None in numbers or not all(known):
        return None
    pairs = sorted((number, value) for number, value in zip(numbers, values, strict=True) if number is not None)
    inside = [value for number, value in pairs
              if (ends[0] is None or number > ends[0]) and (ends[1] is None or number < ends[1])]  # fmt: skip
    opening = "[" if low[1] and ends[0] not in numbers else "("
    closing = "]" if high[1] and ends[1] not in numbers else ")"
    return rf"{opening}{low[0]}," + "".join(rf"{value}) \cup ({value}," for value in inside) + f"{high[0]}{closing}"


def _number(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    if found[1]:
        return Fraction(found[1])
    below = int(found[4] or found[6])
    return Fraction(int(found[3] or found[5]), below) * (-1 if found[2] else 1) if below else None


def _joined(text: str) -> str:
    """`x > 1 and x < 3` as `1 < x < 3`, also where a comma stands for `and`: where both can hold at once."""
    parts = _AND.split(text)
    chains = [_turned(*chain(part)) for part in parts]
    if len(parts) != 2 or any(len(signs) != 1 for _, signs in chains):
        return text
    (low, [over]), (high, [under]) = sorted(chains, key=lambda chain: chain[1][0] not in (">", "\\ge"))
    if low[0] != high[0] or over not in (">", "\\ge") or under not in ("<", "\\le"):
        return text
    numbers = all(_DECIMAL.fullmatch(term) for term in (low[1], high[1]))
    both = float(low[1]) <= float(high[1]) if numbers else "," not in text
    return f"{low[1]} {MIRROR[over]} {low[0]} {under} {high[1]}" if both else text


def _turned(terms: list[str], signs: list[str]) -> tuple[list[str], list[str]]:
    """A single comparison with its variable in front."""
    if len(signs) == 1 and not _SUBJECT.fullmatch(terms[0]) and _SUBJECT.fullmatch(terms[1]):
        return terms[::-1], [MIRROR[signs[0]]]
    return terms, signs


def _magnitude(variable: str, limit: str, sign: str) -> tuple[str, str]:
    """The interval of `|x| < 2`, or the two of `|x| > 2`."""
    if sign in ("<", "\\le"):
        return variable, f"{'(' if sign == '<' else '['}-{limit},{limit}{')' if sign == '<' else ']'}"
    ends = (")", "(") if sign == ">" else ("]", "[")
    return variable, rf"(-\infty,-{limit}{ends[0]} \cup {ends[1]}{limit},\infty)"


def _interval(condition: str) -> tuple[str, str] | None:
    """The variable and the interval of `x < 1`, `1 < x` or `1 < x < 3`."""
    terms, signs = chain(condition)
    if len(signs) == 2 and _VARIABLE.fullmatch(terms[1]) and set(signs) <= {"<", "\\le"}:
        left, right = ("(" if signs[0] == "<" else "["), (")" if signs[1] == "<" else "]")
        return terms[1], f"{left}{terms[0]},{terms[2]}{right}"
    if len(signs) != 1:
        return None
    terms, signs = _turned(terms, signs)
    (one, other), sign = terms, signs[0]
    if sign != "\\ne" and (magnitude := _MAGNITUDE.fullmatch(one)) and _LIMIT.fullmatch(other):
        return _magnitude(magnitude[1], other, sign)
    if not _VARIABLE.fullmatch(one) or not other:
        return None
    ranges = {
        "<": rf"(-\infty,{other})", "\\le": rf"(-\infty,{other}]", ">": rf"({other},\infty)",
        "\\ge": rf"[{other},\infty)", "\\ne": rf"(-\infty,{other}) \cup ({other},\infty)",
    }  # fmt: skip
    return one, ranges[sign]


def chain(text: str) -> tuple[list[str], list[str]]:
    """The terms of a chain of inequalities and the signs between them, each in one form."""
    terms: list[str] = _RELATION.split(text)[::2]
    signs: list[str] = _RELATION.findall(text)
    return [term.strip() for term in terms], [_SIGNS.get(sign, sign[:3]) for sign in signs]
