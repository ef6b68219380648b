"""Keys and values of groups while they are sampled: those of a prompt once, those of an answer once per answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.models.attention.kernels import PLAIN, AttentionOptions
from foveate.models.policy import Policy
from foveate.records import Forest

_HIDDEN = -1e30
"""The bias of a key that is out of sight."""
_PLACES = 256
"""A step that is recorded meets so many places of each answer, or a multiple."""


def cached_numbers(policy: Policy) -> int:
    """Numbers that a token has as keys and values in all layers of the language model."""
    parameters = policy.part("language").named_parameters()
    return 2 * sum(len(weight) for name, weight in parameters if name.endswith("k_proj.weight"))


class GroupCache:
    """The key-value cache of a wave: G prompts, each with `samples` answers of at most `capacity` cached tokens, or
    with as many as were begun.

    It is used in two phases. During the prefill the row holds the packed prompts, and below them the answers that were
    begun: their keys and values are kept, and forest attention computes the output. After `branch` the row holds one
    token of each of B live answers, the answers of a group side by side at first, and `attend` computes the output in
    two parts, whose softmaxes are merged by their log-sum-exp: all answers of a group against their one prompt in one
    product, and each answer against itself. `advance` ends a step; `keep` lets finished answers leave. After `fix` a
    step does the same on tensors of the same shapes as the one before, so that it can be recorded.

    prompt: keys and values (G, H_kv, P, d) per layer, shorter prompts padded and masked by a bias of -inf.
    own: keys and values (B, H_kv, capacity, d) per layer, filled up to `step`, 0 behind it. Answers that were begun
    end at the same place; shorter ones have `pads` places before them, masked likewise.
    """

    def __init__(self, forest: Forest, samples: int, capacity: int, device: torch.device) -> None:
        """`forest` is that of the packed prompts: roots, whose children are the answers that were begun. A root without
        children gets `samples` answers."""
        roots = [segment for segment, above in enumerate(forest.parent) if above < 0]
        below: list[list[int]] = [[] for _ in forest.parent]
        for segment, above in enumerate(forest.parent):
            if above >= 0:
                below[above].append(segment)
        rows = [(group, child) for group, root in enumerate(roots) for child in below[root] or [None] * samples]
        begun = [0 if child is None else forest.length[child] for _, child in rows]
        self.step = max(begun)
        self._pads = [self.step - tokens for tokens in begun]
        self._capacity = capacity + max(self._pads)
        self._lengths = [forest.length[root] for root in roots]
        self._groups = [group for group, _ in rows]
        self._branched = False
        self._device = device
        self._at: Tensor | None = None
        self._places = 0
        self._biases: dict[int | None, Tensor] = {}
        self._prompt: list[tuple[Tensor, Tensor]] = []
        self._begun: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        starts = torch.tensor([forest.start[root] for root in roots])[:, None]
        ends = torch.tensor(self._lengths)[:, None] - 1
        self._index = (starts + torch.arange(max(self._lengths)).minimum(ends)).to(device)
        first = torch.tensor([0 if child is None else forest.start[child] for _, child in rows])[:, None]
        offsets = torch.arange(self.step) - torch.tensor(self._pads)[:, None]
        self._begun_index = (first + offsets.clamp(min=0)).to(device)

    def branch(self) -> None:
        """From the prompts to the answers: make room for the keys and values of all answers."""
        self._branched = True
        for begun in self._begun:
            shape = (len(self._groups), begun[0].shape[1], self._capacity, begun[0].shape[3])
            own = begun[0].new_zeros(shape), begun[1].new_zeros(shape)
            for room, kept in zip(own, begun, strict=True):
                room[:, :, : self.step] = kept
            self._own.append(own)
        self._begun.clear()
        self._arrange()

    def advance(self) -> None:
        """The row that went through all layers is now part of the answers."""
        self.step += 1
        if self._at is not None:
            self._at += 1

    def fix(self) -> None:
        """Until rows leave or `is_fixed` says no more, steps find their place by a tensor, and meet places of the
        answers that are still to be filled, too, behind a bias of -inf."""
        self._at = torch.tensor([self.step], device=self._device)
        self._places = min(self._capacity, -(-(self.step + _PLACES // 4) // _PLACES) * _PLACES)

    def loosen(self) -> None:
        """Steps find their place by a number again."""
        self._at = None

    @property
    def is_fixed(self) -> bool:
        """Whether the next step does what the one before it did."""
        return self._at is not None and self.step < self._places

    def keep(self, live: Sequence[int]) -> list[int]:
        """Only the answers in the rows `live` (rising) go on. Returns the former row of each of the rows that are left.

        Rows from the end fill the gaps, so that one row is copied per finished answer. The prompts of finished groups
        leave when they are at least half of all, so that copying the rest costs little per group."""
        count = len(live)
        gaps = sorted(set(range(count)).difference(live))
        movers = list(live[count - len(gaps) :])
        order = list(range(count))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        for pair in self._own if gaps else ():
            for own in pair:
                own[gaps, :, : self.step] = own[movers, :, : self.step]
        self._groups = [self._groups[row] for row in order]
        self._pads = [self._pads[row] for row in order]
        self._at = None
        groups = sorted(set(self._groups))
        if 2 * len(groups) <= len(self._lengths):
            self._keep_groups(groups)
        self._arrange()
        return order

    def _keep_groups(self, groups: list[int]) -> None:
        self._lengths = [self._lengths[group] for group in groups]
        longest, index = max(self._lengths), torch.tensor(groups, device=self._device)
        self._prompt = [(key[index, :, :longest], value[index, :, :longest]) for key, value in self._prompt]
        renamed = {group: number for number, group in enumerate(groups)}
        self._groups = [renamed[group] for group in self._groups]

    def _arrange(self) -> None:
        """Where the rows stand in the grid of groups x places that meets the prompts. `_grid` (G, n) holds the row at
        each place, any row where the place is empty; `_place` holds group and place of each row, two (B,) tensors."""
        filled: list[list[int]] = [[] for _ in self._lengths]
        places = []
        for row, group in enumerate(self._groups):
            places.append(len(filled[group]))
            filled[group].append(row)
        width = max(map(len, filled))
        self._grid = torch.tensor([rows + [0] * (width - len(rows)) for rows in filled], device=self._device)
        self._place = torch.tensor(self._groups, device=self._device), torch.tensor(places, device=self._device)
        lengths = torch.tensor(self._lengths)
        outside = torch.arange(max(self._lengths)) >= lengths[:, None]
        bias = torch.zeros(outside.shape).masked_fill(outside, float("-inf"))[:, None, None]
        self._bias = bias.to(self._device) if bool(outside.any()) else None
        self._pads_B = torch.tensor(self._pads, device=self._device)
        self._lengths_G = lengths.to(self._device)
        self._own_bias = None
        if any(self._pads):
            before = torch.arange(self._capacity, device=self._device) < self._pads_B[:, None]
            zeros = torch.zeros(before.shape, device=self._device)
            self._own_bias = zeros.masked_fill(before, float("-inf"))[:, None, None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions = PLAIN
    ) -> Tensor | None:
        """The door of `foveate.models.attention.kernels.KeyValueCache`: query (H, T, d), key and value (H_kv, T, d).
        Layers come in order. Returns None during the prefill, else the output (H, B, d)."""
        key = key.to(value.dtype)
        if not self._branched:
            assert layer == len(self._prompt), "layers attend in order, once each"
            for kept, index in ((self._prompt, self._index), (self._begun, self._begun_index)):
                keys, values = (t.transpose(0, 1)[index].transpose(1, 2).contiguous() for t in (key, value))
                kept.append((keys, values))
            return None
        if layer == 0:
            self._biases.clear()
        heads, rows, width = query.shape
        rows_query = query.to(value.dtype).transpose(0, 1).reshape(rows, key.shape[0], -1, width)
        prompt, prompt_lse = self._attend_prompt(layer, rows_query, scale, options.window)
        own, own_lse = self._attend_own(layer, rows_query, key, value, scale, options.window)
        share = torch.sigmoid(prompt_lse - own_lse)[..., None]
        out = torch.lerp(own.float(), prompt.float(), share)
        if options.sinks is not None:
            lse = torch.logaddexp(prompt_lse, own_lse)
            out *= torch.sigmoid(lse - options.sinks.float().view(lse.shape[1:]))[..., None]
        return out.to(value.dtype).view(rows, heads, width).transpose(0, 1)

    def _attend_prompt(self, layer: int, query: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """Query (B, H_kv, H / H_kv, d) against the prompts; the queries of a group meet its keys in one product."""
        groups, places = self._grid.shape
        _, kv_heads, repeat, width = query.shape
        grid = query[self._grid].transpose(1, 2).reshape(groups, kv_heads, places * repeat, width)
        out, lse = partial_attention(grid, *self._prompt[layer], scale, self._prompt_bias(window, repeat))
        group, place = self._place
        return (
            out.view(groups, kv_heads, places, repeat, width)[group, :, place],
            lse.view(groups, kv_heads, places, repeat)[group, :, place],
        )

    def _prompt_bias(self, window: int | None, repeat: int) -> Tensor | None:
        """What the answers' current tokens do not see of the prompts (G, 1, 1 or places x repeat, L): padding, and what
        the window has left behind. That may be all; a finite bias then gives a log-sum-exp that counts for nothing."""
        if window is None:
            return self._bias
        lengths = self._lengths_G[:, None, None]
        places = torch.arange(max(self._lengths), device=self._device)
        now = self.step if self._at is None else self._at
        own = now - self._pads_B[self._grid][..., None]
        hidden = (places >= lengths) | (lengths + own - places >= window)
        bias = torch.zeros(hidden.shape, device=self._device).masked_fill(hidden, _HIDDEN)
        return bias.repeat_interleave(repeat, 1)[:, None]

    def _attend_own(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Query (B, H_kv, H / H_kv, d) against the tokens of its own answer, the row's own token included."""
        own_key, own_value = (own[: len(query)] for own in self._own[layer])
        if self._at is not None:
            for own, new in ((own_key, key), (own_value, value)):
                own.index_copy_(2, self._at, new.transpose(0, 1)[:, :, None])
            seen = own_key[:, :, : self._places], own_value[:, :, : self._places]
            return partial_attention(query, *seen, scale, self._fixed_bias(window, self._at))
        own_key[:, :, self.step] = key.transpose(0, 1)
        own_value[:, :, self.step] = value.transpose(0, 1)
        end = self.step + 1
        begin = 0 if window is None else max(0, end - window)
        bias = None if self._own_bias is None else self._own_bias[..., begin:end]
        return partial_attention(query, own_key[:, :, begin:end], own_value[:, :, begin:end], scale, bias)

    def _fixed_bias(self, window: int | None, at: Tensor) -> Tensor:
        """What tokens at place `at` (1,) do not see of all places of their answers, (1 or B, 1, 1, places)."""
        if window not in self._biases:
            places = torch.arange(self._places, device=self._device)
            hidden = places > at if window is None else (places > at) | (places <= at - window)
            bias = torch.zeros(hidden.shape, device=self._device).masked_fill(hidden, float("-inf"))
            pads = 0.0 if self._own_bias is None else self._own_bias[..., : self._places]
            self._biases[window] = bias + pads
        return self._biases[window]


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
