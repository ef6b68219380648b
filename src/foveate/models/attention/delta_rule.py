"""The gated delta rule over a forest of segments (Gated DeltaNet, arXiv 2412.06464), and the short convolution in front
of it.

A head has a state S (d_k, d_v). Every token, in the order of its path, lets it decay, corrects what it holds under the
token's key, and reads it with the token's query:

    S <- exp(decay) S,    S <- S + beta k (v - S^T k)^T,    out = S^T q.

A segment begins with the state at the end of its parent, a root with zeros: what a prompt has left in the state is
computed once, and each of its answers starts there. The convolution likewise begins with the last tokens of the path.

`recurrent_delta_rule` takes one token after the other: it is the truth. `chunked_delta_rule` cuts segments into chunks.
Within a chunk the corrections are the solution of a triangular system (the UT transform, section 3.3), computed for all
chunks of the forest at once; then the states go down the forest, level by level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from foveate.records import Forest

_CHUNK = 64
"""The most tokens of a chunk."""


class DeltaRule(Protocol):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, forest: Forest, *, ends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Query and key (T, H_k, d_k), of length 1; value (T, H, d_v), decay (a logarithm, at most 0) and beta (T, H).
        H is a multiple of H_k, and neighbouring heads share keys. All are float32 or float64.

        Returns the output (T, H, d_v), and with `ends` the states behind all segments (K, H, d_k, d_v)."""
        ...


def unit_length(rows: Tensor) -> Tensor:
    """Queries or keys (..., d) as the rule takes them."""
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + 1e-6)


# -------------------------------------------------------------------------------------------- one token at a time


def delta_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences, as for `DeltaRule` with B in place of T, and the states (B, H, d_k, d_v) before
    it: the output (B, H, d_v), and the states behind it."""
    repeat = value.shape[1] // key.shape[1]
    query, key = (rows.repeat_interleave(repeat, 1)[:, :, None] for rows in (query, key))
    state = state * decay.exp()[..., None, None]
    correction = (value[:, :, None] - key @ state) * beta[..., None, None]
    state = torch.addcmul(state, key.transpose(-1, -2), correction)
    return (query @ state)[:, :, 0] * query.shape[-1] ** -0.5, state


def recurrent_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, forest: Forest, *, ends: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The reference, a `DeltaRule`."""
    out: list[Tensor] = []
    behind: list[Tensor] = []
    zeros = value.new_zeros(1, value.shape[1], key.shape[2], value.shape[2])
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        state = zeros if parent < 0 else behind[parent]
        for t in range(start, start + length):
            token = (rows[t : t + 1] for rows in (query, key, value, decay, beta))
            row, state = delta_step(*token, state=state)
            out.append(row)
        behind.append(state)
    return torch.cat(out), torch.cat(behind) if ends else None


# ------------------------------------------------------------------------------------------------------- in chunks


@dataclass(frozen=True, slots=True)
class _Level:
    """The next `count` chunks, whose states come from the chunks of the level before: from its first ones in their
    order, or as `parent` says. The first `inner` of them have others below them, and `ends` are the last ones of
    segments."""

    count: int
    inner: int
    parent: Tensor | None
    ends: Tensor


@dataclass(frozen=True, slots=True)
class Chunks:
    """A forest cut into N chunks of up to C tokens, in the order of their distance from the root, in chunks.

    `tokens` (N, C) are their places in the row, copies of its last token where a chunk is shorter, and `real` (N, C) is
    0.0 at the copies. `place` (T,) is where each token of the row stands among N * C; `last` (K,) where the last chunk
    of each segment stands among those of all levels."""

    tokens: Tensor
    real: Tensor
    place: Tensor
    last: Tensor
    levels: tuple[_Level, ...]

    def take(self, rows: Tensor) -> Tensor:
        """Rows (T, H, ...) as (N, H, C, ...)."""
        heads = rows.shape[1]
        index = self.tokens[:, None] * heads + torch.arange(heads, device=rows.device)[:, None]
        return rows.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)

    def give(self, values: Tensor) -> Tensor:
        """Values (N, H, C, d) as (T, H, d)."""
        heads, size = values.shape[1:3]
        chunk, offset = self.place // size, self.place % size
        index = (chunk[:, None] * heads + torch.arange(heads, device=values.device)) * size + offset[:, None]
        return values.flatten(0, 2).index_select(0, index.flatten()).unflatten(0, index.shape)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # those that were made for sampling must also do for training
