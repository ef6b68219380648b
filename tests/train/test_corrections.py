"""Corrections by token, with losses whose ratio is that of a whole answer."""

from __future__ import annotations

import pytest
import torch
from loss_cases import double, make_batch

from foveate.algorithms.targets import PolicyTargets, Totals
from foveate.config.algorithm import AlgorithmSettings
from foveate.errors import ConfigError
from foveate.train.algorithm import build_algorithm

WEIGHT_M = double([0.5, 2.0, 4.0, 1.0, 0.1])
ADVANTAGE_M = double([1.0, 1.0, 1.0, -2.0, -2.0])
TWO_ANSWERS = make_batch(torch.tensor([0, 0, 0, 1, 1]), 2)


def gradient(name: str, mode: str, high: float) -> list[float]:
    """With respect to each token, where the trained weights are those before the update: all ratios are 1."""
    settings = AlgorithmSettings.model_validate({"name": name, "correction": {"mode": mode, "high": high}})
    logp_M = double([-1.0, -0.5, -2.0, -0.1, -3.0]).requires_grad_()
    old_M = logp_M.detach()
    targets = PolicyTargets(old_M, old_M - WEIGHT_M.log(), ADVANTAGE_M)
    loss = build_algorithm(settings, 16).loss
    out = loss(logp_M, -logp_M.detach(), TWO_ANSWERS, targets, Totals(tokens=5, samples=2, groups=1))
    return torch.autograd.grad(out.loss, logp_M)[0].tolist()


@pytest.mark.parametrize(("name", "length"), [("gspo", (3, 2)), ("gspo_token", (3, 2)), ("luspo", (1, 1))])
def test_a_correction_by_token_weighs_the_gradient_of_each_token(name, length):
    weights = WEIGHT_M.clamp(max=3.0).tolist()
    lengths = [length[0]] * 3 + [length[1]] * 2
    expected = [-w * a / (2 * n) for w, a, n in zip(weights, ADVANTAGE_M.tolist(), lengths, strict=True)]
    assert gradient(name, "token-truncate", 3.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["gspo", "luspo"])
def test_a_masked_token_of_an_answer_has_no_gradient(name):
    found = gradient(name, "token-mask", 3.0)
    assert found[2] == 0
    assert all(found[:2] + found[3:])


@pytest.mark.parametrize("mode", ["token-truncate", "token-mask"])
def test_a_geometric_mean_takes_no_weights_of_single_tokens(mode):
    settings = AlgorithmSettings.model_validate({"name": "gmpo", "correction": {"mode": mode}})
    with pytest.raises(ConfigError, match="has one ratio for a whole answer; use sequence-truncate"):
        build_algorithm(settings, 16)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_a_correction_by_answer_weighs_all_its_tokens_alike(name):
    found = gradient(name, "sequence-truncate", 3.0)
    assert found == pytest.approx([-3.0 / 6] * 3 + [2.0 * 0.1 / 4] * 2, rel=1e-12)
