"""What holds where long answers hold nobody up: partial rollouts, over-sampling and the time limit."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, ClassVar

import pytest
from async_cases import Bench, Engine, Rewards, Tasks, TokenByToken, rows
from pydantic import ValidationError
from toy import make_data, rl_settings

import foveate.train.rl
import foveate.train.rollouts
from foveate.data.stream import Stream
from foveate.errors import ConfigError
from foveate.log import read_metrics
from foveate.records import Answer, SamplingParams, Task
from foveate.rollout.native.engine import NativeEngine
from foveate.train.clock import Clock
from foveate.train.rl import run_rl
from foveate.train.rollouts import Grading, SyncRollouts

CORRECTED = {"name": "grpo", "correction": {"mode": "token-truncate"}}


def spans_of(bench: Bench, row: int) -> Any:
    [group] = [group for group in bench.groups if group.task.answer == row]
    return group.answers[0].versions


# -------------------------------------------------------------------------------------------------- partial rollouts


def test_a_publish_waits_for_no_answer_and_each_goes_on_under_the_new_weights():
    """In step 2 stands an answer that has half of its tokens when the weights of step 1 come, and needs them."""
    slow = rows(8)[6]
    engine = TokenByToken(lambda row, made: row == slow and made == 3 and engine.version < 1)
    bench = Bench(engine, 2, last=6, partial=True).run()
    assert [row for step in bench.trained for row in step] == rows(24)
    assert spans_of(bench, slow) == ((0, 3), (1, 3))
    assert (slow, 3) in engine.asked
    assert bench.said[1]["rollout/staleness_mixed"] >= 0.25


def test_an_answer_may_go_over_several_updates_and_each_token_keeps_its_weights():
    slow = rows(12)[9]
    engine = TokenByToken(lambda row, made: row == slow and made == 2 * (engine.version + 1))

    def wait() -> None:
        give_up = time.monotonic() + 20
        while engine.made.get(slow, 0) < min(6, 2 * (engine.version + 1)) and time.monotonic() < give_up:
            time.sleep(0.001)

    bench = Bench(engine, 2, last=6, partial=True).run(between=wait)
    [group] = [group for group in bench.groups if group.task.answer == slow]
    answer = group.answers[0]
    assert answer.versions == ((0, 2), (1, 2), (2, 2))
    assert answer.logprobs.tolist() == [0.0, 0.0, -1.0, -1.0, -2.0, -2.0]
    assert answer.version == 0
    assert max(age for step in bench.ages for age in step) <= 2
    assert [row for step in bench.trained for row in step] == rows(24)
    assert all(said["rollout/groups_dropped"] == 0 for said in bench.said)


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_partial_rollouts_train_every_task_once_in_order_and_none_that_is_too_old(staleness):
    engine = TokenByToken(length=40)
    bench = Bench(engine, staleness, partial=True).run()
    assert [row for step in bench.trained for row in step] == rows(32)
    assert max(age for step in bench.ages for age in step) <= staleness
    assert all(said["rollout/groups_dropped"] == 0 for said in bench.said)
    for group in bench.groups:
        for answer in group.answers:
            assert answer.logprobs.tolist() == [float(-v) for v, tokens in answer.versions for _ in range(tokens)]


def test_groups_of_equal_rewards_are_replaced_while_others_are_under_way():
    """The first four teach nothing, so that step 1 needs the next four. One of these does not grow before those that
    take their place in step 2 are begun beside it."""
    equal, slow, last = set(rows(4)), rows(8)[7], rows(12)[11]
    engine = TokenByToken(lambda row, made: row == slow and made == 1 and (last, 0) not in engine.asked)
    bench = Bench(engine, 1, last=4, partial=True, resample_rounds=2, rewards=Rewards(equal)).run()
    assert [row for step in bench.trained for row in step] == [row for row in rows(20) if row not in equal]


def test_a_run_that_goes_on_trains_the_same_tasks_with_partial_rollouts():
    first = Bench(TokenByToken(length=40), 2, partial=True).run(steps=3)
    second = Bench(TokenByToken(length=40), 2, partial=True, step=3, state=first.saved).run()
    assert [row for step in first.trained + second.trained for row in step] == rows(32)


# ----------------------------------------------------------------------------------------------------- over-sampling


def test_a_step_takes_the_groups_that_finish_first_and_the_others_go_on():
    slow = set(rows(4)[:2])
    engine = TokenByToken(lambda row, made: row in slow and made == 3 and engine.version < 1)
    bench = Bench(engine, 2, last=4, partial=True, over_sample=2).run()
    assert not slow & set(bench.trained[0])
    assert slow <= {row for step in bench.trained for row in step}
    assert {spans_of(bench, row)[0] for row in slow} == {(0, 3)}


def test_an_answer_that_never_ends_is_dropped_and_counted_when_it_is_too_old():
    stuck = rows(4)[1]
    engine = TokenByToken(lambda row, made: row == stuck and made == 2)
    bench = Bench(engine, 1, last=6, partial=True, over_sample=2).run()
    trained = [row for step in bench.trained for row in step]
    assert len(trained) == len({*trained}) == 24
    assert stuck not in trained
    assert sum(said["rollout/groups_dropped"] for said in bench.said) >= 1
    assert max(age for step in bench.ages for age in step) <= 1
    done = {rows(40)[place] for place in (*range(bench.saved["position"]), *bench.saved["beyond"])}
    assert {*trained, stuck} <= done
    assert len(done) - 24 >= sum(said["rollout/groups_dropped"] for said in bench.said)


def test_a_continued_run_loses_and_doubles_nothing_whatever_order_groups_finished_in():
    slow = set(rows(4)[1:3])
    first = Bench(TokenByToken(lambda row, made: row in slow and made == 2), 2, partial=True, over_sample=3).run(
        steps=2
    )
    assert first.saved["beyond"]
    second = Bench(TokenByToken(), 2, step=2, last=6, partial=True, over_sample=3, state=first.saved).run()
    trained = [row for step in first.trained + second.trained for row in step]
    assert len(trained) == len({*trained}) == 24
    assert slow <= {*trained}
    done = [rows(40)[place] for place in (*range(second.saved["position"]), *second.saved["beyond"])]
    dropped = sum(said["rollout/groups_dropped"] for said in first.said + second.said)
    assert {*trained} <= {*done}
    assert len(done) >= 24 + dropped


# -------------------------------------------------------------------------------------------------------- time limit


class Timer(threading.Timer):
    """Time is up when a test says so."""

    running: ClassVar[list[Timer]] = []

    def start(self) -> None:
        self.running.append(self)

    def cancel(self) -> None:
        self.running.remove(self)

    def join(self, timeout: float | None = None) -> None:
        pass

    @classmethod
    def fire(cls) -> None:
        for timer in cls.running:
            timer.function()


@pytest.fixture
def limited(monkeypatch):
    monkeypatch.setattr(foveate.train.rollouts, "Timer", Timer)
    return 1e-9


def sampler_of(engine: Engine, limit: float | None = None, rewards: Rewards | None = None) -> SyncRollouts:
    return SyncRollouts(Tasks(Stream(40, 0, 4)), engine, rewards or Rewards(), SamplingParams(2), 0, False, limit)  # type: ignore[arg-type]


def test_what_is_unfinished_when_time_is_up_is_cut_and_trained(limited):
    slow = rows(4)[2]
    engine = TokenByToken(lambda row, made: row == slow and made == 2)
    engine.stuck = Timer.fire
    groups, _ = sampler_of(engine, limited).draw(1, 4, 0, Clock())
    assert [group.task.answer for group in groups] == rows(4)
    found = {group.task.answer: [(a.finish, len(a.token_ids)) for a in group.answers] for group in groups}
    assert found == {row: [("abort", 2)] * 2 if row == slow else [("stop", 6)] * 2 for row in rows(4)}
    assert not engine.paused
    assert not Timer.running


def test_prompts_that_were_not_begun_when_time_is_up_get_as_long_again(limited):
    engine = TokenByToken(lambda _, made: made == 2, at_once=2)
    engine.stuck = Timer.fire
    groups, _ = sampler_of(engine, limited).draw(1, 4, 0, Clock())
    assert [group.task.answer for group in groups] == rows(4)
    assert engine.asked == [(row, 0) for row in rows(4)]


def test_answers_are_whole_where_no_time_is_up():
    groups, _ = sampler_of(TokenByToken(at_once=3), 1000.0).draw(1, 3, 0, Clock())
    assert {answer.finish for group in groups for answer in group.answers} == {"stop"}


@pytest.mark.parametrize("partial", [False, True])
def test_the_time_limit_holds_ahead_of_the_steps_too(limited, partial):
    slow = rows(8)[5]
    engine = TokenByToken(lambda row, made: row == slow and made == 3)
    engine.stuck = Timer.fire
    bench = Bench(engine, 2, last=5, partial=partial, time_limit=limited).run()
    assert [row for step in bench.trained for row in step] == rows(20)
    [group] = [group for group in bench.groups if group.task.answer == slow]
    assert {(answer.finish, len(answer.token_ids)) for answer in group.answers} == {("abort", 3)}


# ----------------------------------------------------------------------------------------------------------- rewards


def test_groups_are_graded_while_the_others_are_still_answered():
    rewards, seen = Rewards(), []

    def look(_: int) -> None:
        end = time.monotonic() + 5
        while rewards.graded < len(seen) and time.monotonic() < end:
            time.sleep(0.001)
        seen.append(rewards.graded)

    sampler_of(Engine(before=look), rewards=rewards).draw(1, 4, 0, Clock())
    assert seen == [0, 1, 2, 3]


class Batches(Rewards):
    """Grades nothing before it is `let` to, and lists how much came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.partial_answers, self.let, self.sizes = threading.Event(), threading.Event(), []

    def grade_many(self, pairs, _fetches=()):
        self.partial_answers.set()
        assert self.let.wait(20)
        self.sizes.append(len(pairs))
        if pairs[0][0].text == "bad":
            raise ValueError("no grade")
        return super().grade_many(pairs)