def chunks_of(forest: Forest, device: torch.device, size: int = _CHUNK) -> Chunks:
    """The chunks of a forest, of up to `size` tokens."""
    spans: list[tuple[int, int]] = []  # of each chunk its first token and its length
    above: list[int] = []
    last: list[int] = []
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        before = last[parent] if parent >= 0 else -1
        for first in range(0, length, size):
            above.append(before)
            before = len(spans)
            spans.append((start + first, min(size, length - first)))
        last.append(before)
    depth, height = [0] * len(spans), [0] * len(spans)
    for chunk, parent in enumerate(above):
        depth[chunk] = depth[parent] + 1 if parent >= 0 else 0
    for chunk, parent in reversed([*enumerate(above)]):
        if parent >= 0:
            height[parent] = max(height[parent], height[chunk] + 1)
    # those with most below them first, so that a level most often goes on from the first ones of the level before
    order = sorted(range(len(spans)), key=lambda chunk: (depth[chunk], -height[chunk]))
    number = {chunk: i for i, chunk in enumerate(order)}
    begin, count = torch.tensor([spans[chunk] for chunk in order]).T[..., None]
    offset = torch.arange(size)
    tokens, real = begin + offset.minimum(count - 1), offset < count
    place = torch.empty(forest.tokens, dtype=torch.int64)
    place[tokens[real]] = torch.arange(real.numel()).view(real.shape)[real]
    levels: list[_Level] = []
    before, ends, ends_order = list[int](), set(last), list[int]()
    for level in range(max(depth) + 1):
        own = [chunk for chunk in order if depth[chunk] == level]
        parents = [number[above[chunk]] - number[before[0]] for chunk in own] if levels else []
        index = None if parents == [*range(len(parents))] else torch.tensor(parents, device=device)
        ending = [i for i, chunk in enumerate(own) if chunk in ends]
        ends_order += [own[i] for i in ending]
        inner = sum(height[chunk] > 0 for chunk in own)
        levels.append(_Level(len(own), inner, index, torch.tensor(ending, dtype=torch.int64, device=device)))
        before = own
    places = {chunk: i for i, chunk in enumerate(ends_order)}
    made = tokens, real.to(torch.float32), place, torch.tensor([places[chunk] for chunk in last])
    return Chunks(*(one.to(device) for one in made), levels=tuple(levels))


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, forest: Forest, *, ends: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The fast one, a `DeltaRule`. Letters: N chunks, C their tokens, h the heads that share a key.

    Within a chunk, let D_i be the decay from its begin to token i, D_ij = D_i / D_j, and S the state before it. With
    A_ij = beta_i D_ij k_i k_j for j < i, the corrections are U - W S, where (1 + A) U = beta v and (1 + A) W = beta D k
    (equations 8 and 9 of arXiv 2412.06464)."""
    chunks = chunks_of(forest, query.device)
    query, key, value = (chunks.take(rows) for rows in (query * query.shape[-1] ** -0.5, key, value))
    real = chunks.real[:, None].to(key.dtype)  # others neither change a state nor let it decay
    total, beta = (chunks.take(decay) * real).cumsum(-1), chunks.take(beta) * real
    repeat = value.shape[1] // key.shape[1]
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=key.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    seen = (query @ key.transpose(-1, -2)).repeat_interleave(repeat, 1) * between
    alike = (key @ key.transpose(-1, -2)).repeat_interleave(repeat, 1) * between * beta[..., None]
    query, key = query.repeat_interleave(repeat, 1), key.repeat_interleave(repeat, 1)
    known = torch.cat([value * beta[..., None], key * (beta * total.exp())[..., None]], -1)
    own, held = torch.linalg.solve_triangular(alike, known, upper=False, unitriangular=True).split(
        [value.shape[-1], key.shape[-1]], -1
    )
    reading = torch.cat([held, query * total.exp()[..., None]], 2)
    writing = (key * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
    left = total[..., -1].exp()[..., None, None]
    counts = [level.count for level in chunks.levels]
    of_levels = zip(*(made.split(counts) for made in (own, reading, seen, writing, left)), strict=True)
    out, behind = list[Tensor](), list[Tensor]()
    after: Tensor | None = None
    for level, (new, reads, sees, writes, stays) in zip(chunks.levels, of_levels, strict=True):
        going = level.count if ends else level.inner
        if after is None:
            out.append(sees @ new)
            state = writes[:going] @ new[:going]
        else:
            before = after[: level.count] if level.parent is None else after.index_select(0, level.parent)
            corrected, read = (reads @ before).chunk(2, 2)
            new = new - corrected
            out.append(read + sees @ new)
            state = before[:going] * stays[:going] + writes[:going] @ new[:going]
        if ends:
            behind.append(state.index_select(0, level.ends))
        after = state
    return chunks.give(torch.cat(out)), torch.cat(behind)[chunks.last] if ends else None


# -------------------------------------------------------------------------------------------- the short convolution


def _path_tails(forest: Forest, count: int) -> list[list[int]]:
    """For each segment the places of the last `count` tokens on the path to its end, -1 before the root."""
    tails: list[list[int]] = []
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        before = tails[parent] if parent >= 0 else [-1] * count
        tails.append([*before, *range(start + max(0, length - count), start + length)][-count:])
    return tails


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def path_tails(forest: Forest, size: int, device: torch.device) -> Tensor:
    """For each segment the places of the tokens that a convolution of `size` tokens remembers at its end, -1 before the
    root: (K, size - 1)."""
    return torch.tensor(_path_tails(forest, size - 1), device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _split_windows(forest: Forest, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens whose last `size` tokens on their path, themselves included, do not stand together in the row: their
    places (F,), and those of these tokens (F, size), -1 before the root."""
    tails = [*_path_tails(forest, size - 1), [-1] * (size - 1)]
    places: list[int] = []
    windows: list[list[int]] = []
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        own = range(start, start + min(length, size - 1))
        path = [*tails[parent], *own]
        places += own
        windows += [path[i : i + size] for i in range(len(own))]
    return torch.tensor(places, device=device), torch.tensor(windows, device=device)


