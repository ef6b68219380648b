"""Policy losses `(logp_M, entropy_M, batch, targets, totals, *, settings) -> LossOut`, each written as its surrogate.

logp_M, entropy_M: float (M,), log-probs and entropies (nats) of the trained tokens under the current policy. `batch`
says which answer each token belongs to, `targets` holds old and reference log-probs and advantages, `totals` the
denominators of the whole optimizer step: the losses of its micro-batches add up to the loss of the step.

`terms.policy_loss` adds what all share: aggregation (its default is the argument), a KL and an entropy term, metrics.
r_t = exp(logp - old) is the importance ratio of a token, A its advantage, L_i the length of answer i. Formulas are of
the loss, to be minimised, per token before aggregation. Log-ratios are clamped to +-20 (GSPO: at most 10).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.algorithms.aggregate import mean_by_answer
from foveate.algorithms.targets import PolicyTargets
from foveate.algorithms.terms import Surrogate, policy_loss, token_log_ratio
from foveate.errors import require
from foveate.records import Batch

_MAX_LOG_SEQUENCE_RATIO = 10.0
_WIDEST_SEQUENCE_CLIP = 0.05


@policy_loss("seq-mean-token-mean")
def grpo(
    logp_M: Tensor,
    targets: PolicyTargets,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Surrogate:
    """PPO's clipped surrogate per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    With `dual_clip` c > 1 (Ye et al. 2019, arXiv 1912.09729) tokens of negative advantage lose at most -c A.
    Sources: PPO (arXiv 1707.06347), GRPO (2402.03300). The settings make it Dr.GRPO (2503.20783) and DAPO (2503.14476).
    """
    ratio_M = token_log_ratio(logp_M, targets.old_M).exp()
    return _clipped_surrogate(ratio_M, targets.advantage_M, clip_low, clip_high, dual_clip)


@policy_loss("seq-mean-token-mean")
def gspo(
    logp_M: Tensor,
    targets: PolicyTargets,
    batch: Batch,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    allow_wide_clip: bool = False,
) -> Surrogate:
    """Group Sequence Policy Optimization: -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i) per answer, with
    s_i = exp(mean over the answer's tokens of log r_t) and A_i the mean advantage of the answer.

    The ratio is length-normalised, hence its clip range is about a thousandth of PPO's. The default `aggregate` is the
    paper's mean over answers; the others weigh answer i by L_i (token-mean, and seq-mean-token-sum, which is LUSPO).
    A range above 0.05, which never clips, is refused without `allow_wide_clip`.
    Source: GSPO (arXiv 2507.18071), eq. 5 to 7.
    """
    _require_narrow_clip(clip_low, clip_high, allow_wide_clip)
    log_ratio_S = mean_by_answer(logp_M - targets.old_M, batch).clamp(max=_MAX_LOG_SEQUENCE_RATIO)
    advantage_S = mean_by_answer(targets.advantage_M, batch)
    answer = _clipped_surrogate(log_ratio_S.exp(), advantage_S, clip_low, clip_high, dual_clip)
    assert answer.clipped_M is not None
    per_token = batch.sample_M  # every token carries the value of its answer
    return Surrogate(answer.loss_M[per_token], answer.ratio_M[per_token], answer.clipped_M[per_token])


@policy_loss("seq-mean-token-mean")
def gspo_token(
    logp_M: Tensor,
    targets: PolicyTargets,
    batch: Batch,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    allow_wide_clip: bool = False,
) -> Surrogate:
    """GSPO with an advantage per token: its ratio is sg[s_i] exp(logp) / sg[exp(logp)], clipped as `gspo` clips s_i.

    Equals `gspo` in value and gradient when the advantage is constant within each answer.
    Source: GSPO (arXiv 2507.18071), eq. 13 to 16.
    """
    _require_narrow_clip(clip_low, clip_high, allow_wide_clip)
    log_ratio_S = mean_by_answer(logp_M.detach() - targets.old_M, batch)
    log_ratio_M = (logp_M - logp_M.detach() + log_ratio_S[batch.sample_M]).clamp(max=_MAX_LOG_SEQUENCE_RATIO)
    return _clipped_surrogate(log_ratio_M.exp(), targets.advantage_M, clip_low, clip_high, dual_clip)


@policy_loss("token-mean")
def reinforce(logp_M: Tensor, targets: PolicyTargets) -> Surrogate:
    """The plain policy gradient: -A logp. Exact for one update per rollout only, since it knows no importance ratio.

    Sources: Williams (1992); RLOO (arXiv 2402.14740), ReMax (2310.10505), GPG (2504.02546), OPO (2505.23585).
    """
    ratio_M = token_log_ratio(logp_M, targets.old_M).exp()
    return Surrogate(-targets.advantage_M * logp_M, ratio_M)


@policy_loss("token-mean")
def cispo(logp_M: Tensor, targets: PolicyTargets, *, clip_low: float = 1.0, clip_high: float = 0.2) -> Surrogate:
    """Clipped importance sampling: -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logp. No token loses its gradient.

    `clip_low` 1 leaves the ratio free below. Bounds are relative to 1, as in the paper (MiniMax-M1, arXiv 2506.13585)
    and verl; TRL's `epsilon_high` is the bound itself: clip_high = epsilon_high - 1.
    """
    ratio_M = token_log_ratio(logp_M, targets.old_M).exp().detach()
    bounded_M = ratio_M.clamp(1 - clip_low, 1 + clip_high)
    return Surrogate(-bounded_M * targets.advantage_M * logp_M, ratio_M, bounded_M != ratio_M)


@policy_loss("seq-mean-token-mean")
def sapo(logp_M: Tensor, targets: PolicyTargets, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Surrogate:
    """Soft adaptive policy optimization: -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A, in place of a clip.

    Source: SAPO (arXiv 2511.20347).
    """
    ratio_M = token_log_ratio(logp_M, targets.old_M).exp()
    positive, negative = torch.full_like(ratio_M, tau_positive), torch.full_like(ratio_M, tau_negative)
    tau_M = torch.where(targets.advantage_M > 0, positive, negative)
    gate_M = torch.sigmoid(tau_M * (ratio_M - 1)) * (4 / tau_M)
    return Surrogate(-gate_M * targets.advantage_M, ratio_M)


@policy_loss("seq-mean-token-mean")
def gmpo(
    logp_M: Tensor, targets: PolicyTargets, batch: Batch, *, clip_low: float = 0.4, clip_high: float = 0.4
) -> Surrogate:
    """Geometric-mean policy optimization: -A_i exp(mean over tokens of c_t) per answer, where c_t is log r_t held at
    most at clip_high for A > 0 and at least at -clip_low for A < 0: the bounds are of the log-ratio of each token.

    Source: GMPO (arXiv 2507.20673), eq. 4 and 5.
    """
    log_ratio_M = token_log_ratio(logp_M, targets.old_M)
    above_M, below_M = log_ratio_M.clamp(max=clip_high), log_ratio_M.clamp(min=-clip_low)
    bounded_M = torch.where(targets.advantage_M > 0, above_M, below_M)
    loss_S = -mean_by_answer(targets.advantage_M, batch) * mean_by_answer(bounded_M, batch).exp()
    return Surrogate(loss_S[batch.sample_M], log_ratio_M.exp(), bounded_M != log_ratio_M)


@policy_loss("token-mean")
def dppo(
    logp_M: Tensor,
    targets: PolicyTargets,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    limit_low: float = 0.2,
    limit_high: float = 0.2,
    ratio_max: float = 20.0,
) -> Surrogate:
    """Divergence PPO: -sg[min(r, ratio_max)] A logp, without the tokens that an update pushes further away from the old
    policy than the limit on the divergence of the two-way choice "this token or another" (total variation or KL):
    limit_high for A > 0 and a probability that has risen, limit_low for A <= 0 and one that has fallen.

    Source: DPPO (arXiv 2602.04879).
    """
    ratio_M = token_log_ratio(logp_M, targets.old_M).exp().detach()
    new_M, old_M = logp_M.detach().exp(), targets.old_M.exp()
    if divergence == "tv":
        distance_M = (new_M - old_M).abs()
    else:
        other_M = ((1 - old_M + 1e-8) / (1 - new_M + 1e-8)).log()
        distance_M = old_M * (targets.old_M - logp_M.detach()) + (1 - old_M) * other_M
    within_high_M = (distance_M <= limit_high) | (new_M <= old_M)
    within_low_M = (distance_M <= limit_low) | (new_M >= old_M)
    kept_M = torch.where(targets.advantage_M > 0, within_high_M, within_low_M)
    loss_M = -ratio_M.clamp(max=ratio_max) * targets.advantage_M * logp_M * kept_M
    return Surrogate(loss_M, ratio_M, ~kept_M)


@policy_loss("token-mean")
def clip_cov(
    logp_M: Tensor,
    targets: PolicyTargets,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    share: float = 2e-4,  # noqa: ARG001
    cov_low: float = 1.0,  # noqa: ARG001
    cov_high: float = 5.0,  # noqa: ARG001
) -> Surrogate:
    """PPO's clipped surrogate, 0 for the marked tokens: they make the entropy fall and give no gradient.

    share, cov_low, cov_high: settings of the marks (`covariance.clip_cov_tokens`). Source: arXiv 2505.22617.
    """
    ratio_M = token_log_ratio(logp_M, targets.old_M).exp()
    policy = _clipped_surrogate(ratio_M, targets.advantage_M, clip_low, clip_high, None)
    assert policy.clipped_M is not None
    marked_M = _marked(targets)
    return Surrogate(policy.loss_M.masked_fill(marked_M, 0.0), ratio_M, policy.clipped_M | marked_M)


@policy_loss("token-mean")
def kl_cov(
    logp_M: Tensor,
    targets: PolicyTargets,
    *,
    share: float = 2e-4,  # noqa: ARG001
    penalty: float = 1.0,
) -> Surrogate:
    """-r A without a clip, plus penalty |log r| for the marked tokens, which are held near the old policy.

    share: setting of the marks (`covariance.kl_cov_tokens`). Source: arXiv 2505.22617.
    """
    log_ratio_M = token_log_ratio(logp_M, targets.old_M)
    loss_M = penalty * log_ratio_M.abs() * _marked(targets) - log_ratio_M.exp() * targets.advantage_M
    return Surrogate(loss_M, log_ratio_M.exp())


def _marked(targets: PolicyTargets) -> Tensor:
    assert targets.masked_M is not None, "this loss needs an algorithm with a choice of tokens"
    return targets.masked_M


def _require_narrow_clip(clip_low: float, clip_high: float, allow_wide: bool) -> None:
    require(
        allow_wide or max(clip_low, clip_high) <= _WIDEST_SEQUENCE_CLIP,
        f"clip_low {clip_low:g} and clip_high {clip_high:g} are a range for the ratio of a token; GSPO's is the mean"
        " over an answer, which such a range never clips: use 3e-4 and 4e-4, or set allow_wide_clip to true",
    )


def _clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Surrogate:
    """PPO's clipped loss for ratios and advantages of one shape, per token or per answer."""
    require(dual_clip is None or dual_clip > 1 + clip_high, f"dual_clip is {dual_clip}: it must be above 1 + clip_high")
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -advantage * dual_clip
        clipped = clipped | ((advantage < 0) & (loss > ceiling))
        loss = torch.where(advantage < 0, torch.minimum(loss, ceiling), loss)
    return Surrogate(loss, ratio, clipped)
