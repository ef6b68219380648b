"""The table of algorithms, the checks before a start, corrections for the sampler, and the reduction of metrics."""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
from loss_cases import LOSSES, double, make_batch, random_case, read_reference, take_answers

from foveate.algorithms.checks import advantage_inputs, dry_run
from foveate.algorithms.corrections import correct_mismatch
from foveate.algorithms.kl import KLPenalty
from foveate.algorithms.metrics import reduce_metrics, to_metrics
from foveate.algorithms.policy_losses import grpo, gspo, reinforce
from foveate.algorithms.table import ADVANTAGES, ALGORITHMS, POLICY_LOSSES, TOKEN_MASKS, Algorithm
from foveate.algorithms.targets import LossOut, PolicyTargets, Totals
from foveate.algorithms.terms import Surrogate, policy_loss
from foveate.algorithms.values import gae, value_loss
from foveate.config.algorithm import AlgorithmSettings
from foveate.errors import ConfigError, DataError
from foveate.registry import bind
from foveate.train.algorithm import build_algorithm


def load(path: str):
    module, name = path.split(":")
    return vars(import_module(module))[name]


def settings_of(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_with_its_own_settings(name):
    row = ALGORITHMS[name]
    loss, advantage = load(POLICY_LOSSES[row.loss]), load(ADVANTAGES[row.advantage])
    assert set(row.loss_settings) <= settings_of(loss)
    assert set(row.advantage_settings) <= settings_of(advantage)
    teacher = {"path": "demo", "term": "advantage"} if row.needs_teacher else None
    settings = AlgorithmSettings(name=name, critic={"lr": 1e-5} if name == "ppo" else None, teacher=teacher)
    dry_run(build_algorithm(settings, 24).loss, {}, reference=False)
    available = {
        "rewards_S": double([0, 1, 0.5, 0.25]),
        "group_S": torch.tensor([0, 0, 1, 1]),
        "source_S": torch.tensor([0, 0, 0, 1]),
        "length_S": torch.tensor([2, 3, 1, 4]),
        "baseline_S": double([0.5, 0.5, 0.1, 0.1]),
        "reward_M": double([0, 1, 0.5, 0.25]),
        "value_M": double([0.4, 0.4, 0.4, 0.4]),
        "sample_M": torch.arange(4),
    }
    inputs = (available[needed] for needed in advantage_inputs(advantage))
    advantage_S = advantage(*inputs, **row.advantage_settings)
    assert advantage_S[1] > advantage_S[0] or (row.needs_teacher and not advantage_S.any())


def test_every_advantage_and_every_loss_is_used_by_an_algorithm():
    assert {row.advantage for row in ALGORITHMS.values()} == set(ADVANTAGES)
    assert {row.loss for row in ALGORITHMS.values()} == set(POLICY_LOSSES)
    assert {row.token_mask for row in ALGORITHMS.values()} == {"", *TOKEN_MASKS}
    assert {load(path) for path in POLICY_LOSSES.values()} == set(LOSSES)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_every_setting_of_a_loss_has_an_annotation_and_a_default(loss):
    for parameter in inspect.signature(loss).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameter.annotation is not inspect.Parameter.empty
            assert parameter.default is not inspect.Parameter.empty


def test_a_loss_is_its_surrogate_with_the_settings_that_all_share():
    @policy_loss("seq-mean-token-mean")
    def doubled(logp_M, targets, *, factor: float = 2.0):
        return Surrogate(-factor * targets.advantage_M * logp_M, torch.ones_like(logp_M))

    logp_M, batch, targets, totals = random_case(seed=8)
    more = {"kl_coefficient": 0.1, "kl_estimator": "k2", "entropy_coefficient": 0.1}
    mine = bind(doubled, {"factor": 1.0, **more}, "loss doubled")(logp_M, -logp_M, batch, targets, totals)
    ours = reinforce(logp_M, -logp_M, batch, targets, totals, aggregate="seq-mean-token-mean", **more)
    torch.testing.assert_close(mine.loss, ours.loss)
    with pytest.raises(ConfigError, match=r"unknown setting 'clip'; its settings: factor, aggregate, norm_length, kl_"):
        bind(doubled, {"clip": 0.2}, "loss doubled")
    with pytest.raises(ConfigError, match="kl_coefficient must be a number"):
        bind(doubled, {"kl_coefficient": "much"}, "loss doubled")


def test_a_row_says_whether_answers_of_no_advantage_contribute_a_gradient():
    assert not ALGORITHMS["gspo"].trains_without_advantage({"kl_coefficient": 0.0, "entropy_coefficient": 0.0})
    assert ALGORITHMS["gspo"].trains_without_advantage({"kl_coefficient": 0.1})
    assert ALGORITHMS["gspo"].trains_without_advantage({"entropy_coefficient": -0.1})
    assert ALGORITHMS["kl_cov"].trains_without_advantage({})
    assert Algorithm(advantage="grpo", loss="mine.py:loss", source="").trains_without_advantage({})


def test_gspo_has_the_clip_range_of_its_paper_in_the_table_and_by_default():
    defaults = inspect.signature(gspo).parameters
    for name in ("gspo", "gspo_token"):
        settings = ALGORITHMS[name].loss_settings
        assert (settings["clip_low"], settings["clip_high"]) == (3e-4, 4e-4)
    assert (defaults["clip_low"].default, defaults["clip_high"].default) == (3e-4, 4e-4)


@pytest.mark.parametrize(("loss", "length"), [({}, 24), ({"norm_length": 100}, 100)])
def test_dr_grpo_divides_by_the_answer_budget_of_the_run_unless_told_otherwise(loss, length):
    method = build_algorithm(AlgorithmSettings(name="dr_grpo", loss=loss), 24)
    assert method.loss.keywords["norm_length"] == length
    assert "norm_length" not in build_algorithm(AlgorithmSettings(name="grpo"), 24).loss.keywords


def test_a_loss_that_needs_a_reference_is_refused_before_the_start():
    dry_run(grpo, {"kl_coefficient": 0.01}, reference=True)
    with pytest.raises(DataError, match="no reference log-probs"):
        dry_run(grpo, {"kl_coefficient": 0.01}, reference=False)


def test_a_loss_that_is_not_one_finite_number_is_refused_by_name():
    def vector_loss(logp_M, entropy_M, batch, targets, totals):  # noqa: ARG001
        return LossOut(logp_M, {})

    with pytest.raises(DataError, match=r"policy loss .*vector_loss: returned \[.*one finite number"):
        dry_run(vector_loss, {}, reference=False)


def test_an_advantage_from_outside_that_asks_for_an_unknown_tensor_is_refused_by_name():
    def by_difficulty(rewards_S, difficulty_S, *, scale: float = 1.0):
        return scale * rewards_S / difficulty_S

    with pytest.raises(DataError, match=r"by_difficulty: positional parameter 'difficulty_S' is not one of rewards_S,"):
        advantage_inputs(by_difficulty)


# engine_M is chosen so that the token weights exp(old - engine) are these
WEIGHT_M = double([0.5, 2.0, 4.0, 1.0, 0.1])
MISMATCHED = PolicyTargets(torch.zeros(5).double(), -WEIGHT_M.log(), torch.ones(5).double())
TWO_ANSWERS = make_batch(torch.tensor([0, 0, 0, 1, 1]), 2)


@pytest.mark.parametrize(
    ("settings", "expected", "cut"),
    [
        ({"mode": "token-truncate", "high": 3.0}, [0.5, 2.0, 3.0, 1.0, 0.1], 0.2),
        ({"mode": "token-mask", "high": 3.0, "low": 0.2}, [0.5, 2.0, 0.0, 1.0, 0.0], 0.4),
        ({"mode": "sequence-truncate", "high": 3.0}, [3.0, 3.0, 3.0, 0.1, 0.1], 0.6),
        ({"mode": "sequence-mask", "high": 3.0}, [0.0, 0.0, 0.0, 0.1, 0.1], 0.6),
        ({"mode": "sequence-mask", "high": 5.0, "low": 0.2}, [4.0, 4.0, 4.0, 0.0, 0.0], 0.4),
        ({"mode": "sequence-reject", "high": 2.0, "low": 0.4}, [1.0, 1.0, 1.0, 0.0, 0.0], 0.4),
    ],
)
def test_corrections_weigh_advantages_as_written_out(settings, expected, cut):
    corrected, metrics = correct_mismatch(TWO_ANSWERS, MISMATCHED, **settings)
    torch.testing.assert_close(corrected.advantage_M, double(expected), atol=1e-12, rtol=0)
    reduced = reduce_metrics([metrics])
    assert reduced["engine/correction_truncated"] == pytest.approx(cut)
    assert reduced["engine/correction_weight"] == pytest.approx(sum(expected) / 5)
    assert reduced["engine/correction_weight_max"] == pytest.approx(max(expected))
    assert reduced["engine/correction_kl"] == pytest.approx((WEIGHT_M - WEIGHT_M.log() - 1).mean().item())


@pytest.mark.parametrize("mode", ["token-truncate", "sequence-mask", "sequence-reject"])
def test_a_sampler_that_agrees_with_the_trainer_is_not_corrected(mode):
    agreeing = dataclasses.replace(MISMATCHED, engine_M=MISMATCHED.old_M)
    corrected, metrics = correct_mismatch(TWO_ANSWERS, agreeing, mode=mode)
    assert corrected.advantage_M.tolist() == [1] * 5
    assert reduce_metrics([metrics])["engine/correction_truncated"] == 0


def test_a_weight_on_the_advantage_is_a_weight_on_the_token_loss():
    logp_M, batch, targets, totals = random_case(seed=8)
    corrected, _ = correct_mismatch(batch, targets, mode="token-truncate", high=1.2)
    weight_M = (targets.old_M - targets.engine_M).exp().clamp(max=1.2)
    ratio_M, advantage_M = (logp_M - targets.old_M).exp(), targets.advantage_M
    loss_M = -torch.minimum(ratio_M * advantage_M, ratio_M.clamp(0.8, 1.2) * advantage_M)
    out = grpo(logp_M, -logp_M, batch, corrected, totals, aggregate="token-mean")
    torch.testing.assert_close(out.loss, (weight_M * loss_M).mean(), atol=1e-12, rtol=0)


def test_a_lower_bound_for_truncation_is_refused():
    with pytest.raises(DataError, match=r"low is 0\.5, but correction mode token-truncate has no lower bound"):
        correct_mismatch(TWO_ANSWERS, MISMATCHED, mode="token-truncate", low=0.5)


def test_metrics_of_micro_batches_reduce_to_those_of_the_whole_batch():
    logp_M, batch, targets, totals = random_case(seed=9)
    whole = reduce_metrics([to_metrics(grpo(logp_M, -logp_M, batch, targets, totals).metrics)])
    parts = []
    for answers in ([0, 3], [7], [1, 2, 4, 5, 6]):
        part_logp_M, part_batch, part_targets, _ = take_answers(answers, logp_M, batch, targets)
        parts.append(to_metrics(grpo(part_logp_M, -part_logp_M, part_batch, part_targets, totals).metrics))
    assert reduce_metrics(parts) == pytest.approx(whole)


def test_metrics_are_what_their_names_say():
    logp_M, batch, targets, totals = random_case(seed=9)
    out = grpo(logp_M, -logp_M, batch, targets, totals, aggregate="token-mean", entropy_coefficient=0.5)
    log_ratio_M = logp_M - targets.old_M
    ratio_M, advantage_M = log_ratio_M.exp(), targets.advantage_M
    clipped_M = ((ratio_M > 1.2) & (advantage_M > 0)) | ((ratio_M < 0.8) & (advantage_M < 0))
    found = reduce_metrics([to_metrics(out.metrics)])
    expected = {
        "loss/policy": out.loss + 0.5 * (-logp_M).mean(),
        "loss/approx_kl": (ratio_M - log_ratio_M - 1).mean(),
        "loss/entropy": (-logp_M).mean(),
        "loss/ratio_min": ratio_M.min(),
        "loss/ratio_max": ratio_M.max(),
        "loss/clip_fraction": clipped_M.double().mean(),
    }
    assert 0 < expected["loss/clip_fraction"] < 1
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )
    assert set(found) == {*expected, "loss/kl_ref"}


