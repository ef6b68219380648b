"""What every policy loss shares: importance ratios, aggregation, the KL and entropy terms, and the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.algorithms.aggregate import Aggregate, token_weights
from foveate.algorithms.kl import KLEstimator, kl
from foveate.algorithms.metrics import to_metrics
from foveate.records import Batch, LossOut, PolicyTargets, Totals, require

MAX_LOG_RATIO = 20.0  # beyond it a ratio carries no gradient, and exp stays finite in float32


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The policy term of a loss, per token: loss_M to minimise, the importance ratio, and where clipping took the
    gradient (None for a loss that does not clip). All (M,); the last two are for metrics."""

    loss_M: Tensor
    ratio_M: Tensor
    clipped_M: Tensor | None


@dataclass(frozen=True, slots=True)
class Terms:
    """The settings that all policy losses share.

    aggregate, norm_length: see `aggregate.token_weights`. kl_coefficient: weight of the KL to the reference;
    kl_estimator: see `kl.kl`. entropy_coefficient: weight of the entropy bonus. All terms are aggregated alike.
    """

    aggregate: Aggregate
    norm_length: int | None
    kl_coefficient: float
    kl_estimator: KLEstimator
    entropy_coefficient: float


def token_log_ratio(logp_M: Tensor, old_M: Tensor) -> Tensor:
    """log(policy / old policy) per token, clamped to +-20."""
    return (logp_M - old_M).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def combine(
    policy: Surrogate,
    logp_M: Tensor,
    entropy_M: Tensor,
    batch: Batch,
    targets: PolicyTargets,
    totals: Totals,
    terms: Terms,
) -> LossOut:
    """The aggregated policy term + kl_coefficient * KL - entropy_coefficient * entropy, with metrics.

    Metrics: policy_loss (the aggregated policy term, weighted so that its reduction over a step is that of the whole
    step), approx_kl (k3 estimate of KL(old || policy)), entropy, ratio_min, ratio_max, clip_fraction (share of tokens,
    where the loss clips), kl_ref (where a reference is given). Nats; means over tokens.
    Raises DataError when a KL is asked for without reference log-probs.
    """
    require(
        terms.kl_coefficient == 0 or targets.ref_M is not None,
        f"kl_coefficient is {terms.kl_coefficient}, but there are no reference log-probs:"
        " load a reference model or set kl_coefficient to 0",
    )
    weight_M = token_weights(batch, totals, terms.aggregate, terms.norm_length, logp_M.detach())
    policy_loss = (weight_M * policy.loss_M).sum()
    loss = policy_loss
    tokens = float(len(logp_M))
    values = {
        "loss/policy": (policy_loss, tokens / totals.tokens),
        "loss/approx_kl": (kl(targets.old_M, logp_M.detach(), "k3").sum(), tokens),
        "loss/entropy": (entropy_M.sum(), tokens),
        "loss/ratio_min": (policy.ratio_M.min(), tokens),
        "loss/ratio_max": (policy.ratio_M.max(), tokens),
    }
    if policy.clipped_M is not None:
        values["loss/clip_fraction"] = (policy.clipped_M.sum(), tokens)
    if targets.ref_M is not None:
        kl_M = kl(logp_M, targets.ref_M, terms.kl_estimator)
        values["loss/kl_ref"] = (kl_M.sum(), tokens)
        if terms.kl_coefficient:
            loss = loss + terms.kl_coefficient * (weight_M * kl_M).sum()
    if terms.entropy_coefficient:
        assert entropy_M.requires_grad or not logp_M.requires_grad, "an entropy bonus needs entropies with a gradient"
        loss = loss - terms.entropy_coefficient * (weight_M * entropy_M).sum()
    return LossOut(loss, to_metrics(values))
