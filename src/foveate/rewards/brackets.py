r"""Brackets: the parts of a text outside of them; lists, sets, points and intervals in them."""

from __future__ import annotations

import re
from functools import lru_cache

_BRACKETS = re.compile(r"\\\{|\\\}|\\l(?:angle|brace)|\\r(?:angle|brace)|[()\[\]{}]")
_OPENING = ("\\{", "\\langle", "\\lbrace", "(", "[", "{")
SEPARATOR = re.compile(r",(?!\d{3}(?!\d))|(?<!\d),|;|\s(?:and|or)\s")
"""What stands between the entries of a list, but no comma between thousands."""
_SEMICOLON = re.compile(";")
_DECIMAL = re.compile(r"(-?\d+),(\d{1,2}|\d{4,})")
_POINT_NAME = re.compile(r"[A-Z]'?\s*(?=\()")
_EITHER_SIGN = re.compile(r"\s*\\(pm|mp)(?![A-Za-z])\s*")


@lru_cache(maxsize=4096)
def entries_of(text: str) -> tuple[str, str, list[str]]:
    r"""The name of a point, the brackets around a list, a set, a point or an interval, and its entries; no brackets
    around a bare list. In lists and sets `\pm 3` stands for two."""
    named = _POINT_NAME.match(text)
    closed = closing_bracket(text[named.end() :] if named else text)
    if closed:
        opening, closing, inside = closed
        entries = _coordinates(inside) if opening == "(" else parts_of(inside, SEPARATOR)
        if len(entries) > 1 and not (opening == "(" and _EITHER_SIGN.search(inside)):
            if opening + closing == "[]" and len(entries) > 2:  # a vector, for an interval has two ends
                opening, closing = "(", ")"
            brackets = (opening + closing).replace("\\langle\\rangle", "()").replace("\\", "")
            return named.group().strip() if named else "", brackets, _both(entries) if brackets == "{}" else entries
    return "", "", _both(parts_of(text, SEPARATOR))


def _coordinates(inside: str) -> list[str]:
    """The entries between parentheses. Between semicolons, a comma between digits is the point of a decimal."""
    entries = [_DECIMAL.sub(r"\1.\2", entry) if _DECIMAL.fullmatch(entry) else entry
               for entry in parts_of(inside, _SEMICOLON)]  # fmt: skip
    alone = len(entries) > 1 and all(len(parts_of(entry, SEPARATOR)) == 1 for entry in entries)
    return entries if alone else parts_of(inside, SEPARATOR)


def _both(entries: list[str]) -> list[str]:
    """The entries, each that holds `\\pm` as two."""
    return [
        _EITHER_SIGN.sub(lambda found: signs[found[1] == "mp"], entry).removeprefix("+")  # noqa: B023
        for entry in entries
        for signs in (("+-", "-+") if _EITHER_SIGN.search(entry) else ("",))
    ]


def parts_of(text: str, separator: re.Pattern[str]) -> list[str]:
    """A text cut at the separators that stand outside of brackets; empty parts are left out."""
    if not separator.search(text):
        return [text]
    depth, begin, parts = 0, 0, []
    brackets = [*_BRACKETS.finditer(text)]
    place = 0
    for cut in separator.finditer(text):
        while place < len(brackets) and brackets[place].start() < cut.start():
            depth += 1 if brackets[place].group() in _OPENING else -1
            place += 1
        if depth <= 0:
            parts.append(text[begin : cut.start()])
            begin = cut.end()
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()] or [text]


def closing_bracket(text: str) -> tuple[str, str, str] | None:
    """The first bracket of a text, the one that closes it, and what is inside, if they hold the whole of it."""
    depth, first = 0, None
    for found in _BRACKETS.finditer(text):
        opens = found.group() in _OPENING
        if first is None:
            if not opens or found.start():
                return None
            first = found
        depth += 1 if opens else -1
        if depth == 0:
            return (
                (first.group(), found.group(), text[first.end() : found.start()]) if found.end() == len(text) else None
            )
    return None
