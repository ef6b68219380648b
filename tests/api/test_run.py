"""A run as notebooks look at it."""

import json

import pytest

from foveate.api import evaluate
from foveate.api.run import Run
from foveate.errors import ConfigError, DataError
from foveate.report.notebook import gallery, plot

STEPS = [{"step": n, "reward/mean": n / 10, "loss/total": -n, "note": "text"} for n in range(1, 6)]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    return Run(tmp_path)


def test_metrics_are_a_table_with_a_row_for_each_step(run):
    assert run.metrics.num_rows == 5
    assert run.metrics["reward/mean"].to_pylist() == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_metric_that_a_step_did_not_measure_is_null_there(run):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "eval/x": 1.0}\n')
    assert run.metrics["eval/x"].to_pylist() == [None] * 5 + [1.0]


def test_a_plot_shows_the_reward_first_and_others_when_asked(run):
    html = run.plot().html
    assert html.index("reward/mean") < html.index("loss/total")
    assert "<polyline" in run.plot("loss/total").html
    assert run._repr_html_() == html
    with pytest.raises(ConfigError, match=r"no metric 'reward/men'; did you mean 'reward/mean'"):
        run.plot("reward/men")


def test_a_value_that_is_not_finite_interrupts_the_line():
    rows = [{"step": n, "a": None if n == 3 else float(n)} for n in range(6)]
    assert plot(rows, ["a"]).html.count("<polyline") == 2


def test_a_long_line_is_drawn_thin_with_its_moving_average():
    rows = [{"step": n, "a": float(n % 2)} for n in range(48)]
    html = plot(rows, ["a"]).html
    assert html.count("<polyline") == 2
    assert html.count('stroke-opacity="0.4"') == 1
    assert plot(rows[:12], ["a"]).html.count("<polyline") == 1


def test_names_of_metrics_are_text_in_a_plot():
    assert "<b>x" not in plot([{"step": 1, "<b>x": 1.0}], ["<b>x"]).html


def test_a_figure_is_saved_as_a_page(run, tmp_path):
    run.plot().save(tmp_path / "plot.html")
    assert (tmp_path / "plot.html").read_text().startswith("<!doctype html>")


def test_without_an_evaluation_there_is_no_gallery(run):
    with pytest.raises(DataError, match="no evaluation yet"):
        gallery(run.path, 3)


def test_a_run_is_named_by_a_text_or_a_path_and_one_that_is_not_there_says_so(run):
    assert Run(str(run.path)).metrics.num_rows == 5
    for look in (lambda gone: gone.metrics, lambda gone: gone.plot(), lambda gone: gone.gallery()):
        with pytest.raises(ConfigError, match="nowhere: no such run folder"):
            look(Run("nowhere"))
    with pytest.raises(ConfigError, match="nowhere is not a run folder"):
        evaluate("nowhere")
