"""The terms of a loss that need the whole vocabulary, without ever holding M x V logits, in forward or in backward.

A caller names the terms that it needs: the log-prob of the trained token, the entropy, or a `Divergence` to a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import ConfigError
from foveate.models.logprob_blocks import BlockLogprobs, compute_dtype, grad_of_logits
from foveate.models.matmul import has_fast_matmul, has_fast_mkl, matmul

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time: rows x vocabulary. 2**23 float32 values are 32 MB; a few such buffers live at once."""
_CPU_COLUMNS, _CPU_WHOLE, _MKL_ROWS = 1024, 1 << 22, 16
"""Tokens of the vocabulary whose logits a processor computes at a time, since MKL's products of few rows with many are
slow (oneDNN takes four times as many); the logits that oneDNN computes at once: more would lie in new pages; and the
rows from which on MKL with AVX-512 is not slow."""
GPU_CHUNK_ELEMENTS = 1 << 26
"""The same on GPUs, where each chunk reads the whole head anew: 256 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherStates:
    """A teacher by its hidden states (M, D') and the weight of its head (V', D'), at the temperature of the model.
    Large models pad their heads, each to its own length: both distributions are then those over the tokens that both
    have."""

    hidden: Tensor
    weight: Tensor

    def rows(self, index: slice | Tensor) -> TeacherStates:
        return TeacherStates(self.hidden[index], self.weight)

    def outcomes(self, logp: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs of the same outcomes under the model, given all of them (m, V), and under the teacher."""
        both = min(len(self.weight), logp.shape[1])
        if both < logp.shape[1]:
            logp = logp[:, :both].log_softmax(-1)
        with torch.no_grad():
            return logp, _logits(self.hidden.to(self.weight.dtype), self.weight[:both], temperature).log_softmax(-1)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTopK:
    """A teacher by the ids (M, K) of some tokens and their log-probs (M, K), at the temperature of the model. All other
    tokens are one outcome, with the rest of the probability, so that a divergence is 0 only where both agree."""

    token_ids: Tensor
    logprobs: Tensor

    def rows(self, index: slice | Tensor) -> TeacherTopK:
        return TeacherTopK(self.token_ids[index], self.logprobs[index])

    def outcomes(self, logp: Tensor, _temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs (m, K + 1) under the model, given those of all tokens (m, V), and under the teacher."""
        return _with_rest(logp.gather(1, self.token_ids)), _with_rest(self.logprobs.to(logp.dtype))


def chunked_top_k(
    hidden: Tensor, weight: Tensor, temperature: float, k: int, chunk_elements: int | None = None
) -> TeacherTopK:
    """The `k` most probable tokens of a teacher with hidden states (M, D) and head (V, D) and their log-probs over the
    whole vocabulary, in chunks as in `chunked_terms`."""
    rows, k = _rows(hidden, weight, chunk_elements), min(k, len(weight))
    token_ids = hidden.new_empty(len(hidden), k, dtype=torch.long)
    logprobs = hidden.new_empty(len(hidden), k, dtype=compute_dtype(hidden))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = _logits(hidden[part].to(weight.dtype), weight, temperature)
        top = logits.topk(k)
        token_ids[part], logprobs[part] = top.indices, top.values - logits.logsumexp(-1, keepdim=True)
    return TeacherTopK(token_ids, logprobs)


def _with_rest(logp: Tensor) -> Tensor:
    """Log-probs (m, K) of some outcomes, and behind them that of all others together."""
    rest = 1 - logp.exp().sum(-1, keepdim=True)
    return torch.cat([logp, rest.clamp_min(torch.finfo(logp.dtype).eps).log()], -1)


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """How far the model p is from a teacher q at each trained token, in nats: KL(q || p), the forward one; KL(p || q);
    or Jensen-Shannon's, beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p and 0 < beta < 1
    (GKD, arXiv 2306.13649). Raises ConfigError for another kind or beta."""

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
    teacher: TeacherStates | TeacherTopK
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("forward_kl", "reverse_kl", "jensen_shannon"):
            raise ConfigError(f"{self.kind!r} is no divergence; use forward_kl, reverse_kl or jensen_shannon")
        if not 0 < self.beta < 1:
            raise ConfigError(f"beta of a divergence is {self.beta}, not between 0 and 1; use forward_kl or reverse_kl")

    def rows(self, index: slice | Tensor) -> Divergence:
        """That of some of the M tokens."""
        return Divergence(self.kind, self.teacher.rows(index), self.beta)

    def value(self, logp: Tensor, temperature: float) -> Tensor:
        """The divergence (m,), given the log-probs of all tokens (m, V)."""
        model, teacher = self.teacher.outcomes(logp, temperature)
        if self.kind == "forward_kl":
            return _kl(teacher, model)
        if self.kind == "reverse_kl":
            return _kl(model, teacher)
        mixed = torch.logaddexp(teacher + math.log(self.beta), model + math.log1p(-self.beta))
        return self.beta * _kl(teacher, mixed) + (1 - self.beta) * _kl(model, mixed)

    def grad_logits(self, logp: Tensor, temperature: float, grad: Tensor) -> Tensor:
        """The gradient with respect to the scaled logits (m, V), given that of the values (m,)."""
        with torch.enable_grad():
            logits = logp.detach().requires_grad_()
            return torch.autograd.grad(self.value(logits.log_softmax(-1), temperature), logits, grad)[0]


def _kl(logp: Tensor, other: Tensor) -> Tensor:
    return (logp.exp() * (logp - other)).sum(-1)


Term = Literal["logp", "entropy"] | Divergence
LOGP_ENTROPY: tuple[Term, ...] = ("logp", "entropy")


def plain_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The reference for `chunked_logprobs`: the same values, with all logits in memory."""
    logits = (hidden @ weight.T).to(compute_dtype(hidden)) / temperature
    logp = F.log_softmax(logits, -1)
    return logp.gather(1, token_ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float = 1.0, chunk_elements: int | None = None
) -> tuple[Tensor, Tensor]:
    """`chunked_terms` of the log-prob and the entropy: (logp_M, entropy_M)."""
    logp_M, entropy_M = chunked_terms(hidden, weight, token_ids, temperature, LOGP_ENTROPY, chunk_elements)
    return logp_M, entropy_M


def chunked_terms(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    terms: Sequence[Term],
    chunk_elements: int | None = None,
) -> tuple[Tensor, ...]:
    """Terms of the distribution softmax(hidden @ weight.T / temperature), in the order of `terms`, none of them twice:
    "logp", the log-prob of `token_ids`; "entropy"; divergences to teachers. A term that is not asked for costs nothing.

    hidden (M, D), weight (V, D), token_ids int64 (M,); returns a tensor (M,) for each term, differentiable, in float32
    (in float64 for float64 input). Rows are taken `chunk_elements // V` at a time, and once more in backward; on
    processors, unless `chunk_elements` is given or there are divergences, blocks of rows and columns
    (`foveate.models.logprob_blocks`).
    """
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device)  # the meta device knows none
    if autocast and torch.is_autocast_enabled(
        device
    ):  # here, because autocast is over when backward computes the logits again
        hidden, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (hidden, weight))
    rows = _rows(hidden, weight, chunk_elements)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if device == "cpu" and chunk_elements is None and all(isinstance(term, str) for term in terms):
            found = BlockLogprobs.apply(hidden, weight, token_ids, temperature, "entropy" in terms)
            return tuple(found[LOGP_ENTROPY.index(term)] for term in terms)
        return _ChunkedTerms.apply(hidden, weight, token_ids, temperature, rows, tuple(terms))


