"""The memory that layers have of the sequences of a decode batch while they are sampled, a `SequenceState` for each
layer.

`GroupCache` drives the states of all layers and does not know their kinds; `Rows` is what all of them share: which row
belongs to which prompt, and how far it has come. A kind of layer is a class with the methods of `SequenceState`, and a
door like `GroupCache.attend` by which transformers' modules reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.models.attention.kernels import PLAIN, AttentionOptions
from foveate.models.policy import Policy
from foveate.records import Forest
from foveate.rollout.native.recurrent import Recurrence

_HIDDEN = -1e30
"""The bias of a key that is out of sight."""
_PLACES = 256
"""A step that is recorded meets so many places of each answer, or a multiple."""


def cached_numbers(policy: Policy) -> int:
    """Numbers that a token has as keys and values in all layers of the language model."""
    parameters = policy.part("language").named_parameters()
    return 2 * sum(len(weight) for name, weight in parameters if name.endswith("k_proj.weight"))


@dataclass(frozen=True, slots=True)
class Moves:
    """How the rows change when answers leave: row `movers[i]` takes the place `gaps[i]`, and the first `rows` are left.
    `prompts`: those that stay, in order, where others leave; None: all stay."""

    gaps: list[int]
    movers: list[int]
    rows: int
    prompts: list[int] | None


class SequenceState(Protocol):
    """A layer's memory of each sequence: keys and values, or the state of a recurrence. It is made with the `Rows` of
    its batch. The inputs of its methods are those of the layer's kind; B answers are the rows of a step."""

    def prefill(self, *inputs: Any, **named: Any) -> None:
        """Keep what the answers need of the packed row of prompts and of begun answers; the layer itself computes its
        output there."""
        ...

    def fork(self) -> None:
        """Every answer continues from the last token of its prompt, or of what was begun of it."""
        ...

    def extend(self, *inputs: Any, **named: Any) -> Tensor:
        """Take in one token of each of the B answers; the layer's output for them. `Rows.step` tokens were taken in
        before. While steps are recorded, it is the same operations on the same tensors every time."""
        ...

    def drop(self, moves: Moves) -> None:
        """Answers, and perhaps prompts, have left. `Rows` is already that of the others."""
        ...


