"""Attention over a forest of segments, registered with transformers under names of its own.

`foveate_reference` builds the dense T x T mask of the forest: it is the truth. On a CPU, `foveate_forest` computes the
same without padding the row, without a mask of T x T and without copying the keys of a prompt for each answer:

- every segment attends to itself, causally unless it is bidirectional (segments of like length share one call; a long
  causal one is halved, its second half attends to the first without a mask, and each half to itself), and
- all descendants of a segment, which stand together in the row, attend to it in one call, without any mask.

With a sliding window, where a token sees the last `window` tokens of its path (from the root to itself), segments are
cut into chunks of a window's length: a chunk attends causally to itself, and under a band to the tokens before it. A
bidirectional segment attends to itself as a whole, as transformers' Gemma 3 has it, and under the band to the segments
above.

Each call gives a partial softmax with its log-sum-exp; partial results are merged by the log-sum-exp identity used for
attention over split keys (Flash-Decoding, Ring Attention: arXiv 2310.01889). In backward, the flash kernel is
given the merged output and the merged log-sum-exp, with which its gradient for each part is already the exact one.
`foveate.models.attention.blocks` computes the calls of long runs where it is faster than the flash kernel.
A sink, the learned logit without a value that GPT-OSS has in each head, is one more part: it only adds to the
log-sum-exp.

On a GPU, `foveate_forest` is one call of FlexAttention instead (`foveate.models.attention.flex`), with the mask of the
forest.

Both are called by transformers' own modules through `AttentionInterface`; `forest=`, `cache=` and `split=` reach them
as keyword arguments of the language model's forward. No module of transformers is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from foveate.errors import ConfigError
from foveate.models.attention import blocks
from foveate.models.attention.flex import flex_forest_attention
from foveate.models.attention.runs import Part, parts, path_positions
from foveate.models.matmul import has_fast_matmul
from foveate.records import Forest

KERNELS = {
    "auto": "foveate_forest",
    "sdpa": "foveate_parts",
    "flex": "foveate_blocks",
    "reference": "foveate_reference",
}
"""Names under which transformers knows the kernels; it takes one with "sdpa" or "flash" in it for its own."""


class KeyValueCache(Protocol):
    """A sampler's `cache=`: it sees the keys and values of every layer and may compute attention in their place."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions
    ) -> Tensor | None:
        """Tensors are (heads, T, head_dim), without repeated key-value heads. Returns the attention output in the
        shape of `query`, or None to let the forest attention compute it (the prefill of prompts)."""
        ...

    def recur(self, layer: int, kept: Sequence[Any], given: Sequence[Any]) -> Any:
        """The same of a recurrent layer (`foveate.models.attention.gated_delta_net`). In the prefill `kept` says where
        the K segments end in the row (K,), and holds the last rows of the convolution (K, size - 1, channels) and the
        states (K, H, d_k, d_v) there. Later, rows (T, channels) are `given`, of one token of each answer or of what
        answers have observed, and the function from windows (B, size, channels), states (B, H, d_k, d_v) and the places
        of their tokens in the row (B,), unless these are all, to the output, which is returned, and the next states."""
        ...


