"""The state of a recurrent layer while answers are sampled: one of each answer, of a size that no length changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.rollout.native.rows import Rows
from foveate.rollout.native.shelves import Kept, Moves

_Step = Callable[..., tuple[Tensor, Tensor]]
"""The last rows (B, size, channels) of B answers, their new one included, their states (B, ...), and which tokens of
the row these are (B,), unless they are all -> the layer's output for them, and the next states."""


class Recurrence:
    """A `SequenceState` (`foveate.rollout.native.cache`): the last rows that the layer's convolution remembers, and the
    state of its recurrence."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._kept: list[Tensor] = []
        self._new: list[Tensor] = []
        self._parked: dict[Kept, list[Tensor]] = {}

    def prefill(self, ends: Tensor, last: Tensor, state: Tensor) -> None:
        """Of the K segments of the packed row the places of their last tokens (K,), and there the last rows of their
        paths (K, size - 1, channels) and the states (K, H, d_k, d_v)."""
        segment = (ends == self._rows.last_B[:, None]).int().argmax(1)
        self._new = [last[segment], state[segment]]

    def fork(self, moves: Moves) -> None:
        kept = self._kept or [new[:0] for new in self._new]
        self._kept = [torch.cat(pair)[moves.source] for pair in zip(kept, self._new, strict=True)]
        self._new = []
        self._let_go()

    def extend(self, row: Tensor, step: _Step) -> Tensor:
        """One row (B, channels) of each answer; `step` computes its output."""
        last, state = self._kept
        windows = torch.cat([last, row[:, None].to(last.dtype)], 1)
        out, after = step(windows, state)
        last.copy_(windows[:, 1:])
        state.copy_(after)
        return out

    def observe(self, row: Tensor, step: _Step) -> Tensor:
        """The rows (T, channels) of the packed row, a token of each answer at a time."""
        returns = self._rows.returns
        start = torch.tensor([back.start for back in returns], device=row.device)
        tokens = torch.tensor([back.tokens for back in returns], device=row.device)
        last, state = (torch.stack(own) for own in zip(*(self._parked[back.one] for back in returns), strict=True))
        out: Tensor | None = None
        for i in range(max(back.tokens for back in returns)):
            live = (tokens > i).nonzero()[:, 0]
            index = start[live] + i
            windows = torch.cat([last[live], row[index][:, None].to(last.dtype)], 1)
            made, state[live] = step(windows, state[live], index)
            last[live] = windows[:, 1:]
            out = made.new_zeros(len(row), *made.shape[1:]) if out is None else out
            out[index] = made
        self._new = [last, state]
        assert out is not None
        return out

    def drop(self, moves: Moves) -> None:
        for one, row in moves.parked:
            self._parked[one] = [kept[row].clone() for kept in self._kept]
        self._let_go()
        self._kept = [kept[moves.source] for kept in self._kept]

    def _let_go(self) -> None:
        """Keep the states of those alone who wait."""
        waiting = {one for shelf in self._rows.waiting.values() for one in shelf.members}
        self._parked = {one: own for one, own in self._parked.items() if one in waiting}
