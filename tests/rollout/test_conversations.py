"""Environments between the turns of answers: asked once for each turn; those that fail cost their answer."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import pytest

from foveate.encoding.turns import TurnReply, Turns
from foveate.environments.protocol import EnvironmentFailure, Observation, Opened, Step
from foveate.errors import DataError
from foveate.records import Answer, Message, SamplingParams, Score, Segment
from foveate.rollout.conversations import Conversations
from foveate.rollout.credit import AnswerCredit, Outcome
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

SAMPLING = SamplingParams(samples=3, max_tokens=160)


class Pool:
    """Environments that say "again" twice and end; `fails` holds (number of the answer, turn) and the kind, once."""

    tools, has_last_reward = (), False

    def __init__(self, fails=None, opening="start"):
        self.fails, self.opening, self.failures = dict(fails or {}), opening, Counter()
        self.given, self.closed = {}, []

    def open(self, _task, _seed, key):
        self.given[key] = []
        if callable(self.opening):
            return done(Opened((Observation("user", self.opening(key)),), self.opening(key)))
        return done(Opened((Observation("user", self.opening),), self.opening))

    def step(self, key, answer):
        self.given[key].append(answer)
        turn = len(self.given[key])
        kind = self.fails.pop((key[1], turn), None)
        if kind is not None:
            self.failures[kind] += 1
            return done(EnvironmentFailure(kind, "no more"))
        return done(Step((Observation("user", f"again {turn}"),), reward=float(turn), done=turn == 3))

    def close(self, key):
        self.closed.append(key)


def done(value):
    future = Future()
    future.set_result(value)
    return future


@pytest.fixture
def engine(tiny_policy):
    tiny_policy.model.eval()
    policy = replace(tiny_policy, family=replace(tiny_policy.family, stop_ids=tuple(range(1, 600, 6))))
    return NativeEngine(policy, lambda ids: str(ids))


@pytest.fixture
def talk(encode, make_task):
    """Make conversations over a pool, and the request to one prompt."""

    def make(pool, **settings):
        talks = Conversations(pool, encode, AnswerCredit("sum", 0.5, False), **settings)
        task = make_task("?")
        [(_, request)] = talks.begin(["g"], [task], [Request(encode(task), 3)], 3)
        return talks, request

    return make


def test_every_turn_is_asked_once_and_counts(talk, engine):
    pool = Pool()
    talks, request = talk(pool)
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    answers, outcomes = talks.finish("g", answers)
    assert sorted(pool.closed) == [("g", 0), ("g", 1), ("g", 2)]
    for number, (answer, outcome) in enumerate(zip(answers, outcomes, strict=True)):
        own = [turn for turn in outcome.turns if turn.role == "assistant"]
        given = pool.given["g", number]
        assert [turn.text for turn in own[: len(given)]] == given
        assert [turn.text for turn in outcome.turns if turn.role == "user"] == [
            f"again {i + 1}" for i in range(len(own) - 1)
        ]
        rewards = [0.5**i * (i + 1) for i in range(len(given))]
        trained = [segment for segment in answer.segments if segment.trained]
        assert [segment.reward for segment in trained if segment.reward is not None] == rewards
        assert talks.credit.score(outcome, Score(None)).value == pytest.approx(sum(rewards))
    assert max(len(pool.given["g", number]) for number in range(3)) == 3


def test_a_turn_that_is_asked_again_gives_the_same_and_another_answer_is_a_failure(talk):
    pool = Pool()
    talks, _ = talk(pool)
    turn = Answer.sampled((5,), (0.0,), "a", "stop", 0)
    first = talks.observe(["g"], 0, 0, turn)
    assert talks.observe(["g"], 0, 0, turn) is first
    assert pool.given["g", 0] == ["a"]
    longer = Answer(
        (*turn.segments, first.result(10), Segment.sampled((6,), (0.0,), 0), first.result(), *turn.segments),
        "c",
        "stop",
    )
    assert talks.observe(["g"], 0, 0, longer).result() is None
    assert talks.restart("g", [longer] * 3) is not None


def test_an_answer_whose_environment_shows_other_things_begins_anew(talk, engine):
    whole, request = talk(Pool())
    [expected] = engine.generate([request], SAMPLING, partial(whole.observe, ["g"]))
    pool = Pool(fails={(1, 2): "start_again"})
    talks, request = talk(pool)
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    anew = talks.restart("g", answers)
    assert anew is not None
    assert [answer.finish == "abort" for answer in anew] == [False, True, False]
    [answers] = engine.generate([replace(request, partial_answers=anew)], SAMPLING, partial(talks.observe, ["g"]))
    assert talks.restart("g", answers) is None
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert talks.metrics() == {"environment/failures": 0.0, "environment/restarts": 1.0}


def test_failed_and_full_answers_are_not_graded(talk, engine):
    talks, request = talk(Pool(fails={(0, 1): "timed_out"}), when_full="leave_out")
    small = replace(SAMPLING, max_tokens=40)
    [answers] = engine.generate([request], small, partial(talks.observe, ["g"]))
    _, outcomes = talks.finish("g", answers)
    assert outcomes[0].note == "environment: no more"
    assert talks.credit.score(outcomes[0], Score(1.0)) == Score(None, note="environment: no more")
    assert any("had no room" in outcome.note for outcome in outcomes[1:])


def test_a_group_that_begins_differently_is_refused(talk):
    with pytest.raises(DataError, match="different messages for answers of one group"):
        talk(Pool(opening=lambda key: f"hello {key[1]}"))


def test_rewards_add_up_with_those_of_the_function():
    step = Step(reward=2.0)
    silent, last = AnswerCredit(), AnswerCredit("final", 0.5, True)
    assert silent.of_turns([step, step]) == [None, None]
    assert last.of_turns([step, step]) == [None, 1.0]
    assert AnswerCredit("sum", 0.5).of_turns([step, Step(), step]) == [2.0, None, 0.5]


def test_equal_images_are_one_tensor_whoever_sees_them(talk, encode, make_image, make_task):
    talks, _ = talk(Pool())
    segments = [
        Turns(encode)(make_task("?"), [TurnReply((Message("user", "<image>"),), (make_image(60, 50, seed),))])
        for seed in (1, 1, 2)
    ]
    first, again, other = map(talks._shared, segments)
    assert first.tiles is again.tiles is not segments[1].tiles
    assert other.tiles is segments[2].tiles
    turned = replace(segments[1], slots=(replace(segments[1].slots[0], grid=(2, 8)),))
    assert talks._shared(turned).tiles is segments[1].tiles  # its features are not those of the other grid


@pytest.mark.parametrize("max_tokens", [40, 160])
def test_answers_that_never_come_to_their_reward_have_none_of_it_and_are_graded(talk, engine, max_tokens):
    class Silent(Pool):
        def step(self, key, answer):
            step = super().step(key, answer).result()
            return done(replace(step, reward=None, info={"turn_limit": True} if step.done else {}))

    talks, request = talk(Silent())
    [answers] = engine.generate([request], replace(SAMPLING, max_tokens=max_tokens), partial(talks.observe, ["g"]))
    _, outcomes = talks.finish("g", answers)
    assert [talks.credit.score(outcome, Score(None)).value for outcome in outcomes] == [0.0] * 3


class Judging(Pool):
    """Gives a reward for the end of an answer, and none for its turns."""

    has_last_reward = True

    def __init__(self, fails=None, **settings):
        super().__init__(**settings)
        self.asked, self.end = [], fails

    def step(self, key, answer):
        step = super().step(key, answer).result()
        return done(replace(step, reward=None, info={"turn_limit": True} if step.done else {}))

    def last_reward(self, key):
        self.asked.append(key)
        return done(self.end or Step(reward=3.0, done=True))


@pytest.mark.parametrize("max_tokens", [8, 40, 160])
def test_an_answer_that_a_limit_has_ended_has_its_environments_last_reward_on_its_last_turn(talk, engine, max_tokens):
    pool = Judging()
    talks, request = talk(pool)
    [answers] = engine.generate([request], replace(SAMPLING, max_tokens=max_tokens), partial(talks.observe, ["g"]))
    answers, outcomes = talks.finish("g", answers)
    assert sorted(pool.asked) == [("g", 0), ("g", 1), ("g", 2)]
    for answer, outcome in zip(answers, outcomes, strict=True):
        own = [segment.reward for segment in answer.segments if segment.trained]
        worth = 3.0 * 0.5 ** (len(own) - 1)
        assert own == [*[None] * (len(own) - 1), worth]
        assert [turn.reward for turn in outcome.turns if turn.role == "assistant"] == own
        assert talks.credit.score(outcome, Score(None)).value == worth


def test_an_environment_that_fails_at_the_end_of_an_answer_costs_it(talk, engine):
    pool = Judging(EnvironmentFailure("raised", "no judge"))
    talks, request = talk(pool)
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    _, outcomes = talks.finish("g", answers)
    assert {outcome.note for outcome in outcomes} == {"environment: no judge"}


def test_an_environment_whose_rewards_do_not_count_or_that_is_done_is_not_asked_for_its_last_one(talk, engine):
    class Over(Judging):
        def step(self, _key, _answer):
            return done(Step(reward=1.0, done=True))

    pool = Over()
    talks, request = talk(pool)
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    talks.finish("g", answers)
    assert len(pool.asked) == sum(answer.finish == "length" for answer in answers) < 3
    pool = Judging()
    talks, request = talk(pool)
    talks.credit = AnswerCredit()
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    talks.finish("g", answers)
    assert not pool.asked


def test_rewards_that_do_not_count_are_an_error_unless_the_settings_say_so():
    outcome = Outcome((), 0.0, "", unread=True)
    with pytest.raises(DataError, match=r"set environment\.reward to environment or to both, or to function"):
        AnswerCredit().score(outcome, Score(1.0))
    assert AnswerCredit(chosen=True).score(outcome, Score(1.0)) == Score(1.0)


def test_an_environment_that_is_done_without_a_reward_leaves_its_answer_ungraded(talk, engine):
    class Silent(Pool):
        def step(self, key, answer):
            return done(replace(super().step(key, answer).result(), reward=None, done=True))

    talks, request = talk(Silent())
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    answers, outcomes = talks.finish("g", answers)
    ended = [outcome for answer, outcome in zip(answers, outcomes, strict=True) if answer.finish == "stop"]
    assert ended
    assert {talks.credit.score(outcome, Score(None)).note for outcome in ended} == {"environment: it gave no reward"}


def test_a_beginning_that_cannot_be_encoded_costs_its_group_and_no_run(talk, engine):
    talks, request = talk(Pool(opening="red " * 5000))
    [answers] = engine.generate([request], SAMPLING, partial(talks.observe, ["g"]))
    _, outcomes = talks.finish("g", answers)
    assert all("prompt" in outcome.note for outcome in outcomes)
    assert talks.metrics()["environment/failures"] == 1.0


def test_whole_calls_begin_an_answer_anew_too(encode, make_task, engine):
    task = make_task("?")
    requests = [Request(encode(task), 3)]
    talks = Conversations(Pool(fails={(1, 2): "start_again"}), encode, AnswerCredit("sum", 0.5, False))
    [found] = talks.generate(engine, [task], requests, SAMPLING)
    assert [outcome.note for outcome in found.outcomes] == [""] * 3
    assert found.task.messages == (Message("user", "start"),)
    assert found.prompt.token_ids == encode(found.task).token_ids
    assert talks.metrics() == {"environment/failures": 0.0, "environment/restarts": 1.0}
