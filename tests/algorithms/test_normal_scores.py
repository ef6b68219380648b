"""Advantages by source: G2RPO against the authors' rule written out, and batch and source deviations."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from loss_cases import double

from foveate.algorithms.advantages import g2rpo, grpo, lite_ppo, normal_scores


def written_out(values: list[float], classes: list[int]) -> list[float]:
    """The transport to the normal distribution, one value after the other."""
    found = []
    for value, own in zip(values, classes, strict=True):
        members = sorted(v for v, c in zip(values, classes, strict=True) if c == own)
        if len(members) == 1:
            found.append(0.0)
            continue
        quantiles = [NormalDist().inv_cdf((rank + 0.5) / len(members)) for rank in range(len(members))]
        equal = [q for q, v in zip(quantiles, members, strict=True) if v == value]
        found.append(sum(equal) / len(equal))
    return found


def rewards(seed: int, groups: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (groups * size,), generator=generator).double() / 3


@pytest.mark.parametrize("seed", range(5))
def test_g2rpo_is_the_normal_score_within_the_source_of_that_within_the_group(seed):
    rewards_S = rewards(seed, 6, 4)
    group_S = torch.arange(6).repeat_interleave(4)
    source_S = torch.tensor([0, 0, 0, 1, 1, 2]).repeat_interleave(4)
    inner = [round(one, 12) for one in written_out(rewards_S.tolist(), group_S.tolist())]
    expected = double(written_out(inner, source_S.tolist()))
    torch.testing.assert_close(g2rpo(rewards_S, group_S, source_S), expected, atol=1e-9, rtol=0)


def test_g2rpo_equals_numbers_of_the_authors_code():
    rewards_S = double([0, 1, 0.5, 1, 0, 0, 0, 0, 0.2, 0.9, 0.4, 0.1])
    group_S = torch.arange(3).repeat_interleave(4)
    source_S = torch.tensor([0] * 8 + [1] * 4)
    expected = double([-1.53412, 1.210633, -0.887147, 1.210633, 0, 0, 0, 0, -0.318639, 1.150349, 0.318639, -1.150349])
    torch.testing.assert_close(g2rpo(rewards_S, group_S, source_S), expected, atol=1e-5, rtol=0)


def test_the_scores_of_a_source_have_one_distribution_whatever_its_rewards():
    group_S = torch.arange(2).repeat_interleave(8)
    source_S = group_S
    wide_S = torch.cat([torch.arange(8.0), torch.arange(8.0) * 1e-3]).double()
    advantage_S = g2rpo(wide_S, group_S, source_S)
    torch.testing.assert_close(advantage_S[:8], advantage_S[8:])
    assert advantage_S.sum().abs() < 1e-9


def test_a_single_answer_and_equal_answers_have_score_0():
    assert normal_scores(double([3.0]), torch.tensor([0])).tolist() == [0.0]
    assert normal_scores(double([1, 1, 1]), torch.zeros(3, dtype=torch.long)).abs().max() < 1e-15


def test_lite_ppo_divides_by_the_deviation_of_the_step_or_of_the_source():
    rewards_S = double([0, 1, 0, 0, 0.1, 0.3])
    group_S = torch.tensor([0, 0, 1, 1, 2, 2])
    source_S = torch.tensor([0, 0, 0, 0, 1, 1])
    centred_S = grpo(rewards_S, group_S, normalise="none")
    torch.testing.assert_close(lite_ppo(rewards_S, group_S, source_S), centred_S / (rewards_S.std() + 1e-4))
    by_source = torch.cat([centred_S[:4] / (rewards_S[:4].std() + 1e-4), centred_S[4:] / (rewards_S[4:].std() + 1e-4)])
    torch.testing.assert_close(lite_ppo(rewards_S, group_S, source_S, over="source"), by_source)
    assert lite_ppo(rewards_S, group_S, source_S)[2:4].tolist() == [0.0, 0.0]
    assert math.isfinite(lite_ppo(double([1, 1]), torch.tensor([0, 0]), torch.tensor([0, 0])).sum())
