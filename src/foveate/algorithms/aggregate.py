"""How per-token losses become one number: as a weight per token, so that the same weights serve every term."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.algorithms.targets import Totals
from foveate.errors import require
from foveate.records import Batch

Aggregate = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def token_weights(batch: Batch, totals: Totals, mode: Aggregate, norm_length: int | None, like: Tensor) -> Tensor:
    """Weights w_M with which `(w_M * loss_M).sum()` is this micro-batch's share of the aggregated loss.

    The denominators are `totals`, the counts over the whole optimizer step, so that shares add up to the loss of the
    whole batch however it is split. With L_i the trained tokens of answer i:

    - token-mean: 1 / totals.tokens (DAPO)
    - seq-mean-token-sum: 1 / totals.samples (REINFORCE over answers)
    - seq-mean-token-mean: 1 / (totals.samples * L_i) (GRPO, GSPO)
    - seq-mean-token-sum-norm: 1 / (totals.samples * norm_length), a constant such as the answer budget (Dr.GRPO)

    Returns a float (M,) tensor of the dtype and device of `like`. Raises DataError when `norm_length` is missing for
    the mode that divides by it, or is given for one that does not.
    """
    require(
        (mode == "seq-mean-token-sum-norm") == (norm_length is not None),
        f"norm_length is {norm_length} with aggregate={mode}: it is the constant (in tokens, such as the answer budget)"
        " of aggregate=seq-mean-token-sum-norm; give both or neither",
    )
    denominators: dict[Aggregate, Tensor | int] = {
        "token-mean": totals.tokens,
        "seq-mean-token-sum": totals.samples,
        "seq-mean-token-mean": totals.samples * answer_lengths(batch, like)[batch.sample_M],
        "seq-mean-token-sum-norm": totals.samples * (norm_length or 1),
    }
    return torch.ones_like(like) / denominators[mode]


def answer_lengths(batch: Batch, like: Tensor) -> Tensor:
    """Trained tokens per answer, (S,), at least 1 so that an answer without any divides nothing by zero."""
    return sum_by_sample(torch.ones_like(like), batch.sample_M, batch.samples).clamp(min=1)


def mean_by_answer(values_M: Tensor, batch: Batch) -> Tensor:
    """Mean of `values_M` over the trained tokens of each answer, (S,)."""
    return sum_by_sample(values_M, batch.sample_M, batch.samples) / answer_lengths(batch, values_M)


def sum_by_sample(values_M: Tensor, sample_M: Tensor, samples: int) -> Tensor:
    """Sums of `values_M` per sample, shape (S,)."""
    return torch.zeros(samples, dtype=values_M.dtype, device=values_M.device).index_add(0, sample_M, values_M)
