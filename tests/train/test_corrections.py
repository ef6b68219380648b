"""Corrections by token, with losses whose ratio is that of a whole answer."""

from __future__ import annotations

import pytest
import torch
from loss_cases import double, make_batch

from foveate.algorithms.table import Algorithm
from foveate.algorithms.targets import LossOut, PolicyTargets, Totals
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


@pytest.mark.parametrize(
    ("mode", "weights"),
    [("token-mask", [1, 1, 0, 1, 0]), ("sequence-mask", [0, 0, 0, 1, 1]), ("sequence-reject", [1] * 5)],
)
def test_a_ratio_to_the_engine_weighs_what_lies_within_the_bounds_by_one(mode, weights):
    bounds = {"mode": mode, "low": 0.1 if mode == "sequence-mask" else 0.3, "high": 3.0}
    chosen = {"name": "cispo", "loss": {"clip_low": 1.0, "clip_high": 9.0}, "correction": bounds}
    settings = AlgorithmSettings.model_validate({**chosen, "old_logprobs": "engine"})
    logp_M = double([-1.0, -0.5, -2.0, -0.1, -3.0]).requires_grad_()
    engine_M = logp_M.detach() - WEIGHT_M.log()
    targets = PolicyTargets(engine_M, engine_M, ADVANTAGE_M)
    loss = build_algorithm(settings, 16).loss
    out = loss(logp_M, -logp_M.detach(), TWO_ANSWERS, targets, Totals(tokens=5, samples=2, groups=1))
    found = torch.autograd.grad(out.loss, logp_M)[0]
    expected = -double(weights) * WEIGHT_M * ADVANTAGE_M / 5  # the ratio of the loss is the weight
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert out.metrics["engine/correction_truncated"][0] == 5 - sum(weights)


def careful(logp_M, _entropy_M, _batch, targets, totals):
    """A loss that takes only some ratios, and reads nothing but a comparison."""
    apart_M = logp_M.detach() - targets.old_M
    if not (apart_M.abs() < 1).all():
        raise ValueError("too far off")
    return LossOut(-((apart_M.abs() < 0.2) * logp_M * targets.advantage_M).sum() / totals.tokens, {})


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", f"{__name__}:CAREFUL"])
@pytest.mark.parametrize("old", ["trainer", "engine"])
def test_losses_that_compare_with_old_log_probs_take_the_engines(name, old):
    settings = AlgorithmSettings.model_validate({"name": name, "old_logprobs": old})
    assert build_algorithm(settings, 16).old_logprobs == old


CAREFUL = Algorithm(advantage="grpo", loss=f"{__name__}:careful", source="tests")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "grpo", "correction": {"mode": "token-truncate"}}, "the ratio of the loss has already"),
        ({"name": "rloo"}, "algorithm rloo: old_logprobs is engine, but its loss compares with no old log-probs"),
    ],
)
def test_log_probs_of_the_engine_are_refused_as_old_ones_where_they_would_count_twice_or_never(settings, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        build_algorithm(AlgorithmSettings.model_validate({**settings, "old_logprobs": "engine"}), 16)


@pytest.mark.parametrize("mode", ["token-truncate", "token-mask"])
def test_a_geometric_mean_takes_no_weights_of_single_tokens(mode):
    settings = AlgorithmSettings.model_validate({"name": "gmpo", "correction": {"mode": mode}})
    with pytest.raises(ConfigError, match="has one ratio for a whole answer; use sequence-truncate"):
        build_algorithm(settings, 16)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_a_correction_by_answer_weighs_all_its_tokens_alike(name):
    found = gradient(name, "sequence-truncate", 3.0)
    assert found == pytest.approx([-3.0 / 6] * 3 + [2.0 * 0.1 / 4] * 2, rel=1e-12)
