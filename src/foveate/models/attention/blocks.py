"""Attention of long runs on processors with AVX-512 that are not Intel's, as products of matrices by oneDNN.

PyTorch's flash kernel for CPUs takes its products from MKL, see `foveate.models.matmul`. Here scores are blocks (keys,
queries): the log-sum-exp of a query is then the bias of a product, and the softmax comes with the product. For that,
exp(x) is sigmoid(x - c) * exp(c): where x < c - 15 the two differ by less than float32 rounds off, and oneDNN computes
a sigmoid as it writes a product. exp(c) is a power of two, which the other factor of the next product carries.

The query heads that share keys and values are one matrix, with as many rows for each token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from foveate.models.attention.runs import Part, RunPair
from foveate.models.matmul import added, has_fast_matmul

_QUERIES, _KEYS = 512, 512
"""The longest sides of a block of scores."""
_QUERY_ROUND, _KEY_ROUND = 128, 64
"""Sides are multiples of these, filled up with zeros: oneDNN makes code for each shape, and keeps it."""
_LEAST_FORWARD, _LEAST_BACKWARD = 3 << 22, 5 << 19
"""Multiplications for the scores of a run, below which the flash kernel is as fast."""
_LEAST_KEYS = 256
"""Keys below which the flash kernel's forward is as fast."""
_MOST_THREADS = 4
"""Threads share each product here, and whole blocks in the flash kernel."""
_BELOW, _ABOVE = 22, 65
"""c = ln(2**22) for scores minus a log-sum-exp that has them, which are negative; ln(2**65) for scores minus that of
other keys, which may be up to ln(2**41)."""

_product = torch.ops.mkldnn._linear_pointwise


def split_parts(
    parts: Sequence[Part], query: Tensor, repeat: int, *, forward: bool = False
) -> tuple[list[Part], list[Part]]:
    """The parts for `merge_parts` or `add_gradients`, and those for the flash kernel. Query (T, H, d): `repeat` heads
    in turn have the same keys and values."""
    by_blocks: list[Part] = []
    by_flash: list[Part] = []
    able = (
        query.dtype == torch.float32
        and query.is_cpu
        and type(query) is Tensor
        and has_fast_matmul()
        and torch.get_num_threads() <= _MOST_THREADS
    )
    least = _LEAST_FORWARD if forward else _LEAST_BACKWARD
    for part in parts:
        scores = sum(run.q_length * run.k_length for run in part.runs)
        long = bool(part.runs) and scores * repeat * query.shape[-1] >= least * len(part.runs)
        if forward:
            long = long and not part.first and part.key.length >= _LEAST_KEYS
        (by_blocks if able and long else by_flash).append(part)
    return by_blocks, by_flash


