"""Held-out rows: which they are, and the loss on them in SFT and preference learning."""

from __future__ import annotations

import logging

import pytest
import torch
from test_mpo import plain_logprobs
from test_sft import plain_loss
from toy import make_data, make_pairs, mpo_settings, rl_settings, sft_settings
from transformers import AutoModelForImageTextToText

from foveate.config.runs import RLSettings
from foveate.data.demos import demo_of, pair_of
from foveate.data.table import open_tasks
from foveate.encoding.dataset import keep_aside
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.log import read_metrics
from foveate.records import PackedGroup
from foveate.train.mpo import run_mpo
from foveate.train.rl import run_rl
from foveate.train.sft import run_sft


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("shapes"))
    make_pairs(folder)
    return folder


def tasks_of(file):
    return list(open_tasks(file))


def test_the_held_out_loss_of_sft_is_the_training_loss_on_those_rows(tmp_path, tiny_folder, tiny_policy, data):
    test = {
        "data": {"train": [str(data / "train.parquet")], "test": [str(data / "test.parquet")], "max_prompt_tokens": 128}
    }
    train = {"steps": 2, "samples_per_step": 4, "tokens_per_micro_batch": 256, "weighting": "square", "threads": 1}
    run = run_sft(sft_settings(tmp_path / "run", tiny_folder, data, **test, train=train, eval={"every": 2}))
    found = {row["step"]: row["eval/loss"] for row in read_metrics(run.metrics) if "eval/loss" in row}
    assert [*found] == [0, 2]
    encoder = Encoder(tiny_policy.tokenizer, tiny_policy.family, 12, 128)
    groups = [
        PackedGroup.of_tokens(encoder(task), (encoder.answer_ids(demo_of(task).response),))
        for task in tasks_of(data / "test.parquet")
    ]
    for step, folder in ((0, tiny_folder), (2, run.final)):
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            assert found[step] == pytest.approx(plain_loss(model, groups, "square").item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["sft", {"name": "mpo", "settings": {"generation_mean": "token"}}])
def test_the_held_out_loss_of_pairs_does_not_depend_on_how_they_are_chunked(tmp_path, tiny_folder, data, loss):
    found = []
    for pairs in (3, 4):
        changes = {
            "data": {"train": [str(data / "pairs.parquet")], "hold_out": 0.3, "max_prompt_tokens": 128},
            "train": {"steps": 1, "pairs_per_step": pairs, "tokens_per_micro_batch": 256, "threads": 1},
            "loss": loss,
        }
        run = run_mpo(mpo_settings(tmp_path / str(pairs), tiny_folder, data / "pairs.parquet", **changes))
        found.append(read_metrics(run.metrics)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert ("eval/accuracy" in found[0]) == (loss != "sft")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, data):
    """A run without evaluation, and the same with one after each step."""
    folder, pairs = tmp_path_factory.mktemp("runs"), data / "pairs.parquet"
    rows = {"train": [str(pairs)], "max_prompt_tokens": 128, "hold_out": 0.3}
    return [
        run_mpo(mpo_settings(folder / str(n), tiny_folder, pairs, data=rows, eval={"every": n}, train={"steps": 2}))
        for n in (0, 1)
    ]


def test_the_accuracy_of_held_out_pairs_is_the_share_whose_chosen_answer_gained_more(
    runs, tiny_folder, tiny_policy, data
):
    first, *_, last = read_metrics(runs[1].metrics)
    assert (first["step"], first["eval/accuracy"]) == (0, 0.5)  # the policy is the reference: all tie
    _, test = keep_aside(open_tasks(data / "pairs.parquet"), 0.3)
    encoder = Encoder(tiny_policy.tokenizer, tiny_policy.family, 12, 128)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
        for folder in (tiny_folder, runs[1].final)
    )

    def gain(prompt, text):
        ids = encoder.answer_ids(text)
        return (plain_logprobs(after, prompt, ids).sum() - plain_logprobs(before, prompt, ids).sum()).item()

    with torch.no_grad():
        won = [gain(encoder(task), pair_of(task).chosen) > gain(encoder(task), pair_of(task).rejected) for task in test]
    assert last["eval/accuracy"] == pytest.approx(sum(won) / len(won))


def test_evaluation_changes_no_step(runs):
    alone, evaluated = (
        [{name: value for name, value in row.items() if not name.startswith(("time/", "eval/"))} for row in rows]
        for rows in (read_metrics(run.metrics) for run in runs)
    )
    assert evaluated[1:] == alone


def test_held_out_rows_are_the_same_in_every_run_and_never_trained_on(tmp_path, tiny_folder, data):
    every = open_tasks(data / "train.parquet")
    train, test = keep_aside(every, 0.25)
    assert test is not None
    assert (len(train), len(test)) == (12, 4)
    assert not {task.id for task in train} & {task.id for task in test}
    assert [task.id for task in keep_aside(every, 0.25)[1]] == [task.id for task in test]
    changes = {"data": {"train": [str(data / "train.parquet")], "test": (), "hold_out": 0.25, "max_prompt_tokens": 128}}
    values = rl_settings(tmp_path / "run", tiny_folder, data, **changes).model_dump()
    run = run_rl(RLSettings.model_validate(values | {"seed": 5}))
    asked = {task.id for task in test}
    assert all(asked.isdisjoint(file.read_text().split('"')) for file in run.rollouts.glob("*.jsonl"))
    assert asked <= set((run.path / "evals" / "step_000000.jsonl").read_text().split('"'))
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3]


def test_a_share_that_leaves_nothing_to_train_on_is_refused(data):
    with pytest.raises(DataError, match=r"data\.hold_out=0\.99: keeps all 16 rows .* aside; use a smaller share"):
        keep_aside(open_tasks(data / "train.parquet"), 0.99)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": {"test": ["a"], "hold_out": 0.1}}, r"data.test names held-out files; choose one"),
        ({"eval": {"every": 5}}, r"eval.every is 5, but data.test is empty"),
    ],
)
def test_settings_of_evaluation_act_or_raise(tmp_path, tiny_folder, data, changes, match):
    data_group = {"train": [str(data / "train.parquet")], **changes.pop("data", {})}
    with pytest.raises(ValueError, match=match):
        sft_settings(tmp_path / "run", tiny_folder, data, data=data_group, **changes)


def test_rows_held_out_that_share_images_with_those_trained_on_are_warned_of(tmp_path, tiny_folder, data, caplog):
    changes = {"test": [str(data / "train.parquet")], "train": [str(data / "train.parquet")], "max_prompt_tokens": 128}
    with caplog.at_level(logging.WARNING, "foveate"):
        run_sft(sft_settings(tmp_path / "run", tiny_folder, data, data=changes, train={"steps": 1}))
    assert "share" in caplog.text
