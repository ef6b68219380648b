"""Which metrics are drawn, and the geometry of charts."""

from __future__ import annotations

import math

import pytest
from fake_run import a_row

from foveate.evaluate.predictions import (
    Evaluation,
)
from foveate.report.charts import chart_metrics, format_value, moving_average, nice_ticks, thin_out
from foveate.report.page import accuracy_chart
from foveate.report.summary import compare_evaluations


def test_every_metric_is_shown_known_or_not() -> None:
    rows = [{"step": step, "reward/mean": step / 9, "my/own": -step, "optim/skipped": 0} for step in range(1, 9)]
    charts, steady = chart_metrics(rows)
    assert {line.label for chart in charts for line in chart.lines} == {"reward/mean", "my/own"}
    assert steady == (("optim/skipped", "0"),)


def test_missing_and_non_finite_values_break_the_line() -> None:
    rows = [{"step": step, "loss": value} for step, value in enumerate((1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0))]
    (chart,), _ = chart_metrics(rows)
    assert chart.lines[0].path.count("M") == 3
    assert chart.data["series"][0]["points"] == ((0, 1.0), (1, 2.0), (3, 3.0), (5, 4.0), (6, 5.0))


def test_a_metric_of_some_steps_only_is_one_line_with_dots() -> None:
    rows = [{"step": step} | ({"eval/greedy_accuracy": step / 100} if step % 20 == 0 else {}) for step in range(61)]
    (chart,), _ = chart_metrics(rows)
    assert chart.lines[0].path.count("M") == 1
    assert len(chart.lines[0].dots) == 4


def test_a_metric_that_was_never_finite_is_not_hidden() -> None:
    rows = [{"step": step, "loss": None, "nonfinite": ["loss"]} for step in range(3)]
    assert chart_metrics(rows) == ((), (("loss", "never a finite number"),))


def test_series_of_very_different_size_do_not_flatten_each_other() -> None:
    rows = [{"step": step, "time/a": 1.0 + step, "time/b": 2.0 + step, "time/c": 0.001 * step} for step in range(5)]
    charts, _ = chart_metrics(rows)
    assert [[line.label for line in chart.lines] for chart in charts] == [["time/a", "time/b"], ["time/c"]]


def test_a_long_run_is_thinned_without_losing_a_spike() -> None:
    points = [(step, 50.0 if step == 7777 else math.sin(step)) for step in range(20_000)]
    kept = thin_out(points, 480)
    assert len(kept) <= 480
    assert (7777, 50.0) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert list(kept) == sorted(kept)


def test_a_moving_average_is_centred_and_shorter_at_the_ends() -> None:
    points = [(step, value) for step, value in enumerate((0.0, 3.0, 6.0, 0.0))]
    assert moving_average(points, 3) == ((0, 1.5), (1, 3.0), (2, 3.0), (3, 3.0))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0.41, 0.67, [0.4, 0.5, 0.6, 0.7]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (0, 3e-7, [0, 1e-7, 2e-7, 3e-7]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(expected)


def test_numbers_are_written_for_people() -> None:
    assert format_value(0.4096, "%") == "41.0 %"
    assert format_value(12345.6, "tokens/s") == "12\u202f346 tokens/s"
    assert format_value(1e-4) == "1e-4"
    assert format_value(0.0) == "0"
    assert format_value(-0.123456) == "-0.1235"


def test_one_step_and_equal_values_still_make_a_chart() -> None:
    evaluations = (Evaluation(0, (a_row(),)), Evaluation(5, (a_row(),)))
    comparison = compare_evaluations(evaluations)
    assert comparison is not None
    chart = accuracy_chart(evaluations, comparison)
    assert chart is not None
    assert chart.y_ticks[0][1] == "0 %"
    assert len(chart.lines[0].dots) == 2
    assert "stayed at 100.0 %" in comparison.sentences[0]


def test_values_are_told_as_finely_as_the_axis_shows_them() -> None:
    rows = [{"step": step, "loss/ratio_max": 1 + step * 1e-4} for step in range(6)]
    (chart,), _ = chart_metrics(rows)
    assert chart.lines[0].last == "1.0005"
