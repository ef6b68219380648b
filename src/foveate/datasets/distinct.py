"""Drawn things that are all different, each of one split whatever the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeVar

_Drawn = TypeVar("_Drawn")


def drawn_number(drawn: object) -> int:
    """A number that what is drawn decides, by its representation."""
    return int(hashlib.sha256(repr(drawn).encode()).hexdigest()[:16], 16)


def distinct_of_split(
    split: str,
    count: int,
    draw: Callable[[int], _Drawn],
    number_of: Callable[[_Drawn], int],
    *,
    has_traces: bool = False,
) -> Iterator[_Drawn]:
    """`count` different ones of those that belong to a split: by their numbers one in eight to `test`, and where there
    are traces, of the rest one in four to `traces`. `draw` gets how many there are already; `number_of` is a hash of
    all that tells one from another."""
    seen: set[int] = set()
    while len(seen) < count:
        one = draw(len(seen))
        number = number_of(one)
        belongs = "test" if number % 8 == 0 else "traces" if has_traces and number // 8 % 4 == 0 else "train"
        if belongs == split and number not in seen:
            seen.add(number)
            yield one
