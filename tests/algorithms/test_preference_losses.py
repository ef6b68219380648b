"""Preference losses: against TRL, against formulas written out, and invariant to how pairs are packed."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import double, make_batch, read_reference

from foveate.algorithms.checks import dry_run_pairs
from foveate.algorithms.metrics import reduce_metrics, to_metrics
from foveate.algorithms.preference_losses import RewardShift, bco, dpo, ipo, mpo, sft
from foveate.algorithms.table import PREFERENCE_LOSSES
from foveate.algorithms.targets import PairTargets, Totals
from foveate.errors import DataError
from foveate.registry import resolve

LOSSES = (dpo, ipo, bco, sft, mpo)
TRL = read_reference("trl_preference_losses")


def packed(answers, ref, shift=0.0):
    """Per-token log-probs of chosen, rejected, chosen, ... with the batch, targets and totals they come with."""
    lengths = torch.tensor([len(answer) for answer in answers])
    batch = make_batch(torch.repeat_interleave(torch.arange(len(answers)), lengths), len(answers))
    totals = Totals(tokens=int(lengths[::2].sum()), samples=len(answers), groups=len(answers) // 2)
    return torch.cat([double(answer) for answer in answers]), batch, PairTargets(double(ref), shift), totals


def alternating(halves):
    """First all chosen, then all rejected -> chosen, rejected, chosen, ..."""
    pairs = len(halves) // 2
    return [halves[i + half * pairs] for i in range(pairs) for half in (0, 1)]


def evaluated(loss, logp_M, batch, targets, totals, **settings):
    leaf_M = logp_M.clone().requires_grad_()
    out = loss(leaf_M, batch, targets, totals, **settings)
    return out, torch.autograd.grad(out.loss, leaf_M)[0]


def random_pairs(seed, pairs=4, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (2 * pairs,), generator=generator).tolist()
    answers = [(-3 * torch.rand(n, generator=generator, dtype=torch.float64)).tolist() for n in lengths]
    ref = [sum(answer) + float(torch.randn((), generator=generator, dtype=torch.float64)) for answer in answers]
    return answers, ref, shift


# ------------------------------------------------------------------------------------------------------ against TRL


@pytest.mark.parametrize("case", TRL["paired"]["cases"], ids=lambda case: f"{case['name']}-{case['beta']}")
def test_losses_and_gradients_are_those_of_trl(case):
    answers, ref = alternating(TRL["paired"]["logp"]), alternating(TRL["paired"]["ref"])
    settings = {} if case["name"] == "sft" else {"beta": case["beta"]}
    settings |= {"generation_mean": "token"} if case["name"] == "mpo" else {}
    loss = resolve(PREFERENCE_LOSSES, case["name"], "loss")
    out, gradient_M = evaluated(loss, *packed(answers, ref), **settings)
    assert out.loss.item() == pytest.approx(case["loss"], rel=1e-12)
    expected_M = torch.cat([double(answer) for answer in alternating(case["grad"])])
    torch.testing.assert_close(gradient_M, expected_M, rtol=1e-11, atol=1e-15)
    if case["name"] != "sft":
        said = reduce_metrics([to_metrics(out.metrics)])
        assert said["reward/margin"] == pytest.approx(case["margins"], rel=1e-12)
        assert said["reward/preferred"] == pytest.approx(case["accuracies"])


def test_bco_with_a_shift_is_that_of_trl_and_so_is_its_running_mean():
    """TRL counts the rewards of a step in its own shift; the mean of the steps before is the one it had before."""
    running = RewardShift()
    for step in TRL["shifted"]["steps"]:
        assert running.mean == pytest.approx(step["shift_before"], abs=1e-7)  # TRL keeps it in float32
        answers = [[value] for pair in step["logp"] for value in pair]
        ref = [value for pair in step["ref"] for value in pair]
        out, gradient_M = evaluated(bco, *packed(answers, ref, step["shift"]), beta=TRL["shifted"]["beta"])
        assert out.loss.item() == pytest.approx(step["loss"], rel=1e-12)
        torch.testing.assert_close(gradient_M, double(step["grad"]).flatten(), rtol=1e-11, atol=1e-15)
        said = reduce_metrics([to_metrics(out.metrics)])
        running.add(said["reward/chosen"], said["reward/rejected"], len(step["logp"]))
        assert running.mean == pytest.approx(step["shift"], abs=1e-7)


# ------------------------------------------------------------------------------------------------ the formulas by hand


def by_hand(answers, ref, shift, beta, weights, generation_mean="pair"):
    """MPO one pair at a time in plain Python."""
    preference = quality = generation = 0.0
    pairs = len(answers) // 2
    tokens = sum(len(answer) for answer in answers[::2])

    def minus_log_sigmoid(x):
        return math.log1p(math.exp(-x))

    for i in range(pairs):
        chosen = beta * (sum(answers[2 * i]) - ref[2 * i])
        rejected = beta * (sum(answers[2 * i + 1]) - ref[2 * i + 1])
        preference += minus_log_sigmoid(chosen - rejected) / pairs
        quality += (minus_log_sigmoid(chosen - shift) + minus_log_sigmoid(-(rejected - shift))) / pairs
        generation -= sum(answers[2 * i]) / (len(answers[2 * i]) * pairs if generation_mean == "pair" else tokens)
    return weights[0] * preference + weights[1] * quality + weights[2] * generation


@pytest.mark.parametrize("weights", [(0.8, 0.2, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize("generation_mean", ["pair", "token"])
def test_mpo_is_its_formula(weights, beta, generation_mean):
    answers, ref, shift = random_pairs(1)
    settings = dict(zip(("preference", "quality", "generation"), weights, strict=True))
    out, _ = evaluated(mpo, *packed(answers, ref, shift), beta=beta, generation_mean=generation_mean, **settings)
    assert out.loss.item() == pytest.approx(by_hand(answers, ref, shift, beta, weights, generation_mean), rel=1e-12)


def test_mpo_has_the_weights_of_the_paper_and_each_term_stands_alone():
    answers, ref, shift = random_pairs(2)
    case = packed(answers, ref, shift)
    whole = mpo(*case).loss
    assert whole.item() == pytest.approx(by_hand(answers, ref, shift, 0.1, (0.8, 0.2, 1.0)), rel=1e-12)
    imitate = mpo(*case, preference=0.0, quality=0.0).loss
    assert whole.item() == pytest.approx((0.8 * dpo(*case).loss + 0.2 * bco(*case).loss + imitate).item())
    by_token = mpo(*case, preference=0.0, quality=0.0, generation_mean="token").loss
    assert by_token.item() == pytest.approx(sft(*case).loss.item(), rel=1e-14)


def test_a_long_chosen_answer_weighs_no_more_than_a_short_one():
    answers = [[-3.0] * 5, [-1.0] * 3, [-0.25] * 400, [-1.0] * 3]
    case = packed(answers, [0.0] * 4)
    by_pair, by_token = (
        mpo(*case, preference=0.0, quality=0.0, generation_mean=mean).loss.item() for mean in ("pair", "token")
    )
    assert by_pair == pytest.approx((3.0 + 0.25) / 2, rel=1e-14)
    assert by_token == pytest.approx((5 * 3.0 + 400 * 0.25) / 405, rel=1e-14)


def on_one_device(logits_TV, answer_T, prompt, shift, ref):
    """The loss of a device that holds one pair, as the released trainer computes it from logits: rows of logits and
    tokens of the chosen and of the rejected answer behind a prompt of `prompt` tokens, padded to one length."""
    logps = []
    for logits, ids in zip(logits_TV, answer_T, strict=True):
        answer = ids[prompt:]
        logps.append(torch.log_softmax(logits[prompt - 1 : prompt - 1 + len(answer)], -1).gather(1, answer[:, None]))
    labels = torch.zeros(len(logits_TV[0]), dtype=torch.int64)  # 0 is ignored: the prompt and the padding
    labels[prompt - 1 : len(answer_T[0]) - 1] = answer_T[0][prompt:]
    generation = torch.nn.functional.cross_entropy(logits_TV[0], labels, ignore_index=0)
    chosen, rejected = (0.1 * (logp.sum() - own) for logp, own in zip(logps, ref, strict=True))
    preference = -torch.nn.functional.logsigmoid(chosen - rejected)
    quality = -torch.nn.functional.logsigmoid(chosen - shift) - torch.nn.functional.logsigmoid(shift - rejected)
    return 0.8 * preference + 0.2 * quality + generation, [logp[:, 0].tolist() for logp in logps]


def test_mpo_equals_the_released_trainer_with_a_pair_on_each_device():
    generator = torch.Generator().manual_seed(5)
    losses, answers, ref, shift = [], [], [], 0.7
    for _ in range(100):
        prompt = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(1, 40, (2,), generator=generator).tolist()
        ids = [torch.randint(1, 23, (prompt + length,), generator=generator) for length in lengths]
        padded = prompt + max(lengths)
        logits = [2 * torch.randn(padded, 23, generator=generator, dtype=torch.float64) for _ in ids]
        own = (-3.0 * double(lengths) + torch.randn(2, generator=generator, dtype=torch.float64)).tolist()
        loss, pair = on_one_device(logits, ids, prompt, shift, own)
        losses.append(loss)
        answers += pair
        ref += own
    mean_over_devices = torch.stack(losses).mean()
    assert mpo(*packed(answers, ref, shift)).loss.item() == pytest.approx(mean_over_devices.item(), rel=1e-12)


def test_the_reward_shift_is_the_mean_over_all_rewards_so_far():
    shift = RewardShift()
    shift.add(1.0, 0.0, pairs=2)
    shift.add(4.0, 2.0, pairs=6)
    assert shift == RewardShift(mean=(4 * 0.5 + 12 * 3.0) / 16, count=16)


# -------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3], [1, 0, 2]], [[2], [0], [3], [1]]])
def test_neither_order_nor_micro_batches_bias_a_loss(loss, parts):
    answers, ref, shift = random_pairs(3)
    logp_M, batch, targets, totals = packed(answers, ref, shift)
    whole, gradient_M = evaluated(loss, logp_M, batch, targets, totals)
    total, metrics = 0.0, []
    for part in parts:
        members = [2 * pair + half for pair in part for half in (0, 1)]
        some_M, some, some_targets, _ = packed([answers[i] for i in members], [ref[i] for i in members], shift)
        out, part_M = evaluated(loss, some_M, some, some_targets, totals)
        total += out.loss.item()
        metrics.append(to_metrics(out.metrics))
        index_M = torch.cat([(batch.sample_M == sample).nonzero()[:, 0] for sample in members])
        torch.testing.assert_close(part_M, gradient_M[index_M], rtol=1e-10, atol=1e-15)
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    assert reduce_metrics(metrics) == pytest.approx(reduce_metrics([to_metrics(whole.metrics)]), rel=1e-9)
    assert reduce_metrics(metrics)["loss/total"] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("loss", [dpo, ipo, bco, mpo])
def test_a_step_down_the_gradient_prefers_the_chosen_answer_more(loss):
    answers, ref, _ = random_pairs(4)
    logp_M, batch, targets, totals = packed(answers, ref)
    out, gradient_M = evaluated(loss, logp_M, batch, targets, totals)
    after, _ = evaluated(loss, logp_M - 0.1 * gradient_M, batch, targets, totals)
    assert (
        reduce_metrics([to_metrics(after.metrics)])["reward/margin"]
        > reduce_metrics([to_metrics(out.metrics)])["reward/margin"]
    )


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (dpo, {"beta": 0.0}, "setting beta: is 0.0, must be above 0"),
        (mpo, {"quality": -1.0}, "setting quality: is -1.0, a weight must be at least 0"),
        (mpo, {"preference": 0.0, "quality": 0.0, "generation": 0.0}, "all are 0, so there is nothing to train on"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_a_run(loss, settings, message):
    with pytest.raises(DataError, match=message):
        dry_run_pairs(loss, settings, reference=True)


@pytest.mark.parametrize("loss", [dpo, ipo, bco, mpo])
def test_a_loss_that_compares_with_a_reference_needs_one(loss):
    with pytest.raises(DataError, match="needs the log-probs of a reference"):
        dry_run_pairs(loss, {}, reference=False)


def test_imitation_needs_no_reference():
    dry_run_pairs(sft, {}, reference=False)


def test_a_loss_that_is_no_finite_number_is_refused():
    def broken(logp_M, batch, targets, totals):
        return sft(logp_M / 0, batch, targets, totals)

    with pytest.raises(DataError, match="must be one finite number"):
        dry_run_pairs(broken, {}, reference=True)
