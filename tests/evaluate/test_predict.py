"""Evaluation: the same answers inside a run and outside of it, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from light_rewards import PLACE
from toy import make_data, rl_settings

import foveate.evaluate.predict
from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.data.answers import ScoredRow
from foveate.data.table import open_tasks
from foveate.encoding.dataset import build_encoder
from foveate.errors import ConfigError
from foveate.evaluate.evaluate_models import EvalRequest, run_eval
from foveate.evaluate.predict import predict
from foveate.evaluate.predictions import Evaluation, read_evaluations, summarise
from foveate.report.page import write_report
from foveate.rewards.pool import Graders
from foveate.rollout.native.engine import NativeEngine
from foveate.train.rl import run_rl

REWARD = f"{PLACE}:short_is_right"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, data):
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"train": {"steps": 1}, "eval": {"every": 1, "samples": 3}, "reward": {"name": REWARD}}
    return run_rl(rl_settings(folder, tiny_folder, data, seed=3, **changes))


@pytest.fixture
def ask(tiny_policy):
    """ask(tasks, **settings) -> predictions of the tiny policy."""
    settings = ModelSettings(path="unused"), DataSettings(train=("unused",), max_prompt_tokens=128)
    encoder = build_encoder(tiny_policy.tokenizer, tiny_policy.family, *settings)

    def asked(tasks, *, samples=2, seed=0):
        engine, reward = NativeEngine(tiny_policy, encoder.decode), Graders(REWARD, {}, workers=0)
        return predict(engine, tasks, encoder, reward, samples=samples, max_tokens=8, seed=seed, advance=lambda _: None)

    return asked


def evaluation(model: Path, data: Path, out: Path) -> Evaluation:
    request = EvalRequest(
        (str(model),), (str(data / "test.parquet"),), out, REWARD, 3, 8, 128, gallery=2, seed=3, threads=1
    )
    run_eval(request)
    write_report(out)
    [found] = read_evaluations(out)
    return found


def plain(found: Evaluation) -> list[ScoredRow]:
    return [
        replace(row, answers=tuple(replace(answer, logprobs=()) for answer in row.answers)) for row in found.predictions
    ]


def test_evaluating_outside_gives_the_predictions_of_the_run(tmp_path, run, tiny_folder, data):
    before, after = read_evaluations(run.path)
    assert plain(evaluation(tiny_folder, data, tmp_path / "start")) == plain(before)
    assert plain(evaluation(run.final, data, tmp_path / "end")) == plain(after)
    assert before.predictions != after.predictions


def test_an_evaluation_leaves_predictions_summary_pictures_and_a_report(tmp_path, tiny_folder, data):
    found = evaluation(tiny_folder, data, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    one = summary["models"][tiny_folder.name]
    expected = summarise(found.predictions, 0)
    assert (one["rows"], one["accuracy"]["value"]) == (6, pytest.approx(expected["greedy"]["accuracy"]))
    assert one["sampled"]["avg@3"] == pytest.approx(expected["sampled"]["accuracy"])
    assert len(found.predictions[0].shown.logprobs) > 0
    assert len(list((tmp_path / "out" / "gallery").iterdir())) == 2
    assert "6 held-out questions" in (tmp_path / "out" / "report.html").read_text()


def test_sampled_accuracy_is_the_mean_over_the_answers(run):
    for found in read_evaluations(run.path):
        hits = [answer.hit for row in found.predictions for answer in row.sampled]
        assert len(hits) == 6 * 3
        assert summarise(found.predictions, found.step)["sampled"]["accuracy"] == pytest.approx(sum(hits) / len(hits))
        greedy = [row.shown.correctness for row in found.predictions]
        assert summarise(found.predictions, found.step)["greedy"]["accuracy"] == pytest.approx(sum(greedy) / 6)


def test_answers_depend_on_seed_and_row_and_not_on_their_neighbours(monkeypatch, ask, data):
    table = open_tasks(data / "test.parquet")
    whole = ask(table)
    monkeypatch.setattr(foveate.evaluate.predict, "BATCH", 4)
    assert ask(table) == whole
    assert ask(table.select(range(3))) == whole[:3]
    other = ask(table, seed=1)
    assert [row.shown for row in other] == [row.shown for row in whole]
    assert [row.sampled for row in other] != [row.sampled for row in whole]


def test_a_prediction_tells_question_truth_picture_and_tags(ask, data):
    task = open_tasks(data / "test.parquet")[0]
    row = ask(open_tasks(data / "test.parquet").select([0]), samples=0)[0]
    assert (row.id, row.where, row.question) == (task.id, task.where, task.meta["question"])
    assert [(image.path, image.width, image.height) for image in row.images] == [(None, 56, 56)]
    assert row.prompt[-1] == {"role": "user", "content": task.messages[-1].content}
    assert row.ground_truth == list(task.answer)
    assert row.tags == {"kind": "pair", "relation": task.meta["relation"], "source": task.source}
    assert row.sampled == ()


def test_rows_without_a_picture_are_asked_too(tmp_path, ask):
    row = {
        "data_source": "words",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is red?"}],
        "reward_model": {"style": "rule", "ground_truth": "a colour"},
    }
    (tmp_path / "words.jsonl").write_text(json.dumps(row) + "\n")
    [found] = ask(open_tasks(tmp_path / "words.jsonl"))
    assert (found.question, found.images, found.ground_truth) == ("What is red?", (), "a colour")
    assert {answer.box for answer in found.answers} == {None}


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, tiny_folder, data):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file, not a folder; choose another one"):
        evaluation(tiny_folder, data, tmp_path / "file")
