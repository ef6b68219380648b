"""Even batches: sources of tasks in fixed shares of every batch, each in an order of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np

from foveate.data.stream import Curriculum, Stream
from foveate.errors import DataError
from foveate.registry import suggestion

LONGEST_PATTERN = 100_000
"""Places after which the sources repeat in the same order, at most."""
_SIMPLE, _NEAR = 1000, 1e-9


class SourcePattern:
    """Which source each place belongs to, and how many of the source came before.

    After n places every source has had its share of n but for less than 1 (the chairman assignment of Tijdeman 1980,
    by earliest deadline), and the pattern repeats. So where the shares of a batch are whole numbers, any such number of
    places in a row has exactly these, wherever it begins.

    shares: positive numbers, which need not add up to 1. Raises DataError for shares that no short pattern has.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        parts = [_simple(share) for share in shares.values()]
        scale = lcm(*(part.denominator for part in parts))
        whole = [int(part * scale) for part in parts]
        common = gcd(*whole)
        self.counts = [count // common for count in whole]
        self.length = sum(self.counts)
        if self.length > LONGEST_PATTERN:
            raise DataError(
                f"data.shares: {dict(shares)} repeat only after more than {LONGEST_PATTERN:,} prompts; write the "
                "shares with fewer digits, such as 0.17, or as whole numbers, such as 1 and 2"
            )
        self._source_P, self._before_P = _pattern(self.counts)

    def __call__(self, place: int) -> tuple[int, int]:
        """The source of a place, by number, and how many of its places come before."""
        cycle, rest = divmod(place, self.length)
        source = int(self._source_P[rest])
        return source, cycle * self.counts[source] + int(self._before_P[rest])

    def taken(self, place: int) -> list[int]:
        """How many places before this one belong to each source."""
        cycles, rest = divmod(place, self.length)
        last = np.bincount(self._source_P[:rest], minlength=len(self.counts))
        return [cycles * count + int(more) for count, more in zip(self.counts, last, strict=True)]


def _simple(share: float) -> Fraction:
    """A share as the fraction that was meant: 0.16666666666666666 is a sixth."""
    exact = Fraction(repr(float(share)))
    near = exact.limit_denominator(_SIMPLE)
    return near if near and abs(near - exact) < _NEAR else exact


def _pattern(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The sources of a cycle in order, and how many places of the source come before each; both int64 (cycle,).

    The k-th place of a source with c of n places may come from place floor(n (k - 1) / c) on, and has to by place
    ceil(n k / c); of those that may come, the one with the earliest deadline does.
    """
    total = sum(counts)
    source_P, before_P = np.zeros(total, np.int64), np.zeros(total, np.int64)
    taken = [0] * len(counts)
    for place in range(total):
        open_now = [i for i, count in enumerate(counts) if taken[i] < count and total * taken[i] < count * (place + 1)]
        chosen = min(open_now, key=lambda i: (-(-total * (taken[i] + 1) // counts[i]), i))
        source_P[place], before_P[place] = chosen, taken[chosen]
        taken[chosen] += 1
    return source_P, before_P


class StratifiedStream(Stream):
    """A stream in which every batch holds the sources in fixed shares.

    Each source has an order of its own, shuffled by seed, its name and its epoch: one that runs out begins its next
    epoch alone, and another source or share does not change its order. Weights of files and a curriculum act within the
    sources. The position is one number, as with a plain stream: it says how far every source is.

    sources: the source of each row; shares: source -> share, each of the sources named.
    """

    def __init__(
        self,
        sources: Sequence[str],
        shares: Mapping[str, float],
        seed: int,
        batch: int,
        *,
        weights: Sequence[float] = (),
        source_of: np.ndarray | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__(len(sources), seed, batch, weights=weights, source_of=source_of, curriculum=curriculum)
        _check_names(sources, shares)
        chosen = {name: share for name, share in shares.items() if share}
        self.pattern = SourcePattern(chosen)
        self.names = tuple(chosen)
        names = np.asarray(sources, dtype=object)
        self._rows_of = [np.flatnonzero(names == name) for name in self.names]
        self._parts = [
            Stream(
                len(rows),
                seed_of_source(seed, name),
                batch,
                weights=weights,
                source_of=None if source_of is None else source_of[rows],
                curriculum=_of_rows(curriculum, rows),
            )
            for name, rows in zip(self.names, self._rows_of, strict=True)
        ]
        self.length = sum(part.length for part in self._parts)
        self._plan = hashlib.sha256(f"{self._plan} {self.names} {self.pattern.counts}".encode()).hexdigest()[:16]

    def row(self, place: int) -> int:
        return self.row_of(*self.pattern(place))

    def row_of(self, source: int, number: int) -> int:
        """The row at a place in the order of a source."""
        return int(self._rows_of[source][self._parts[source].row(number)])

    def taken(self) -> list[int]:
        """How many rows each source has given so far."""
        return self.pattern.taken(self.position)

    def metrics(self) -> dict[str, float]:
        """The epochs taken so far, over all rows, and of each source."""
        epochs = zip(self.names, self.taken(), self._parts, strict=True)
        return super().metrics() | {f"source/{name}/epoch": taken / part.length for name, taken, part in epochs}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "taken": dict(zip(self.names, self.taken(), strict=True))}


def seed_of_source(seed: int, name: str) -> int:
    """The seed of the order of a source."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _of_rows(curriculum: Curriculum | None, rows: np.ndarray) -> Curriculum | None:
    return None if curriculum is None else Curriculum(curriculum.rank[rows], curriculum.epochs, curriculum.mixing)


def _check_names(sources: Sequence[str], shares: Mapping[str, float]) -> None:
    found = dict.fromkeys(sources)
    for name in shares:
        if name not in found:
            raise DataError(
                f"data.shares: no row has data_source {name!r}"
                f"{suggestion(name, found, then='there are')} {', '.join(found)}"
            )
    left_out = [name for name in found if name not in shares]
    if left_out:
        raise DataError(
            f"data.shares: names no share for data_source {', '.join(left_out)}; add it, 0 to leave its rows out"
        )
