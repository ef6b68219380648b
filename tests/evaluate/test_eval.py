"""`foveate eval` outside of a run: figures by hand, served answers against those in process, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from fake_run import a_row, an_answer
from serving import served
from toy import make_data
from typer.testing import CliRunner

from foveate.api.of_run import options_of_run
from foveate.cli.app import app as command_line
from foveate.cli.evaluate import _scoring
from foveate.config.recipe import read_recipe, to_yaml
from foveate.datasets.shapes import prepare_shapes
from foveate.errors import ConfigError
from foveate.evaluate.client import ClientSettings
from foveate.evaluate.evaluate_models import EvalRequest, run_eval
from foveate.evaluate.generate import GenerateRequest, RowsRequest, run_generate
from foveate.evaluate.metrics import (
    likely_frame,
    pass_at,
    refcoco_split,
    refcoco_splits,
    summary_statistics,
    vote,
    warn_of_lost_answers,
)
from foveate.evaluate.predictions import bootstrap, paired, read_evaluations
from foveate.models.tiny import retile
from foveate.records import SamplingParams
from foveate.report.page import write_report

PHOTOS = Path(__file__).parent.parent / "data" / "refphotos" / "refphotos.jsonl"


def box_row(row_id, text, overlap, **fields):
    hit = overlap >= 0.5
    truth = [100, 200, 500, 600]
    return a_row(row_id, answer=truth, text=text, box=None, score=overlap, iou=overlap, hit=hit, **fields)


def sampled_row(*texts, right="7", rank=None):
    answers = tuple(
        an_answer(text, float(text.endswith(right)), hit=text.endswith(right), rank=None if rank is None else rank[i])
        for i, text in enumerate(texts)
    )
    return replace(a_row("r", answer=right, width=0), answers=answers)


# --------------------------------------------------------------------------------------------------------- figures


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    for n, correct in ((4, 1), (6, 2), (8, 8), (5, 0)):
        right = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(combinations(right, k))
            assert pass_at(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_sampled_figures_by_hand():
    rows = [
        sampled_row("7", "8", "7", "9", rank=[-3.0, -1.0, -2.0, -4.0]),
        sampled_row("8", "8", "7", "9", rank=[-3.0, -4.0, -0.5, -4.0]),
    ]
    statistics = summary_statistics(rows)
    found, ways = statistics["sampled"], statistics["parallel"]
    assert {name: way["value"] for name, way in ways.items()} == {name: found[name] for name in ways}
    assert [*ways] == ["avg@4", "pass@4", "majority@4", "best_of@4"]
    assert ways["pass@4"]["over_majority"]["value"] == 0.5
    assert ways["majority@4"]["over_majority"] == {"value": 0.0, "interval": (0.0, 0.0)}
    assert found["avg@4"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["pass@1"] == found["avg@4"]
    assert found["pass@2"] == pytest.approx((pass_at(4, 2, 2) + pass_at(4, 1, 2)) / 2)
    assert found["pass@4"] == 1.0
    assert found["majority@4"] == 0.5
    assert found["best_of@4"] == 0.5
    assert summary_statistics(rows)["accuracy"]["value"] == found["avg@4"]


def test_boxes_vote_by_overlap_and_texts_by_what_they_end_on():
    texts = ("[0,0,10,10]", "no idea", "[500,500,700,700]", "[510,500,700,710]")
    row = box_row("a", "", 0.0, sampled=tuple(an_answer(text, 0.0) for text in texts))
    assert vote(row, 4).text in texts[2:]
    words = ("<answer>7</answer>", r"so \boxed{8}", r"\boxed{ 8 }", "7?")
    assert vote(sampled_row(*words), 4).text == words[1]
    assert vote(sampled_row("7", "8"), 2).text == "7"
    assert vote(sampled_row(r"\boxed{}", r"\boxed{}", r"\boxed{8}"), 3).text == r"\boxed{8}"  # an empty one is none


def test_an_interval_covers_the_mean_as_often_as_it_says():
    import numpy as np

    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap((rng.random(60) < 0.4).astype(float).tolist(), trial) or (1.0, 0.0)
        covered += low <= 0.4 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert bootstrap([1.0] * 5) == (1.0, 1.0)
    assert bootstrap([]) is None


def test_thresholds_and_mean_iou_are_those_of_the_rows():
    found = summary_statistics([box_row(str(i), "", overlap) for i, overlap in enumerate((0.0, 0.5, 0.72, 0.95))])
    assert found["accuracy_at"]["0.5"] == 0.75
    assert found["accuracy_at"]["0.7"] == 0.5
    assert found["accuracy_at"]["0.95"] == 0.25
    assert found["mean_iou"]["value"] == pytest.approx(2.17 / 4)


def test_accuracy_is_told_by_the_tags_of_rows():
    rows = [box_row(str(i), "", float(i % 2), tags={"box size": "under 1 %" if i else "1 to 5 %"}) for i in range(4)]
    by_size = summary_statistics(rows)["by_tag"]["box size"]
    assert {size: (one["rows"], one["greedy_accuracy"]) for size, one in by_size.items()} == {
        "under 1 %": (3, pytest.approx(2 / 3)),
        "1 to 5 %": (1, 0.0),
    }


@pytest.mark.parametrize(
    ("frame", "text"), [("pixels", "[64,96,320,288]"), ("fractions", "[0.1,0.2,0.5,0.6]"), (None, "[100,200,500,600]")]
)
def test_boxes_in_another_frame_are_noticed(frame, text):
    found = summary_statistics([box_row(str(i), text, 1.0 if frame is None else 0.1) for i in range(9)])
    assert likely_frame(found, 9) == frame
    assert likely_frame(found, 3) is None


def test_an_evaluation_in_which_nothing_could_be_read_warns(caplog):
    rows = [scored("no box here", 0.0), scored("[1, 2]", 0.0)]
    warn_of_lost_answers(rows, "model")
    assert "model: none of 2 answers could be read (no box in the answer)" in caplog.text
    assert "'no box here'" in caplog.text
    caplog.clear()
    warn_of_lost_answers([*rows, scored("[1,2,3,4]", 1.0)], "model")
    assert not caplog.text


def scored(text, parsed):
    row = box_row("a", text, 0.0)
    note = "" if parsed else "no box in the answer"
    return replace(row, answers=(replace(row.shown, parts={"iou": 0.0, "parsed": parsed}, note=note),))


def test_the_average_over_splits_is_said_only_of_all_eight():
    names = ["refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco_plus_testA", "refcoco+_testB",
             "refcocog_val", "refcocog_test"]  # fmt: skip
    rows = [box_row(f"{name}-{i}", "", float(i < place)) for place, name in enumerate(names) for i in range(8)]
    found = refcoco_splits(rows)
    assert found is not None
    assert list(found["accuracy"].values()) == [place / 8 for place in range(8)]
    assert found["mean_of_8"] == pytest.approx(sum(range(8)) / 64)
    part = refcoco_splits([row for row in rows if refcoco_split(row) != "refcocog_val"])
    assert part is not None
    assert (part["mean_of_8"], part["missing"]) == (None, ["refcocog_val"])
    assert refcoco_splits([box_row("photo-1", "", 1.0), box_row("refcoco_train-1", "", 1.0)]) is None


def test_two_models_are_compared_row_by_row():
    before = [box_row(str(i), "", float(i < 4)) for i in range(8)]
    after = [box_row(str(i), "", float(i in (0, 1, 2, 5, 6))) for i in range(9)]
    found = paired(before, after)
    assert found is not None
    assert (found.rows, found.better, found.worse, found.only_in_one) == (8, ("5", "6"), ("3",), 1)
    assert found.difference == pytest.approx(1 / 8)
    assert found.interval[0] < 1 / 8 < found.interval[1]
    assert paired(before, [box_row("x", "", 1.0)]) is None


def test_tasks_name_rewards_with_their_settings():
    assert _scoring("refcoco", None, None, None, "pixels") == ("refcoco", {"rule": "first", "frame": "pixels"})
    assert _scoring("grounding", None, None, "last", None) == ("refcoco", {"rule": "last"})
    assert _scoring("grounding", None, ["kind=giou"], None, "pixels") == (
        "grounding", {"kind": "giou", "answer_frame": "pixels"},
    )  # fmt: skip
    assert _scoring("geo3k", "mine.py:f", ["limit=3"], None, None) == ("mine.py:f", {"limit": 3})
    with pytest.raises(ConfigError, match="--task refcoc: unknown; did you mean 'refcoco'"):
        _scoring("refcoc", None, None, None, None)


# ------------------------------------------------------------------------------------------------------ whole paths


def generate(source, out, sampling, **fields):
    run_generate(GenerateRequest(RowsRequest((str(source),)), out, sampling, **fields))


def whole_path(tmp_path, monkeypatch, model, source, tokens, *options):
    """Serve, generate and evaluate, and evaluate in process: the summaries and rows of both."""
    with served(model, "--port", 0, "--threads", 1, *options) as (address, key, _):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        client = ClientSettings((address,), concurrency=16, logprobs=True)
        generate(source, tmp_path / "answers", SamplingParams(1, tokens, 0.0), client=client)
        generate(source, tmp_path / "drawn", SamplingParams(2, tokens, 1.0), client=client)
    folders = (tmp_path / "answers", tmp_path / "drawn")
    common = {"reward": "refcoco", "gallery": 8, "max_tokens": tokens}
    run_eval(EvalRequest((), (), tmp_path / "served", generated=folders, text_files=True, **common))
    run_eval(EvalRequest((str(model),), (str(source),), tmp_path / "inside", samples=2, threads=1, **common))
    return read_evaluations(tmp_path / "served"), read_evaluations(tmp_path / "inside")


def without_logprobs(row, *answers):
    return replace(row, answers=tuple(replace(answer, logprobs=()) for answer in answers))


def assert_same(served_answers, inside):
    greedy, drawn = (one.predictions for one in served_answers)
    [own] = inside
    assert [without_logprobs(row, *row.answers) for row in greedy] == [
        without_logprobs(row, row.shown) for row in own.predictions
    ]
    for row, expected in zip(drawn, own.predictions, strict=True):
        assert [(a.text, a.score) for a in row.sampled] == [(a.text, a.score) for a in expected.sampled]
    for row, expected in zip(greedy[:8], own.predictions[:8], strict=True):
        assert [token for token, _ in row.shown.logprobs] == [token for token, _ in expected.shown.logprobs]
        values = [value for _, value in expected.shown.logprobs]
        assert [value for _, value in row.shown.logprobs] == pytest.approx(values, abs=2e-4)


@pytest.mark.slow
def test_served_answers_have_the_numbers_of_those_in_process(tmp_path, monkeypatch):
    prepare_shapes(tmp_path / "data", {"test": 48}, seed=1)
    monkeypatch.delenv("FOVEATE_API_KEY", raising=False)
    outside, inside = whole_path(tmp_path, monkeypatch, "demo", tmp_path / "data" / "test.parquet", 24)
    assert_same(outside, inside)
    models = json.loads((tmp_path / "served" / "summary.json").read_text())["models"]
    [own] = json.loads((tmp_path / "inside" / "summary.json").read_text())["models"].values()
    assert own["accuracy"]["value"] > 0.2
    for name in ("accuracy", "mean_iou", "accuracy_at"):
        assert models["answers"][name] == own[name]
    assert models["drawn"]["sampled"]["avg@2"] == own["sampled"]["avg@2"]
    [mean_iou, _] = (tmp_path / "served" / "text" / "answers" / "iou.txt").read_text().splitlines()
    assert float(mean_iou.split(": ")[1]) == pytest.approx(own["mean_iou"]["value"], abs=1e-6)
    detail = json.loads((tmp_path / "served" / "text" / "answers" / "iou_detail.json").read_text())
    assert len(detail) == 48
    assert math.isclose(sum(one["v"] for one in detail.values()) / 48, own["mean_iou"]["value"])
    assert "case_number: 48" in (tmp_path / "served" / "text" / "answers" / "latency.txt").read_text()
    assert "answers" in write_report(tmp_path / "served").read_text()


@pytest.mark.slow
def test_photographs_at_full_tiling_are_served_as_they_are_encoded(tmp_path, monkeypatch):
    retile("demo", tmp_path / "model", 112, 12)
    monkeypatch.delenv("FOVEATE_API_KEY", raising=False)
    outside, inside = whole_path(tmp_path, monkeypatch, tmp_path / "model", PHOTOS, 24)
    assert_same(outside, inside)
    assert len(inside[0].predictions) == len(PHOTOS.read_text().splitlines())


def test_rows_without_an_answer_are_never_scored_in_silence(tmp_path, tiny_folder):
    data = make_data(tmp_path / "shapes") / "test.parquet"
    generate(data, tmp_path / "answers", SamplingParams(1, 8, 0.0), model=str(tiny_folder))
    shard = tmp_path / "answers" / "shards" / "answers_00000.jsonl"
    shard.write_bytes(b"".join(shard.read_bytes().splitlines(keepends=True)[:4]))

    def rows(missing):
        out = tmp_path / missing
        run_eval(EvalRequest((), (), out, generated=(tmp_path / "answers",), missing=missing))
        summary = json.loads((out / "summary.json").read_text())["models"]["answers"]
        return summary["rows"], summary["missing"]

    with pytest.raises(ConfigError, match="2 of 6 rows have no answer, the first is row 4"):
        rows("error")
    assert rows("skip") == (4, 2)
    assert rows("wrong") == (6, 2)


def test_a_folder_of_answers_or_of_a_run_is_not_overwritten(tmp_path, tiny_folder):
    data = make_data(tmp_path / "shapes") / "test.parquet"
    generate(data, tmp_path / "answers", SamplingParams(1, 4, 0.0), model=str(tiny_folder))
    with pytest.raises(ConfigError, match="is the folder of answers"):
        run_eval(EvalRequest((), (), tmp_path / "answers", generated=(tmp_path / "answers",)))


# --------------------------------------------------------------------------------------------------- options of a run


def saved_run(folder, recipe, *overrides):
    (folder / "config.yaml").write_text(to_yaml(read_recipe(recipe, [f"run={folder}", *overrides])))
    return options_of_run(folder)


def test_an_evaluation_takes_what_the_run_says(tmp_path):
    system, columns = "data.system=Be brief.", "data.columns={answer: label}"
    found = saved_run(tmp_path, "shapes_gspo", "rollout.max_tokens=9", "model.max_tiles=3", system, columns)
    assert found["models"] == (str(tmp_path / "final"),)
    assert found["data"] == ("runs/demo-data/test.parquet",)
    assert (found["max_tokens"], found["max_prompt_tokens"], found["max_tiles"]) == (9, 256, 3)
    assert (found["system"], found["columns"]) == ("Be brief.", {"answer": "label"})
    assert (found["reward"], found["settings"]["alpha"]) == ("grounding", 0.5)
    request = EvalRequest(**found, out=tmp_path / "eval")
    assert not request.hold_out


def test_an_evaluation_takes_the_environment_of_the_run_unless_another_is_given(tmp_path, monkeypatch):
    recipe = "grounding_zoom_internvl3_5_1b"
    found = saved_run(tmp_path, recipe, "environment.reward=both", "algorithm.turn_discount=0.5")
    assert (found["environment"].name, found["turn_discount"]) == ("tools", 0.5)
    assert saved_run(tmp_path, "shapes_gspo")["environment"] is None
    saved_run(tmp_path, recipe)
    asked = []
    monkeypatch.setattr("foveate.api.evaluate", lambda request: asked.append(request) or tmp_path)
    monkeypatch.setattr("foveate.cli.evaluate.print_report", lambda *_: None)
    for options in ([], ["--environment", "{name: gui, reward: environment}"]):
        result = CliRunner().invoke(command_line, ["eval", str(tmp_path), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert [request.environment.name for request in asked] == ["tools", "gui"]
    assert asked[0].environment.settings["max_turns"] == 4
    assert asked[0].reward == "grounding"


@pytest.mark.parametrize("thinking", [True, False])
def test_thoughts_are_switched_as_in_the_run(tmp_path, thinking):
    found = saved_run(tmp_path, "shapes_gspo", f"data.thinking={str(thinking).lower()}")
    assert (found["system"], found["thinking"]) == ("none", thinking)


def test_rows_that_a_run_kept_aside_are_what_it_is_evaluated_on(tmp_path):
    found = saved_run(tmp_path, "shapes_gspo", "data.test=[]", "data.hold_out=0.1")
    assert (found["data"], found["hold_out"]) == (("runs/demo-data/train.parquet",), 0.1)


def test_a_cascade_is_evaluated_by_its_last_model_and_supervised_training_without_a_reward(tmp_path):
    assert saved_run(tmp_path, "shapes_cascade")["models"] == (str(tmp_path / "rl/final"),)
    assert "reward" not in saved_run(tmp_path, "shapes_coldstart", "data.hold_out=0.1")


def test_a_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.yaml"):
        options_of_run(tmp_path)


def test_a_run_without_held_out_rows_is_evaluated_on_rows_that_are_named(tmp_path, caplog):
    with pytest.raises(ConfigError, match=r"has no held-out rows .*--data FILE"):
        saved_run(tmp_path, "shapes_gspo", "data.test=[]", "eval.every=0", "eval.prompts=null")
    assert options_of_run(tmp_path, data=["other.jsonl"])["data"] == ("other.jsonl",)
    assert not caplog.records
    found = options_of_run(tmp_path, data=["runs/demo-data/train.parquet"])
    assert (found["data"], found["hold_out"]) == (("runs/demo-data/train.parquet",), 0.0)
    assert "rows that the run was trained on" in caplog.text