def merge_parts(
    parts: Sequence[Part],
    tensors: tuple[Tensor, Tensor, Tensor],
    repeat: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Merge parts into the output (T, H, d) and the log-sum-exp (T, H) of the first. `tensors`: query, key and value
    (T, H, d)."""
    for head in range(0, lse.shape[1] if parts else 0, repeat):
        group = slice(head, head + repeat)
        queries, keys, values = tensors[0][:, group] * scale, tensors[1][:, head].contiguous(), tensors[2][:, head]
        for run in (run for part in parts for run in part.runs):
            own = []
            for at in _cut(run.k, run.k_length, _KEYS):
                some, theirs = (_padded(rows[at], _KEY_ROUND) for rows in (keys, values))
                own.append((some, theirs.t().contiguous(), at.stop - at.start))
            at = slice(run.q, run.q + run.q_length)
            _merge_run(queries[at], own, out[at, group], lse[at, group])


def _merge_run(queries: Tensor, keys: list[tuple[Tensor, Tensor, int]], out: Tensor, lse: Tensor) -> None:
    """Queries (T, r, d) of r heads and their output and log-sum-exp (T, r); blocks of keys (K, d) and values (d, K),
    and how many of them are true."""
    rows, before = (_padded(some, _QUERY_ROUND) for some in (queries.flatten(0, 1), lse.flatten()))
    base = before
    found, total = _sums(rows, keys, base)
    if not bool(total.max() <= 2.0 ** (_ABOVE - 24)):
        largest = [(some[:count] @ rows.t()).amax(0) for some, _, count in keys]
        base = torch.stack([before, *largest]).amax(0)
        found, total = _sums(rows, keys, base)
    kept = (before - base).exp_()
    total += kept
    base = total.log().add_(base)
    found, kept = found.div_(total).t().contiguous(), kept.div_(total)
    out.mul_(kept[: lse.numel()].view(*lse.shape, 1)).add_(found[: lse.numel()].view(out.shape))
    lse.copy_(base[: lse.numel()].view(lse.shape))


def _sums(rows: Tensor, keys: list[tuple[Tensor, Tensor, int]], base: Tensor) -> tuple[Tensor, Tensor]:
    """The values (d, Q) weighted with exp(score - base), and the sum of the weights (Q,)."""
    bias = -_ABOVE * math.log(2) - base
    found: list[Tensor] = []
    totals: list[Tensor] = []
    for queries, some_bias in zip(rows.split(_QUERIES), bias.split(_QUERIES), strict=True):
        sums = total = None
        for some, values, count in keys:
            weights = _product(some, queries, some_bias, "sigmoid", [], "")
            sums = added(sums, values, weights.t())
            share = weights[:count].sum(0)
            total = share if total is None else total.add_(share)
        assert sums is not None
        assert total is not None
        found.append(sums)
        totals.append(total)
    return _joined(found, 1).mul_(2.0**_ABOVE), _joined(totals, 0).mul_(2.0**_ABOVE)


def add_gradients(
    parts: Sequence[Part],
    tensors: tuple[Tensor, Tensor, Tensor],
    repeat: int,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Add the parts' share of the gradients, as `tensors`. Those of keys and values that heads share are given to the
    first of these heads."""
    if not parts:
        return
    shift = -_BELOW * math.log(2) - lse
    delta = (grad_out * out).sum(-1).mul_(-(2.0**_BELOW))
    for head in range(0, lse.shape[1], repeat):
        group = slice(head, head + repeat)
        query, key, value = tensors
        columns = query[:, group] * scale, grad_out[:, group] * 2.0**_BELOW, shift[:, group], delta[:, group]
        columns = tuple(rows.flatten(0, 1).contiguous() for rows in columns)
        rows = key[:, head].contiguous(), value[:, head].contiguous()
        to_query, to_key, to_value = grads[0][:, group], grads[1][:, head], grads[2][:, head]
        for part in parts:
            for run in part.runs:
                found = _run_gradients(run, part.causal, repeat, columns, rows)
                at = slice(run.q, run.q + run.q_length)
                shares = found[0].t().contiguous()[: run.q_length * repeat]
                to_query[at].add_(shares.view(run.q_length, repeat, -1), alpha=scale)
                at = slice(run.k, run.k + run.k_length)
                to_key[at] += found[1][: run.k_length]
                to_value[at] += found[2][: run.k_length]


def _run_gradients(
    run: RunPair, causal: bool, repeat: int, columns: tuple[Tensor, ...], rows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (d, Q) of the queries, but for the scale, and (K, d) of keys and values. `columns`: scaled queries
    and gradients (T * repeat, d), biases of the scores and of their gradients; rows: keys and values (T, d)."""
    blocks = [
        (at, *(_padded(column[at], _QUERY_ROUND) for column in columns))
        for at in _cut(run.q * repeat, run.q_length * repeat, _QUERIES)
    ]
    to_queries: list[Tensor | None] = [None] * len(blocks)
    to_keys: list[Tensor] = []
    to_values: list[Tensor] = []
    for at in _cut(run.k, run.k_length, _KEYS):
        keys, values = (_padded(some[at], _KEY_ROUND) for some in rows)
        turned = keys.t().contiguous()
        to_key = to_value = None
        for place, (within, queries, grads, shift, delta) in enumerate(blocks):
            ahead = at.start * repeat - within.start
            weights = _product(keys, queries, shift, "sigmoid", [], "")
            if causal:
                weights *= _seen(len(keys), len(queries), repeat, ahead)
            to_value = added(to_value, weights, grads.t())
            weights = _product.binary(values, weights, grads, delta, "mul")
            to_key = added(to_key, weights, queries.t())
            to_queries[place] = added(to_queries[place], turned, weights.t())
        assert to_key is not None
        assert to_value is not None
        to_keys.append(to_key)
        to_values.append(to_value)
    return _joined([one for one in to_queries if one is not None], 1), _joined(to_keys, 0), _joined(to_values, 0)


@lru_cache(maxsize=16)
def _seen(keys: int, queries: int, repeat: int, ahead: int) -> Tensor:
    """1 where a query's token is not before the key (K, Q). The first key is `ahead` queries before or behind the first
    query, and `repeat` queries are of one token."""
    return (torch.arange(keys)[:, None] * repeat + ahead <= torch.arange(queries)).float()


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def _cut(start: int, length: int, size: int) -> list[slice]:
    end = start + length
    return [slice(first, min(first + size, end)) for first in range(start, end, size)]


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Rows (n, ...) filled up with zeros."""
    missing = -len(rows) % multiple
    return functional.pad(rows, (0,) * (2 * rows.dim() - 1) + (missing,)) if missing else rows