def answers_of(text: str) -> Any:
    return (Answer.sampled((1,), (0.0,), text, "stop", 0),) * 3


def test_groups_that_wait_are_graded_together_and_each_gets_its_own_scores():
    rewards = Batches()
    tasks = [Task(str(i), "made up", (), (), i) for i in range(4)]
    with Grading(rewards) as grading:  # type: ignore[arg-type]
        futures = [grading.submit(tasks[0], answers_of("a"))]
        rewards.partial_answers.wait(20)
        futures += [grading.submit(task, answers_of("a")) for task in tasks[1:]]
        rewards.let.set()
        scores = [[score.value for score in future.result(20)] for future in futures]
    assert rewards.sizes == [3, 9]
    assert scores == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_reward_that_fails_fails_where_its_scores_are_asked_for():
    rewards = Batches()
    rewards.let.set()
    with Grading(rewards) as grading:  # type: ignore[arg-type]
        future = grading.submit(Task("0", "made up", (), (), 0), answers_of("bad"))
        with pytest.raises(ValueError, match="no grade"):
            future.result(20)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def rows_of(run):
    return [json.loads(line) for file in sorted(run.rollouts.iterdir()) for line in file.read_text().splitlines()]


class Stalling(NativeEngine):
    """At the third token of what goes on, waits for new weights, where the next step has its groups already."""

    sampled = 0

    def _prefill(self, *arguments: Any) -> Any:
        self.sampled = 0
        return super()._prefill(*arguments)

    def _draw(self, *arguments: Any) -> Any:
        self.sampled += 1
        if self.sampled == 3 and 1 <= self.version < 3:
            assert self._paused.wait(60)
        return super()._draw(*arguments)


