"""Advantages: pure functions `(tensors over the S answers of a step, *, settings) -> advantage_S`.

An advantage names the tensors that it needs as its positional parameters (`checks.advantage_inputs`):
rewards_S, float, the reward of each answer; group_S, int64, the prompt it answers; length_S, int64, its trained tokens;
baseline_S, float, the reward of the greedy answer to the same prompt; source_S, int64, the `data_source` of its prompt.
Indices of groups and sources need not be dense or ordered.

All answers of a rollout are passed at once. The result is float (S,) in the dtype of rewards_S; the arithmetic is
float64. An answer whose group has equal rewards, or no other answer, says nothing about better or worse: where the
baseline is the group's, its advantage is exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.algorithms.aggregate import sum_by_sample

_TIE_DECIMALS = 12
"""Normal scores of different groups that agree to so many decimals are equal."""


@dataclass(frozen=True, slots=True)
class _Groups:
    """Answers by group: rewards as float64, a dense group index, answers per group, and whether all rewards of an
    answer's group are equal, which is said by comparison: a mean in floating point need not equal its equal terms."""

    rewards_S: Tensor
    index_S: Tensor
    count_G: Tensor
    equal_S: Tensor

    def mean(self, values_S: Tensor) -> Tensor:
        """The mean over its group, for each answer: (S,)."""
        sum_G = sum_by_sample(values_S, self.index_S, len(self.count_G))
        return (sum_G / self.count_G)[self.index_S]

    def std(self) -> Tensor:
        """The standard deviation of the group's rewards (divisor n - 1), for each answer: (S,)."""
        count_S = self.count_G[self.index_S]
        centred_S = self.rewards_S - self.mean(self.rewards_S)
        return (self.mean(centred_S.square()) * count_S / (count_S - 1).clamp(min=1)).sqrt()

    def silence_equal(self, advantage_S: Tensor, dtype: torch.dtype) -> Tensor:
        """`advantage_S` in `dtype`, 0 for the answers of groups without a difference."""
        return advantage_S.masked_fill(self.equal_S, 0.0).to(dtype)


def _group(rewards_S: Tensor, group_S: Tensor) -> _Groups:
    unique_G, index_S, count_G = torch.unique(group_S, return_inverse=True, return_counts=True)
    rewards_S = rewards_S.double()
    empty_G = rewards_S.new_zeros(len(unique_G))
    low_G = empty_G.scatter_reduce(0, index_S, rewards_S, "amin", include_self=False)
    high_G = empty_G.scatter_reduce(0, index_S, rewards_S, "amax", include_self=False)
    return _Groups(rewards_S, index_S, count_G, (low_G == high_G)[index_S])


def none(rewards_S: Tensor) -> Tensor:
    """0 whatever the reward: what is learned comes from elsewhere, such as a teacher."""
    return torch.zeros_like(rewards_S)


def grpo(rewards_S: Tensor, group_S: Tensor, *, normalise: Literal["std", "none"] = "std", eps: float = 1e-6) -> Tensor:
    """(r - mean) / (std + eps) over the group, std with divisor n - 1; without the division for `normalise="none"`.

    Sources: GRPO (arXiv 2402.03300); Dr.GRPO (2503.20783) does not divide.
    """
    groups = _group(rewards_S, group_S)
    advantage_S = groups.rewards_S - groups.mean(groups.rewards_S)
    if normalise == "std":
        advantage_S = advantage_S / (groups.std() + eps)
    return groups.silence_equal(advantage_S, rewards_S.dtype)


def rloo(rewards_S: Tensor, group_S: Tensor) -> Tensor:
    """r minus the mean reward of the other answers of the group. Source: RLOO (arXiv 2402.14740)."""
    groups = _group(rewards_S, group_S)
    count_S = groups.count_G[groups.index_S]
    advantage_S = (groups.rewards_S - groups.mean(groups.rewards_S)) * count_S / (count_S - 1).clamp(min=1)
    return groups.silence_equal(advantage_S, rewards_S.dtype)


def opo(rewards_S: Tensor, group_S: Tensor, length_S: Tensor) -> Tensor:
    """r minus the length-weighted mean reward of the group, the baseline of least variance when the squared gradient
    of an answer grows with its length. Source: OPO (arXiv 2505.23585)."""
    groups = _group(rewards_S, group_S)
    length_S = length_S.double()
    baseline_S = groups.mean(length_S * groups.rewards_S) / groups.mean(length_S)
    return groups.silence_equal(groups.rewards_S - baseline_S, rewards_S.dtype)


def grpo_passk(
    rewards_S: Tensor, group_S: Tensor, *, normalise: Literal["std", "none"] = "std", eps: float = 1e-6
) -> Tensor:
    """The best answer of a group gets its margin over the second best, divided by (std + eps) unless
    `normalise="none"`; the others get 0. It rewards that one of the group's answers is right (pass@n).

    Source: arXiv 2503.19595.
    """
    groups = _group(rewards_S, group_S)
    by_reward = torch.argsort(groups.rewards_S, descending=True, stable=True)
    order = by_reward[torch.argsort(groups.index_S[by_reward], stable=True)]  # by group, best first
    first_G = groups.count_G.cumsum(0) - groups.count_G
    second_G = first_G + (groups.count_G > 1).long()
    best_G = order[first_G]
    margin_G = groups.rewards_S[best_G] - groups.rewards_S[order[second_G]]
    advantage_S = torch.zeros_like(groups.rewards_S).index_copy(0, best_G, margin_G)
    if normalise == "std":
        advantage_S = advantage_S / (groups.std() + eps)
    return groups.silence_equal(advantage_S, rewards_S.dtype)


