"""Corrections for answers that were sampled by another distribution than the trainer's.

An engine computes log-probs with other kernels, and sometimes with older weights, than the trainer. The importance
weight w = exp(old - engine) corrects for it. Every policy loss is linear in positive scalings of the advantage, so that
the weight enters through the advantages and any loss, also one from outside, can be corrected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foveate.algorithms.aggregate import mean_by_answer, sum_by_sample
from foveate.algorithms.kl import MAX_LOG_RATIO, kl
from foveate.algorithms.targets import LossOut, PolicyTargets, Totals
from foveate.algorithms.terms import token_log_ratio
from foveate.errors import require
from foveate.records import Batch

Correction = Literal["token-truncate", "sequence-truncate", "token-mask", "sequence-mask", "sequence-reject"]


def correct_mismatch(
    batch: Batch,
    targets: PolicyTargets,
    *,
    mode: Correction,
    low: float | None = None,
    high: float = 2.0,
    now_M: Tensor | None = None,
) -> tuple[PolicyTargets, dict[str, tuple[Tensor, float]]]:
    """`targets` with advantages multiplied by importance weights between trainer (old_M) and sampler (engine_M).

    - token-truncate: min(w_t, high) (truncated importance sampling; Yao et al. 2025)
    - sequence-truncate: min(prod_t w_t, high), the same for all tokens of an answer
    - token-mask: w_t where low <= w_t <= high, else 0 (masked importance sampling; IcePop)
    - sequence-mask: prod_t w_t where it lies in low .. high, else 0
    - sequence-reject: 1 for answers whose geometric mean of w_t lies in low .. high, else 0

    now_M: log-probs (M,) under the weights of this moment, where the old ones are the sampler's. w is between these
    two then, and the ratio of the loss has it already: what lies in low .. high weighs 1.

    Returns the new targets and metrics: engine/correction_kl (k3 estimate of KL(engine || trainer), nats per token),
    engine/correction_weight (mean), engine/correction_weight_max, engine/correction_truncated (share of tokens that
    were truncated or masked).
    Raises DataError when `low` is given for a mode that does not use it; for the others its default is 0.
    """
    truncates = mode.endswith("truncate")
    require(low is None or not truncates, f"low is {low}, but correction mode {mode} has no lower bound: leave it out")
    trainer_M = targets.old_M if now_M is None else now_M
    log_weight_M = token_log_ratio(trainer_M, targets.engine_M)
    if mode.startswith("sequence"):
        log_weight_M = _log_weight_by_answer(log_weight_M, batch, mode)
    weight_M = log_weight_M.exp()
    cut_M = weight_M > high if truncates else (weight_M < (low or 0.0)) | (weight_M > high)
    if mode == "sequence-reject" or now_M is not None:
        weight_M = torch.ones_like(weight_M)
    weight_M = weight_M.clamp(max=high) if truncates else weight_M.masked_fill(cut_M, 0.0)
    tokens = float(len(weight_M))
    metrics = {
        "engine/correction_kl": (kl(targets.engine_M, trainer_M, "k3").sum(), tokens),
        "engine/correction_weight": (weight_M.sum(), tokens),
        "engine/correction_weight_max": (weight_M.max(), tokens),
        "engine/correction_truncated": (cut_M.sum(), tokens),
    }
    return dataclasses.replace(targets, advantage_M=targets.advantage_M * weight_M), metrics


def corrected_loss(
    logp_M: Tensor,
    entropy_M: Tensor,
    batch: Batch,
    targets: PolicyTargets,
    totals: Totals,
    *,
    loss: Callable[..., LossOut],
    mode: Correction,
    low: float | None,
    high: float,
    old_logprobs: Literal["trainer", "engine"] = "trainer",
) -> LossOut:
    """`loss` of the corrected targets, with the metrics of both. `old_logprobs`: whose log-probs the old ones are."""
    now_M = logp_M.detach() if old_logprobs == "engine" else None
    corrected, metrics = correct_mismatch(batch, targets, mode=mode, low=low, high=high, now_M=now_M)
    out = loss(logp_M, entropy_M, batch, corrected, totals)
    return LossOut(out.loss, {**out.metrics, **metrics})


def _log_weight_by_answer(log_weight_M: Tensor, batch: Batch, mode: Correction) -> Tensor:
    if mode == "sequence-reject":
        return mean_by_answer(log_weight_M, batch)[batch.sample_M]
    log_weight_S = sum_by_sample(log_weight_M, batch.sample_M, batch.samples)
    return log_weight_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[batch.sample_M]
