"""Predictions on disk, their summary, and the comparison of before and after."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import a_miss, a_row, an_answer

from foveate.data.answers import ScoredRow, read_answers
from foveate.errors import DataError
from foveate.evaluate.metrics import summary_statistics
from foveate.evaluate.predictions import (
    RESAMPLES,
    Evaluation,
    bootstrap,
    read_evaluations,
    summarise,
    write_evaluation,
)
from foveate.log import _told
from foveate.report.models import model_table
from foveate.report.summary import compare_evaluations


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        a_row(tags={"relation": "left"}, sampled=(an_answer("x", 0.5, 0.4, False),)),
        a_miss("b", answer=7, iou=None),
    ]
    write_evaluation(tmp_path, 20, rows)
    assert read_evaluations(tmp_path) == (Evaluation(20, tuple(rows)),)
    assert json.loads((tmp_path / "evals/step_000020.summary.json").read_text()) == summarise(rows, 20)


def test_a_prediction_without_a_field_is_refused_by_file_row_and_field(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, [a_row(), a_row("b")])
    path = tmp_path / "evals/step_000000.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    for found, put, message in (
        ('"score": 1.0, ', "", r"row 2, field answers\.0\.score: no ScoredRow of this version \(Field required\)"),
        ('"id": "b"', '"id": 7', "row 2, field id: .*string"),
        ('"id": "b"', '"id": "b", "iou": 1', "row 2, field iou: .*[Uu]nexpected"),
        (second, second[:40] + "\n", "row 2: no ScoredRow .*Invalid JSON"),
    ):
        path.write_text(first + second.replace(found, put))
        with pytest.raises(DataError, match=r"step_000000\.jsonl, " + message):
            list(read_answers(path, ScoredRow))


def test_the_summary_averages_rows_and_within_rows_their_samples() -> None:
    hit, miss = an_answer("", 1.0, 0.9, True), an_answer("", 0.0, 0.1, False)
    rows = [
        a_row("a", iou=0.8, tags={"relation": "left"}, sampled=(hit, hit, hit, miss)),
        a_miss("b", tags={"relation": "left"}, sampled=(miss, miss)),
        a_miss("c", iou=0.4, score=0.4, tags={"relation": "right"}, sampled=(hit,)),
    ]
    assert summarise(rows, 5) == {
        "step": 5,
        "rows": 3,
        "greedy": {"accuracy": pytest.approx(1 / 3), "mean_iou": pytest.approx(0.4), "score": pytest.approx(1.4 / 3)},
        "sampled": {
            "samples": 4,
            "accuracy": pytest.approx((0.75 + 0 + 1) / 3),
            "mean_iou": pytest.approx((0.7 + 0.1 + 0.9) / 3),
            "score": pytest.approx((0.75 + 0 + 1) / 3),
        },
        "by_tag": {
            "relation": {
                "left": {"rows": 2, "greedy_accuracy": 0.5, "sampled_accuracy": pytest.approx(0.375)},
                "right": {"rows": 1, "greedy_accuracy": 0.0, "sampled_accuracy": 1.0},
            }
        },
    }


def test_a_reward_that_does_not_say_what_is_right_has_a_score_and_no_accuracy_anywhere() -> None:
    rows = [a_row(str(score), iou=None, hit=None, score=score) for score in (0.25, 0.75)]
    summary = summarise(rows, 0)
    assert summary["greedy"] == {"accuracy": None, "mean_iou": None, "score": 0.5}
    assert summary["sampled"] == {"samples": 0, "accuracy": None, "mean_iou": None, "score": None}
    comparison = compare_evaluations([Evaluation(0, tuple(rows))])
    assert comparison is not None
    assert comparison.sentences == ("Greedy mean score is 0.500 on 2 held-out questions.",)
    one = summary_statistics(rows)
    assert "accuracy" not in one
    assert (one["score"], one["score_interval"]) == (0.5, (0.25, 0.75))
    table = model_table({"models": {"m": one}})
    assert table is not None
    assert dict(table.lines)["mean score"] == ("0.500 [0.250, 0.750]",)
    assert "held-out score -0.160" in ", ".join(_told({"eval/greedy_score": -0.16}))
    assert "score" not in ", ".join(_told({"eval/greedy_score": 0.5, "eval/greedy_accuracy": 0.5}))


def test_a_part_accuracy_says_what_is_right() -> None:
    row = a_row("a", iou=None, hit=None, score=0.55)
    [answer] = row.answers
    rows = [replace(row, answers=(replace(answer, parts={"accuracy": 0.0, "format": 0.5}),))]
    assert summarise(rows, 0)["greedy"] == {"accuracy": 0.0, "mean_iou": None, "score": 0.55}


def test_the_interval_is_that_of_paired_differences() -> None:
    before = Evaluation(
        0, tuple([a_miss(str(index)) for index in range(6)] + [a_row(str(index)) for index in range(6, 10)])
    )
    after = Evaluation(
        9,
        tuple(
            [a_row(str(index)) for index in range(4)]
            + [a_miss(str(index)) for index in range(4, 7)]
            + [a_row(str(index)) for index in range(7, 10)]
        ),
    )
    comparison = compare_evaluations([before, after])
    assert comparison is not None
    assert comparison.paired is not None
    paired = comparison.paired
    assert (paired.rows, len(paired.better), len(paired.worse), paired.unchanged) == (10, 4, 1, 5)
    deviation = math.sqrt((4 * 0.7**2 + 1.3**2 + 5 * 0.3**2) / 10)
    low, high = paired.interval
    assert paired.difference == pytest.approx(0.3)
    assert high - low == pytest.approx(2 * 1.96 * deviation / math.sqrt(10), rel=0.15)
    assert (low, high) == bootstrap([1.0] * 4 + [0.0] * 2 + [-1.0] + [0.0] * 3)
    assert RESAMPLES >= 1000
    assert paired.is_noise
    assert "chance alone could explain it" in comparison.sentences[1]


def test_a_better_step_before_the_last_is_told() -> None:
    steps = [
        Evaluation(step, (a_row("a", hit=hit), a_miss("b", hit=second)))
        for step, hit, second in ((0, False, False), (10, True, True), (20, True, False))
    ]
    comparison = compare_evaluations(steps)
    assert comparison is not None
    assert comparison.sentences[-1] == "The best evaluation was 100.0 % at step 10."


def test_a_fall_is_called_a_fall() -> None:
    comparison = compare_evaluations([Evaluation(20, (a_row(),)), Evaluation(40, (a_miss(),))])
    assert comparison is not None
    assert comparison.sentences[0] == (
        "Greedy accuracy at IoU 0.5 fell from 100.0 % to 0.0 % on 1 held-out question from step 20 to step 40."
    )