class SequenceParallelAttention(Protocol):
    """A row shared between ranks, each of which holds a part of its tokens, see `foveate.parallel.ulysses`."""

    def attend(
        self,
        kernel: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forest: Forest,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        """`kernel` on the whole row, for this rank's tokens: tensors as for `forest_attention`."""
        ...

    def exchange(self, rows: Tensor, *, to_heads: bool) -> Tensor:
        """This rank's tokens of all H heads (H, T / ranks, d) to all tokens of its own heads (H / ranks, T, d), or
        back."""
        ...

    def own_heads(self, values: Tensor) -> Tensor:
        """The values (H / ranks, ...) of this rank's heads, of those of all (H, ...)."""
        ...

    def see(self, policy: Any) -> Any:
        """The `Features` of this rank's image tokens."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """The extras of a layer's attention: a sliding window (in tokens, itself included), and sinks (H,)."""

    window: int | None = None
    sinks: Tensor | None = None


PLAIN = AttentionOptions()


def forest_mask(forest: Forest, device: torch.device | None = None, window: int | None = None) -> Tensor:
    """The dense boolean mask of a forest, (T, T): True where the row's token may see the column's token. A window hides
    the tokens that stand `window` or more before the row's token on its path, but none of its own bidirectional
    segment."""
    mask = torch.zeros(forest.tokens, forest.tokens, dtype=torch.bool, device=device)
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        rows = slice(start, start + length)
        mask[rows, rows] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        while parent >= 0:
            above = slice(forest.start[parent], forest.start[parent] + forest.length[parent])
            mask[rows, above] = True
            parent = forest.parent[parent]
    if window is not None:
        position = path_positions(forest).to(mask.device)
        mask &= position[:, None] - position < window
    for start, length, bidirectional in zip(forest.start, forest.length, forest.bidirectional, strict=True):
        if bidirectional:
            mask[start : start + length, start : start + length] = True
    return mask


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, options: AttentionOptions = PLAIN
) -> Tensor:
    """Softmax attention under the dense forest mask. Query (H, T, d); key, value (H_kv, T, d); returns (H, T, d)."""
    repeat = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    scores = (query @ key.transpose(1, 2)) * scale
    scores = scores.masked_fill(~forest_mask(forest, query.device, options.window), float("-inf"))
    scores = scores.float() if scores.dtype != torch.float64 else scores
    if options.sinks is not None:
        sinks = options.sinks[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    return torch.softmax(scores, -1)[..., : key.shape[1]].to(query.dtype) @ value


# ------------------------------------------------------------------------------------------------- the fast kernel


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_BACKWARD_KEYS = 256
"""About how many keys a call of the backward kernel has, of which it holds scores for 256 queries."""


class _ForestAttention(torch.autograd.Function):
    """Query (T, H, d); key, value (T, H, d), each head `repeat` times; sinks (H,) or None; returns (T, H, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        calls: tuple[tuple[Part, ...], tuple[Part, ...]],
        scale: float,
        repeat: int,
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        by_blocks, by_flash = blocks.split_parts(calls[0], query, repeat, forward=True)
        for part in by_flash:
            partial, partial_lse = _flash(
                part.query.take(query), part.key.take(key), part.key.take(value),
                0.0, part.causal, attn_mask=_bias(part, query), scale=scale,
            )  # fmt: skip
            if not part.first:
                before, before_lse = part.query.take(out).to(lse.dtype), part.query.take(lse)
                added = torch.sigmoid(partial_lse - before_lse)[..., None]
                partial = torch.lerp(before, partial.to(lse.dtype), added).to(out.dtype)
                partial_lse = torch.logaddexp(before_lse, partial_lse)
            part.query.write(out, partial)
            part.query.write(lse, partial_lse)
        blocks.merge_parts(by_blocks, (query, key, value), repeat, out, lse, scale)
        if sinks is not None:
            merged = torch.logaddexp(lse, sinks.to(lse.dtype))
            out, lse = (out * (lse - merged).exp()[..., None]).to(out.dtype), merged
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.calls, ctx.scale, ctx.repeat = calls[1], scale, repeat
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        by_blocks, by_flash = blocks.split_parts(ctx.calls, query, ctx.repeat)
        new = torch.zeros_like if by_blocks else torch.empty_like
        totals = grad_query, grad_key, grad_value = new(query), new(key), new(value)
        for part in by_flash:
            grads = _part_backward(part, grad_out, query, key, value, out, lse, scale=ctx.scale)
            for total, runs, share in zip(totals, (part.query, part.key, part.key), grads, strict=True):
                if part.first and not by_blocks:
                    runs.write(total, share)
                else:
                    runs.add(total, share)
        blocks.add_gradients(by_blocks, (query, key, value), ctx.repeat, out, lse, grad_out, totals, ctx.scale)
        grad_sinks = None
        if sinks is not None:  # the sink's share of a row's probability, whose value is 0
            share = (sinks.to(lse.dtype) - lse).exp()
            grad_sinks = -(share * (grad_out * out).sum(-1)).sum(0).to(sinks.dtype)
        return grad_query, grad_key, grad_value, grad_sinks, None, None, None


def _part_backward(
    part: Part, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of the gradients, for its runs of query, key and value. Of many keys some at a time: the scores
    of one call then stay in a core's cache."""
    grad = part.query.take(grad_out)
    if part.query.real is not None:
        grad = grad * part.query.real.view(part.query.batch, 1, part.query.length, 1)
    queries, outs, sums = (part.query.take(rows) for rows in (query, out, lse))
    keys, values, bias = part.key.take(key), part.key.take(value), _bias(part, query)
    pieces = max(1, round(part.key.length / _BACKWARD_KEYS)) if not part.causal else 1
    size = -(-part.key.length // pieces)
    grad_queries, grad_keys, grad_values = None, list[Tensor](), list[Tensor]()
    for first in range(0, part.key.length, size):  # of the queries' gradients, one is kept beside that of a piece
        share, *rest = _flash_backward(
            grad, queries, keys[:, :, first : first + size], values[:, :, first : first + size],
            outs, sums, 0.0, part.causal,
            attn_mask=None if bias is None else bias[..., first : first + size], scale=scale,
        )  # fmt: skip
        grad_queries = share if grad_queries is None else grad_queries.add_(share)
        grad_keys.append(rest[0])
        grad_values.append(rest[1])
        del share
    assert grad_queries is not None
    if len(grad_keys) == 1:
        return grad_queries, grad_keys[0], grad_values[0]
    return grad_queries, torch.cat(grad_keys, 2), torch.cat(grad_values, 2)


def _bias(part: Part, query: Tensor) -> Tensor | None:
    return None if part.bias is None else part.bias.to(query.dtype)


def forest_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, options: AttentionOptions = PLAIN
) -> Tensor:
    """Exact attention over the forest, equal to `reference_attention`, by the kernel that suits the device. Query
    (H, T, d); key, value (H_kv, T, d)."""
    kernel = flex_attention if query.device.type == "cuda" else parts_attention
    return kernel(query, key, value, forest, scale, options)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, options: AttentionOptions = PLAIN
) -> Tensor:
    """`forest_attention` on a GPU."""
    if query.device.type != "cuda":
        raise ConfigError("model.attention: flex is a kernel for GPUs; auto and sdpa compute on CPUs")
    return flex_forest_attention(query, key, value, forest, scale, options.window, options.sinks)