def _rows(hidden: Tensor, weight: Tensor, chunk_elements: int | None) -> int:
    """Rows of a chunk."""
    if chunk_elements is None:
        chunk_elements = GPU_CHUNK_ELEMENTS if hidden.device.type == "cuda" else CHUNK_ELEMENTS
    return max(1, chunk_elements // len(weight))


def logits_of(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden (M, D) @ weight.T (V, D): (M, V) in float32, or float64. A GPU adds in float32 whatever it multiplies, and
    its sums are taken as they are; elsewhere, those of bfloat16 come rounded to 8 bits. A processor may write them to
    `out`, where it takes the vocabulary in parts."""
    if hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if torch.is_grad_enabled():
        return (hidden @ weight.T).to(compute_dtype(hidden))
    fast = has_fast_matmul()
    if (
        hidden.device.type != "cpu"
        or len(weight) < 2 * _CPU_COLUMNS
        or (fast and len(hidden) * len(weight) <= _CPU_WHOLE)
    ):
        return matmul(hidden, weight.T).to(compute_dtype(hidden))
    logits = hidden.new_empty(len(hidden), len(weight), dtype=compute_dtype(hidden)) if out is None else out
    if has_fast_mkl() and len(hidden) >= _MKL_ROWS and logits.dtype == hidden.dtype == weight.dtype:
        return torch.mm(hidden, weight.T, out=logits)
    size = 4 * _CPU_COLUMNS if fast else _CPU_COLUMNS
    for first in range(0, len(weight), size):
        logits[:, first : first + size] = matmul(hidden, weight[first : first + size].T)
    return logits


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Scaled logits of one chunk, in one (rows, V) buffer where the dtypes allow it."""
    logits = logits_of(hidden, weight)
    if temperature != 1.0:
        logits /= temperature
    return logits


class _ChunkedTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        temperature: float,
        rows: int,
        terms: tuple[Term, ...],
    ) -> tuple[Tensor, ...]:
        lse, *values = (hidden.new_empty(len(hidden), dtype=compute_dtype(hidden)) for _ in range(1 + len(terms)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, temperature)
            top = logits.amax(-1)
            logits -= top[:, None]
            weights = logits.exp()
            total = weights.sum(-1)
            lse[part] = top + total.log()
            for term, value in zip(terms, values, strict=True):
                if isinstance(term, Divergence):
                    value[part] = term.rows(part).value(logits - total.log()[:, None], temperature)
                elif term == "logp":
                    value[part] = logits.gather(1, token_ids[part, None])[:, 0] - total.log()
                else:
                    value[part] = total.log() - weights.mul_(logits).sum(-1) / total
        entropy = values[terms.index("entropy")] if "entropy" in terms else None
        ctx.save_for_backward(hidden, weight, token_ids, entropy, lse)
        ctx.temperature, ctx.rows, ctx.terms = temperature, rows, terms
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, entropy, lse = ctx.saved_tensors
        asked = [(term, grad) for term, grad in zip(ctx.terms, grads, strict=True) if grad is not None]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # in float32 also for bfloat16 weights: a sum over many chunks loses its small terms in 8 bits
        grad_weight = torch.zeros_like(weight, dtype=compute_dtype(hidden)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            all_logp = _logits(hidden[part], weight, ctx.temperature).sub_(lse[part, None])
            plain = {term: grad[part] for term, grad in asked if isinstance(term, str)}
            diverging = [
                term.rows(part).grad_logits(all_logp, ctx.temperature, grad[part])
                for term, grad in asked
                if isinstance(term, Divergence)
            ]
            own = torch.arange(len(all_logp), device=hidden.device), token_ids[part]
            grad_logits = grad_of_logits(
                all_logp, own, None if entropy is None else entropy[part], plain.get("logp"), plain.get("entropy")
            )
            for more in diverging:
                grad_logits += more
            if ctx.temperature != 1.0:
                grad_logits /= ctx.temperature
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 4


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a buffer of the product where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
