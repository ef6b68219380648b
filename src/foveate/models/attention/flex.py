"""Forest attention on GPUs: one call of PyTorch's FlexAttention per layer, under the mask of the forest.

The descendants of a segment stand together in the row, right behind it. So a token sees exactly those at or before it
whose segment is still open, that is, whose last descendant has not ended: key k is seen by query q where
k <= q < end[k], and of these, with a sliding window, the last ones on its path. In a bidirectional segment a token
also sees those behind it, so that k < reach[q], the end of the segment, takes the place of k <= q. Blocks of 128 x 128
tokens in which nothing is seen are skipped, and those in which all is seen need no mask (FlexAttention: arXiv
2412.05496).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from foveate.models.attention.runs import path_positions, subtree_ends
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
    """Compiled for rows of any length and any forest: training, sampling and rows of one block each have their own
    kernel, with and without a window. A mask that cannot be compiled raises, since all scores would be computed
    instead."""
    compiled: Any = torch.compile  # whose declared overloads lack the limit
    return compiled(flex_attention, dynamic=True, fullgraph=True, recompile_limit=64)


@lru_cache(maxsize=64)
@torch.no_grad()
@torch.inference_mode(False)  # one that was made for sampling must also do for training
def block_mask(forest: Forest, device: torch.device, window: int | None = None) -> BlockMask:
    """The mask of a forest, and which of its blocks are empty, full or neither."""
    count = -(-forest.tokens // BLOCK)
    visible = _visible(forest, count, window)
    some, whole = _blocks(*visible)
    # all tensors: FlexAttention compiles no mask that depends on a number
    end, reach, position, earliest = (values.to(device) for values in visible)

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    def seen_in_window(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k]) & (position[k] >= earliest[q])

    def seen_both_ways(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < reach[q]) & (q < end[k]) & (position[k] >= earliest[q])

    partial, full = _ordered(some & ~whole, device), _ordered(whole, device)
    mod: Any = seen_both_ways if any(forest.bidirectional) else seen if window is None else seen_in_window
    length = count * BLOCK
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(length, length))


def _visible(forest: Forest, count: int, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each token of `count` blocks, int64 (count * BLOCK,): the `end` of the last descendant of its segment, where
    it stops being seen; its `reach`, the place behind the last token that it sees; its position on its path, and the
    `earliest` position that it sees."""
    position_T, length_K = path_positions(forest), torch.tensor(forest.length)
    bidirectional_T = torch.tensor(forest.bidirectional).repeat_interleave(length_K)
    start_T = torch.tensor(forest.start).repeat_interleave(length_K)
    causal_T = torch.arange(forest.tokens) + 1
    end_T = torch.tensor(subtree_ends(forest)).repeat_interleave(length_K)
    reach_T = torch.where(bidirectional_T, start_T + length_K.repeat_interleave(length_K), causal_T)
    earliest_T = torch.zeros_like(position_T) if window is None else position_T - window + 1
    begin_T = position_T - (causal_T - 1 - start_T)  # where its segment begins on the path
    earliest_T = torch.where(bidirectional_T, earliest_T.minimum(begin_T), earliest_T)
    filled = ((end_T, 1), (reach_T, 1), (position_T, 0), (earliest_T, 0))
    end, reach, position, earliest = (_filled(values_T, step, count) for values_T, step in filled)
    return end, reach, position, earliest


def _filled(values_T: Tensor, step: int, count: int) -> Tensor:
    """As many values as `count` blocks have tokens; those of added tokens are `step` times the place behind them."""
    added = torch.arange(len(values_T), count * BLOCK) + 1
    return torch.cat([values_T, step * added])


def _blocks(end: Tensor, reach: Tensor, position: Tensor, earliest: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of (queries, keys) have something that is seen, and which nothing that is not, bool (n, n). With a
    window, the first may name too many."""
    end, reach, position, earliest = (values.view(-1, BLOCK) for values in (end, reach, position, earliest))
    first = torch.arange(len(end)) * BLOCK
    some = (first < reach.amax(1)[:, None]) & (first[:, None] < end.amax(1))
    some &= position.amax(1) >= earliest.amin(1)[:, None]
    whole = (first + BLOCK <= reach.amin(1)[:, None]) & (first[:, None] + BLOCK <= end.amin(1))
    whole &= position.amin(1) >= earliest.amax(1)[:, None]
    return some, whole


def _ordered(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many key blocks are chosen for each query block, and all of them with the chosen ones first: int32."""
    order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)
    counts, order = chosen.sum(1).int(), order.int()
    return counts[None, None].to(device), order[None, None].contiguous().to(device)
