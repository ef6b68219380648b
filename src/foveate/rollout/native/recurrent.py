"""The state of a recurrent layer while answers are sampled: one of each answer, of a size that no length changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.rollout.native.rows import Moves, Rows

_Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""The last rows (B, size, channels) of B answers, their new one included, and their states (B, ...) -> the layer's
output for them, and the next states."""


class Recurrence:
    """A `SequenceState` (`foveate.rollout.native.cache`): the last rows that the layer's convolution remembers, and the
    state of its recurrence."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._kept: list[Tensor] = []
        self._new: list[Tensor] = []

    def prefill(self, ends: Tensor, last: Tensor, state: Tensor) -> None:
        """Of the K segments of the packed row the places of their last tokens (K,), and there the last rows of their
        paths (K, size - 1, channels) and the states (K, H, d_k, d_v)."""
        segment = (ends == self._rows.last_B[:, None]).int().argmax(1)
        self._new = [last[segment], state[segment]]

    def fork(self, moves: Moves) -> None:
        kept = self._kept or [new[:0] for new in self._new]
        self._kept = [torch.cat(pair)[moves.source] for pair in zip(kept, self._new, strict=True)]
        self._new = []

    def extend(self, row: Tensor, step: _Step) -> Tensor:
        """One row (B, channels) of each answer; `step` computes its output."""
        last, state = self._kept
        windows = torch.cat([last, row[:, None].to(last.dtype)], 1)
        out, after = step(windows, state)
        last.copy_(windows[:, 1:])
        state.copy_(after)
        return out

    def drop(self, moves: Moves) -> None:
        self._kept = [kept[moves.source] for kept in self._kept]
