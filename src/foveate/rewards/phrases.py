r"""Phrases around a value: changes (`increase of 20%`), directions, dimensions (`3 m by 4 m`), vectors in i, j, k.

All functions read the form of `foveate.rewards.latex.tidy`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from foveate.rewards.brackets import entries_of, parts_of

_DIRECTION = re.compile(
    r"(?:^|,?\s+)(?:(?:directed|acting|pointing|heading|due|vertically|horizontally|straight|to|towards?|in|on|the)\s+)*"
    r"(?P<way>(?:north|south)[ -]?(?:east|west)|north|south|east|west|up|down|left|right|forward|backward|inward"
    r"|outward)(?:wards?)?(?:\s+(?:direction|side|part))?(?:\s+of\s+[^\d]{1,60})?$",
    re.IGNORECASE,
)
_UP = (
    r"increas(?:e[ds]?|ing)|r(?:is|os)e[sn]?|gr[eo]w[ns]?|growth|gain(?:s|ed)?|profits?|climb(?:s|ed)?|more|higher"
    r"|增长|增加|上升|提高|上涨|盈利"
)
_DOWN = (
    r"decreas(?:e[ds]?|ing)|drop(?:s|ped)?|f[ae]ll(?:s|en)?|declin(?:e[ds]?|ing)|reduc(?:e[ds]?|tion)|loss(?:es)?|lost|less"
    r"|fewer|lower|discount|减少|下降|降低|下跌|亏损"
)
_WAY = rf"(?:(?P<up>{_UP})|(?P<down>{_DOWN}))"
CHANGE = re.compile(rf"(?<![A-Za-z]){_WAY}(?![A-Za-z])", re.IGNORECASE)
_CHANGED_BY = re.compile(
    rf"(?:.*(?<![A-Za-z]))?{_WAY}(?:\s+(?:of|by)\s+|了?\s*(?=[\d\\]))(?P<value>[-+\\$€£\d].*)", re.I | re.DOTALL
)
_CHANGE_BEHIND = re.compile(rf"(?:an?\s+)?(?P<value>[-+\\$€£\d].*?)\s+(?:in\s+)?{_WAY}", re.I | re.DOTALL)
_BY = re.compile(r"\s+by\s+")
_CROSS = re.compile(r"(?<=[\w°])\s*[xX]\s*(?=\d)")
_SIDES = re.compile(r"\s+by\s+|\s*\\times\s*|(?<=[\w°])\s*[xX]\s*(?=\d)")
_REMAINDER = re.compile(
    r"(?:quotient\s+)?(\d+)\s*,?\s*(?:with\s+)?(?:an?\s+)?(?:remainder(?:\s+of)?|R|r\.|余)\s*(\d+)", re.IGNORECASE
)
_BASES = {"two": "2", "eight": "8", "ten": "10", "sixteen": "16"}
_NAME_OF_BASE = rf"(\d+|{'|'.join(_BASES)})"
_BASE = re.compile(
    rf"\(?([0-9][0-9A-F]*)\)?\s*(?:_\s*\{{?\s*{_NAME_OF_BASE}\s*\}}?|\(?\s*(?:in\s+)?base\s+{_NAME_OF_BASE}\s*\)?)"
)
_MIXED = re.compile(r"(\d+)\s+and\s+(\d{1,2})\s*/\s*(\d{1,2})")
_COMPASS = {"n": "north", "s": "south", "e": "east", "w": "west", "ne": "northeast", "nw": "northwest",
            "se": "southeast", "sw": "southwest"}  # fmt: skip
_TRENDS = (
    re.compile(
        r"(?:it\s+)?(?:is\s+)?(?:increas(?:e[sd]?|ing)|ris(?:es?|ing)|rose|grow(?:s|ing)?|gr[eo]wn?|go(?:es|ing)\s+up)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?:it\s+)?(?:is\s+)?(?:decreas(?:e[sd]?|ing)|fall(?:s|ing)?|fell|declin(?:e[sd]?|ing)|drop(?:s|ped|ping)?"
        r"|go(?:es|ing)\s+down)",
        re.IGNORECASE,
    ),
)
_ORIGIN = re.compile(r"(?:the\s+)?(?:point\s+)?(?:origin|原点)", re.IGNORECASE)
_COMPONENT = re.compile(
    r"\s*([+-]?)\s*([^+\-ijk]*?(?:\\[a-z]+[^+\-ijk]*?)*)\s*(?:\\cdot|\*)?\s*(?<![A-Za-z\\])([ijk])(?![A-Za-z])\s*"
)

Same = Callable[[str, str], bool]


def with_direction(text: str) -> str:
    """A quantity or nothing before a direction, with that in one form: `3 m/s to the east` as `3 m/s eastward`, `to the
    left` as `left`."""
    found = _DIRECTION.search(text)
    if found is None or (found.start() and not any(map(str.isdigit, text[: found.start()]))):
        return text
    way = re.sub("[ -]", "", found["way"].lower()).removesuffix("ward")
    return f"{text[: found.start()]} {way}ward" if found.start() else way


def same_phrases(given: str, wanted: str, same: Same) -> bool | None:
    """The verdict of `same` on the values of two phrases; None where neither side is one."""
    for compared in (_same_changes, _same_dimensions, _same_vectors, _same_marked, _same_mixed, _same_ways):
        verdict = compared(given, wanted, same)
        if verdict is not None:
            return verdict
    return None


def _same_changes(given: str, wanted: str, same: Same) -> bool | None:
    """The verdict on two changes. Without a word for it, a change is a value with or without its sign."""
    one, other = _change(given), _change(wanted)
    if one is None and other is None:
        return None
    signs = [
        change[0] if change else {"-": -1, "+": 1}.get(text[:1], 0) for change, text in ((one, given), (other, wanted))
    ]
    if signs[0] * signs[1] < 0:
        return False
    values = [change[1] if change else text for change, text in ((one, given), (other, wanted))]
    return same(*(value.removeprefix("-").removeprefix("+") for value in values))


def _change(text: str) -> tuple[int, str] | None:
    """The sign and the amount of a change."""
    found = _CHANGED_BY.fullmatch(text) or _CHANGE_BEHIND.fullmatch(text)
    return None if found is None else (1 if found["up"] else -1, found["value"])


def _same_dimensions(given: str, wanted: str, same: Same) -> bool | None:
    """The verdict on `3 m by 4 m` and `3 m \\times 4 m`, of which one at least says `by`."""
    if not (_BY.search(given) or _BY.search(wanted) or _CROSS.search(given) or _CROSS.search(wanted)):
        return None
    one, other = parts_of(given, _SIDES), parts_of(wanted, _SIDES)
    if len(one) < 2 or len(other) < 2:
        return None
    return len(one) == len(other) and all(map(same, one, other))


def _same_marked(given: str, wanted: str, same: Same) -> bool | None:
    """The verdict on two divisions with remainder (`5 R 4`), and on numbers of which both, or one, name their base."""
    one, other = _REMAINDER.fullmatch(given), _REMAINDER.fullmatch(wanted)
    if one or other:
        return bool(one and other and one.groups() == other.groups())
    one, other = _BASE.fullmatch(given), _BASE.fullmatch(wanted)
    if one is None and other is None:
        return None
    digits = [found[1] if found else text for found, text in ((one, given), (other, wanted))]
    bases = [_BASES.get(base, base) for base in (found[2] or found[3] for found in (one, other) if found)]
    return same(*digits) and len({*bases}) == 1


def _same_mixed(given: str, wanted: str, same: Same) -> bool | None:
    """True where `5 and 1/2` is the number of the other side, which is no list; else None."""
    for text, other in ((given, wanted), (wanted, given)):
        found = _MIXED.fullmatch(text)
        if found and int(found[2]) < int(found[3]) and len(entries_of(other)[2]) == 1:
            return same(rf"{found[1]}\frac{{{found[2]}}}{{{found[3]}}}", other) or None
    return None


def _same_ways(given: str, wanted: str, same: Same) -> bool | None:  # noqa: ARG001
    """True for `NE` and `northeast`, and for two verbs of one trend; else None."""
    if any(_COMPASS.get(one.casefold()) == other for one, other in ((given, wanted), (wanted, given))):
        return True
    return True if any(trend.fullmatch(given) and trend.fullmatch(wanted) for trend in _TRENDS) else None


def _same_vectors(given: str, wanted: str, same: Same) -> bool | None:
    """The verdict on a point or vector beside another form of one: `2i - 3j`, the origin."""
    for one, other in ((given, wanted), (wanted, given)):
        _, brackets, entries = entries_of(other)
        if brackets not in ("()", "[]") or len(entries) < 2:
            continue
        if _ORIGIN.fullmatch(one):
            return all(entry == "0" for entry in entries)
        components = _components(one, len(entries))
        if components:
            return all(map(same, components, entries))
    return None


def _components(text: str, count: int) -> list[str] | None:
    """The components of a sum such as `2i - 3j`; None for anything else, and where it has more than `count`."""
    values, position = dict.fromkeys("ijk"[:count], "0"), 0
    while position < len(text):
        found = _COMPONENT.match(text, position)
        if found is None or (position and not found[1]) or values.get(found[3]) != "0":
            return None
        values[found[3]] = found[1].replace("+", "") + (found[2].strip() or "1")
        position = found.end()
    return [*values.values()] if position and count <= 3 else None
