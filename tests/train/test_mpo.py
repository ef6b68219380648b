"""Preference optimisation: the packed loss against plain transformers, the cache of the reference, and whole runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slow_cases import slow_but
from test_resume import interrupt, stop_at, without_times
from test_sft import distance, norm
from toy import make_data, make_pairs, mpo_settings
from transformers import AutoModelForImageTextToText

import foveate.train.mpo
from foveate.algorithms.targets import Totals
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.data.demos import pair_of
from foveate.data.table import open_tasks
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, DataError
from foveate.log import read_metrics
from foveate.models.policy import load_policy
from foveate.records import PackedGroup
from foveate.run_folder import RunFolder
from foveate.train.mpo import build_preference_loss, run_mpo
from foveate.train.reference import Reference, TrainPair, reference_key
from foveate.train.worker import Worker

SHIFT = 0.2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(make_data(tmp_path_factory.mktemp("shapes")))


@pytest.fixture(scope="module")
def packed_groups(tiny_policy, pairs):
    encoder = Encoder(tiny_policy.tokenizer, tiny_policy.family, 1, 128)
    found = [pair_of(open_tasks(pairs)[i]) for i in range(4)]
    return [
        PackedGroup.of_tokens(encoder(p.task), (encoder.answer_ids(p.chosen), encoder.answer_ids(p.rejected)))
        for p in found
    ]


def plain_logprobs(model, prompt, answer):
    """Log-probs of one answer after one prompt, without packing."""
    ids = torch.tensor([[*prompt.token_ids, *answer]])
    logits = model(input_ids=ids, pixel_values=prompt.pixels).logits[0, len(prompt) - 1 : -1]
    return F.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def plain_mpo(model, packed_groups, ref):
    """MPO with its default weights, one answer at a time."""
    logps = [
        [plain_logprobs(model, packed.prompt, one.token_ids) for one in packed.answers] for packed in packed_groups
    ]
    rewards = [[0.1 * (logp.sum() - r) for logp, r in zip(*pair, strict=True)] for pair in zip(logps, ref, strict=True)]
    dpo = sum(-F.logsigmoid(c - r) for c, r in rewards) / len(packed_groups)
    bco = sum(-F.logsigmoid(c - SHIFT) - F.logsigmoid(SHIFT - r) for c, r in rewards) / len(packed_groups)
    generation = -sum(chosen.mean() for chosen, _ in logps) / len(packed_groups)
    return 0.8 * dpo + 0.2 * bco + generation


def learned(folder, packed_groups, ref, budget):
    """The metrics of one step, and its gradient: plain descent with learning rate 1 moves the weights by it."""
    worker = Worker(ModelSettings(path=str(folder)), OptimSettings(lr=1.0, max_grad_norm=1e9), budget)
    before = {name: p.detach().clone() for name, p in worker.policy.model.named_parameters()}
    worker.optimizer = torch.optim.SGD(worker.policy.model.parameters(), lr=1.0)  # type: ignore[assignment]
    totals = Totals(
        tokens=sum(len(packed.answers[0]) for packed in packed_groups),
        samples=2 * len(packed_groups),
        groups=len(packed_groups),
    )
    loss = build_preference_loss(mpo_settings("run", folder, "pairs").loss)
    said = worker.update_preference(
        [TrainPair(packed, r) for packed, r in zip(packed_groups, ref, strict=True)], loss, totals, SHIFT, 1.0
    )
    return said, {name: before[name] - p.detach() for name, p in worker.policy.model.named_parameters()}


REF = [(-30.0, -20.0), (-35.0, -22.0), (-40.0, -31.0), (-32.0, -9.0)]


def test_the_packed_loss_and_gradient_are_those_of_one_answer_at_a_time(tiny_folder, packed_groups):
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, attn_implementation="eager")
    loss = plain_mpo(model, packed_groups, REF)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    said, gradient = learned(tiny_folder, packed_groups, REF, budget=4096)
    assert said["loss/total"] == pytest.approx(loss.item(), rel=1e-5)
    assert said["optim/grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
    assert distance(gradient, expected) <= 1e-3 * norm(expected)


def test_the_token_budget_biases_neither_loss_nor_gradient(tiny_folder, packed_groups):
    whole, gradient = learned(tiny_folder, packed_groups, REF, budget=4096)
    parted, other = learned(tiny_folder, packed_groups, REF, budget=60)
    assert parted == pytest.approx(whole, rel=1e-4)
    assert distance(gradient, other) <= 1e-4 * norm(gradient)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_metrics_checkpoints_reference_and_a_model(tmp_path, tiny_folder, pairs):
    run = run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs))
    records = read_metrics(run.metrics)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {
        "loss/total",
        "loss/dpo",
        "loss/bco",
        "loss/sft",
        "reward/margin",
        "reward/preferred",
        "loss/entropy",
    } <= set(records[0])
    first = records[0]
    assert first["reward/margin"] == pytest.approx(0, abs=1e-5)  # the policy is the reference
    assert first["loss/dpo"] == pytest.approx(np.log(2), rel=1e-5)
    assert first["reward/shift"] == 0.0
    expected = (records[1]["reward/chosen"] + records[1]["reward/rejected"]) / 4 + first["reward/chosen"] / 4
    expected += first["reward/rejected"] / 4
    assert records[2]["reward/shift"] == pytest.approx(expected, abs=1e-12)
    assert [path.name for path in sorted(run.checkpoints.glob("step_*"))] == ["step_000002", "step_000003"]
    assert len(list((run.path / "reference").iterdir())) == 1
    assert load_policy(str(run.final)).family == load_policy(str(tiny_folder)).family


@pytest.mark.parametrize("name", slow_but(["mpo", "bco"], ["mpo", "dpo", "ipo", "bco"]))
def test_each_loss_learns_to_prefer_the_chosen_answers(tmp_path, tiny_folder, pairs, name):
    settings = mpo_settings(tmp_path / "run", tiny_folder, pairs, loss=name, train={"steps": 8})
    last = read_metrics(run_mpo(settings).metrics)[-1]
    assert last["reward/margin"] > 0.2
    assert last["reward/preferred"] == 1.0


def test_imitation_of_the_chosen_answers_computes_no_reference(tmp_path, tiny_folder, pairs):
    run = run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs, loss="sft"))
    records = read_metrics(run.metrics)
    assert not (run.path / "reference").exists()
    assert records[-1]["loss/total"] < records[0]["loss/total"]


def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path, tiny_folder, pairs):
    """The shift of BCO is part of what continues."""

    def settings(name):
        changes = {"optim": {"lr": 1e-3, "schedule": "linear"}, "train": {"steps": 6, "save_every": 2}}
        return mpo_settings(tmp_path / name, tiny_folder, pairs, **changes)

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "between gradients and update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_mpo(settings("interrupted"))
    run, whole = run_mpo(settings("interrupted")), run_mpo(settings("at once"))
    assert (run.final / "model.safetensors").read_bytes() == (whole.final / "model.safetensors").read_bytes()
    assert without_times(run) == without_times(whole)
    assert without_times(run)[-1]["reward/shift"] != 0


def test_a_step_that_was_skipped_does_not_move_the_shift(tmp_path, tiny_folder, pairs, monkeypatch):
    """Rewards that are not finite would stay in the mean for ever."""
    original, steps = Worker.update_preference, []

    def breaking(self, own, loss, *arguments):
        steps.append(len(own))

        def infinite(*given):
            out = loss(*given)
            return replace(out, loss=out.loss * float("inf"))

        return original(self, own, infinite if len(steps) == 2 else loss, *arguments)

    monkeypatch.setattr(Worker, "update_preference", breaking)
    records = read_metrics(run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs)).metrics)
    assert [record["optim/update_skipped"] for record in records] == [0.0, 1.0, 0.0]
    assert records[2]["reward/shift"] == records[1]["reward/shift"]


# ---------------------------------------------------------------------------------------------------- the reference


def test_reference_logprobs_are_computed_once_and_shared_by_runs(tmp_path, tiny_folder, pairs, monkeypatch):
    train = {"reference_cache": str(tmp_path / "cache")}
    one = run_mpo(mpo_settings(tmp_path / "one", tiny_folder, pairs, train=train))
    monkeypatch.setattr(Worker, "logprobs", None)  # a second computation would fail
    two = run_mpo(mpo_settings(tmp_path / "two", tiny_folder, pairs, train=train))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert (one.final / "model.safetensors").read_bytes() == (two.final / "model.safetensors").read_bytes()


def test_a_reference_that_was_cut_off_is_completed(tmp_path, tiny_folder, pairs, monkeypatch):
    train = {"reference_cache": str(tmp_path / "cache")}
    run_mpo(mpo_settings(tmp_path / "one", tiny_folder, pairs, train=train))
    [file] = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3 + 5])
    original, asked = Worker.logprobs, []

    def counting(self, packed_groups, reference=False):
        asked.append(len(packed_groups))
        return original(self, packed_groups, reference)

    monkeypatch.setattr(Worker, "logprobs", counting)
    run_mpo(mpo_settings(tmp_path / "two", tiny_folder, pairs, train=train))
    assert sum(asked) == 16 - 16 // 3
    entries = np.dtype([("pair", "V16"), ("logp", "<f8", 2), ("seconds", "<f8")])
    before, after = (np.frombuffer(data, entries) for data in (whole, file.read_bytes()))
    assert (before["pair"] == after["pair"]).all()
    np.testing.assert_allclose(before["logp"], after["logp"], rtol=1e-5)


def test_the_reference_is_that_of_the_start_whatever_the_token_budget(tmp_path, tiny_folder, pairs, packed_groups):
    run = run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs))
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, attn_implementation="eager")
    [file] = (run.path / "reference").iterdir()
    reference = Reference(file.parent, file.stem)
    reference.complete(0, 1, None, None)
    for packed in packed_groups:
        expected = [plain_logprobs(model, packed.prompt, one.token_ids).sum().item() for one in packed.answers]
        assert reference(packed, "here") == pytest.approx(expected, rel=1e-5)


def test_a_pair_that_changed_is_found_when_its_reference_is_used(tmp_path, tiny_folder, pairs, packed_groups):
    run = run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs))
    [file] = (run.path / "reference").iterdir()
    reference = Reference(file.parent, file.stem)
    reference.complete(0, 1, None, None)
    prompt = packed_groups[0].prompt
    pixels = prompt.pixels.clone()
    pixels[0, 0, 0, 0] += 1
    others = [
        PackedGroup(prompt, packed_groups[0].answers[::-1]),
        PackedGroup(type(prompt)(prompt.token_ids, prompt.slots, pixels, prompt.engine_ids), packed_groups[0].answers),
    ]
    for packed in others:
        with pytest.raises(DataError, match=r"pairs\.parquet, row 0: the row, its image or the model's template"):
            reference(packed, "pairs.parquet, row 0")


def test_the_key_of_a_reference_names_model_data_and_what_else_counts(tmp_path):
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    data = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in data:
        file.write_text(file.name)
    keys = {
        reference_key(tmp_path / "model", data[:1], {"dtype": "float32"}),
        reference_key(tmp_path / "other", data[:1], {"dtype": "float32"}),
        reference_key(tmp_path / "model", data[1:], {"dtype": "float32"}),
        reference_key(tmp_path / "model", data[:1], {"dtype": "bfloat16"}),
    }
    assert len(keys) == 4
    assert reference_key(tmp_path / "model", data[:1], {"dtype": "float32"}) in keys


def test_a_run_does_not_continue_against_another_start(tmp_path, tiny_folder, pairs, monkeypatch):
    settings = mpo_settings(tmp_path / "run", tiny_folder, pairs, train={"steps": 2})
    run_mpo(settings)
    monkeypatch.setattr(foveate.train.mpo, "reference_key", lambda *_: "another")
    with pytest.raises(DataError, match=r"the start .* or the pairs changed since this run began"):
        run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs, train={"steps": 4}))


# ---------------------------------------------------------------------------------------------------- what is refused


def row_of(**extra):
    return (
        '{"data_source": "x", "prompt": [{"role": "user", "content": "a"}], "extra_info": '
        + str(extra).replace("'", '"')
        + "}\n"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"chosen": "a"}, r"bad\.jsonl: no column holds the rejected \(a preference pair needs both"),
        ({"chosen": "a", "rejected": "a"}, r"field extra_info\.rejected: is the chosen answer; there is nothing to"),
        ({"chosen": "a", "rejected": "  "}, r"field extra_info\.rejected: is ' '; a preference pair"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_by_name(tmp_path, tiny_folder, extra, message):
    (tmp_path / "bad.jsonl").write_text(row_of(**extra))
    with pytest.raises(DataError, match=message):
        run_mpo(mpo_settings(tmp_path / "run", tiny_folder, tmp_path / "bad.jsonl"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("dop", "unknown preference loss 'dop'; did you mean 'dpo'"),
        ({"name": "mpo", "settings": {"betta": 0.1}}, "preference loss mpo: unknown setting 'betta'; did you mean"),
        ({"name": "sft", "settings": {"beta": 0.1}}, "preference loss sft: unknown setting 'beta'; it has no settings"),
        ({"name": "mpo", "settings": {"quality": -1.0}}, "setting quality: is -1.0, a weight must be at least 0"),
    ],
)
def test_wrong_settings_of_a_loss_are_refused_before_anything_starts(tmp_path, tiny_folder, pairs, loss, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run_mpo(mpo_settings(tmp_path / "run", tiny_folder, pairs, loss=loss))
    assert not RunFolder(tmp_path / "run").path.exists()
