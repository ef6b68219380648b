"""The order in which tasks are trained on: shuffled by seed and epoch, endless, and resumable from one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from foveate.errors import DataError


@dataclass(frozen=True, slots=True)
class Curriculum:
    """From easy to hard in the first `epochs` epochs: a row stands at its rank in the order of difficulty (0..1) plus
    a random share of `mixing`, so that 0 sorts strictly and a large value shuffles. rank: float64 (rows,)."""

    rank: np.ndarray
    epochs: int
    mixing: float


def ranks(difficulty: Sequence[float], descending: bool = False) -> np.ndarray:
    """The place of each row in the order of difficulty, 0..1, float64 (rows,); equals share their middle place."""
    values = np.asarray(difficulty, dtype=np.float64) * (-1 if descending else 1)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return middle[inverse] / max(1, len(values) - 1)


class Stream:
    """An endless seeded order over `length` rows, `batch` at a time.

    Epoch e is drawn from a generator seeded with (seed, e), so the order depends on nothing else. An epoch that does
    not divide into batches flows into the next one: within an epoch every row comes exactly once, and a batch may hold
    the end of one epoch and the start of the next. The batch size may change between runs: position counts rows, not
    batches. Rows may also be done out of turn (`finish`): `position` is then the place of the first that is not.

    weights: how often each row comes in an epoch, (rows,); rows with the same weight in `source_of` (the file of each
    row) share it: 2.5 is twice all of them and once a random half, another one in each epoch.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        batch: int,
        *,
        weights: Sequence[float] = (),
        source_of: np.ndarray | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        if length < 1 or batch < 1:
            raise DataError(f"a stream needs at least one row and a batch of at least one, not {length} and {batch}")
        self.seed, self.batch = seed, batch
        self.position = 0
        self._beyond: frozenset[int] = frozenset()  # places after `position` that are done
        self._curriculum = curriculum
        sources = np.zeros(length, np.int64) if source_of is None else source_of
        shares = weights or [1.0] * (int(sources.max()) + 1)
        self._rows = [(np.flatnonzero(sources == number), share) for number, share in enumerate(shares)]
        self.length = sum(int(share) * len(rows) + _part(share, rows) for rows, share in self._rows)
        if self.length == 0:
            raise DataError(f"data.weights: {list(weights)} leave no row in an epoch; raise one of them")
        self._plan = _fingerprint(weights, curriculum)
        self._ordered: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> float:
        """Epochs taken so far, with their fraction."""
        return self.position / self.length

    def draw(self, count: int | None = None) -> list[int]:
        """The next `count` row indices (one batch of them by default)."""
        places = self.coming(self.batch if count is None else count)
        for place in places:
            self.finish(place)
        return [self.row(place) for place in places]

    def row(self, place: int) -> int:
        """The row at a place."""
        return int(self._order(place // self.length)[place % self.length])

    def metrics(self) -> dict[str, float]:
        """The epochs taken so far, with their fraction."""
        return {"data/epoch": self.epoch}

    def coming(self, count: int) -> list[int]:
        """The places of the next `count` rows: row i of epoch e has place e * length + i."""
        places: list[int] = []
        place = self.position
        while len(places) < count:
            if place not in self._beyond:
                places.append(place)
            place += 1
        return places

    def finish(self, place: int) -> None:
        """The row at this place is done, and passed over from now on."""
        self._beyond |= {place}
        while self.position in self._beyond:
            self._beyond -= {self.position}
            self.position += 1

    def observe(self, place: int, score: float) -> None:
        """Tell what the answers to the task at this place scored. A shuffle does not depend on it; `AdaptiveStream`
        does."""

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue with the very next row."""
        place = {"position": self.position, "beyond": sorted(self._beyond)}
        return {"length": self.length, "seed": self.seed, "plan": self._plan, **place}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError if it belongs to another dataset size, seed, weights or
        curriculum."""
        for name, here in (("length", self.length), ("seed", self.seed), ("plan", self._plan)):
            if state.get(name, "") != here:
                raise DataError(
                    f"data position, field {name}: saved with {state.get(name)}, but the run now has {here}; "
                    "go on with the same data, weights, shares, rlcs, curriculum and seed, or start a new run folder"
                )
        self.position, self._beyond = state["position"], frozenset(state.get("beyond", ()))

    def _order(self, epoch: int) -> np.ndarray:
        ordered = self._ordered
        if ordered is None or ordered[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            rows = np.concatenate([_drawn(rng, rows, share) for rows, share in self._rows])
            curriculum = self._curriculum
            if curriculum is not None and epoch < curriculum.epochs:
                place = curriculum.rank[rows] + curriculum.mixing * rng.random(len(rows))
                order = np.lexsort((rng.random(len(rows)), place))
            else:
                order = rng.permutation(len(rows))
            self._ordered = ordered = epoch, rows[order]
        return ordered[1]


class AdaptiveStream(Stream):
    """A stream whose order depends on what its tasks scored, by overriding `adapt`. A place is the number of a draw.

    Observations take effect at the step boundary, that is with the next `draw`, and in the order of the tasks, however
    their answers happened to finish. Those that wait are part of the state. Streams are copied to look ahead: `adapt`
    replaces what it changes.
    """

    _observed: Mapping[int, float] = MappingProxyType({})

    def observe(self, place: int, score: float) -> None:
        self._observed = {**self._observed, place: score}

    def adapt(self, observed: Sequence[tuple[int, float]]) -> None:
        """Take in what tasks scored: their places, in order, with their scores."""
        raise NotImplementedError

    def take_in_observed(self) -> None:
        """Adapt to what was observed since the last draw."""
        if self._observed:
            self.adapt(sorted(self._observed.items()))
            self._observed = {}

    def draw(self, count: int | None = None) -> list[int]:
        self.take_in_observed()
        return super().draw(count)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "observed": sorted(self._observed.items())}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._observed = dict(state["observed"])


def _part(share: float, rows: np.ndarray) -> int:
    return round(share % 1 * len(rows))


def _drawn(rng: np.random.Generator, rows: np.ndarray, share: float) -> np.ndarray:
    """The rows as often as their share says: all of them, its whole part many times, and some of them once more."""
    some = rng.choice(rows, _part(share, rows), replace=False) if _part(share, rows) else rows[:0]
    return np.concatenate([np.repeat(rows, int(share)), some])


def _fingerprint(weights: Sequence[float], curriculum: Curriculum | None) -> str:
    """A short name of what shapes the order beside length and seed; empty for a plain shuffle."""
    if not weights and curriculum is None:
        return ""
    digest = hashlib.sha256(repr(tuple(weights)).encode())
    if curriculum is not None:
        digest.update(repr((curriculum.epochs, curriculum.mixing)).encode())
        digest.update(np.ascontiguousarray(curriculum.rank).tobytes())
    return digest.hexdigest()[:16]
