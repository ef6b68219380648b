"""Advantages against reference numbers, and the rules that they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import double, read_reference

from foveate.algorithms import advantages
from foveate.algorithms.advantages import (
    gpg,
    grpo,
    grpo_passk,
    opo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)

GROUPED: tuple[tuple[Callable[..., torch.Tensor], dict[str, Any], str], ...] = (
    (grpo, {}, "grpo"),
    (grpo, {"normalise": "none"}, "dr_grpo"),
    (rloo, {}, "rloo"),
    (grpo_passk, {}, "grpo_passk"),
)
GROUP_S = torch.tensor([0, 0, 0, 1, 1, 1, 2])
REWARDS_S = double([0.1, 0.7, 0.4, 0.3, 0.3, 0.3, 0.9])
LENGTH_S = torch.tensor([3, 1, 5, 2, 2, 4, 6])


@pytest.mark.parametrize("case", read_reference("policy_gradients"), ids=lambda c: f"{c['seed']}-{c['scale']}")
def test_advantages_equal_the_reference_for_groups_of_four(case):
    inputs, expected = case["inputs"], case["advantages"]
    rewards_S, length_S = double(inputs["rew"]), torch.tensor(inputs["mask"]).sum(1).long()
    group_S = torch.arange(len(rewards_S)) // inputs["n"]

    def reference(name: str) -> torch.Tensor:
        return double(expected[name])[:, 0]

    for function, settings, name in GROUPED:
        torch.testing.assert_close(function(rewards_S, group_S, **settings), reference(name), atol=1e-9, rtol=0)
    torch.testing.assert_close(opo(rewards_S, group_S, length_S), reference("opo"), atol=1e-9, rtol=0)
    whitened_S = reinforce_plus_plus_baseline(rewards_S, group_S, length_S)
    torch.testing.assert_close(whitened_S, reference("reinforce_plus_plus_baseline"), atol=1e-9, rtol=0)
    torch.testing.assert_close(remax(rewards_S, double(case["remax_baseline"])), reference("remax"), atol=1e-9, rtol=0)


def test_advantages_equal_the_reference_for_groups_of_unequal_size():
    reference = read_reference("verl_losses")
    inputs, expected = reference["adv_inputs"], reference["advantages"]
    rewards_S, length_S = double(inputs["rewards"]).sum(1), torch.tensor(inputs["mask"]).sum(1).long()
    group_S = torch.tensor(["abcd".index(name) for name in inputs["uid"]])
    several = group_S != 3  # the reference gives the whole reward to an answer without a group; here it gets 0
    found = {
        "grpo_std": grpo(rewards_S, group_S),
        "grpo_nostd": grpo(rewards_S, group_S, normalise="none"),
        "rloo": rloo(rewards_S, group_S),
        "opo": opo(rewards_S, group_S, length_S),
    }
    for name, advantage_S in found.items():
        torch.testing.assert_close(advantage_S[several], double(expected[name])[several, 0], atol=1e-9, rtol=0)
        assert advantage_S[-1] == 0
    vectorized_S = double(expected["rloo_vectorized"])[:, 0]
    torch.testing.assert_close(found["rloo"], vectorized_S, atol=1e-9, rtol=0)
    whitened_S = reinforce_plus_plus(rewards_S, length_S)
    torch.testing.assert_close(whitened_S, double(expected["reinforce_plus_plus"])[:, 0], atol=1e-9, rtol=0)
    # the reference divides in float32 here
    scaled_S = gpg(rewards_S, group_S, count="rewarded")
    torch.testing.assert_close(scaled_S[several], double(expected["gpg"])[several, 0], atol=1e-6, rtol=0)


def test_gpg_scales_by_all_answers_over_those_of_groups_that_differ():
    expected = 7 / 3 * grpo(REWARDS_S, GROUP_S, normalise="none")
    torch.testing.assert_close(gpg(REWARDS_S, GROUP_S), expected, atol=1e-12, rtol=0)


def test_gpg_without_any_difference_is_zero():
    assert gpg(double([0.2, 0.2]), torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [grpo, rloo, grpo_passk, gpg])
def test_a_group_of_equal_rewards_and_a_group_of_one_get_exactly_zero(function, dtype):
    advantage_S = function(REWARDS_S.to(dtype), GROUP_S)
    assert advantage_S.dtype == dtype
    assert advantage_S[:3].abs().max() > 0.1
    assert advantage_S[3:].tolist() == [0, 0, 0, 0]


def test_a_mean_that_rounds_does_not_turn_equal_rewards_into_advantages():
    equal_S = torch.full((7,), 0.1)
    assert equal_S.mean() != equal_S[0]
    assert grpo(equal_S, torch.zeros(7, dtype=torch.long)).tolist() == [0] * 7


def test_grpo_advantages_have_mean_zero_and_deviation_one_in_their_group():
    advantage_S = grpo(REWARDS_S, GROUP_S)[:3]
    assert abs(advantage_S.mean()) < 1e-12
    assert abs(advantage_S.std() - 1) < 1e-5


def test_the_best_answer_alone_is_rewarded_by_passk_and_a_tie_for_the_best_is_not():
    group_S = torch.tensor([5, 5, 5, 2, 2, 2])
    advantage_S = grpo_passk(double([0.1, 0.9, 0.6, 1, 0, 1]), group_S, normalise="none")
    torch.testing.assert_close(advantage_S, double([0, 0.3, 0, 0, 0, 0]), atol=1e-12, rtol=0)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_tokens():
    tokens = torch.repeat_interleave(reinforce_plus_plus(REWARDS_S, LENGTH_S), LENGTH_S)
    assert abs(tokens.mean()) < 1e-12
    assert abs(tokens.var() - 1) < 1e-6


@pytest.mark.parametrize("name", ["grpo", "rloo", "grpo_passk", "gpg", "opo", "reinforce_plus_plus_baseline"])
def test_advantages_follow_their_answers_in_any_order_and_whatever_the_group_numbers(name):
    function = vars(advantages)[name]
    rewards_S, group_S = REWARDS_S, GROUP_S
    lengths = (LENGTH_S,) if name in ("opo", "reinforce_plus_plus_baseline") else ()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    expected = function(rewards_S, group_S, *lengths)
    renumbered_S = torch.tensor([40, 7, 1000])[group_S]
    shuffled = function(rewards_S[order], renumbered_S[order], *(length_S[order] for length_S in lengths))
    torch.testing.assert_close(shuffled, expected[order], atol=1e-12, rtol=0)