def test_a_run_with_partial_rollouts_learns_and_says_which_weights_sampled_what(tmp_path, tiny_folder, data):
    rollout = {"staleness": 2, "partial": True, "engine": f"{__file__}:Stalling"}
    settings = {"algorithm": CORRECTED, "train": {"steps": 5}, "rollout": rollout, "eval": {"every": 0}}
    run = run_rl(rl_settings(tmp_path / "a", tiny_folder, data, **settings))
    records = read_metrics(run.metrics)
    answers = [answer for row in rows_of(run) for answer in row["answers"]]
    for answer in answers:
        assert sum(tokens for _, tokens in answer["versions"]) == answer["tokens"]
        assert min(version for version, _ in answer["versions"]) == answer["version"]
    joints = {tuple(map(tuple, answer["versions"][:2])) for answer in answers if len(answer["versions"]) > 1}
    assert any(tokens == 3 and later == version + 1 for (version, tokens), (later, _) in joints), joints
    assert max(record["rollout/staleness_mixed"] for record in records) > 0
    assert max(record["rollout/staleness_max"] for record in records) <= 2
    assert records[0]["engine/logprob_difference_max"] < 1e-4 < records[-1]["engine/logprob_difference_max"]
    assert {record["answer/timed_out"] for record in records} == {0}


