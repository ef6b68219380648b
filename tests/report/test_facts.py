"""What a report says of a run by its settings and metrics alone, and of several runs on one page."""

from __future__ import annotations

import json

import pytest
from fake_run import make_run
from pages import Page, rendered
from toy import mpo_settings, rl_settings, sft_settings

from foveate.config.recipe import to_yaml
from foveate.errors import ConfigError
from foveate.report.compare import write_comparison
from foveate.report.facts import metric_sentences, metric_tiles, run_facts, stage_of
from foveate.report.page import INPUTS, read_run, run_settings, write_report


def write_run(folder, rows, settings):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(to_yaml(settings))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Runs of ten steps: of RL without evaluation, of SFT and of pairs with held-out rows, and RL at another rate."""
    steps = range(1, 11)
    held_out = {"data": {"train": ["a/pairs.parquet"], "hold_out": 0.05}}
    sft = [
        {"step": 0, "eval/loss": 2.0},
        *({"step": n, "loss/total": 2 - n / 10, "eval/loss": 2 - n / 20} for n in steps),
    ]
    mpo = [{"step": n, "loss/total": 1 - n / 20, "eval/loss": 1.0, "eval/accuracy": 0.5 + n / 40} for n in steps]
    rl = [{"step": n, "reward/mean": n / 10, "answer/length": 9.0, "time/step": 7.0} for n in steps]
    reward = {"name": "passed:right-0123456789ab"}
    return {
        "rl": write_run(tmp_path / "rl", rl, rl_settings("r", "demo", tmp_path, reward=reward)),
        "other": write_run(
            tmp_path / "other", rl[:5], rl_settings("r2", "demo", tmp_path, reward=reward, optim={"lr": 1})
        ),
        "sft": write_run(tmp_path / "sft", sft, sft_settings("r", "demo", tmp_path)),
        "mpo": write_run(tmp_path / "mpo", mpo, mpo_settings("r", "demo", tmp_path, **held_out)),
    }


@pytest.mark.parametrize(
    ("counts", "said"),
    [("function", "exact"), ("environment", "that of environment gui"), ("both", "exact and that of environment gui")],
)
def test_the_reward_that_is_said_is_the_one_that_counts(tmp_path, counts, said):
    environment = {"name": "gui", "reward": counts}
    config = rl_settings("r", "demo", tmp_path, reward={"name": "exact"}).model_dump() | {"environment": environment}
    assert ("reward", said) in run_facts(config, [])


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("rl", "Reward rose from 0.1 to 1 over 10 steps."),
        ("sft", "Held-out loss fell from 2 to 1.5 over 10 steps."),
        ("mpo", "Held-out loss stayed at 1 over 10 steps."),
    ],
)
def test_without_an_evaluation_the_headline_is_the_reward_or_the_loss(runs, name, headline):
    assert headline in Page(write_report(runs[name])).text
    assert headline in rendered(runs[name])


def test_the_facts_of_a_run_are_told_from_its_settings(runs):
    run = read_run(runs["rl"])
    facts = dict(run_facts(run_settings(run), run.metrics))
    assert facts["stage"] == "Online RL, gspo"
    assert (facts["model"], facts["reward"], facts["steps"]) == ("demo", "right", "10 of 3")
    assert facts["in a step"] == "4 prompts, 4 answers each"
    assert facts["time of steps"] == "70 s"
    told = dict(run_facts(run_settings(read_run(runs["mpo"])), ()))
    assert (told["stage"], told["held out"]) == ("Preference optimisation, mpo", "5 % of them")
    assert stage_of(run_settings(read_run(runs["sft"]))) == "sft"
    cascade = {**run_settings(run), "pairs": {}, "mpo": {"train": {"steps": 4}}, "rl": {"train": {"steps": 8}}}
    del cascade["train"], cascade["rollout"]
    assert dict(run_facts(cascade, run.metrics))["steps"] == "10 of 12: 4 mpo, 8 rl"


@pytest.mark.parametrize(
    "config", [{}, {"train": 3}, {"rollout": {}, "model": "x"}, {"train": {"steps": 3}, "data": {}}]
)
def test_settings_of_something_else_give_no_facts(config):
    assert run_facts(config, ()) == []


def test_a_run_without_any_metric_that_is_known_says_how_far_it_is():
    assert metric_sentences(metric_tiles([{"step": 1, "a": 2.0}]), 1) == ["1 step so far."]
    assert metric_sentences([], 0) == ["No step has been taken yet."]


def test_the_first_chart_is_the_reward_or_the_loss_with_step_0(runs):
    assert next(iter(Page(write_report(runs["rl"])).charts)) == "Reward"
    title, lines = next(iter(Page(write_report(runs["sft"])).charts.items()))
    assert title == "Loss: training and held-out"
    assert dict(lines)["eval/loss"][0] == [0, 2.0]


def test_the_first_chart_of_an_evaluated_run_is_its_reward(tmp_path):
    assert [*Page(write_report(make_run(tmp_path / "run", steps=6))).charts][:2] == [
        "Reward",
        "Held-out accuracy at IoU 0.5",
    ]


def test_the_curves_of_evaluations_begin_with_step_0(tmp_path):
    run = make_run(tmp_path / "run", steps=6)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "eval/greedy_accuracy": 0.5}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    [(_, points)] = Page(write_report(run)).charts["Held-out figures"]
    assert [step for step, _ in points] == [0, 6]


def test_the_true_box_is_drawn_on_top_and_red_is_for_misses(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", steps=6)))
    for drawing in page.source.split('<svg viewBox="0 0 1000 1000"')[1:]:
        boxes = drawing.split("</svg>")[0]
        assert boxes.rindex('class="true"') > boxes.rfind('class="guess')
    assert page.source.count('class="guess miss"') > 1


def test_a_report_looks_at_the_warnings_of_a_run():
    assert "warnings.jsonl" in INPUTS


def test_several_runs_are_laid_over_each_other(runs, tmp_path):
    page = Page(write_comparison([runs["rl"], runs["other"], runs["sft"]], tmp_path / "page.html"))
    reward = dict(page.charts["reward/mean"])
    assert [*reward] == ["rl", "other"]
    assert reward["other"] == [[n, n / 10] for n in range(1, 6)]
    assert [*dict(page.charts["eval/loss"])] == ["sft"]
    assert "answer/length" not in page.charts  # it never moved
    assert "optim.lr 0.001 1.0 0.001" in page.text
    assert "model.path" not in page.text
    [loss] = [
        one
        for one in json.loads(page.source.split('id="charts">')[1].split("</script>")[0])
        if one["title"] == "eval/loss"
    ]
    assert loss["series"][0]["place"] == 2  # a run has its colour in every chart


def test_runs_of_the_same_name_are_told_apart(runs, tmp_path):
    page = Page(write_comparison([runs["rl"], runs["rl"]], tmp_path / "page.html"))
    assert [label.rpartition("/")[2] for label, _ in page.charts["reward/mean"]] == ["rl (1)", "rl (2)"]


def test_a_folder_without_metrics_is_refused_by_name(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"bare: has no metrics\.jsonl"):
        write_comparison([runs["rl"], bare], tmp_path / "page.html")
