"""Runs whose answers have several turns with an environment each."""

from __future__ import annotations

import re

import pytest
from test_online import rows_of
from test_resume import MOMENTS, interrupt, stop_at
from test_rl import metrics_of
from toy import make_data, rl_settings
from worlds import HERE, with_short_turns

import foveate.train.worker
from foveate.data.answers import ScoredRow, read_answers
from foveate.errors import DataError
from foveate.tools.dry_run import describe_run
from foveate.train.rl import run_rl

CORNERS = {"name": f"{HERE}:Corners", "workers": 0}
ROOM = {
    "rollout": {"samples": 4, "max_tokens": 200},
    "train": {"steps": 1, "prompts_per_step": 2, "tokens_per_micro_batch": 1024},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_folder):
    return with_short_turns(tiny_folder, tmp_path_factory.mktemp("models") / "short")


def settings_of(run, model, data, /, environment=CORNERS, **changes):
    changes = {group: {**ROOM.get(group, {}), **own} for group, own in {**ROOM, **changes}.items()}
    return rl_settings(run, model, data, environment=environment, **changes)


def test_a_run_trains_on_answers_of_several_turns_and_keeps_what_was_said(tmp_path, model, data):
    run = run_rl(settings_of(tmp_path / "run", model, data))
    for step, record in enumerate(metrics_of(run), start=1):
        answers = [answer for row in rows_of(run, step) for answer in row["answers"]]
        said = [[turn for turn in answer["turns"] if turn["role"] == "assistant"] for answer in answers]
        assert record["turns/mean"] == sum(map(len, said)) / len(answers) > 1.2
        assert record["tool/calls"] == record["tool/zoom"] <= record["turns/mean"]
        assert 0 < record["tool/errors"] < record["tool/calls"]
        assert record["engine/logprob_difference_max"] < 1e-4
        assert record["reward/failed"] == 0
        for answer, turns in zip(answers, said, strict=True):
            assert answer["tokens"] == sum(turn["tokens"] for turn in turns)
            assert answer["text"] == turns[-1]["text"]
            seen = [turn for turn in answer["turns"] if turn["role"] == "tool"]
            assert [turn["text"] for turn in seen] == [f"corner {1 + i}" for i in range(len(seen))]
            assert all((run.path / image["path"]).exists() for turn in seen for image in turn["images"])
    [*_, last] = sorted((run.path / "evals").glob("*.jsonl"))
    rows = [*read_answers(last, ScoredRow)]
    answers = [answer for row in rows for answer in row.answers]
    assert sum(len(answer.turns) > 1 for answer in answers) > 1
    assert all(answer.turns[-1].role == "assistant" or answer.finish != "stop" for answer in answers)


def test_rewards_of_steps_add_up_discounted_and_belong_to_their_turns(tmp_path, model, data):
    changes = {"algorithm": {"name": "ppo", "critic": {"lr": 1e-3}, "turn_discount": 0.5}, "eval": {"every": 0}}
    run = run_rl(
        settings_of(
            tmp_path / "run", model, data, {**CORNERS, "settings": {"rewards": True}, "reward": "both"}, **changes
        )
    )
    answers = [answer for row in rows_of(run, 1) for answer in row["answers"]]
    assert len(answers) == 8
    for answer in answers:
        turns = [turn for turn in answer["turns"] if turn["role"] == "assistant"]
        rewards = [turn["reward"] for turn in turns if "reward" in turn]
        assert rewards == [0.5**i * (len(turn["text"]) % 5) for i, turn in enumerate(turns[: len(rewards)])]
        assert answer["parts"]["environment"] == pytest.approx(sum(rewards))
        assert answer["score"] == pytest.approx(sum(rewards) + len(answer["text"]) / 10)


def test_an_environment_that_fails_costs_its_answer_alone(tmp_path, model, data):
    run = run_rl(
        settings_of(tmp_path / "run", model, data, {**CORNERS, "settings": {"fails_at": 2}}, eval={"every": 0})
    )
    answers = [answer for row in rows_of(run, 1) for answer in row["answers"]]
    lost = [answer for answer in answers if "no such corner" in answer["note"]]
    assert 0 < len(lost) < len(answers)
    record = metrics_of(run)[0]
    assert record["reward/failed"] == record["environment/failures"] == len(lost)
    assert record["environment/restarts"] == 0
    assert all("score" not in answer or answer["score"] is None for answer in lost)
    assert all("advantage" not in answer for answer in lost)


def test_an_environment_that_fails_always_is_what_must_be_fixed(tmp_path, model, data):
    broken = {"name": f"{HERE}:Broken", "reward": "environment", "workers": 0}
    with pytest.raises(DataError, match=r"(?s)environment: KeyError: .*; fix the environment\n.*in reset"):
        run_rl(settings_of(tmp_path / "run", model, data, broken, eval={"every": 0}))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_that_no_message_can_show_ends_the_run_by_name(tmp_path, model, data, workers):
    (tmp_path / "odd.py").write_text("class Odd:\n    def reset(self):\n        return b'PNG'\n")
    odd = {"name": "trl", "settings": {"factory": f"{tmp_path / 'odd.py'}:Odd"}, "workers": workers}
    with pytest.raises(DataError, match=r"^environment trl: reset returned a bytes; allowed: a text, a number"):
        run_rl(settings_of(tmp_path / "run", model, data, odd, eval={"every": 0}))


