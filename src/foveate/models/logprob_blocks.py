"""Log-probs and entropies on processors: `chunked_logprobs` by blocks of tokens of the vocabulary.

A chunk of whole rows of logits leaves a processor's caches, and each chunk reads the head and its gradient anew. Here
the head is read once in each direction, a block at a time, and a block of logits stays in the cache: the sums of
softmax are carried from block to block, as flash attention carries them (arXiv 2205.14135; for a loss: arXiv
2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.models.matmul import matmul

ROWS, COLUMNS = 512, 1024
"""Of a block of logits: 2 MB in float32."""


class BlockLogprobs(torch.autograd.Function):
    """hidden (M, D), weight (V, D), token_ids (M,) and a temperature to log-probs and, where asked for, entropies (M,)
    of softmax(hidden @ weight.T / temperature), in float32 or, of float64, in float64."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        top, total, above, logit = torch.zeros(4, len(hidden), dtype=compute_dtype(hidden)).unbind()
        unknown = token_ids[(token_ids < 0) | (token_ids >= len(weight))]
        if len(unknown):
            raise IndexError(f"token {int(unknown[0])} is none of the {len(weight)} of the vocabulary")
        for rows, columns in _blocks(hidden, weight):
            logits = _logits(hidden[rows], weight[columns], temperature)
            row, place = _own(token_ids[rows], columns)
            logit[rows][row] = logits[row, place]
            before, so_far = top[rows], logits.amax(-1).clamp_min_(torch.finfo(logits.dtype).min)
            if columns.start:
                so_far = torch.maximum(before, so_far)
                lower = before - so_far
                shrunk = lower.exp()
                total[rows] *= shrunk
                above[rows] = above[rows] * shrunk + total[rows] * lower
            top[rows] = so_far
            logits -= so_far[:, None]
            weights = logits.exp() if with_entropy else logits.exp_()
            total[rows] += weights.sum(-1)
            if with_entropy:
                above[rows] += weights.mul_(logits).sum(-1)
        log_total = total.log()
        entropy = log_total - above / total if with_entropy else None
        ctx.save_for_backward(hidden, weight, token_ids, top + log_total, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logit - top - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, lse, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if wants_weight else None
        for rows, columns in _blocks(hidden, weight):
            logp = _logits(hidden[rows], weight[columns], ctx.temperature).sub_(lse[rows, None])
            of_logp, of_entropy = (None if grad is None else grad[rows] / ctx.temperature for grad in grads)
            own = _own(token_ids[rows], columns)
            grad = grad_of_logits(logp, own, None if entropy is None else entropy[rows], of_logp, of_entropy)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] += matmul(grad, weight[columns])
            if grad_weight is not None:
                grad_weight[columns] += matmul(grad.T, hidden[rows])
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            *[None] * 3,
        )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """That of logits and of what is made of them."""
    return torch.promote_types(hidden.dtype, torch.float32)


def grad_of_logits(
    logp: Tensor, own: tuple[Tensor, Tensor], entropy: Tensor | None, of_logp: Tensor | None, of_entropy: Tensor | None
) -> Tensor:
    """The gradient of logits (m, n) with the log-probs `logp`, given those of log-probs and entropies (m,); `own`: the
    rows whose token is among the n, and where. With p = softmax and H the entropy, d logp / d logits = onehot - p and
    d H / d logits = -p (log p + H). Overwrites `logp`."""
    if of_entropy is None or entropy is None:
        grad = logp.zero_() if of_logp is None else logp.exp_().mul_(-of_logp[:, None])
    else:
        p = logp.exp()
        grad = logp.add_(entropy[:, None]).mul_(p).mul_(-of_entropy[:, None])
        if of_logp is not None:
            grad.addcmul_(p, -of_logp[:, None])
    if of_logp is not None:
        grad[own] += of_logp[own[0]]
    return grad


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block, all rows of some columns together: these and their gradient stay in the cache."""
    for first in range(0, len(weight), COLUMNS):
        columns = slice(first, min(first + COLUMNS, len(weight)))
        for start in range(0, len(hidden), ROWS):
            yield slice(start, start + ROWS), columns


def _own(token_ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The rows whose tokens lie in these columns, and where in them."""
    (row,) = torch.where((token_ids >= columns.start) & (token_ids < columns.stop))
    return row, token_ids[row] - columns.start


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = matmul(hidden, weight.T).to(compute_dtype(hidden))
    if temperature != 1.0:
        logits /= temperature
    return logits
