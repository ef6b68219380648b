"""Which metrics share a chart, and the values that the page draws."""

from __future__ import annotations

import math

from fake_run import a_row

from foveate.evaluate.predictions import (
    Evaluation,
)
from foveate.report.charts import chart_metrics, format_value, thin_out
from foveate.report.models import model_table
from foveate.report.page import accuracy_chart
from foveate.report.summary import compare_evaluations


def test_every_metric_is_shown_known_or_not() -> None:
    rows = [{"step": step, "reward/mean": step / 9, "my/own": -step, "optim/update_skipped": 0} for step in range(1, 9)]
    charts, table = chart_metrics(rows)
    assert [(chart.title, *chart.legend) for chart in charts] == [
        ("Reward", ("reward/mean", "0.8889")),
        ("my/own", ("my/own", "-8")),
    ]
    assert table == [("reward/mean", "8", "0.8889"), ("my/own", "8", "-8"), ("optim/update_skipped", "8", "0")]


def test_missing_and_non_finite_values_break_the_line() -> None:
    rows = [{"step": step, "loss": value} for step, value in enumerate((1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0))]
    ([chart], _) = chart_metrics(rows)
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, None), (5, 4.0), (6, 5.0)]
    assert chart.data()["series"] == [{"label": "loss", "place": 0, "points": points}]


def test_a_metric_of_some_steps_only_has_points_at_these() -> None:
    rows = [{"step": step} | ({"eval/greedy_accuracy": step / 100} if step % 20 == 0 else {}) for step in range(61)]
    ([chart], _) = chart_metrics(rows)
    assert chart.series[0].points == ((0, 0.0), (20, 0.2), (40, 0.4), (60, 0.6))


def test_a_metric_that_was_never_finite_is_not_hidden() -> None:
    rows = [{"step": step, "loss": None, "nonfinite": ["loss"]} for step in range(3)]
    assert chart_metrics(rows) == ([], [("loss", "–", "never a finite number")])


def test_series_of_very_different_size_do_not_flatten_each_other() -> None:
    rows = [{"step": step, "time/a": 1.0 + step, "time/b": 2.0 + step, "time/c": 0.001 * step} for step in range(5)]
    charts, _ = chart_metrics(rows)
    labels = [(chart.title, [one.label for one in chart.series]) for chart in charts]
    assert labels == [("Time per step", ["time/a", "time/b"]), ("Time per step: time/c", ["time/c"])]


def test_the_metrics_of_a_run_stand_in_charts_by_their_prefix() -> None:
    names = ("eval/greedy_accuracy", "reward/mean", "reward/kl", "answer/length", "answer/truncated", "loss/policy",
             "loss/entropy", "loss/kl_ref", "optim/grad_norm", "optim/lr", "critic/lr", "critic/value", "engine/kl_k1",
             "engine/correction_weight", "rollout/staleness_mean", "time/update", "time/update_tokens_per_second",
             "source/a/reward", "source/a/length")  # fmt: skip
    charts, _ = chart_metrics([{"step": step, **dict.fromkeys(names, step + 1.0)} for step in range(2)])
    assert {chart.title: [one.label for one in chart.series] for chart in charts} == {
        "Held-out figures": ["eval/greedy_accuracy"],
        "KL divergence": ["reward/kl", "loss/kl_ref"],
        "Reward": ["reward/mean"],
        "Reward by source": ["source/a/reward"],
        "Truncated answers": ["answer/truncated"],
        "Answer length": ["answer/length", "source/a/length"],
        "Entropy": ["loss/entropy"],
        "Off-policy correction": ["engine/correction_weight"],
        "Trainer versus engine": ["engine/kl_k1"],
        "Gradient norm": ["optim/grad_norm"],
        "Learning rate": ["optim/lr", "critic/lr"],
        "Critic": ["critic/value"],
        "Loss": ["loss/policy"],
        "Staleness": ["rollout/staleness_mean"],
        "Tokens per second": ["time/update_tokens_per_second"],
        "Time per step": ["time/update"],
    }


def test_a_long_run_is_thinned_without_losing_a_spike() -> None:
    points = [(step, 50.0 if step == 7777 else None if step == 9999 else math.sin(step)) for step in range(20_000)]
    kept = thin_out(points, 480)
    assert len(kept) <= 480
    assert (7777, 50.0) in kept
    assert (9999, None) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


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
    assert chart.legend == [("greedy", "100.0 %")]
    assert (chart.dots, chart.digits) == (True, 4)
    assert "stayed at 100.0 %" in comparison.sentences[0]


def test_values_are_told_as_finely_as_the_axis_shows_them() -> None:
    rows = [{"step": step, "loss/ratio_max": 1 + step * 1e-4} for step in range(6)]
    ([chart], _) = chart_metrics(rows)
    assert chart.legend == [("loss/ratio_max", "1.0005")]
    assert chart.digits == 7


def test_a_line_over_thresholds_has_no_latest_value() -> None:
    figures = {"rows": 2, "accuracy_at": {"0.5": 0.9, "0.95": 0.1}}
    table = model_table({"models": {"final": figures}})
    assert table is not None
    assert table.chart is not None
    assert table.chart.legend == [("final", "")]
