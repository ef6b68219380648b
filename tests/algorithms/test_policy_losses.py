"""Policy losses: values and gradients against reference numbers, and the rules that they keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import LOSSES, double, pack, random_case, read_reference, take_answers, value_and_gradient

from foveate.algorithms.advantages import grpo as grpo_advantage
from foveate.algorithms.aggregate import Aggregate, token_weights
from foveate.algorithms.covariance import clip_cov_tokens, kl_cov_tokens
from foveate.algorithms.kl import KLEstimator, kl
from foveate.algorithms.policy_losses import (
    cispo,
    clip_cov,
    dppo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    kl_cov,
    reinforce,
    sapo,
)
from foveate.algorithms.targets import PolicyTargets, Totals
from foveate.errors import DataError

POLICY_GRADIENTS = read_reference("policy_gradients")
VERL = read_reference("verl_losses")
TRL = read_reference("trl_losses")
AGGREGATES: tuple[Aggregate, ...] = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
NO_CEILING = 1e9
WIDE = {"allow_wide_clip": True}
ESTIMATORS: tuple[tuple[KLEstimator, str], ...] = (("k1", "kl"), ("k2", "mse"), ("k3", "k3"), ("abs", "abs"))


def assert_reference(loss, settings, inputs, advantage_S, expected, tolerance=1e-9):
    """The loss and its gradient in the packed form equal those of the padded reference."""
    mask = torch.tensor(inputs["mask"]).bool()
    batch = pack(mask)
    old_M, logp_M, ref_M = double(inputs["old"])[mask], double(inputs["logp"])[mask], double(inputs["ref"])[mask]
    targets = PolicyTargets(old_M, old_M, advantage_S[batch.sample_M], ref_M)
    totals = Totals(tokens=len(logp_M), samples=len(mask), groups=1)
    value, gradient_M = value_and_gradient(loss, logp_M, batch, targets, totals, settings)
    torch.testing.assert_close(value, double(expected["loss"]), atol=tolerance, rtol=0)
    torch.testing.assert_close(gradient_M, double(expected["grad"])[mask], atol=tolerance, rtol=0)


def verl_settings(name, aggregate, low, high, ceiling):
    """Our loss and settings for a loss of verl: (function, settings, tolerance)."""
    exact = 1e-8 if aggregate == "seq-mean-token-mean" else 1e-9  # there the reference adds 1e-8 to the length
    clip = {"clip_low": low, "clip_high": high}
    common = {"aggregate": aggregate}
    if aggregate == "seq-mean-token-sum-norm":
        common["norm_length"] = 7
    limits = {"limit_low": low, "limit_high": high, "ratio_max": ceiling}
    return {
        "vanilla": (grpo, clip | {"dual_clip": ceiling} | common, exact),
        "gspo": (gspo, clip | common | WIDE, exact),
        "sapo": (sapo, {}, 1e-8),
        "cispo": (cispo, clip | common, exact),
        "gpg": (reinforce, common, exact),
        "geo_mean": (gmpo, clip, 1e-7),
        "dppo_tv": (dppo, limits | {"divergence": "tv"} | common, exact),
        "dppo_kl": (dppo, limits | {"divergence": "kl"} | common, exact),
    }.get(name)


@pytest.mark.parametrize("case", POLICY_GRADIENTS, ids=lambda c: f"{c['seed']}-{c['scale']}")
def test_losses_equal_the_reference_with_group_advantages(case):
    inputs = case["inputs"] | {"logp": case["inputs"]["new"]}
    advantage_S = grpo_advantage(double(inputs["rew"]), torch.arange(12) // inputs["n"])
    for expected in case["losses"]:
        given = expected["settings"]
        low, high, ceiling = (given[key] for key in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"))
        found = verl_settings(expected["name"], expected["aggregate"], low, high, ceiling)
        assert found is not None
        loss, settings, tolerance = found
        assert_reference(loss, settings, inputs, advantage_S, expected, tolerance)
        if loss is gspo:
            assert_reference(gspo_token, settings, inputs, advantage_S, expected, tolerance)


def test_losses_equal_verl_in_every_aggregation_and_clip_range():
    compared = set()
    for expected in VERL["losses"]:
        found = verl_settings(
            expected["loss_mode"], expected["agg"], expected["eps"], expected["eps_high"], ceiling=NO_CEILING
        )
        if found is not None:
            loss, settings, tolerance = found
            assert_reference(loss, settings, VERL["inputs"], double(VERL["inputs"]["adv"]), expected, tolerance)
            compared.add(expected["loss_mode"])
    assert compared == {"vanilla", "gspo", "sapo", "cispo", "gpg", "geo_mean", "dppo_tv", "dppo_kl"}


@pytest.mark.parametrize(("name", "choice"), [("clip_cov", clip_cov_tokens), ("kl_cov", kl_cov_tokens)])
def test_clip_cov_and_kl_cov_equal_verl_tokens_included(name, choice):
    """verl draws clip-cov's tokens with torch's generator after manual_seed(0)."""
    inputs = VERL["inputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    batch, totals = pack(mask), Totals(tokens=int(mask.sum()), samples=len(mask), groups=1)
    old_M, logp_M = double(inputs["old"])[mask], double(inputs["logp"])[mask]
    advantage_M = double(inputs["adv"])[batch.sample_M]
    cases = [case for case in VERL["losses"] if case["loss_mode"] == name]
    for case in cases:
        clip = {"clip_low": case["eps"], "clip_high": case["eps_high"]} if name == "clip_cov" else {}
        bounds = {"cov_low": 1.0, "cov_high": 5.0} if name == "clip_cov" else {}
        generator = torch.Generator().manual_seed(0)
        masked_M = choice(logp_M, old_M, advantage_M, generator, share=2e-4, **clip, **bounds)
        targets = PolicyTargets(old_M, old_M, advantage_M, masked_M=masked_M)
        settings = {"aggregate": case["agg"], **clip} | ({"penalty": 0.1} if name == "kl_cov" else {})  # verl's default
        if case["agg"] == "seq-mean-token-sum-norm":
            settings["norm_length"] = 7
        loss = clip_cov if name == "clip_cov" else kl_cov
        value, gradient_M = value_and_gradient(loss, logp_M, batch, targets, totals, settings)
        torch.testing.assert_close(value, double(case["loss"]), atol=1e-8, rtol=0)
        torch.testing.assert_close(gradient_M, double(case["grad"])[mask], atol=1e-8, rtol=0)
        assert masked_M.sum() == 1
    assert len(cases) == 12


def trl_settings(case):
    """Our loss and settings for a case of TRL: (function, settings), or None for what only TRL defines."""
    low, high = case["eps"], case["eps_high"]
    common = {"kl_coefficient": case["beta"], "kl_estimator": "k3"}
    clip = {"clip_low": low, "clip_high": high, "dual_clip": case["delta"]} | common
    sequence = case["level"] == "sequence"
    aggregates = {
        "grpo": {"aggregate": "seq-mean-token-mean"},
        "bnpo": {"aggregate": "token-mean"},
        "dapo": {"aggregate": "token-mean"},
        "dr_grpo": {"aggregate": "seq-mean-token-sum-norm", "norm_length": 7},
        "luspo": {"aggregate": "seq-mean-token-sum"},
    }
    if case["loss_type"] in aggregates:
        return (
            (gspo, clip | WIDE | aggregates[case["loss_type"]])
            if sequence
            else (grpo, clip | aggregates[case["loss_type"]])
        )
    if sequence or case["delta"] is not None:
        return None
    if case["loss_type"] == "cispo":  # TRL's bound is the ratio itself, ours its distance from 1
        return cispo, {"clip_low": 1.0, "clip_high": high - 1, "aggregate": "token-mean"} | common
    # TRL holds its temperatures in float32
    return sapo, {"tau_negative": torch.tensor(1.05).item()} | common


def test_losses_with_kl_and_dual_clip_equal_trl():
    compared = {}
    for expected in TRL["cases"]:
        found = trl_settings(expected)
        if found is not None:
            loss, settings = found
            assert_reference(loss, settings, TRL["inputs"], double(TRL["inputs"]["adv"]), expected)
            compared[expected["loss_type"]] = compared.get(expected["loss_type"], 0) + 1
    assert compared == {"grpo": 24, "bnpo": 24, "dr_grpo": 24, "dapo": 24, "luspo": 24, "cispo": 6, "sapo": 6}


def test_kl_estimators_equal_the_reference():
    mask = torch.tensor(VERL["inputs"]["mask"]).bool()
    logp_M, ref_M = double(VERL["inputs"]["logp"])[mask], double(VERL["inputs"]["ref"])[mask]
    for estimator, _ in ESTIMATORS:
        expected_M = double(VERL["kl"][estimator])[mask]
        torch.testing.assert_close(kl(logp_M, ref_M, estimator), expected_M, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", POLICY_GRADIENTS, ids=lambda c: f"{c['seed']}-{c['scale']}")
def test_kl_and_aggregations_equal_the_reference_with_groups(case):
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    new_M, ref_M = double(case["inputs"]["new"])[mask], double(case["inputs"]["ref"])[mask]
    for estimator, name in ESTIMATORS:
        expected_M = double(case["kl"][name])[mask]
        torch.testing.assert_close(kl(new_M, ref_M, estimator), expected_M, atol=1e-9, rtol=0)
    totals = Totals(tokens=len(new_M), samples=len(mask), groups=3)
    for mode in AGGREGATES:
        norm_length = mask.shape[1] if mode == "seq-mean-token-sum-norm" else None
        weight_M = token_weights(pack(mask), totals, mode, norm_length, new_M)
        value = (weight_M * (new_M - ref_M).square()).sum()
        # the reference adds 1e-8 to the number of tokens in the mean over an answer
        relative = 1e-8 if mode == "seq-mean-token-mean" else 0
        torch.testing.assert_close(value, double(case["aggregate"][mode]), atol=1e-9, rtol=relative)


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [
        ("k1", lambda d: torch.ones_like(d)),
        ("k2", lambda d: d),
        ("k3", lambda d: 1 - (-d).exp()),
        ("abs", lambda d: d.sign()),
    ],
)
def test_kl_estimators_have_their_written_out_gradient(estimator, derivative):
    logp_M = double([-0.1, -2.0, -30.0]).requires_grad_()
    ref_M = double([-1.0, -0.5, -29.0])
    (gradient_M,) = torch.autograd.grad(kl(logp_M, ref_M, estimator).sum(), logp_M)
    torch.testing.assert_close(gradient_M, derivative((logp_M - ref_M).detach()), atol=1e-12, rtol=0)


def test_k3_stays_finite_where_the_reference_finds_a_token_impossible():
    assert torch.isfinite(kl(torch.tensor([-100.0, 0.0]), torch.tensor([0.0, -100.0]), "k3")).all()


COMMON = {"kl_coefficient": 0.1, "kl_estimator": "k3", "entropy_coefficient": 0.05}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_micro_batches_in_any_order_add_up_to_the_whole_batch(loss, aggregate):
    logp_M, batch, targets, totals = random_case(seed=1)
    norm_length = {"norm_length": 6} if aggregate == "seq-mean-token-sum-norm" else {}
    settings = COMMON | {"aggregate": aggregate} | norm_length
    value, gradient_M = value_and_gradient(loss, logp_M, batch, targets, totals, settings)
    parts_value, parts_gradient_M = torch.zeros_like(value), torch.zeros_like(gradient_M)
    for answers in ([6, 2, 0], [5], [7, 1, 4, 3]):
        part_logp_M, part_batch, part_targets, index_M = take_answers(answers, logp_M, batch, targets)
        part_value, part_gradient_M = value_and_gradient(loss, part_logp_M, part_batch, part_targets, totals, settings)
        parts_value += part_value
        parts_gradient_M[index_M] = part_gradient_M
    torch.testing.assert_close(parts_value, value, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts_gradient_M, gradient_M, atol=1e-12, rtol=0)


@pytest.mark.parametrize("aggregate", AGGREGATES[:3])
def test_gspo_equals_gspo_token_when_advantages_are_constant_within_an_answer(aggregate):
    settings = {"clip_low": 0.1, "clip_high": 0.1, "aggregate": aggregate} | WIDE
    for seed in range(5):
        logp_M, batch, targets, totals = random_case(seed)
        sequence = value_and_gradient(gspo, logp_M, batch, targets, totals, settings)
        token = value_and_gradient(gspo_token, logp_M, batch, targets, totals, settings)
        torch.testing.assert_close(sequence, token, atol=1e-12, rtol=0)
        assert sequence[1].abs().max() > 1e-3


def test_gspo_is_the_written_out_formula():
    logp_M, batch, targets, totals = random_case(seed=2)
    expected = 0.0
    for answer in range(8):
        own = batch.sample_M == answer
        ratio = (logp_M - targets.old_M)[own].mean().exp()
        advantage = targets.advantage_M[own][0]
        expected -= min(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage) / 8
    value, _ = value_and_gradient(gspo, logp_M, batch, targets, totals, {})
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_gspo_stops_the_gradient_of_an_answer_that_left_its_clip_range():
    logp_M, batch, targets, totals = random_case(seed=2, drift=0.0)
    rises_M = dataclasses.replace(targets, advantage_M=torch.ones_like(logp_M))
    for step, moves in ((3e-4, True), (5e-4, False), (-5e-4, True)):
        _, gradient_M = value_and_gradient(gspo, logp_M + step, batch, rises_M, totals, {})
        assert bool((gradient_M != 0).all()) == moves


@pytest.mark.parametrize("loss", [grpo, gspo, gspo_token, gmpo, cispo], ids=lambda f: f.__name__)
def test_on_fresh_weights_every_ratio_loss_has_the_gradient_of_reinforce(loss):
    logp_M, batch, targets, totals = random_case(seed=4)
    rewards_S = double([0.1, 0.9, 0.3, 0.4, 1.0, 0.0, 0.0, 0.5])
    advantage_S = grpo_advantage(rewards_S, torch.arange(8) // 4)
    fresh = dataclasses.replace(targets, old_M=logp_M, advantage_M=advantage_S[batch.sample_M])
    settings = {"aggregate": "seq-mean-token-mean"}
    _, gradient_M = value_and_gradient(loss, logp_M, batch, fresh, totals, settings)
    _, expected_M = value_and_gradient(reinforce, logp_M, batch, fresh, totals, settings)
    torch.testing.assert_close(gradient_M, expected_M, atol=1e-12, rtol=0)
    assert expected_M.abs().max() > 1e-2


def test_the_common_terms_are_added_with_their_coefficients():
    logp_M, batch, targets, totals = random_case(seed=5)
    plain, _ = value_and_gradient(grpo, logp_M, batch, targets, totals, {"aggregate": "token-mean"})
    full, _ = value_and_gradient(grpo, logp_M, batch, targets, totals, COMMON | {"aggregate": "token-mean"})
    assert targets.ref_M is not None
    expected = plain + 0.1 * kl(logp_M, targets.ref_M, "k3").mean() - 0.05 * (-logp_M).mean()
    torch.testing.assert_close(full, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shift", [200.0, -200.0])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_ratio_beyond_float32_gives_a_finite_loss_and_gradient(loss, shift):
    logp_M, batch, targets, totals = random_case(seed=6)
    logp_M, old_M, advantage_M = logp_M.float(), (logp_M - shift).float(), targets.advantage_M.float()
    far = PolicyTargets(old_M, old_M, advantage_M, masked_M=targets.masked_M)
    value, gradient_M = value_and_gradient(loss, logp_M, batch, far, totals, {})
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(gradient_M).all()


def test_a_kl_without_reference_log_probs_is_refused_with_advice():
    logp_M, batch, targets, totals = random_case(seed=7)
    without = dataclasses.replace(targets, ref_M=None)
    with pytest.raises(DataError, match=r"kl_coefficient is 0\.01.*load a reference model or set"):
        gspo(logp_M, -logp_M, batch, without, totals, kl_coefficient=0.01)


@pytest.mark.parametrize("settings", [{"aggregate": "seq-mean-token-sum-norm"}, {"norm_length": 5}])
def test_a_norm_length_without_its_aggregation_or_the_reverse_is_refused(settings):
    logp_M, batch, targets, totals = random_case(seed=7)
    with pytest.raises(DataError, match="give both or neither"):
        grpo(logp_M, -logp_M, batch, targets, totals, **settings)


def test_a_dual_clip_inside_the_clip_range_is_refused():
    logp_M, batch, targets, totals = random_case(seed=7)
    with pytest.raises(DataError, match=r"dual_clip is 1\.1: it must be above 1 \+ clip_high"):
        grpo(logp_M, -logp_M, batch, targets, totals, dual_clip=1.1)


def test_an_entropy_bonus_on_entropies_without_gradient_is_a_mistake():
    logp_M, batch, targets, totals = random_case(seed=7)
    with pytest.raises(AssertionError, match="entropies with a gradient"):
        grpo(logp_M.requires_grad_(), -logp_M.detach(), batch, targets, totals, entropy_coefficient=0.1)
