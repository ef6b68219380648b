"""What named algorithms ask of a run beyond advantages and losses: more groups, greedy answers, values, penalties."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from slow_cases import slow_but
from test_resume import assert_equal, interrupt, stop_at
from test_rl import metrics_of
from toy import HERE, make_data, rl_settings

from foveate.config.runs import RLSettings
from foveate.records import Score, Task
from foveate.run_folder import RunFolder
from foveate.train.rl import run_rl
from foveate.train.worker import Worker

SELDOM = f"{__file__}:seldom"


def seldom(text: str, _: Task) -> Score:
    """A hit for few answers, so that many groups of four have none."""
    return Score(float(len(text) % 5 == 0))


def never(_text: str, _task: Task) -> Score:
    return Score(0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def rows_of(run: RunFolder, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.rollouts / f"step_{step:06d}.jsonl").read_text().splitlines()]


def test_groups_of_equal_rewards_are_replaced_by_those_of_the_next_tasks(tmp_path, tiny_folder, data):
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm="dapo", reward={"name": SELDOM}))
    taken = 0
    for step, record in enumerate(metrics_of(run), start=1):
        rows = rows_of(run, step)
        assert len(rows) == 4
        assert all(len({answer["score"] for answer in row["answers"]}) > 1 for row in rows)
        assert record["rollout/groups_without_advantage"] == 0
        taken += record["rollout/groups"]
        assert record["data/epoch"] == pytest.approx(taken / 16)
    assert taken > 12  # or nothing had to be replaced


def test_dynamic_sampling_ends_after_its_rounds_and_keeps_the_size_of_a_step(tmp_path, tiny_folder, data):
    algorithm = {"name": "dapo", "resample_rounds": 2}
    changes = {"train": {"steps": 1}, "eval": {"every": 0}}
    settings = rl_settings(
        tmp_path / "run", tiny_folder, data, algorithm=algorithm, reward={"name": f"{__file__}:never"}, **changes
    )
    run = run_rl(settings)
    record = metrics_of(run)[0]
    assert (record["rollout/groups"], record["rollout/groups_without_advantage"], record["optim/updates"]) == (12, 4, 0)
    assert len(rows_of(run, 1)) == 4


ALGORITHMS = {
    "dynamic sampling": ({"name": "dapo"}, {"name": SELDOM}),
    "a critic": ({"name": "ppo", "critic": {"lr": 1e-3, "warmup_steps": 1}}, {}),
    "an adaptive penalty": ({"name": "rloo", "reward_kl": {"coefficient": 0.1, "target": 0.01, "horizon": 20.0}}, {}),
    "random marks": ({"name": "clip_cov", "loss": {"share": 0.1, "cov_low": 0.0}}, {}),
    "greedy answers": ({"name": "remax"}, {}),
}


@pytest.mark.parametrize("what", slow_but(["dynamic sampling"], ALGORITHMS))
def test_an_interrupted_run_with_it_ends_as_the_uninterrupted_one(tmp_path, tiny_folder, data, what):
    algorithm, reward = ALGORITHMS[what]

    def settings(name: str) -> RLSettings:
        train = {"steps": 4, "updates_per_step": 2, "save_every": 2}
        changes = {"algorithm": algorithm, "reward": reward, "train": train, "eval": {"every": 0}}
        return rl_settings(tmp_path / name, tiny_folder, data, **changes)

    whole = run_rl(settings("whole"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "while it writes a checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_rl(settings("run"))
    assert_equal(run_rl(settings("run")), whole)


def test_a_greedy_answer_is_the_baseline_of_remax(tmp_path, tiny_folder, data):
    changes = {"algorithm": "remax", "train": {"steps": 1}, "eval": {"every": 0}}
    for row in rows_of(run_rl(rl_settings(tmp_path / "run", tiny_folder, data, **changes)), 1):
        baselines = [answer["score"] - answer["advantage"] for answer in row["answers"]]
        assert baselines == pytest.approx([baselines[0]] * 4, abs=1e-6)


def test_the_critic_alone_learns_while_it_warms_up(tmp_path, tiny_folder, data):
    algorithm = {"name": "ppo", "critic": {"lr": 1e-3, "warmup_steps": 2}}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm))
    records = metrics_of(run)
    assert [record["optim/lr"] > 0 for record in records] == [False, False, True]
    assert [record["optim/updates"] for record in records] == [0, 0, 1]
    assert records[0]["critic/value"] == 0.0  # its head says 0 at first
    assert records[2]["critic/value"] != 0.0
    assert all(record["critic/lr"] == 1e-3 and record["critic/grad_norm"] > 0 for record in records)


def test_a_kl_in_the_reward_adapts_its_coefficient_to_the_target(tmp_path, tiny_folder, data):
    penalty = {"coefficient": 0.1, "target": 1e-9, "horizon": 160.0}
    algorithm = {"name": "grpo", "reward_kl": penalty}
    changes = {"train": {"steps": 4}, "eval": {"every": 0}}
    records = metrics_of(run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm, **changes)))
    assert records[0]["reward/kl"] == pytest.approx(0.0, abs=1e-4)
    assert records[3]["reward/kl"] != records[0]["reward/kl"]
    coefficients = [record["reward/kl_coefficient"] for record in records]
    factors = [after / now for now, after in pairwise(coefficients)]
    for record, factor in zip(records, factors, strict=False):
        sign = 1 if record["reward/kl"] > 1e-9 else -1
        assert factor == pytest.approx(1 + sign * 0.2 * 16 / 160, rel=1e-6)


def test_a_correction_says_what_it_did_and_changes_nothing_for_an_exact_sampler(tmp_path, tiny_folder, data):
    changes = {"train": {"steps": 1}, "eval": {"every": 0}}
    correction = {"mode": "token-truncate", "high": 2.0}
    plain = metrics_of(run_rl(rl_settings(tmp_path / "plain", tiny_folder, data, algorithm="grpo", **changes)))[0]
    algorithm = {"name": "grpo", "correction": correction}
    settings = rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm, **changes)
    record = metrics_of(run_rl(settings))[0]
    assert record["engine/correction_truncated"] == 0.0
    assert record["engine/correction_weight"] == pytest.approx(1.0, abs=1e-4)
    assert record["engine/correction_kl"] == pytest.approx(0.0, abs=1e-6)
    assert record["optim/grad_norm"] == pytest.approx(plain["optim/grad_norm"], rel=1e-3)
    assert record["engine/logprob_difference_max"] < 1e-4


PASSES = {
    "a correction, one update": ({"correction": {"mode": "token-truncate"}}, {}, {}, False),
    "a correction, two updates": ({"correction": {"mode": "token-truncate"}}, {"updates_per_step": 2}, {}, True),
    "a correction, two epochs": ({"correction": {"mode": "token-truncate"}}, {"epochs_per_step": 2}, {}, True),
    "a correction, dropout": (
        {"correction": {"mode": "token-truncate"}}, {}, {"lora": {"rank": 2, "dropout": 0.1}}, True
    ),
    "the engine's": ({"old_logprobs": "engine"}, {"updates_per_step": 2, "epochs_per_step": 2}, {}, False),
    "the engine's, a mask": (
        {"old_logprobs": "engine", "correction": {"mode": "token-mask", "high": 1e9}},
        {"updates_per_step": 2}, {}, False,
    ),
    "the engine's, marks by the weights": (
        {"name": "clip_cov", "old_logprobs": "engine", "loss": {"share": 0.1, "cov_low": 0.0}}, {}, {}, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PASSES)
def test_old_log_probs_take_a_pass_only_where_no_other_has_them(tmp_path, tiny_folder, data, monkeypatch, what):
    algorithm, train, model, takes = PASSES[what]
    passes = []
    computed = Worker.logprobs
    monkeypatch.setattr(Worker, "logprobs", lambda *given: passes.append(given) or computed(*given))
    changes = {"train": {"steps": 1, **train}, "eval": {"every": 0}}
    if model:
        changes["model"] = {"path": str(tiny_folder), **model}
    same = {"name": "grpo", **{name: value for name, value in algorithm.items() if name in ("name", "loss")}}
    plain = rl_settings(tmp_path / "plain", tiny_folder, data, algorithm=same, **changes)
    expected = metrics_of(run_rl(plain))[0]
    passes.clear()
    algorithm = {"name": "grpo", **algorithm}
    record = metrics_of(run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm, **changes)))[0]
    assert bool(passes) == takes
    assert record["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=1e-3)  # the engine is exact
    assert 0 < record["engine/logprob_difference_max"] < 0.05 + 9 * (what == "a correction, dropout")


def test_advantages_are_cut_to_the_clip(tmp_path, tiny_folder, data):
    algorithm = {"name": "grpo", "advantage_clip": 0.5}
    changes = {"train": {"steps": 1}, "eval": {"every": 0}}
    rows = rows_of(run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm, **changes)), 1)
    sizes = [abs(answer["advantage"]) for row in rows for answer in row["answers"]]
    assert max(sizes) == pytest.approx(0.5)


def test_an_answer_may_earn_a_bonus_for_its_form(tmp_path, tiny_folder, data):
    bonus = {"weights": {f"{HERE}:text_length": 1.0, "format_tags": 0.2}}
    changes = {"train": {"steps": 1}, "eval": {"every": 0}}
    reward = {"name": "weighted_sum", "settings": bonus}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, reward=reward, **changes))
    assert "reward/format_tags" in metrics_of(run)[0]


def test_a_second_pass_learns_from_the_same_answers_once_more(tmp_path, tiny_folder, data):
    """Its ratios are to the weights before the first one, so that they have left 1."""
    train = {"steps": 1, "updates_per_step": 2}
    one, two = (
        metrics_of(run_rl(rl_settings(tmp_path / str(n), tiny_folder, data, train={**train, "epochs_per_step": n})))[0]
        for n in (1, 2)
    )
    assert (one["optim/updates"], two["optim/updates"]) == (2, 4)
    assert two["optim/tokens"] == 2 * one["optim/tokens"]
    assert two["reward/mean"] == one["reward/mean"]
    assert two["loss/ratio_max"] > one["loss/ratio_max"] > 1