def test_a_dry_run_shows_the_tools_and_what_was_said(tmp_path, model, data):
    environment = {"name": "tools", "settings": {"tools": ["zoom"]}, "workers": 0}
    told = describe_run(settings_of(tmp_path / "run", model, data, environment, data={"max_prompt_tokens": 600}))
    assert '"name": "zoom"' in told
    assert "\nassistant:\n" in told


def test_a_dry_run_shows_the_prompt_that_the_environment_makes_and_the_run_has(tmp_path, model, data):
    environment = {"name": f"{HERE}:Drawn", "reward": "environment", "workers": 0}
    settings = settings_of(tmp_path / "run", model, data, environment, eval={"every": 0})
    told = describe_run(settings)
    shown = re.search(r"what is \d\?", told)
    assert shown is not None
    assert "  | Be brief." in told
    assert f"\nreward of environment {HERE}:Drawn: " in told
    assert "string_match" not in told.rpartition("ground truth")[2]
    assert rows_of(run_rl(settings), 1)[0]["prompt"][1]["content"] == f"<image>\n{shown[0]}"
    long = settings_of(tmp_path / "other", model, data, {**environment, "name": f"{HERE}:Lengthy"}, eval={"every": 0})
    assert re.search(
        r"not graded \(environment: .*, field prompt: \d+ tokens with its images, the limit", describe_run(long)
    )


def test_an_environment_may_draw_the_prompt_and_score_alone(tmp_path, model, data):
    environment = {"name": f"{HERE}:Drawn", "reward": "environment", "workers": 0}
    run = run_rl(settings_of(tmp_path / "run", model, data, environment, train={"steps": 1}, eval={"every": 0}))
    [record] = metrics_of(run)
    assert record["reward/mean"] == record["reward/environment"]
    rows = rows_of(run, 1)
    assert all([message["role"] for message in row["prompt"]] == ["system", "user"] for row in rows)
    assert all(row["prompt"][1]["content"].startswith("<image>\nwhat is") for row in rows)
    for answer in (answer for row in rows for answer in row["answers"]):
        ended = answer["finish"] == "stop"
        assert answer["score"] == (len(answer["text"]) % 3 if ended else 0)


def test_rewards_that_do_not_count_are_refused(tmp_path, model, data):
    with pytest.raises(DataError, match=r"set environment\.reward to environment or to both"):
        run_rl(
            settings_of(tmp_path / "run", model, data, {**CORNERS, "settings": {"rewards": True}}, eval={"every": 0})
        )


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{}, {"staleness": 1, "partial": True}], ids=["in turn", "ahead"])
def test_an_interrupted_run_with_environments_ends_as_the_uninterrupted_one(tmp_path, model, data, rollout):
    correction = {"algorithm": {"name": "gspo", "correction": {"mode": "sequence-truncate"}}} if rollout else {}
    environment = {**CORNERS, "workers": 2}

    def settings(name):
        train = {"steps": 4, "save_every": 2}
        return settings_of(
            tmp_path / name, model, data, environment, rollout=rollout, train=train, eval={"every": 0}, **correction
        )

    whole = run_rl(settings("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MOMENTS, "in the third step", (foveate.train.worker, "apply_gradients", 3, "before"))
        stop_at(patch, "in the third step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_rl(settings("cut"))
    cut = run_rl(settings("cut"))
    assert [record["step"] for record in metrics_of(cut)] == [1, 2, 3, 4]
    if not rollout:  # what was under way ahead is begun anew
        for step in range(1, 5):
            texts = [[[a["text"] for a in row["answers"]] for row in rows_of(run, step)] for run in (whole, cut)]
            assert texts[0] == texts[1]


GYM = """
import numpy as np

class Walk:
    def reset(self, seed=None):
        self.steps = 0
        return np.full((28, 28, 3), seed % 200, np.uint8), {}

    def step(self, action):
        self.steps += 1
        return np.full((28, 28, 3), self.steps, np.uint8), np.float32(0.5), False, self.steps >= 3, {}

    def close(self):
        pass
"""


def test_a_run_with_several_worker_processes_has_the_rewards_of_every_step(tmp_path, model, data):
    (tmp_path / "walk.py").write_text(GYM)
    settings = {"make": f"{tmp_path / 'walk.py'}:Walk", "max_turns": 2}
    walk = {"name": "gymnasium", "settings": settings, "workers": 2, "reward": "environment"}
    run = run_rl(settings_of(tmp_path / "run", model, data, walk, eval={"every": 0}))
    assert metrics_of(run)[0]["environment/failures"] == 0
    for answer in (answer for row in rows_of(run, 1) for answer in row["answers"]):
        turns = [turn for turn in answer["turns"] if turn["role"] == "assistant"]
        rewarded = [turn["reward"] for turn in turns if "reward" in turn]
        assert set(rewarded) <= {0.5}
        assert answer["score"] == sum(rewarded)
        assert len(turns) <= 2
