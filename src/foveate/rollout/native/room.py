"""How many places the rows of a running batch take, now and with more of them, and who comes in one packed row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from foveate.rollout.native.rows import Rows
from foveate.rollout.native.shelves import first_room, slot_size

_ROW = 2048
"""Tokens of a packed row on a processor, whose caches hold what lies between two products of matrices for so many."""


class Use:
    """The places that the next step takes, with larger slots for answers that have filled theirs."""

    def __init__(self, rows: Rows) -> None:
        self._answers, self._prompts = (
            {size: (len(shelf.members), shelf.places) for size, shelf in kind.items()}
            for kind in (rows.answers, rows.prompts)
        )
        self._shares_slot = rows.shares_slot
        self._waiting = sum(len(shelf.members) * shelf.places for shelf in rows.waiting.values())
        for own in rows.own:
            for one in rows.full(own):
                _put(self._answers, own.shelf.size, 0, -1)
                _put(self._answers, 2 * own.shelf.size, min(2 * own.shelf.size, one.limit))

    @property
    def places(self) -> int:
        shelves = (*self._answers.values(), *self._prompts.values())
        return self._waiting + sum(count * places for count, places in shelves)

    def with_more(self, prompt: int, begun: Sequence[int], limit: int) -> int:
        """All places, if a prompt of so many tokens came too, and its answers with those that were begun."""
        if self._shares_slot(prompt, len(begun)):
            begun, limit = [prompt + begun[0]], prompt + limit
        else:
            _put(self._prompts, slot_size(prompt), prompt)
        for tokens in begun:
            size = slot_size(first_room(tokens, limit))
            _put(self._answers, size, min(size, max(limit, 1)))
        return self.places


def row_of(tokens: Sequence[int], device: torch.device) -> int:
    """How many newcomers with so many tokens go through the model together: on a processor those that a row has room
    for, but one at least."""
    if device.type != "cpu":
        return len(tokens)
    return max(1, sum(end <= _ROW for end in accumulate(tokens)))


def _put(shelves: dict[int, tuple[int, int]], size: int, places: int, more: int = 1) -> None:
    count, before = shelves.get(size, (0, 0))
    shelves[size] = count + more, max(before, places)