def parts_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, options: AttentionOptions = PLAIN
) -> Tensor:
    """`forest_attention` on a CPU."""
    if query.device.type == "cuda":
        raise ConfigError("model.attention: sdpa is a kernel for CPUs; auto and flex compute on GPUs")
    repeat = query.shape[0] // key.shape[0]
    key, value = (rows.transpose(0, 1).repeat_interleave(repeat, 1) for rows in (key, value))
    # forward, where MKL takes AVX-512 the flash kernel is as fast on a whole causal run as on its halves
    calls = tuple(parts(forest, query.device, options.window, whole=whole) for whole in (not has_fast_matmul(), False))
    # contiguous, as are the two above: the kernel takes the last dimension to have stride 1
    query = query.transpose(0, 1).contiguous()
    return _ForestAttention.apply(query, key, value, options.sinks, calls, scale, repeat).transpose(0, 1)


# ------------------------------------------------------------------------------------ the door into transformers


def _attention(kernel: Any) -> Any:
    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        *,
        scaling: float,
        forest: Forest | None = None,
        cache: KeyValueCache | None = None,
        split: SequenceParallelAttention | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: (1, heads, T, d) tensors in, (1, T, heads, d) out; `s_aux`: sinks."""
        assert len(query) == 1, f"packed rows come one at a time, not {len(query)}"
        rows = query[0].to(value.dtype), key[0].to(value.dtype), value[0]  # autocast leaves rotated ones in float32
        options, out = AttentionOptions(sliding_window, s_aux), None
        if cache is not None:
            out = cache.attend(module.layer_idx, *rows, scaling, options)  # type: ignore[arg-type]
        if out is None:
            assert forest is not None, "the language model was called without layout="
            within = (*rows, forest, scaling, options)
            out = kernel(*within) if split is None else split.attend(kernel, *within)
        return out.transpose(0, 1)[None], None

    return attend


def _no_mask(*_: Any, **__: Any) -> None:
    return None


_kernels = {
    "auto": forest_attention,
    "sdpa": parts_attention,
    "flex": flex_attention,
    "reference": reference_attention,
}
for _name, _kernel in _kernels.items():
    AttentionInterface.register(KERNELS[_name], _attention(_kernel))
    AttentionMaskInterface.register(KERNELS[_name], _no_mask)


def keep_from_compiler() -> None:
    """Let torch.compile of a module leave attention as it is: what it does follows from the forest, which is another
    one in every row."""
    for name, kernel in _kernels.items():
        AttentionInterface.register(KERNELS[name], torch.compiler.disable(_attention(kernel)))
