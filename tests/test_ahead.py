"""What holds when answers are generated while the policy learns, for any staleness."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from toy import make_data, rl_settings

import foveate.train.rl
from foveate.data.stream import Stream
from foveate.errors import ConfigError, EngineError
from foveate.log import read_metrics
from foveate.model.load import load_policy
from foveate.records import Completion, Message, Prompt, SamplingParams, Score, Task
from foveate.rollout.native import NativeEngine
from foveate.train.ahead import Ahead
from foveate.train.clock import Clock
from foveate.train.groups import Sampler
from foveate.train.rl import run_rl

CORRECTED = {"name": "grpo", "correction": {"mode": "token-truncate"}}
TASKS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


# --------------------------------------------------------------------------------------------------- made-up parts


class Tasks:
    """A reader whose tasks are the numbers of its stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def take(self, count: int) -> list[tuple[Task, Prompt]]:
        rows = self.stream.take(count)
        return [
            (Task(str(row), "made up", (Message("user", ""),), (), row), Prompt((row,), (), None, (row,)))
            for row in rows
        ]


class Engine:
    """Answers with the number of the prompt. `lag` makes it answer with older weights than it was given; `before` is
    called before each group. It notices when it is published to while it answers."""

    def __init__(self, *, lag: Callable[[int], int] = lambda _: 0, before: Callable[[int], None] = lambda _: None):
        self.version, self.answering, self.answered = 0, False, 0
        self.lag, self.before = lag, before

    def generate(self, requests: Sequence[Any], sampling: SamplingParams) -> Any:
        return [group for _, group in self.stream(requests, sampling)]

    def stream(self, requests: Sequence[Any], sampling: SamplingParams) -> Iterator[Any]:
        self.answering = True
        try:
            for index, request in reversed([*enumerate(requests)]):
                row = request.prompt.token_ids[0]
                self.before(row)
                self.answered += 1
                version = self.version - self.lag(row)
                answer = Completion((row,), (0.0,), str(row), "stop", version)
                yield index, (answer,) * sampling.samples
        finally:
            self.answering = False

    def publish(self, version: int) -> None:
        assert not self.answering
        self.version = version


@dataclass
class Rewards:
    """Grades by number: rows of `equal` teach nothing."""

    equal: set[int] = field(default_factory=set)
    delay: float = 0.0
    graded: int = 0

    def grade_many(self, pairs: Sequence[tuple[str, Task]]) -> list[Score]:
        time.sleep(self.delay)
        self.graded += 1
        return [Score(0.0 if task.answer in self.equal else float(i)) for i, (_, task) in enumerate(pairs)]


@dataclass
class Bench:
    """What a page holds: the stream that counts what was trained, and what runs ahead of it."""

    engine: Engine
    staleness: int = 1
    count: int = 4
    last: int = 8
    step: int = 0
    rewards: Rewards = field(default_factory=Rewards)
    refills: int = 0
    trained: list[list[int]] = field(default_factory=list)
    ages: list[list[int]] = field(default_factory=list)
    said: list[dict[str, float]] = field(default_factory=list)

    def run(self, steps: int | None = None, between: Callable[[], None] = lambda: None) -> Bench:
        self.stream = Stream(TASKS, 0, self.count)
        self.stream.take(self.step * self.count)
        source = Stream(TASKS, 0, self.count)
        source.take(self.step * self.count)
        self.engine.version = self.step
        sampler = Sampler(Tasks(source), self.engine, self.rewards, SamplingParams(2), 0, False)
        ahead = Ahead(
            sampler,
            self.engine,
            self.stream,
            staleness=self.staleness,
            count=self.count,
            step=self.step,
            last=self.last,
        )
        with closing(ahead):
            for step in range(self.step + 1, (steps or self.last) + 1):
                clock = Clock()
                groups, _ = ahead.draw(step, self.count, self.refills, clock)
                between()
                self.trained.append([group.task.answer for group in groups])
                self.ages.append([step - 1 - group.completions[0].version for group in groups])
                self.said.append(ahead.metrics())
                with ahead.at_rest(clock):
                    self.engine.publish(step)
        return self


def rows(count: int) -> list[int]:
    return Stream(TASKS, 0, 4).take(count)


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
    assert bench.said[-1]["staleness/max"] > 0
    assert all(said["groups_dropped"] == 0 for said in bench.said)


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
    assert max(said["groups_waiting"] for said in bench.said) <= 4 * (staleness + 1)


def test_groups_that_are_too_old_are_dropped_and_counted_and_never_trained():
    old = set(rows(32)[5:8])
    bench = Bench(Engine(lag=lambda row: 3 if row in old else 0), last=5).run()
    flat = [row for step in bench.trained for row in step]
    dropped = sum(said["groups_dropped"] for said in bench.said)
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
    bench = Bench(Engine(), staleness, last=5, refills=2, rewards=Rewards(equal)).run()
    flat = [row for step in bench.trained for row in step]
    assert flat == [row for row in rows(23) if row not in equal]
    assert all(said["groups_dropped"] == 0 for said in bench.said)
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


def test_a_run_with_staleness_learns_and_says_how_old_its_answers_are(tmp_path, tiny_folder, data):
    settings = {"algorithm": CORRECTED, "rollout": {"staleness": 1}, "train": {"steps": 4}}
    run = run_rl(rl_settings(tmp_path / "a", tiny_folder, data, **settings))
    again = run_rl(rl_settings(tmp_path / "b", tiny_folder, data, **settings))
    records = read_metrics(run.metrics)
    assert [record["staleness/max"] for record in records] == [0, 1, 1, 1]
    assert {"seconds/wait", "seconds/generate", "mismatch_kl", "mismatch_cut", "engine_kl_k3"} <= set(records[-1])
    assert records[0]["engine_logprob_difference_max"] < 1e-4 < records[2]["engine_logprob_difference_max"]
    own = [records[-1][f"seconds/{name}"] for name in ("wait", "logprobs", "update", "publish")]
    assert records[-1]["seconds/step"] == pytest.approx(sum(own))
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
    with pytest.raises(ConfigError, match=r"rollout.staleness=1: several ranks answer and learn in turn so far; use 0"):
        run_rl(settings.model_copy(update={"cluster": cluster}))
