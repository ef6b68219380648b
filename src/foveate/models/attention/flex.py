"""Forest attention on GPUs: one call of PyTorch's FlexAttention per layer, under the mask of the forest.

The descendants of a segment stand together in the row, right behind it. So a token sees exactly those at or before it
whose segment is still open, that is, whose last descendant has not ended: key k is seen by query q where
k <= q < end[k], and of these, with a sliding window, the last ones on its path. Blocks of 128 x 128 tokens in which
nothing is seen are skipped, and those in which all is seen need no mask (FlexAttention: arXiv 2412.05496).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from foveate.models.attention.runs import path_positions
from foveate.records import Forest

BLOCK = 128
"""Rows are filled up to whole blocks with tokens that see themselves alone."""


def flex_forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact attention over the forest. Query (H, T, d); key, value (H_kv, T, d); sinks (H,); returns (H, T, d)."""
    tokens = query.shape[1]
    mask = block_mask(forest, query.device, window)
    room = mask.seq_lengths[0] - tokens
    rows = (functional.pad(t, (0, 0, 0, room)).contiguous()[None] for t in (query, key, value))
    attend: Any = _compiled() if query.device.type == "cuda" else flex_attention
    out, aux = attend(*rows, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
    if sinks is not None:  # the share that a logit without a value leaves to the others
        out = out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None]).to(out.dtype)[..., None]
    return out[0, :, :tokens]


@cache
def _compiled() -> Any:
    """Compiled for rows of any length and any forest: learning, sampling and rows of one block have each a kernel of
    their own, with and without a window. What cannot be compiled raises, since all scores would be computed instead."""
    compiled: Any = torch.compile  # whose declared overloads lack the limit
    return compiled(flex_attention, dynamic=True, fullgraph=True, recompile_limit=64)


@lru_cache(maxsize=64)
@torch.no_grad()
@torch.inference_mode(False)  # one that was made for sampling must also do for learning
def block_mask(forest: Forest, device: torch.device, window: int | None = None) -> BlockMask:
    """The mask of a forest, and which of its blocks are empty, full or neither."""
    count = -(-forest.tokens // BLOCK)
    end_T, position_T = _filled(_ends(forest), 1, count), _filled(path_positions(forest), 0, count)
    some, whole = _blocks(end_T, position_T, window)
    end, position = end_T.to(device), position_T.to(device)
    earliest = position - (window or 0) + 1  # a tensor: FlexAttention compiles no mask that depends on a number

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    def seen_in_window(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k]) & (position[k] >= earliest[q])

    partial, full = _ordered(some & ~whole, device), _ordered(whole, device)
    mod: Any = seen if window is None else seen_in_window
    length = count * BLOCK
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(length, length))


def _ends(forest: Forest) -> Tensor:
    """For each token, the place in the row behind the last descendant of its segment, int64 (T,)."""
    ends = [start + length for start, length in zip(forest.start, forest.length, strict=True)]
    for segment in reversed(range(len(ends))):
        parent = forest.parent[segment]
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[segment])
    return torch.tensor(ends).repeat_interleave(torch.tensor(forest.length))


def _filled(values_T: Tensor, step: int, count: int) -> Tensor:
    """As many values as `count` blocks have tokens; those of added tokens are `step` times the place behind them."""
    added = torch.arange(len(values_T), count * BLOCK) + 1
    return torch.cat([values_T, step * added])


def _blocks(end_T: Tensor, position_T: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks of (queries, keys) have something that is seen, and which nothing that is not, bool (n, n). With a
    window, the first may name too many."""
    ends, positions = end_T.view(-1, BLOCK), position_T.view(-1, BLOCK)
    number = torch.arange(len(ends))
    first, behind = number[:, None] * BLOCK, (number[:, None] + 1) * BLOCK
    before = number < number[:, None]
    some = (number == number[:, None]) | (before & (first < ends.amax(1)))
    whole = before & (behind <= ends.amin(1))
    if window is not None:
        some &= positions.amin(1)[:, None] - positions.amax(1) < window
        whole &= positions.amax(1)[:, None] - positions.amin(1) < window
    return some, whole


def _ordered(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many key blocks are chosen for each query block, and all of them with the chosen ones first: int32."""
    order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)
    counts, order = chosen.sum(1).int(), order.int()
    return counts[None, None].to(device), order[None, None].contiguous().to(device)
