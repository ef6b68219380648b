"""Log-probs and entropy of trained tokens without ever holding M x V logits, in forward or in backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time: rows x vocabulary. 2**23 float32 values are 32 MB; a few such buffers live at once."""
GPU_CHUNK_ELEMENTS = 1 << 26
"""The same on GPUs, where each chunk reads the whole head anew: 256 MB."""


def plain_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The reference for `chunked_logprobs`: the same values, with all logits in memory."""
    logits = (hidden @ weight.T).to(_compute_dtype(hidden)) / temperature
    logp = F.log_softmax(logits, -1)
    return logp.gather(1, token_ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float = 1.0, chunk_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of `token_ids` and the entropy of the distribution softmax(hidden @ weight.T / temperature).

    hidden (M, D), weight (V, D), token_ids int64 (M,); returns (logp_M, entropy_M), both differentiable, in float32 (in
    float64 for float64 input). Rows are taken `chunk_elements // V` at a time, and once more in backward, where with
    p = softmax and H the entropy: d logp / d logits = onehot - p and d H / d logits = -p (log p + H).
    """
    device = hidden.device.type
    if chunk_elements is None:
        chunk_elements = GPU_CHUNK_ELEMENTS if device == "cuda" else CHUNK_ELEMENTS
    autocast = torch.amp.is_autocast_available(device)  # the meta device knows none
    if autocast and torch.is_autocast_enabled(
        device
    ):  # here, because autocast is over when backward computes the logits again
        hidden, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (hidden, weight))
    rows = max(1, chunk_elements // weight.shape[0])
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return _ChunkedLogProbs.apply(hidden, weight, token_ids, temperature, rows)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (M, D) @ weight.T (V, D): (M, V) in float32, or float64. A GPU adds in float32 whatever it multiplies, and
    its sums are taken as they are; elsewhere, those of bfloat16 come rounded to 8 bits."""
    if hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).to(_compute_dtype(hidden))


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Scaled logits of one chunk, in one (rows, V) buffer where the dtypes allow it."""
    logits = logits_of(hidden, weight)
    if temperature != 1.0:
        logits /= temperature
    return logits


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, lse = (hidden.new_empty(len(hidden), dtype=_compute_dtype(hidden)) for _ in range(3))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, temperature)
            top = logits.amax(-1)
            logits -= top[:, None]
            weights = logits.exp()
            total = weights.sum(-1)
            logp[part] = logits.gather(1, token_ids[part, None])[:, 0] - total.log()
            entropy[part] = total.log() - weights.mul_(logits).sum(-1) / total
            lse[part] = top + total.log()
        ctx.save_for_backward(hidden, weight, token_ids, entropy, lse)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, entropy, lse = ctx.saved_tensors
        grad_logp, grad_entropy = grads
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # in float32 also for bfloat16 weights: a sum over many chunks loses its small terms in 8 bits
        grad_weight = torch.zeros_like(weight, dtype=_compute_dtype(hidden)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            all_logp = _logits(hidden[part], weight, ctx.temperature).sub_(lse[part, None])
            grad_logits = _grad_logits(
                all_logp,
                token_ids[part],
                entropy[part],
                None if grad_logp is None else grad_logp[part],
                None if grad_entropy is None else grad_entropy[part],
            )
            if ctx.temperature != 1.0:
                grad_logits /= ctx.temperature
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a buffer of the product where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _grad_logits(
    all_logp: Tensor, token_ids: Tensor, entropy: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """The gradient of one chunk with respect to its scaled logits; overwrites `all_logp` when entropy needs none."""
    if grad_entropy is None:
        assert grad_logp is not None
        grad = all_logp.exp_().mul_(-grad_logp[:, None])
    else:
        p = all_logp.exp()
        grad = all_logp.add_(entropy[:, None]).mul_(p).mul_(-grad_entropy[:, None])
        if grad_logp is not None:
            grad.addcmul_(p, -grad_logp[:, None])
    if grad_logp is not None:
        grad[torch.arange(len(grad), device=grad.device), token_ids] += grad_logp
    return grad