def forest_convolution(rows: Tensor, weight: Tensor, forest: Forest) -> Tensor:
    """Each token's sum of the last tokens on its path, itself last, weighted by channel: rows (T, D), weight (D, size)
    with size > 1; returns (T, D). Equal to `reference_convolution`."""
    tokens, size = len(rows), weight.shape[1]
    padded = functional.pad(rows, (0, 0, size - 1, 0))
    out = padded[:tokens] * weight[:, 0]
    for i in range(1, size):
        out = out + padded[i : i + tokens] * weight[:, i]
    places, windows = _split_windows(forest, size, rows.device)
    return out.index_copy(0, places, window_convolution(rows_at(rows, windows), weight))


def reference_convolution(rows: Tensor, weight: Tensor, forest: Forest) -> Tensor:
    """`forest_convolution`, token by token along each path."""
    size, out = weight.shape[1], []
    paths: list[Tensor] = []
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        before = rows.new_zeros(size - 1, rows.shape[1]) if parent < 0 else paths[parent]
        path = torch.cat([before, rows[start : start + length]])
        out += [window_convolution(path[None, i : i + size], weight) for i in range(length)]
        paths.append(path[1 - size :])
    return torch.cat(out)


def window_convolution(windows: Tensor, weight: Tensor) -> Tensor:
    """The convolution of single windows: (F, size, D) with weight (D, size) to (F, D)."""
    return (windows * weight.T).sum(1)


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """The rows (T, D) at places (..., size), zeros at -1."""
    return rows[places.clamp(min=0)] * (places >= 0)[..., None]
