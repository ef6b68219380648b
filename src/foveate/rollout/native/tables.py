"""The numbers of the answers that are sampled, in tables with a row, a seat, for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.records import Answer, PackedGroup
from foveate.rollout.native.sampling import require_numbers


class AnswerTables:
    """Uniform numbers that draw the tokens, float64; the tokens, their log-probs, and the experts that each was
    computed with, int16 (layers, experts per token), -1 where it was not: all by (seat, token)."""

    def __init__(self, device: torch.device) -> None:
        self._free: list[int] = []
        self._token_ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(0, 0, device=device)
        self._uniform = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self._experts: Tensor | None = None

    def take(self, uniform: Tensor) -> int:
        """A seat for an answer of at most as many tokens as there are uniform numbers."""
        tokens = len(uniform)
        seats, width = self._uniform.shape
        if not self._free or tokens > width:
            more = 0 if self._free else max(8, seats)
            grown = 0, max(tokens - width, 0), 0, more
            self._token_ids, self._logprobs = pad(self._token_ids, grown), pad(self._logprobs, grown)
            self._uniform = pad(self._uniform, grown)
            if self._experts is not None:
                self._experts = pad(self._experts, (0, 0, 0, 0, *grown), value=-1)
            self._free += range(seats, seats + more)
        seat = self._free.pop()
        self._uniform[seat, :tokens] = uniform.to(self._uniform.device)
        if self._experts is not None:
            self._experts[seat] = -1
        return seat

    def give_back(self, seat: int) -> None:
        self._free.append(seat)

    def place(self, token_B: Tensor) -> Tensor:
        """Where tokens of those numbers stand; rows of answers that are done may run on beyond the end."""
        return token_B.clamp(max=self._uniform.shape[1] - 1)

    def uniform(self, seat_B: Tensor, at_B: Tensor) -> Tensor:
        return self._uniform[seat_B, at_B]

    def write(self, seat_B: Tensor, at_B: Tensor, token_B: Tensor, logprob_B: Tensor) -> None:
        self._token_ids[seat_B, at_B], self._logprobs[seat_B, at_B] = token_B, logprob_B

    def keep_experts(self, layers: int, per_token: int) -> None:
        """From now on there is room for the experts of tokens."""
        if self._experts is None:
            shape = *self._uniform.shape, layers, per_token
            self._experts = torch.full(shape, -1, dtype=torch.int16, device=self._uniform.device)

    def write_experts(self, seat_B: Tensor, at_B: Tensor, experts: Tensor) -> None:
        """The experts (B, layers, experts per token) that tokens were computed with."""
        assert self._experts is not None
        self._experts[seat_B, at_B] = experts

    def read(self, seat: int, tokens: slice) -> tuple[list[int], list[float], np.ndarray | None]:
        """Tokens, log-probs and experts of an answer, from one number to another. Raises EngineError for a log-prob
        that is NaN, as greedy tokens of a model without numbers have."""
        experts = None if self._experts is None else _as_array(self._experts[seat, tokens])
        logprobs = self._logprobs[seat, tokens].tolist()
        require_numbers(logprobs)
        return self._token_ids[seat, tokens].tolist(), logprobs, experts


def _as_array(experts: Tensor) -> np.ndarray:
    return experts.to("cpu", torch.int16, copy=True).numpy()


def with_experts(answer: Answer, experts: Tensor, begin: int = 0) -> Answer:
    """An answer with the experts (L - begin, layers, experts per token) of its tokens from `begin` on, where it has
    none."""
    found, place, new = [], 0, _as_array(experts)
    for segment in answer.segments:
        own = np.full((len(segment), *new.shape[1:]), -1, np.int16)
        if segment.routed_experts is not None:
            own[:] = segment.routed_experts
        first = max(begin - place, 0)
        later = new[max(place - begin, 0) : max(place + len(segment) - begin, 0)]
        own[first:] = np.where(own[first:] < 0, later, own[first:])
        found.append(replace(segment, routed_experts=own))
        place += len(segment)
    return replace(answer, segments=tuple(found))


def split_experts(groups: Sequence[PackedGroup], experts: Tensor) -> list[tuple[np.ndarray, tuple[Answer, ...]]]:
    """The experts (T, layers, experts per token) of a packed row: of each group those of its prompt, and its answers
    with theirs."""
    found = []
    for own, group in zip(experts.split([group.tokens for group in groups]), groups, strict=True):
        prompt, *rest = own.split([len(group.prompt), *map(len, group.answers)])
        answers = (with_experts(answer, part) for answer, part in zip(group.answers, rest, strict=True))
        found.append((_as_array(prompt), tuple(answers)))
    return found