class Rows:
    """Which sequences the rows of a decode batch are: G prompts, each with `samples` answers of at most `capacity`
    tokens to be taken in, or with as many as were begun.

    `step` places of each answer are filled. Answers that were begun end at the same place; shorter ones have `pads`
    places before them. `last_B` is the place in the packed row of the token that each answer continues. `grid` (G, n)
    holds the row at each place of the groups, any row where the place is empty; `place` group and place of each row,
    two (B,) tensors. After `fix` a step does the same on tensors of the same shapes as the one before, so that it can
    be recorded: it finds its place by the tensor `at`, and meets the first `places` of each answer.
    """

    def __init__(
        self, forest: Forest, prompt_lengths: Sequence[int], samples: int, capacity: int, device: torch.device
    ) -> None:
        """`forest` is that of the packed row. A root with the segments that continue it is a prompt, as far as its
        length says; what follows are the answers that were begun. A prompt without any gets `samples` answers."""
        starts = [start for start, above in zip(forest.start, forest.parent, strict=True) if above < 0]
        stops = [*starts[1:], forest.tokens]
        group_at = {start + length: g for g, (start, length) in enumerate(zip(starts, prompt_lengths, strict=True))}
        firsts: list[list[int]] = [[] for _ in starts]
        for start, above in zip(forest.start, forest.parent, strict=True):
            end = forest.start[above] + forest.length[above]
            if above >= 0 and end in group_at:
                firsts[group_at[end]].append(start)
        rows: list[tuple[int, int, int]] = []  # of each answer its group, its first token, and how many were begun
        for group, (own, stop) in enumerate(zip(firsts, stops, strict=True)):
            began = [(group, first, after - first) for first, after in pairwise([*own, stop])]
            rows += began or [(group, starts[group] + prompt_lengths[group] - 1, 0)] * samples
        begun = [tokens for _, _, tokens in rows]
        self.device = device
        self.step = max(begun)
        self.pads = [self.step - tokens for tokens in begun]
        self.capacity = capacity + max(self.pads)
        self.lengths = list(prompt_lengths)
        self.groups = [group for group, _, _ in rows]
        self.at: Tensor | None = None
        self.places = 0
        self.biases: dict[int | None, Tensor] = {}
        start_G, last_G = torch.tensor(starts)[:, None], torch.tensor(self.lengths)[:, None] - 1
        self.prompt_index = (start_G + torch.arange(max(self.lengths)).minimum(last_G)).to(device)
        first_B = torch.tensor([first for _, first, _ in rows])
        offsets = torch.arange(self.step) - torch.tensor(self.pads)[:, None]
        self.begun_index = (first_B[:, None] + offsets.clamp(min=0)).to(device)
        self.last_B = (first_B + (torch.tensor(begun) - 1).clamp(min=0)).to(device)

    def fix(self) -> None:
        """Until rows leave or `is_fixed` says no more, steps find their place by a tensor, and meet places of the
        answers that are still to be filled, too, behind a bias of -inf."""
        self.at = torch.tensor([self.step], device=self.device)
        self.places = min(self.capacity, -(-(self.step + _PLACES // 4) // _PLACES) * _PLACES)

    def loosen(self) -> None:
        """Steps find their place by a number again."""
        self.at = None

    @property
    def is_fixed(self) -> bool:
        """Whether the next step does what the one before it did."""
        return self.at is not None and self.step < self.places

    def advance(self) -> None:
        """A token of each answer went through all layers."""
        self.step += 1
        if self.at is not None:
            self.at += 1

    def drop(self, live: Sequence[int]) -> tuple[list[int], Moves]:
        """Only the answers in the rows `live` (rising) are left: the former row of each of them, and what moved.

        Rows from the end fill the gaps, so that one row is copied per finished answer. The prompts of finished groups
        leave when they are at least half of all, so that copying the rest costs little per group."""
        count = len(live)
        gaps = sorted(set(range(count)).difference(live))
        movers = list(live[count - len(gaps) :])
        order = list(range(count))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        self.groups = [self.groups[row] for row in order]
        self.pads = [self.pads[row] for row in order]
        self.at = None
        prompts = sorted(set(self.groups))
        leave = 2 * len(prompts) <= len(self.lengths)
        if leave:
            self.lengths = [self.lengths[group] for group in prompts]
            renamed = {group: number for number, group in enumerate(prompts)}
            self.groups = [renamed[group] for group in self.groups]
        self.arrange()
        return order, Moves(gaps, movers, count, prompts if leave else None)

    def arrange(self) -> None:
        """Where the rows stand in the grid of groups x places that meets the prompts, and what is out of their sight
        there and among their own places."""
        filled: list[list[int]] = [[] for _ in self.lengths]
        places = []
        for row, group in enumerate(self.groups):
            places.append(len(filled[group]))
            filled[group].append(row)
        width = max(map(len, filled))
        self.grid = torch.tensor([rows + [0] * (width - len(rows)) for rows in filled], device=self.device)
        self.place = torch.tensor(self.groups, device=self.device), torch.tensor(places, device=self.device)
        lengths = torch.tensor(self.lengths)
        outside = torch.arange(max(self.lengths)) >= lengths[:, None]
        bias = torch.zeros(outside.shape).masked_fill(outside, float("-inf"))[:, None, None]
        self._prompt_bias = bias.to(self.device) if bool(outside.any()) else None
        self._pads_B = torch.tensor(self.pads, device=self.device)
        self._lengths_G = lengths.to(self.device)
        self.own_bias = None
        if any(self.pads):
            before = torch.arange(self.capacity, device=self.device) < self._pads_B[:, None]
            zeros = torch.zeros(before.shape, device=self.device)
            self.own_bias = zeros.masked_fill(before, float("-inf"))[:, None, None]

    def prompt_bias(self, window: int | None, repeat: int) -> Tensor | None:
        """Hides from the answers' current tokens, of the prompts, padding and what the window has left behind (G, 1, 1
        or places x repeat, L). That may be all; a finite bias then gives a log-sum-exp that counts for nothing."""
        if window is None:
            return self._prompt_bias
        lengths = self._lengths_G[:, None, None]
        places = torch.arange(max(self.lengths), device=self.device)
        now = self.step if self.at is None else self.at
        own = now - self._pads_B[self.grid][..., None]
        hidden = (places >= lengths) | (lengths + own - places >= window)
        bias = torch.zeros(hidden.shape, device=self.device).masked_fill(hidden, _HIDDEN)
        return bias.repeat_interleave(repeat, 1)[:, None]

    def fixed_bias(self, window: int | None, at: Tensor) -> Tensor:
        """Hides from tokens at place `at` (1,) places of their answers, of all of them: (1 or B, 1, 1, places)."""
        if window not in self.biases:
            places = torch.arange(self.places, device=self.device)
            hidden = places > at if window is None else (places > at) | (places <= at - window)
            bias = torch.zeros(hidden.shape, device=self.device).masked_fill(hidden, float("-inf"))
            pads = 0.0 if self.own_bias is None else self.own_bias[..., : self.places]
            self.biases[window] = bias + pads
        return self.biases[window]


class KeysAndValues:
    """The state of an attention layer, with or without a sliding window and sinks.

    The keys and values of a prompt are kept once, (G, H_kv, P, d), shorter prompts padded; those of answers once per
    answer, (B, H_kv, capacity, d), filled up to `step` and 0 behind it. A step computes its output in two parts, whose
    softmaxes are merged by their log-sum-exp: all answers of a group against their one prompt in one product, and each
    answer against itself.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.prompt: list[Tensor] = []
        self.own: list[Tensor] = []

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """Key and value (H_kv, T, d) of the packed row."""
        for kept, index in ((self.prompt, self._rows.prompt_index), (self.own, self._rows.begun_index)):
            kept += [t.transpose(0, 1)[index].transpose(1, 2).contiguous() for t in (key, value)]

    def fork(self) -> None:
        begun, self.own = self.own, []
        for kept in begun:
            own = kept.new_zeros(len(self._rows.groups), kept.shape[1], self._rows.capacity, kept.shape[3])
            own[:, :, : self._rows.step] = kept
            self.own.append(own)

    def drop(self, moves: Moves) -> None:
        for own in self.own if moves.gaps else ():
            own[moves.gaps, :, : self._rows.step] = own[moves.movers, :, : self._rows.step]
        if moves.prompts is not None:
            longest, index = max(self._rows.lengths), torch.tensor(moves.prompts, device=self._rows.device)
            self.prompt = [rows[index, :, :longest] for rows in self.prompt]

    def extend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions) -> Tensor:
        """Query (H, B, d), key and value (H_kv, B, d); returns (H, B, d)."""
        heads, rows, width = query.shape
        rows_query = query.to(value.dtype).transpose(0, 1).reshape(rows, key.shape[0], -1, width)
        prompt, prompt_lse = self._attend_prompt(rows_query, scale, options.window)
        own, own_lse = self._attend_own(rows_query, key, value, scale, options.window)
        share = torch.sigmoid(prompt_lse - own_lse)[..., None]
        out = torch.lerp(own.float(), prompt.float(), share)
        if options.sinks is not None:
            lse = torch.logaddexp(prompt_lse, own_lse)
            out *= torch.sigmoid(lse - options.sinks.float().view(lse.shape[1:]))[..., None]
        return out.to(value.dtype).view(rows, heads, width).transpose(0, 1)

    def _attend_prompt(self, query: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """Query (B, H_kv, H / H_kv, d) against the prompts; the queries of a group meet its keys in one product."""
        groups, places = self._rows.grid.shape
        _, kv_heads, repeat, width = query.shape
        grid = query[self._rows.grid].transpose(1, 2).reshape(groups, kv_heads, places * repeat, width)
        key, value = self.prompt
        out, lse = partial_attention(grid, key, value, scale, self._rows.prompt_bias(window, repeat))
        group, place = self._rows.place
        return (
            out.view(groups, kv_heads, places, repeat, width)[group, :, place],
            lse.view(groups, kv_heads, places, repeat)[group, :, place],
        )

    def _attend_own(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Query (B, H_kv, H / H_kv, d) against the tokens of its own answer, the row's own token included."""
        rows = self._rows
        own_key, own_value = (own[: len(query)] for own in self.own)
        if rows.at is not None:
            for own, new in ((own_key, key), (own_value, value)):
                own.index_copy_(2, rows.at, new.transpose(0, 1)[:, :, None])
            seen = own_key[:, :, : rows.places], own_value[:, :, : rows.places]
            return partial_attention(query, *seen, scale, rows.fixed_bias(window, rows.at))
        own_key[:, :, rows.step] = key.transpose(0, 1)
        own_value[:, :, rows.step] = value.transpose(0, 1)
        end = rows.step + 1
        begin = 0 if window is None else max(0, end - window)
        bias = None if rows.own_bias is None else rows.own_bias[..., begin:end]
        return partial_attention(query, own_key[:, :, begin:end], own_value[:, :, begin:end], scale, bias)


class GroupCache:
    """The states of all layers of a decode batch.

    During the prefill the row holds the packed prompts, and below them the answers that were begun. After `fork` it
    holds one token of each of B live answers, the answers of a group side by side at first. `extend` ends a step;
    `drop` lets finished answers leave.
    """

    def __init__(
        self, forest: Forest, prompt_lengths: Sequence[int], samples: int, capacity: int, device: torch.device
    ) -> None:
        """As for `Rows`."""
        self.rows = Rows(forest, prompt_lengths, samples, capacity, device)
        self.states: dict[int, SequenceState] = {}
        self._forked = False

    def fork(self) -> None:
        """From the prompts to the answers."""
        self._forked = True
        for state in self.states.values():
            state.fork()
        self.rows.arrange()

    def extend(self) -> None:
        """The row that went through all layers is now part of the answers."""
        self.rows.advance()

    def drop(self, live: Sequence[int]) -> list[int]:
        """Only the answers in the rows `live` (rising) are left: the former row of each of them."""
        order, moves = self.rows.drop(live)
        for state in self.states.values():
            state.drop(moves)
        return order

    def call_layer(
        self, layer: int, kind: Callable[[Rows], SequenceState], kept: Sequence[Any], given: Sequence[Any]
    ) -> Any:
        """One call of a layer with a state of this kind. During the prefill the state keeps `kept` and the answer is
        None; later it is the state's output for what is `given`. Layers come in order."""
        if not self._forked:
            assert layer not in self.states, "layers come once each"
            self.states[layer] = kind(self.rows)
            return self.states[layer].prefill(*kept)
        if layer == 0:
            self.rows.biases.clear()
        return self.states[layer].extend(*given)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions = PLAIN
    ) -> Tensor | None:
        """The door of `foveate.models.attention.kernels.KeyValueCache`: query (H, T, d), key and value (H_kv, T, d).
        Returns None during the prefill, else the output (H, B, d)."""
        key = key.to(value.dtype)
        return self.call_layer(layer, KeysAndValues, (key, value), (query, key, value, scale, options))

    def recur(self, layer: int, kept: Sequence[Any], given: Sequence[Any]) -> Any:
        """The door of recurrent layers, see `foveate.models.attention.kernels.KeyValueCache`."""
        return self.call_layer(layer, Recurrence, kept, given)


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a part of the keys, with what is needed to merge it with other parts.

    query (..., Q, d), key and value (..., L, d), bias broadcast to (..., Q, L) or None; returns the output (..., Q, d)
    and the log-sum-exp of the scores (..., Q) in float32. The log-sum-exp comes from the largest probability p of a
    row, which is exp(largest score - log-sum-exp) and at least 1 / L: no second pass of exponentials.
    """
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    if bias is not None:
        scores += bias
    probs = scores.softmax(-1)
    lse = scores.amax(-1) - probs.amax(-1).log()
    return probs.to(value.dtype) @ value, lse
