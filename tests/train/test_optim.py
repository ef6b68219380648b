from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from foveate.config.train import OptimSettings
from foveate.train.optim import LossScale, apply_gradients, build_optimizer, learning_rate


def model_with(gradient: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return model


def rates(steps: int, **settings: object) -> list[float]:
    optim = OptimSettings.model_validate({"lr": 8.0, **settings})
    return [learning_rate(step, steps, optim) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8, 8, 8, 8]),
        ({"warmup_steps": 2}, [4, 8, 8, 8]),
        ({"warmup_steps": 4}, [2, 4, 6, 8]),
        ({"schedule": "linear"}, [8, 6, 4, 2]),
        ({"schedule": "linear", "warmup_steps": 2}, [4, 8, 8, 4]),
        ({"schedule": "cosine"}, [8 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(settings, expected):
    assert rates(4, **settings) == pytest.approx(expected)


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decays = build_optimizer(model, OptimSettings(lr=1.0, weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in decays] == [(1, 0.1), (3, 0.0)]


def test_frozen_parameters_are_not_the_optimizers():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    [group] = build_optimizer(model, OptimSettings(lr=1.0)).param_groups
    assert [p is model.bias for p in group["params"]] == [True]


def test_a_step_moves_by_the_given_rate_and_clears_the_gradients():
    model = model_with(1.0)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, OptimSettings(lr=1.0))
    norm, taken = apply_gradients(optimizer, 0.25, max_grad_norm=1e9)
    assert (norm, taken) == (pytest.approx(math.sqrt(8)), True)
    torch.testing.assert_close(model.weight.detach(), before - 0.25)
    assert all(p.grad is None for p in model.parameters())


def test_the_global_norm_is_clipped_and_told_as_it_was():
    model = model_with(1.0)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    descent = torch.optim.SGD(model.parameters(), lr=1.0)
    norm, _ = apply_gradients(descent, 1.0, max_grad_norm=0.5)  # type: ignore[arg-type]
    assert norm == pytest.approx(math.sqrt(8))
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - start
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_neither_weights_nor_optimizer(bad):
    model = model_with(1.0)
    optimizer = build_optimizer(model, OptimSettings(lr=0.1))
    apply_gradients(optimizer, 0.1, 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, bad)
    _, taken = apply_gradients(optimizer, 0.1, 1.0)
    assert not taken
    for p, weight, moment in zip(model.parameters(), weights, moments, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is None
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in moment.items())


def test_a_scaled_loss_gives_the_same_step_and_its_scale_follows_what_happens():
    def stepped(scale):
        weight = torch.nn.Parameter(torch.arange(1.0, 5.0))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        (weight.pow(2).sum() * scale).backward()
        return apply_gradients(optimizer, 0.1, 1.0, scale), weight.detach()

    assert stepped(1.0)[0] == stepped(2.0**16)[0]
    assert torch.equal(stepped(1.0)[1], stepped(2.0**16)[1])
    scale = LossScale(8.0, patience=2)
    seen = []
    for taken in (True, False, True, True, True):
        scale.update(taken)
        seen.append(scale.value)
    assert seen == [8.0, 4.0, 4.0, 8.0, 8.0]
