"""Choosing prompts while training: curriculum sampling (RLCS), as of GLM-4.1V-Thinking (arXiv 2507.01006).

The paper does not give its weights; here they follow the variance of a success, p (1 - p), which is greatest at one
half. Prompts that the policy nearly always or nearly never solves teach little: a group's advantages vanish at 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foveate.data.shares import SourcePattern, StratifiedStream
from foveate.data.stream import AdaptiveStream, Stream
from foveate.errors import DataError


class LeaningStream(AdaptiveStream):
    """A stream that leans to rows whose recent success is near one half.

    Rows come in the order of `base`. A row that was answered before, with recent success p, is taken with probability
    max(floor, 4 p (1 - p)), and else passed over until its next epoch; a row without success yet is always taken. The
    recent success is the exponential mean p <- p + smoothing (s - p) of the mean success s of its answers, from the
    first s on. With a stratified base rows are passed over within their source, so that shares stay exact.

    The draws depend on seed and place alone, and observations take effect at the next draw in the order of the tasks,
    so that a resumed run takes the same rows. `position` counts the rows that were taken.
    """

    def __init__(self, base: Stream, *, smoothing: float, floor: float) -> None:
        self.seed, self.batch, self.length = base.seed, base.batch, base.length
        self.position, self._beyond = 0, frozenset()
        self._base, self._smoothing, self._floor = base, smoothing, floor
        self._pattern = base.pattern if isinstance(base, StratifiedStream) else SourcePattern({"": 1.0})
        self._places = (0,) * len(self._pattern.counts)  # of each source: the next one to look at
        self._success: Mapping[int, float] = {}
        self._waiting: Mapping[int, int] = {}  # place of a draw -> its row, until it is observed
        self._plan = f"{base.state()['plan']} rlcs {smoothing!r} {floor!r}"

    def draw(self, count: int | None = None) -> list[int]:
        self.take_in_observed()
        first = self.position
        rows = [self._next(first + number) for number in range(self.batch if count is None else count)]
        self._waiting = {**self._waiting, **dict(enumerate(rows, start=first))}
        self.position += len(rows)
        return rows

    def row(self, place: int) -> int:
        """The row of a draw that is not observed yet."""
        return self._waiting[place]

    def _next(self, place: int) -> int:
        """The next row of the source whose turn it is; where all of an epoch are passed over, the one after it."""
        source, _ = self._pattern(place)
        number = first = self._places[source]
        row = self._row(source, number)
        while not self._is_taken(source, number, row) and number < first + self.length:
            number += 1
            row = self._row(source, number)
        self._places = (*self._places[:source], number + 1, *self._places[source + 1 :])
        return row

    def _row(self, source: int, number: int) -> int:
        return self._base.row_of(source, number) if isinstance(self._base, StratifiedStream) else self._base.row(number)

    def _is_taken(self, source: int, number: int, row: int) -> bool:
        success = self._success.get(row)
        if success is None:
            return True
        chance = max(self._floor, 4 * success * (1 - success))
        return chance >= 1 or float(np.random.default_rng((self.seed, source, number)).random()) < chance

    def adapt(self, observed: Sequence[tuple[int, float]]) -> None:
        success, waiting = dict(self._success), dict(self._waiting)
        for place, score in observed:
            row = waiting.pop(place)
            before = success.get(row)
            success[row] = score if before is None else before + self._smoothing * (score - before)
        last = observed[-1][0]  # earlier ones that were not observed are not graded, and never will be
        self._success = success
        self._waiting = {place: row for place, row in waiting.items() if place > last}

    def metrics(self) -> dict[str, float]:
        """Epochs looked at; rows with a success, its mean, and the share of them within 0.25..0.75."""
        epoch = sum(self._places) / self.length
        known = np.fromiter(self._success.values(), dtype=np.float64)
        found = {"data/epoch": epoch, "data/rows_seen": float(len(known))}
        if len(known):
            middle = (known >= 0.25) & (known <= 0.75)
            found |= {"data/success": float(known.mean()), "data/success_middle": float(middle.mean())}
        return found

    def state(self) -> dict[str, Any]:
        own = {
            "places": list(self._places),
            "success": [[*self._success], [*self._success.values()]],
            "waiting": sorted(self._waiting.items()),
        }
        return {**super().state(), **own}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if len(state["places"]) != len(self._places):
            raise DataError("data position, field places: saved for other sources; start a new run folder")
        self._places = tuple(state["places"])
        self._success = dict(zip(*state["success"], strict=True))
        self._waiting = dict(state["waiting"])