def test_names_choose_how_metrics_are_reduced_and_parts_may_lack_them():
    parts = [{"a": (6.0, 2.0), "a_max": (3.0, 2.0), "a_min": (1.0, 2.0)}, {"a": (1.0, 5.0), "a_max": (9.0, 5.0)}]
    assert reduce_metrics([*parts, {"b": (0.0, 0.0)}]) == {"a": 1.0, "a_max": 9.0, "a_min": 1.0}
    assert reduce_metrics([]) == {}


@pytest.mark.parametrize("case", read_reference("policy_gradients"), ids=lambda c: f"{c['seed']}-{c['scale']}")
def test_gae_equals_the_reference(case):
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    sample_M, length_S = mask.nonzero()[:, 0], mask.sum(1)
    reward_M = torch.zeros(len(sample_M), dtype=torch.float64)
    reward_M[length_S.cumsum(0) - 1] = double(case["inputs"]["rew"])
    value_M = double(case["inputs"]["vals"])[mask]
    expected = double(case["advantages"]["gae(gamma=0.99,lam=0.95)"])[mask]
    found = gae(reward_M, value_M, sample_M, gamma=0.99, lam=0.95)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_gae_with_lambda_1_is_what_was_earned_less_what_was_expected():
    reward_M, value_M = double([0, 0, 1, 0.5]), double([0.2, 0.3, 0.4, 0.1])
    found = gae(reward_M, value_M, torch.tensor([0, 0, 0, 1]), gamma=1.0, lam=1.0, normalise="none")
    torch.testing.assert_close(found, double([0.8, 0.7, 0.6, 0.4]), atol=1e-12, rtol=0)