@pytest.mark.parametrize("over_sample", [0, 3])
def test_a_stopped_run_with_partial_rollouts_trains_each_task_once(
    tmp_path, tiny_folder, data, monkeypatch, over_sample
):
    rollout = {"staleness": 2, "partial": True, "over_sample": over_sample}
    settings = rl_settings(
        tmp_path / "run", tiny_folder, data, algorithm=CORRECTED, rollout=rollout, train={"steps": 3}
    )
    calls = []

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **keywords)

    plain = foveate.train.rl.update
    monkeypatch.setattr(foveate.train.rl, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_rl(settings)
    run = run_rl(settings)
    assert len({row["where"] for row in rows_of(run)}) == 12


def test_a_time_limit_that_is_never_reached_changes_nothing(tmp_path, tiny_folder, data):
    found = []
    for name, rollout in (("a", {}), ("b", {"time_limit": 1000.0})):
        found.append(rows_of(run_rl(rl_settings(tmp_path / name, tiny_folder, data, rollout=rollout))))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"partial": True}, r"rollout.partial.*is true, .*rollout.staleness is 0.*set rollout.staleness=1"),
        ({"staleness": 1, "over_sample": 2}, r"rollout.over_sample.*is 2, but rollout.partial is false"),
    ],
)
def test_settings_that_would_not_act_are_refused(tmp_path, tiny_folder, data, rollout, message):
    with pytest.raises(ValidationError, match=message):
        rl_settings(tmp_path / "run", tiny_folder, data, algorithm=CORRECTED, rollout=rollout)


def test_partial_rollouts_with_a_greedy_baseline_are_refused(tmp_path, tiny_folder, data):
    algorithm = {"name": "remax", "correction": {"mode": "token-truncate"}}
    rollout = {"staleness": 1, "partial": True}
    with pytest.raises(ConfigError, match=r"rollout.partial is true, but algorithm remax compares"):
        run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm, rollout=rollout))


def test_a_time_limit_on_several_ranks_is_refused(tmp_path, tiny_folder, data):
    settings = rl_settings(tmp_path / "run", tiny_folder, data, rollout={"time_limit": 5.0})
    cluster = settings.cluster.model_copy(update={"nodes": 1, "gpus_per_node": 2})
    with pytest.raises(ConfigError, match=r"rollout.time_limit=5: with several ranks that takes processes of its own"):
        run_rl(settings.model_copy(update={"cluster": cluster}))
