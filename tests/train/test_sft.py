"""Supervised training: the packed loss against plain transformers, its weightings, and whole runs."""

from __future__ import annotations

import math

import pytest
import torch
from test_resume import interrupt, stop_at
from toy import make_data, sft_settings
from transformers import AutoModelForImageTextToText

from foveate.algorithms.supervised import sft_total
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.data.demos import demo_of
from foveate.data.table import open_tasks
from foveate.encoding.encode import Encoder
from foveate.log import read_metrics
from foveate.models.policy import load_policy
from foveate.records import PackedGroup
from foveate.train.sft import run_sft
from foveate.train.worker import Worker

EXPONENT = {"token": 0.0, "sample": 1.0, "square": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def packed_groups(tiny_policy, data):
    """Four demonstrations of very different lengths."""
    encoder = Encoder(tiny_policy.tokenizer, tiny_policy.family, 1, 128)
    demos = [demo_of(open_tasks(data / "train.parquet")[i]) for i in range(4)]
    answers = ["no", demos[1].response, "left " * 20, demos[3].response]
    return [
        PackedGroup.of_tokens(encoder(demo.task), (encoder.answer_ids(text),))
        for demo, text in zip(demos, answers, strict=True)
    ]


def plain_loss(model, packed_groups, weighting):
    """One sample at a time, with the model's own loss: the mean over the tokens of an answer, weighted by hand."""
    total, weights = torch.zeros(()), 0.0
    for packed in packed_groups:
        answer = packed.answers[0].token_ids
        ids = torch.tensor([[*packed.prompt.token_ids, *answer]])
        labels = ids.clone()
        labels[:, : len(packed.prompt)] = -100
        mean = model(input_ids=ids, pixel_values=packed.prompt.pixels, labels=labels).loss
        weight = len(answer) ** (1 - EXPONENT[weighting])
        total, weights = total + weight * mean, weights + weight
    return total / weights


def learned(folder, packed_groups, weighting, budget):
    """The metrics of one step, and its gradient: plain descent with learning rate 1 moves the weights by it."""
    worker = Worker(ModelSettings(path=str(folder)), OptimSettings(lr=1.0, max_grad_norm=1e9), budget)
    before = {name: p.detach().clone() for name, p in worker.policy.model.named_parameters()}
    worker.optimizer = torch.optim.SGD(worker.policy.model.parameters(), lr=1.0)  # type: ignore[assignment]
    said = worker.update_sft(packed_groups, weighting, sft_total(packed_groups, weighting), 1.0)
    return said, {name: before[name] - p.detach() for name, p in worker.policy.model.named_parameters()}


def distance(one, other):
    return math.sqrt(sum(float((one[name] - other[name]).pow(2).sum()) for name in other))


def norm(gradient):
    return math.sqrt(sum(float(value.pow(2).sum()) for value in gradient.values()))


@pytest.mark.parametrize("weighting", EXPONENT)
def test_the_packed_loss_and_gradient_are_those_of_one_sample_at_a_time(tiny_folder, packed_groups, weighting):
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, attn_implementation="eager")
    loss = plain_loss(model, packed_groups, weighting)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    said, gradient = learned(tiny_folder, packed_groups, weighting, budget=4096)
    assert said["loss/total"] == pytest.approx(loss.item(), rel=1e-5)
    assert said["optim/grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
    assert distance(gradient, expected) <= 1e-3 * norm(expected)


@pytest.mark.parametrize("weighting", EXPONENT)
def test_the_token_budget_biases_neither_loss_nor_gradient(tiny_folder, packed_groups, weighting):
    assert max(packed.tokens for packed in packed_groups) > 36 > min(packed.tokens for packed in packed_groups)
    whole, gradient = learned(tiny_folder, packed_groups, weighting, budget=4096)
    parted, other = learned(tiny_folder, packed_groups, weighting, budget=36)
    for name in ("loss/total", "loss/nll", "loss/entropy", "optim/grad_norm"):
        assert parted[name] == pytest.approx(whole[name], rel=1e-5)
    assert distance(gradient, other) <= 1e-4 * norm(gradient)


def test_the_weightings_differ_where_lengths_do(tiny_folder, packed_groups):
    losses = {learned(tiny_folder, packed_groups, weighting, 4096)[0]["loss/total"] for weighting in EXPONENT}
    assert len(losses) == 3


def test_four_demonstrations_are_learned_by_heart(tiny_folder, packed_groups):
    worker = Worker(ModelSettings(path=str(tiny_folder)), OptimSettings(lr=3e-3), 4096)
    losses = [
        worker.update_sft(packed_groups, "token", sft_total(packed_groups, "token"), 3e-3)["loss/total"]
        for _ in range(30)
    ]
    assert losses[-1] < losses[0] / 5


def test_a_run_leaves_metrics_checkpoints_and_a_model(tmp_path, tiny_folder, data):
    run = run_sft(sft_settings(tmp_path / "run", tiny_folder, data))
    records = read_metrics(run.metrics)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {
        "loss/total",
        "loss/nll",
        "loss/entropy",
        "optim/grad_norm",
        "optim/lr",
        "data/epoch",
        "time/update_tokens_per_second",
    } <= set(records[0])
    assert [record["data/epoch"] for record in records] == [0.25, 0.5, 0.75]
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["latest", "step_000002", "step_000003"]
    start, end = (load_policy(str(folder)).model.state_dict() for folder in (tiny_folder, run.final))
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert AutoModelForImageTextToText.from_pretrained(run.final).config.model_type == "internvl"


def test_rows_without_an_answer_are_refused_by_name(tmp_path, tiny_folder, data):
    text = '{"data_source": "x", "prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "b"}}\n'
    (tmp_path / "bare.jsonl").write_text(text)
    settings = sft_settings(tmp_path / "run", tiny_folder, data, data={"train": [str(tmp_path / "bare.jsonl")]})
    with pytest.raises(ValueError, match=r"bare\.jsonl: no column holds the response \(supervised training "):
        run_sft(settings)


def test_checkpoints_written_beside_the_steps_change_nothing(tmp_path, tiny_folder, data):
    runs = [
        run_sft(sft_settings(tmp_path / name, tiny_folder, data, train={"save_async": apart}))
        for name, apart in (("apart", True), ("in turn", False))
    ]
    own, other = ((run.final / "model.safetensors").read_bytes() for run in runs)
    assert own == other
    names = [[path.name for path in sorted(run.checkpoints.iterdir())] for run in runs]
    assert names[0] == names[1] == ["latest", "step_000002", "step_000003"]
    states = [sorted(file.name for file in (run.checkpoints / "step_000003").iterdir()) for run in runs]
    assert states[0] == states[1]


def test_a_run_that_saves_beside_its_steps_continues_as_if_it_had_not_stopped(tmp_path, tiny_folder, data):
    train = {"save_async": True, "steps": 7}
    settings = [sft_settings(tmp_path / name, tiny_folder, data, train=train) for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "between gradients and update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_sft(settings[0])
    run, whole = run_sft(settings[0]), run_sft(settings[1])
    assert (run.final / "model.safetensors").read_bytes() == (whole.final / "model.safetensors").read_bytes()
