"""Patterns of bash (`*`, `?`, `[a-z]`) as regular expressions, and operations with them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foveate.tools.import_verl.bash.values import MARK_REST

_MOST_STARS = 6
CLASSES = {
    "[:digit:]": "0-9", "[:upper:]": "A-Z", "[:lower:]": "a-z", "[:alpha:]": "A-Za-z", "[:alnum:]": "A-Za-z0-9",
    "[:xdigit:]": "0-9A-Fa-f", "[:blank:]": " \t", "[:space:]": " \t\n\r\f\v",
}  # fmt: skip
"""Classes of characters in brackets, as ranges."""
_CLASS = re.compile(r"(\[:\w+:\])")


def to_regex(pieces: Sequence[tuple[str, bool]]) -> re.Pattern[str] | None:
    """A pattern given as (text, quoted) pieces; quoted text stands for itself. None: one that is not read here."""
    raw = "".join(text for text, _ in pieces)
    special = "".join("x" * len(text) if quoted else text for text, quoted in pieces)
    if special.count("*") > _MOST_STARS or re.search(r"[@*+?!]\(", special):
        return None
    built, at = "", 0
    while at < len(raw):
        one = special[at]
        bracket = re.compile(r"\[[!^]?\]?(?:\[:\w+:\]|[^\]])*\]").match(special, at) if one == "[" else None
        if bracket:
            inside = raw[at + 1 : bracket.end() - 1]
            negated = inside[:1] in ("!", "^")
            classes = _CLASS.split(inside[negated:])
            escaped = "".join(CLASSES.get(one) or re.sub(r"[\\\[\]^]", r"\\\g<0>", one) for one in classes)
            if re.search(r"\\\[[:.=]|&&|\|\||~~|--", escaped):
                return None
            built += f"[{'^' if negated else ''}{escaped}]"
            at = bracket.end()
            continue
        if one == "\\" and at + 1 < len(raw):
            built += re.escape(raw[at + 1])
            at += 2
            continue
        built += {"*": ".*", "?": "."}.get(one) or re.escape(raw[at])
        at += 1
    try:
        return re.compile(built, re.DOTALL)
    except re.error:
        return None


def extended_regex(pieces: Sequence[tuple[str, bool]]) -> re.Pattern[str] | None:
    """The right side of `=~`; None for one that is not read here, or could take very long."""
    text = "".join(re.escape(text) if quoted else text for text, quoted in pieces)
    text = _CLASS.sub(lambda found: CLASSES.get(found[0], found[0]), text)
    if re.search(r"\)[*+{]|\[\[|[*+}][*+?{]|\\[a-zA-Z]|\(\?", text) or len(text) > 200:
        return None
    try:
        return re.compile(text)
    except re.error:
        return None


def remove_match(operator: str, text: str, pattern: re.Pattern[str]) -> str:
    """`text` without the shortest (#, %) or longest (##, %%) start or end that the pattern matches."""
    places = range(len(text) + 1)
    if operator in ("##", "%"):
        places = reversed(places)
    for place in places:
        rest = text[:place] if operator[0] == "#" else text[place:]
        if pattern.fullmatch(rest):
            return text[place:] if operator[0] == "#" else text[:place]
    return text


def change_case(operator: str, text: str, pattern: re.Pattern[str]) -> str:
    """`text` with the first (^, `,`, ~) or every character that the pattern matches in the other case."""
    change = {"^": str.upper, ",": str.lower, "~": str.swapcase}[operator[0]]
    end = 1 if len(operator) == 1 else len(text)
    return "".join(change(one) if pattern.fullmatch(one) else one for one in text[:end]) + text[end:]


def replace_match(operator: str, text: str, pattern: re.Pattern[str], new: str) -> str:
    """`${text/pattern/new}` and its forms `//` (all), `/#` (at the start), `/%` (at the end)."""
    if operator == "/#":
        match = pattern.match(text)
        return new + text[match.end() :] if match else text
    if operator == "/%":
        match = next((found for place in range(len(text) + 1) if (found := pattern.fullmatch(text, place))), None)
        return text[: match.start()] + new if match else text
    if not pattern.pattern:
        return text
    return pattern.sub(lambda found: new if found[0] or not text else "", text, count=0 if operator == "//" else 1)


def separator_regex(separators: str) -> str:
    """A separator of the fields of a value: a character of $IFS with the blanks of $IFS around it, or blanks."""
    blank = "".join(re.escape(one) for one in separators if one in " \t\n")
    other = "".join(re.escape(one) for one in separators if one not in " \t\n")
    blanks = f"[{blank}]*" if blank else ""
    forms = ([f"{blanks}[{other}]{blanks}"] if other else []) + ([f"[{blank}]+"] if blank else [])
    return f"(?:{'|'.join(forms)})(?!{MARK_REST})"