def gpg(rewards_S: Tensor, group_S: Tensor, *, count: Literal["informative", "rewarded"] = "informative") -> Tensor:
    """alpha (r - mean), alpha = S / (answers that count), so that answers without a gradient do not dilute the others.

    `count`: "informative" counts answers of groups whose rewards differ, as the paper does (arXiv 2504.02546);
    "rewarded" counts answers of a reward that is not 0, as verl does.
    """
    groups = _group(rewards_S, group_S)
    counted_S = ~groups.equal_S if count == "informative" else groups.rewards_S != 0
    alpha = len(rewards_S) / counted_S.sum().clamp(min=1).double()
    advantage_S = alpha * (groups.rewards_S - groups.mean(groups.rewards_S))
    return groups.silence_equal(advantage_S, rewards_S.dtype)


def lite_ppo(
    rewards_S: Tensor,
    group_S: Tensor,
    source_S: Tensor,
    *,
    over: Literal["batch", "source"] = "batch",
    eps: float = 1e-4,
) -> Tensor:
    """(r - mean of the group) / (std + eps), where the std (divisor n - 1) is that of all rewards of the step, or of
    those of the same source: a group of few differences is not blown up, and with "source" no source of tasks counts
    more because its rewards are spread wider. Sources: Lite PPO (arXiv 2508.08221); TRL's `scale_rewards="batch"`.
    """
    groups = _group(rewards_S, group_S)
    whole = _group(rewards_S, torch.zeros_like(group_S) if over == "batch" else source_S)
    advantage_S = (groups.rewards_S - groups.mean(groups.rewards_S)) / (whole.std() + eps)
    return groups.silence_equal(advantage_S, rewards_S.dtype)


def g2rpo(rewards_S: Tensor, group_S: Tensor, source_S: Tensor) -> Tensor:
    """Normal scores of the normal scores: rewards become quantiles of the normal distribution within their group, and
    these within their source, so that the advantages of every source of tasks are normally distributed whatever its
    rewards are. A group of equal rewards stands in the middle of its source: near 0, but not at it.

    Source: Gaussian GRPO (arXiv 2604.08539), with the data_source as the task.
    """
    scores_S = normal_scores(rewards_S.double(), group_S)
    return normal_scores(scores_S.round(decimals=_TIE_DECIMALS), source_S).to(rewards_S.dtype)


def normal_scores(values_S: Tensor, class_S: Tensor) -> Tensor:
    """Each value as the quantile of the standard normal distribution at (rank - 1/2) / n within its class of n, float64
    (S,): the optimal transport of its values to that distribution. Equal values share the mean of their quantiles; a
    class of one gets 0."""
    scores_S = torch.zeros(len(values_S), dtype=torch.float64, device=values_S.device)
    for one in torch.unique(class_S):
        places = (class_S == one).nonzero()[:, 0]
        rank_N = torch.arange(1, len(places) + 1, dtype=torch.float64, device=values_S.device)
        quantile_N = torch.special.ndtri((rank_N - 0.5) / len(places))
        order = torch.argsort(values_S[places], stable=True)
        _, tie_N, count_U = torch.unique(values_S[places][order], return_inverse=True, return_counts=True)
        scores_S[places[order]] = (sum_by_sample(quantile_N, tie_N, len(count_U)) / count_U)[tie_N]
    return scores_S


def remax(rewards_S: Tensor, baseline_S: Tensor) -> Tensor:
    """r minus the reward of the greedy answer to the same prompt. Source: ReMax (arXiv 2310.10505)."""
    return rewards_S - baseline_S


def reinforce_plus_plus(rewards_S: Tensor, length_S: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Rewards whitened over all tokens of the step (each answer weighs by its length): (r - mean) / sqrt(var + eps),
    var with divisor tokens - 1. No discount. Source: REINFORCE++ (arXiv 2501.03262)."""
    return _whiten(rewards_S.double(), length_S, eps).to(rewards_S.dtype)


def reinforce_plus_plus_baseline(rewards_S: Tensor, group_S: Tensor, length_S: Tensor, *, eps: float = 1e-8) -> Tensor:
    """r minus the mean of the group, then whitened over all tokens of the step as in `reinforce_plus_plus`.

    The whitening subtracts the mean over tokens, so that a group of equal rewards gets a small advantage, not 0.
    Source: REINFORCE++ (arXiv 2501.03262).
    """
    groups = _group(rewards_S, group_S)
    centred_S = groups.silence_equal(groups.rewards_S - groups.mean(groups.rewards_S), torch.float64)
    return _whiten(centred_S, length_S, eps).to(rewards_S.dtype)


def _whiten(values_S: Tensor, length_S: Tensor, eps: float) -> Tensor:
    tokens = length_S.sum()
    centred_S = values_S - (values_S * length_S).sum() / tokens
    variance = (centred_S.square() * length_S).sum() / (tokens - 1).clamp(min=1)
    return centred_S * (variance + eps).rsqrt()
