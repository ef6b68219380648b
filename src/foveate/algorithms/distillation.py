"""A teacher beside the rewards: its term in any policy loss, or in the advantage of each token."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foveate.algorithms.aggregate import Aggregate, token_weights
from foveate.algorithms.targets import LossOut, PolicyTargets, Totals
from foveate.records import Batch


def distilled_loss(
    logp_M: Tensor,
    entropy_M: Tensor,
    batch: Batch,
    targets: PolicyTargets,
    totals: Totals,
    *,
    loss: Callable[..., LossOut],
    coefficient: float,
    aggregate: Aggregate,
    norm_length: int | None = None,
) -> LossOut:
    """`loss` plus coefficient times the divergence of the policy to its teacher, `targets.divergence_M`, aggregated as
    the policy term is. With the mean over tokens and a `loss` of 0 this is GKD's (arXiv 2306.13649).

    Metric: loss/divergence, the mean over tokens, in nats.
    """
    assert targets.divergence_M is not None, "a loss with a teacher needs the divergence to it"
    out = loss(logp_M, entropy_M, batch, targets, totals)
    weight_M = token_weights(batch, totals, aggregate, norm_length, logp_M.detach())
    term = coefficient * (weight_M * targets.divergence_M).sum()
    metric = targets.divergence_M.sum(), float(len(logp_M))
    return LossOut(out.loss + term, {**out.metrics, "loss/divergence": metric})


def distilled_advantage(
    advantage_M: Tensor, old_M: Tensor, teacher_M: Tensor, coefficient: float
) -> tuple[Tensor, float]:
    """The advantage of each token less coefficient times log policy - log teacher, the reverse KL as the sampled token
    estimates it (on-policy distillation with a discount of 0; Lu, "On-Policy Distillation", 2025). Returns it, and the
    mean of that estimate over the tokens, in nats.

    advantage_M, old_M, teacher_M: (M,); the last two are log-probs of the sampled tokens.
    """
    estimate_M = old_M - teacher_M
    return advantage_M - coefficient * estimate_M.to(advantage_M), estimate_M.double().mean().item()
