"""The few tokens that make the entropy of a policy fall, which clip-cov and kl-cov treat apart.

A token's share in the fall is its covariance (log p - mean log p) (A - mean A), both means over all tokens of an
update. The tokens are chosen before the update from the whole of it, so that the choice does not depend on how it is
split into micro-batches. Source: Cui et al. 2025, arXiv 2505.22617.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.algorithms.terms import token_log_ratio


def clip_cov_tokens(
    logp_M: Tensor,
    old_M: Tensor,
    advantage_M: Tensor,
    generator: torch.Generator,
    *,
    clip_low: float,
    clip_high: float,
    share: float,
    cov_low: float,
    cov_high: float,
) -> Tensor:
    """A random `share` of the tokens, at least one, among those whose covariance lies between the bounds and that the
    ordinary clip leaves alone: bool (M,)."""
    ratio_M = token_log_ratio(logp_M, old_M).exp()
    clipped_M = -advantage_M * ratio_M.clamp(1 - clip_low, 1 + clip_high) > -advantage_M * ratio_M
    covariance_M = _covariance(logp_M, advantage_M)
    eligible = ((covariance_M > cov_low) & (covariance_M < cov_high) & ~clipped_M).nonzero()[:, 0]
    drawn = torch.randperm(len(eligible), generator=generator)[: max(1, int(share * len(logp_M)))]
    return _mark(eligible[drawn], logp_M)


def kl_cov_tokens(
    logp_M: Tensor,
    old_M: Tensor,  # noqa: ARG001
    advantage_M: Tensor,
    generator: torch.Generator,  # noqa: ARG001
    *,
    share: float,
) -> Tensor:
    """The `share` of the tokens with the largest covariance, at least one: bool (M,)."""
    count = max(1, int(share * len(logp_M)))
    return _mark(_covariance(logp_M, advantage_M).topk(min(count, len(logp_M))).indices, logp_M)


def _covariance(logp_M: Tensor, advantage_M: Tensor) -> Tensor:
    return (advantage_M - advantage_M.mean()) * (logp_M - logp_M.mean())


def _mark(index: Tensor, like_M: Tensor) -> Tensor:
    marked_M = torch.zeros(len(like_M), dtype=torch.bool)
    marked_M[index] = True
    return marked_M