def test_the_value_loss_takes_the_worse_of_the_value_and_its_clipped_move():
    value_M, old_M = double([1.0, 0.0, 2.0]).requires_grad_(), double([0.0, 0.0, 1.9])
    out = value_loss(value_M, old_M, double([1.0, 1.0, 0.0]), Totals(tokens=6, samples=1, groups=1), clip=0.5)
    assert out.loss.item() == pytest.approx(0.5 * (0.25 + 1.0 + 4.0) / 6)
    (gradient_M,) = torch.autograd.grad(out.loss, value_M)
    assert gradient_M.tolist() == pytest.approx([0.0, -1 / 6, 2 / 6])
    reduced = reduce_metrics([to_metrics(out.metrics)])
    assert reduced["critic/error"] == pytest.approx(1.0)


def test_the_coefficient_of_a_kl_in_the_reward_follows_its_target_as_written_out():
    penalty = KLPenalty(coefficient=0.1, target=6.0, horizon=10_000)
    penalty.observe(60.0, 500)  # far above: the error counts as 0.2
    assert penalty.coefficient == pytest.approx(0.1 * (1 + 0.2 * 500 / 10_000))
    before = penalty.coefficient
    penalty.observe(5.4, 1000)
    assert penalty.coefficient == pytest.approx(before * (1 - 0.1 * 1000 / 10_000))
    again = KLPenalty(coefficient=9.0)
    again.restore(penalty.state())
    assert again.coefficient == penalty.coefficient
    again.observe(60.0, 500)  # without a target it stays
    assert again.coefficient == penalty.coefficient


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_docs_say_source_and_defaults_of_every_algorithm(name):
    page = (Path(__file__).parent.parent.parent / "docs" / "algorithms.md").read_text()
    row = ALGORITHMS[name]
    section = " ".join(page.partition(f"\n### {name}\n")[2].partition("\n### ")[0].split())
    assert f"Source: arXiv {row.source}." in section
    defaults = {f"loss.{key}": value for key, value in row.loss_settings.items()}
    defaults |= {f"advantage.{key}": value for key, value in row.advantage_settings.items()}
    defaults |= {"resample_rounds": row.resample_rounds} if row.resample_rounds else {}
    for key, value in defaults.items():
        assert f"`{key}` {value}" in section
