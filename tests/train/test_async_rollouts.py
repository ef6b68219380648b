"""What holds when answers are generated while the policy learns, for any staleness."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch
from async_cases import TASKS, Bench, Engine, Rewards, Tasks, rows
from pydantic import ValidationError
from toy import make_data, rl_settings

import foveate.train.rl
from foveate.data.stream import Stream
from foveate.errors import ConfigError, EngineError
from foveate.log import read_metrics
from foveate.models.policy import load_policy
from foveate.records import SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.rl import run_rl
from foveate.train.rollouts import PendingGroup, SyncRollouts

CORRECTED = {"name": "grpo", "correction": {"mode": "token-truncate"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


# ------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_every_task_is_trained_once_in_the_order_of_the_stream(staleness):
    bench = Bench(Engine(), staleness).run()
    assert [row for step in bench.trained for row in step] == rows(32)
    assert bench.stream.position == 32
    assert bench.engine.answered == 32


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_no_answer_is_older_than_the_staleness_and_none_is_made_to_be_dropped(staleness):
    bench = Bench(Engine(), staleness).run(between=lambda: time.sleep(0.01))
    assert max(age for step in bench.ages for age in step) <= staleness
    assert bench.said[-1]["rollout/staleness_max"] > 0
    assert all(said["rollout/groups_dropped"] == 0 for said in bench.said)


@pytest.mark.parametrize("slow", ["generation", "learning", "neither"])
def test_with_staleness_one_the_weights_of_every_answer_are_known_beforehand(slow):
    engine = Engine(before=(lambda _: time.sleep(0.003)) if slow == "generation" else lambda _: None)
    bench = Bench(engine).run(between=(lambda: time.sleep(0.02)) if slow == "learning" else lambda: None)
    assert bench.ages == [[0] * 4, *[[1] * 4] * 7]


@pytest.mark.parametrize("staleness", [1, 3])
def test_what_waits_is_bounded_however_slow_the_learner_is(staleness):
    engine = Engine()
    made: list[int] = []

    def wait() -> None:
        give_up, allowed = time.monotonic() + 20, min(24, 4 * (len(made) + 1 + staleness))
        while engine.answered < allowed and time.monotonic() < give_up:
            time.sleep(0.001)
        time.sleep(0.02)  # for what should not come
        made.append(engine.answered)

    bench = Bench(engine, staleness, last=6).run(between=wait)
    assert made == [min(24, 4 * (step + staleness)) for step in range(1, 7)]
    assert max(said["rollout/groups_waiting"] for said in bench.said) <= 4 * (staleness + 1)


def test_groups_that_are_too_old_are_dropped_and_counted_and_never_trained():
    old = set(rows(32)[5:8])
    bench = Bench(Engine(lag=lambda row: 3 if row in old else 0), last=5).run()
    flat = [row for step in bench.trained for row in step]
    dropped = sum(said["rollout/groups_dropped"] for said in bench.said)
    assert flat == [row for row in rows(20 + int(dropped)) if row not in old]
    assert dropped == 3
    assert bench.stream.position == 23
    assert max(age for step in bench.ages for age in step) <= 1


def test_an_engine_that_never_takes_new_weights_ends_the_run():
    bench = Bench(Engine(lag=lambda _: 5))
    with pytest.raises(
        EngineError, match=r"weights of step -5 or older, .* rollout.staleness is 1: new weights do not"
    ):
        bench.run()


def test_an_engine_that_claims_newer_weights_than_it_was_given_ends_the_run():
    with pytest.raises(EngineError, match="answered with weights of step 1, but was given those of 0"):
        Bench(Engine(lag=lambda _: -1)).run()


def test_an_error_of_the_thread_is_raised_where_the_page_waits():
    def fail(row: int) -> None:
        if row == rows(10)[9]:
            raise EngineError("the server is gone")

    with pytest.raises(EngineError, match="the server is gone"):
        Bench(Engine(before=fail)).run()
    assert not [thread for thread in threading.enumerate() if thread.name in ("generation", "grading_0")]


def test_closing_ends_the_thread_amid_a_round():
    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    engine = Engine(before=lambda _: time.sleep(0.02))
    with pytest.raises(StopError):
        Bench(engine, staleness=5, count=10).run(between=stop)
    assert not engine.answering
    assert not [thread for thread in threading.enumerate() if thread.name in ("generation", "grading_0")]
    assert engine.answered < 30


def test_closing_ends_the_greedy_answers_of_a_round():
    """The engine is paused then, and gives nothing however often it is asked."""
    engine = Engine()
    engine.pause()
    sampler = SyncRollouts(Tasks(Stream(TASKS, 0, 1)), engine, None, SamplingParams(), 0, True)
    [(task, prompt)] = sampler.reader.take(1)
    asked = []
    greedy = sampler.greedy(
        [PendingGroup(0, task, Request(prompt, 0))], None, lambda: asked.append(1) or len(asked) > 2
    )
    assert greedy == []
    assert len(asked) == 3


def test_rewards_are_graded_while_the_others_are_still_answered():
    rewards = Rewards()
    seen: list[int] = []

    def look(_: int) -> None:
        end = time.monotonic() + 5
        while rewards.graded < len(seen) and time.monotonic() < end:
            time.sleep(0.001)
        seen.append(rewards.graded)

    Bench(Engine(before=look), rewards=rewards, last=3).run()
    assert seen == list(range(12))


def test_a_continued_run_trains_the_same_groups_in_the_same_steps():
    whole = Bench(Engine(), 2).run()
    first = Bench(Engine(), 2).run(steps=3)
    second = Bench(Engine(), 2, step=3).run()
    assert first.trained + second.trained == whole.trained
    assert max(age for step in second.ages for age in step) <= 2


@pytest.mark.parametrize("staleness", [1, 2])
def test_groups_of_equal_rewards_are_replaced_by_those_that_follow(staleness):
    equal = set(rows(12)[1:3]) | set(rows(12)[6:7])
    bench = Bench(Engine(), staleness, last=5, resample_rounds=2, rewards=Rewards(equal)).run()
    flat = [row for step in bench.trained for row in step]
    assert flat == [row for row in rows(23) if row not in equal]
    assert all(said["rollout/groups_dropped"] == 0 for said in bench.said)
    assert bench.stream.position == 23


# ------------------------------------------------------------------------------------------------------- whole runs


def weights(run):
    return load_policy(str(run.final)).model.state_dict()


def rows_of(run):
    return [json.loads(line) for file in sorted(run.rollouts.iterdir()) for line in file.read_text().splitlines()]


class Unpublished(NativeEngine):
    """Has weights of its own that stay as they were."""

    def publish(self, version: int, _weights: Any) -> None:
        self.version = version


@pytest.mark.slow
def test_a_run_with_staleness_learns_and_says_how_old_its_answers_are(tmp_path, tiny_folder, data):
    settings = {"algorithm": CORRECTED, "rollout": {"staleness": 1}, "train": {"steps": 4}}
    run = run_rl(rl_settings(tmp_path / "a", tiny_folder, data, **settings))
    again = run_rl(rl_settings(tmp_path / "b", tiny_folder, data, **settings))
    records = read_metrics(run.metrics)
    assert [record["rollout/staleness_max"] for record in records] == [0, 1, 1, 1]
    assert {"time/wait", "time/generate", "engine/correction_kl", "engine/correction_truncated", "engine/kl_k3"} <= set(
        records[-1]
    )
    assert records[0]["engine/logprob_difference_max"] < 1e-4 < records[2]["engine/logprob_difference_max"]
    own = [records[-1][f"time/{name}"] for name in ("wait", "logprobs", "update", "publish")]
    assert records[-1]["time/step"] == pytest.approx(sum(own))
    assert [row["answers"][0]["version"] for row in rows_of(run)] == [0] * 8 + [1] * 4 + [2] * 4
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(run).items())


def test_the_engine_of_a_run_with_staleness_answers_with_what_was_published_alone(tmp_path, tiny_folder, data):
    changes = {"algorithm": CORRECTED, "train": {"steps": 3}}
    engine = {"staleness": 1, "engine": f"{__file__}:Unpublished"}
    run = run_rl(rl_settings(tmp_path / "a", tiny_folder, data, rollout=engine, **changes))
    frozen = run_rl(rl_settings(tmp_path / "b", tiny_folder, data, rollout=engine, optim={"lr": 1e-12}, **changes))
    texts = [[[answer["text"] for answer in row["answers"]] for row in rows_of(one)] for one in (run, frozen)]
    assert texts[0] == texts[1]


def test_staleness_goes_with_adapters(tmp_path, tiny_folder, data):
    settings = rl_settings(
        tmp_path / "run", tiny_folder, data, algorithm=CORRECTED, rollout={"staleness": 2}, train={"steps": 3},
        model={"path": str(tiny_folder), "lora": {"rank": 4, "targets": ["q_proj"]}},
    )  # fmt: skip
    assert len(read_metrics(run_rl(settings).metrics)) == 3


def test_a_stopped_run_with_staleness_trains_each_task_once(tmp_path, tiny_folder, data, monkeypatch):
    settings = rl_settings(
        tmp_path / "run", tiny_folder, data, algorithm=CORRECTED, rollout={"staleness": 2}, train={"steps": 4}
    )
    calls = []

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments, **keywords)

    plain = foveate.train.rl.update
    monkeypatch.setattr(foveate.train.rl, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_rl(settings)
    run = run_rl(settings)
    assert len({row["where"] for row in rows_of(run)}) == 16  # an epoch


def test_staleness_without_correction_is_refused(tmp_path, tiny_folder, data):
    with pytest.raises(ValidationError, match=r"rollout.staleness.* but algorithm.correction is null; set 'algorithm"):
        rl_settings(tmp_path / "run", tiny_folder, data, rollout={"staleness": 1})


def test_staleness_on_several_ranks_is_refused(tmp_path, tiny_folder, data):
    settings = rl_settings(tmp_path / "run", tiny_folder, data, algorithm=CORRECTED, rollout={"staleness": 1})
    cluster = settings.cluster.model_copy(update={"nodes": 1, "gpus_per_node": 2})
    with pytest.raises(ConfigError, match=r"rollout.staleness=1: with several ranks that takes processes"):
        run_rl(settings.model_copy(update={"cluster": cluster}))
