"""From a surrogate to a policy loss: importance ratios, and the terms, settings and metrics that all losses share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, get_type_hints

from torch import Tensor

from foveate.algorithms.aggregate import Aggregate, token_weights
from foveate.algorithms.kl import MAX_LOG_RATIO, KLEstimator, kl
from foveate.algorithms.targets import LossOut, PolicyTargets, Totals
from foveate.errors import require
from foveate.records import Batch


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The policy term of a loss, per token: loss_M to minimise, the importance ratio, and where clipping took the
    gradient (None for a loss that does not clip). All (M,); the last two are for metrics."""

    loss_M: Tensor
    ratio_M: Tensor
    clipped_M: Tensor | None = None


def token_log_ratio(logp_M: Tensor, old_M: Tensor) -> Tensor:
    """log(policy / old policy) per token, clamped to +-20."""
    return (logp_M - old_M).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(default: Aggregate) -> Callable[[Callable[..., Surrogate]], Callable[..., LossOut]]:
    """Make a policy loss of a surrogate `(logp_M, targets, batch, *, settings of its own) -> Surrogate`, which may
    leave out what it does not need.

    The loss is `(logp_M, entropy_M, batch, targets, totals, *, settings) -> LossOut`, with the settings of the
    surrogate and those of `_loss`, by which it aggregates as `default` says unless told otherwise.
    """

    def compose(surrogate: Callable[..., Surrogate]) -> Callable[..., LossOut]:
        def loss(logp_M: Tensor, entropy_M: Tensor, batch: Batch, targets: PolicyTargets, totals: Totals, **settings):
            shared = {"aggregate": default, **{name: settings.pop(name) for name in _SHARED if name in settings}}
            data = {"logp_M": logp_M, "targets": targets, "batch": batch}
            policy = surrogate(*(data[name] for name in inputs), **settings)
            return _loss(policy, logp_M, entropy_M, batch, targets, totals, **shared)

        parameters = inspect.signature(surrogate).parameters
        inputs = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        own = [p for name, p in parameters.items() if name not in inputs]
        others = [p.replace(default=default) if p.name == "aggregate" else p for p in _SHARED.values()]
        ours = [*inspect.signature(loss).parameters.values()][:-1]
        composed: Any = update_wrapper(loss, surrogate)
        composed.__signature__ = inspect.Signature([*ours, *own, *others])
        composed.__annotations__ = {**surrogate.__annotations__, **get_type_hints(_loss)}
        return composed

    return compose


def _loss(
    policy: Surrogate,
    logp_M: Tensor,
    entropy_M: Tensor,
    batch: Batch,
    targets: PolicyTargets,
    totals: Totals,
    *,
    aggregate: Aggregate = "token-mean",
    norm_length: int | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    entropy_coefficient: float = 0.0,
) -> LossOut:
    """The aggregated policy term + kl_coefficient * KL - entropy_coefficient * entropy, with metrics.

    aggregate, norm_length: see `aggregate.token_weights`; all terms are aggregated alike. kl_coefficient: weight of the
    KL to the reference; kl_estimator: see `kl.kl`. entropy_coefficient: weight of the entropy bonus.

    Metrics: loss/policy (the aggregated policy term, weighted so that its reduction over a step is that of the whole
    step), loss/approx_kl (k3 estimate of KL(old || policy)), loss/entropy, loss/ratio_min, loss/ratio_max,
    loss/clip_fraction (share of tokens, where the loss clips), loss/kl_ref (where a reference is given). Nats; means
    over tokens. Raises DataError when a KL is asked for without reference log-probs.
    """
    require(
        kl_coefficient == 0 or targets.ref_M is not None,
        f"kl_coefficient is {kl_coefficient}, but there are no reference log-probs:"
        " load a reference model or set kl_coefficient to 0",
    )
    weight_M = token_weights(batch, totals, aggregate, norm_length, logp_M.detach())
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
        kl_M = kl(logp_M, targets.ref_M, kl_estimator)
        values["loss/kl_ref"] = (kl_M.sum(), tokens)
        if kl_coefficient:
            loss = loss + kl_coefficient * (weight_M * kl_M).sum()
    if entropy_coefficient:
        assert entropy_M.requires_grad or not logp_M.requires_grad, "an entropy bonus needs entropies with a gradient"
        loss = loss - entropy_coefficient * (weight_M * entropy_M).sum()
    return LossOut(loss, values)


_SHARED = {name: p for name, p in inspect.signature(_loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
