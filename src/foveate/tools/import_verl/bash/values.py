"""Values of variables, some of which cannot be known without running the script.

A value is text. What was not read stands in it as a mark, a number between two characters that no script has. Marks
travel through quotes, arrays and assignments like any text, so that a value tells at its end what it depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
MARK_REST = f"\\d*{_CLOSE}"
"""Within a mark: what stands behind a digit of it, as a regular expression."""
LONGEST = 200_000


class Unreadable(Exception):
    """A script that grows or loops beyond what a launch script does."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that was not read, and why. `unset`: a variable that is set nowhere, empty text for bash. `several`: any
    number of words may stand in its place."""

    reason: str
    unset: bool = False
    several: bool = False


@dataclass(frozen=True, slots=True)
class Array:
    """An array of bash: elements by index, or by key."""

    elements: dict[int | str, str]
    keyed: bool = False

    @property
    def keys(self) -> list[int | str]:
        """In the order of bash: by number, or by the bucket of its table that a key is in."""
        if not self.keyed:
            return sorted(self.elements, key=int)
        latest_first = list(reversed(self.elements))
        return sorted(latest_first, key=lambda key: _bucket(str(key)))

    @property
    def values(self) -> list[str]:
        return [self.elements[key] for key in self.keys]

    def position(self, index: str) -> int:
        """The place of an element of an array without keys; a negative index counts from behind the last."""
        number = int(index) if re.fullmatch(r"-?\d{1,9}", index) else 0
        return number if number >= 0 else number + 1 + max((int(one) for one in self.elements), default=-1)


def _bucket(key: str) -> int:
    """The FNV-1 hash of a key in a table of 1024, as bash has it."""
    found = 2166136261
    for byte in key.encode(errors="surrogateescape"):
        found = (found * 16777619 & 0xFFFFFFFF) ^ (byte if byte < 128 else byte | 0xFFFFFF00)
    return found % 1024


@dataclass(slots=True)
class Marks:
    """The marks that were made, by number."""

    made: list[Unread] = field(default_factory=list)

    def make(self, reason: str, *, unset: bool = False, several: bool = False) -> str:
        unread = Unread(reason, unset, several)
        if unread not in self.made:
            self.made.append(unread)
        return f"{_OPEN}{self.made.index(unread)}{_CLOSE}"

    def unread_in(self, text: str) -> list[Unread]:
        return [self.made[int(number)] for number in dict.fromkeys(_MARK.findall(text))]

    def known(self, text: str) -> str | None:
        """The text as bash has it, in which an unset variable is empty; None where something was not read."""
        if _OPEN not in text:
            return text
        return None if any(not unread.unset for unread in self.unread_in(text)) else _MARK.sub("", text)

    def split(self, text: str) -> str:
        """A text that is split into words, of which what was not read may be any number."""

        def several(match: re.Match[str]) -> str:
            unread = self.made[int(match[1])]
            return match[0] if unread.unset else self.make(unread.reason, several=True)

        return _MARK.sub(several, text)

    def uncounted(self, words: Iterable[str]) -> str:
        """The mark of words that may be more or fewer; "" where their number is known."""
        unread = next((one for word in words for one in self.unread_in(word) if one.several), None)
        return self.make(unread.reason, several=True) if unread else ""

    def derived(self, text: str) -> str:
        """The value of an operation on a text that is not known: not known, for the same reason."""
        unread = self.unread_in(text)
        first = next((one for one in unread if not one.unset), unread[0])
        return self.make(first.reason)


def is_bare_mark(text: str) -> bool:
    """Whether nothing but marks stands in a text, so that it may be empty."""
    return not _MARK.sub("", text)


def without_marks(text: str) -> str:
    """The text of a script in which no character is taken for a mark."""
    return text.replace(_OPEN, "\ufffd").replace(_CLOSE, "\ufffd")
