"""Answers of several turns in the native engine: each goes on when its own observation is there, and costs its new
tokens."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_cases import TEXT_MODELS, VISION_MODELS, build_family

from foveate.encoding.encode import Encoder
from foveate.models.policy import load_policy
from foveate.records import Answer, SamplingParams, Segment
from foveate.rollout.check import logprob_differences
from foveate.rollout.engine import Request
from foveate.rollout.native import shelves
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.rounds import stream_in_rounds
from foveate.rollout.server.process import ServerLostError
from foveate.rollout.server.turns import GroupTurns, unbegun

FAMILIES = ["internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3", "gpt_oss"]
SAMPLING = SamplingParams(samples=3, max_tokens=90)


def observed(prompt):
    """The tokens and images of a prompt, as something that the policy reads within its answer."""
    ids, engine_ids = (np.array(own, np.int64) for own in (prompt.token_ids, prompt.engine_ids))
    return Segment(ids, engine_ids, np.zeros(0, np.float32), False, prompt.slots, prompt.pixels)


def done(value):
    future = Future()
    future.set_result(value)
    return future


class World:
    """Shows a crop behind the first two turns, and ends each answer behind its third. `late` futures are finished by
    another thread, in an order of its own."""

    def __init__(self, crops, *, late=False):
        self.crops, self.late = crops, late
        self.pool = ThreadPoolExecutor(3)

    def seen(self, index, number, turn):
        return self.crops[(index + number + turn) % len(self.crops)] if turn < 3 else None

    def __call__(self, index, number, answer):
        assert answer.finish == "stop"
        assert torch.is_inference_mode_enabled() is False
        turn = sum(segment.trained for segment in answer.segments)
        seen = self.seen(index, number, turn)
        return self.pool.submit(lambda: seen) if self.late else done(seen)


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory, tiny_policy):
    def make(name):
        policy = tiny_policy
        if name != "internvl":
            assert name in VISION_MODELS or name in TEXT_MODELS
            policy = load_policy(str(build_family(tmp_path_factory.mktemp(name) / name, name)))
        policy.model.eval()
        return replace(policy, family=replace(policy.family, stop_ids=tuple(range(3, 600, 8))))

    return make


@pytest.fixture
def world_of(make_task, make_image):
    """Prompts and crops for a policy: two images, one, or none."""

    def make(policy):
        encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)
        eyes = policy.family.sees_images
        look = "<image> " * eyes
        crops = [
            observed(encode(make_task(f"{look}the crop", *[make_image(60, 90, 2)] * eyes))),
            observed(encode(make_task("nothing to see"))),
            observed(encode(make_task(f"so {look}", *[make_image(90, 60, 3)] * eyes))),
        ]
        prompts = [
            encode(make_task(f"{look}What is shown?", *[make_image(130, 70, 1)] * eyes)),
            encode(make_task("What is two and three?")),
        ]
        return [Request(prompt, 5 + i) for i, prompt in enumerate(prompts)], crops

    return make


def require_same(found, expected):
    for group, wanted in zip(found, expected, strict=True):
        for one, other in zip(group, wanted, strict=True):
            assert (one.token_ids, one.finish, one.text) == (other.token_ids, other.finish, other.text)
            assert [s.trained for s in one.segments] == [s.trained for s in other.segments]
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_costs_its_new_tokens_and_has_the_logprobs_of_the_trainer(name, policy_of, world_of):
    policy = policy_of(name)
    requests, crops = world_of(policy)
    engine = NativeEngine(policy, lambda ids: f"{len(ids)} tokens")
    world = World(crops)
    groups = engine.generate(requests, SAMPLING, world)
    answers = [answer for group in groups for answer in group]
    seen = [segment for answer in answers for segment in answer.segments if not segment.trained]
    assert len(seen) >= 6
    assert engine.stats.prefill_tokens == sum(len(request.prompt) for request in requests)
    assert engine.stats.turns == len(seen)
    assert engine.stats.turn_tokens == sum(len(segment) + 1 for segment in seen)
    differences = logprob_differences(policy, [request.prompt for request in requests], groups, 1.0)
    assert max(float(own.max()) for own in differences) < 2e-5
    for answer in answers:
        assert len(answer) <= SAMPLING.max_tokens
        sampled = [segment for segment in answer.segments if segment.trained]
        assert all(int(turn.token_ids[-1]) in policy.family.stop_ids for turn in sampled[:-1])
        assert answer.text == f"{len(sampled[-1])} tokens"


def test_images_that_are_seen_both_ways_go_through_with_their_answer(policy_of, world_of):
    policy = policy_of("gemma3")
    requests, crops = world_of(policy)
    engine = NativeEngine(policy, lambda ids: f"{len(ids)} tokens")
    groups = engine.generate(requests, SAMPLING, World(crops))
    seen = [segment for group in groups for one in group for segment in one.segments if not segment.trained]
    assert any(segment.slots for segment in seen)
    assert engine.stats.turns == sum(not segment.slots for segment in seen)
    differences = logprob_differences(policy, [request.prompt for request in requests], groups, 1.0)
    assert max(float(own.max()) for own in differences) < 2e-5


@pytest.fixture
def engine_of(policy_of):
    return lambda **settings: NativeEngine(policy_of("internvl"), lambda ids: str(ids), **settings)


@pytest.fixture
def expected(engine_of, world_of):
    """Requests, crops, and the answers to each request by itself."""
    requests, crops = world_of(engine_of().policy)
    world = World(crops)
    alone = []
    for i, request in enumerate(requests):
        alone += engine_of().generate([request], SAMPLING, lambda _, number, answer, i=i: world(i, number, answer))
    return requests, crops, alone


def test_answers_are_the_same_whatever_else_runs_and_whenever_observations_come(engine_of, expected):
    requests, crops, alone = expected
    require_same(engine_of().generate(requests, SAMPLING, World(crops)), alone)
    require_same(engine_of().generate(requests, SAMPLING, World(crops, late=True)), alone)


def test_an_answer_that_is_put_back_loses_what_is_kept_and_stays_the_same(engine_of, expected, monkeypatch):
    monkeypatch.setattr(shelves, "SMALLEST", 4)
    monkeypatch.setattr(shelves, "FIRST_ROOM", 4)
    requests, crops, alone = expected
    small = engine_of(token_budget=260)
    require_same(small.generate(requests, SAMPLING, World(crops, late=True)), alone)
    assert small.stats.prefills > 2


def test_what_waits_when_the_engine_is_paused_goes_on_later_as_if_nothing_had_been(engine_of, expected):
    requests, crops, alone = expected
    engine, world = engine_of(), World(crops)
    for least in (1, 2, 4, 3):
        unheard = []

        def observe(index, number, answer, least=least, unheard=unheard):
            unheard.append(Future() if len(unheard) % 2 else world(index, number, answer))
            if len(unheard) >= least:
                engine.pause()
            return unheard[-1]

        found = dict(engine.stream(requests, SAMPLING, observe))
        assert any(answer.finish == "abort" for group in found.values() for answer in group)
        engine.resume()
        requests = [replace(one, partial_answers=found.get(i, one.partial_answers)) for i, one in enumerate(requests)]
    require_same(engine.generate(requests, SAMPLING, world), alone)


def test_engines_elsewhere_give_the_same_answers_in_rounds_over_pauses_too(engine_of, expected):
    requests, crops, alone = expected
    engine, world = engine_of(), World(crops)
    stop_ids = engine.policy.family.stop_ids
    found = dict(stream_in_rounds(engine.stream, requests, SAMPLING, world, stop_ids))
    require_same([found[0], found[1]], alone)

    def pausing(index, number, answer):
        engine.pause()
        return world(index, number, answer)

    found = dict(stream_in_rounds(engine.stream, requests, SAMPLING, pausing, stop_ids))
    engine.resume()
    assert all(any(answer.finish == "abort" for answer in group) for group in found.values())
    again = [replace(request, partial_answers=found.get(i, ())) for i, request in enumerate(requests)]
    found = dict(stream_in_rounds(engine.stream, again, SAMPLING, world, stop_ids))
    require_same([found[0], found[1]], alone)


def test_answers_that_begin_anew_join_with_those_that_go_on(engine_of, expected):
    requests, crops, alone = expected
    [first, second, third] = alone[0]
    begun = replace(second, segments=(Segment.sampled(second.token_ids[:3], second.logprobs[:3], 0),), finish="abort")
    anew = Answer.sampled((), (), "", "abort", 0)
    request = replace(requests[0], partial_answers=(anew, begun, third))
    require_same(engine_of().generate([request], SAMPLING, World(crops)), [(first, second, third)])


def test_an_observation_without_room_ends_the_answer_as_truncated(engine_of, expected):
    requests, crops, alone = expected
    first = [len(answer.segments[0]) for group in alone for answer in group]
    sampling = replace(SAMPLING, max_tokens=min(len(crop) for crop in crops) + min(first))
    for group in engine_of().generate(requests, sampling, World(crops)):
        for answer in group:
            assert answer.finish == "length"
            assert len(answer) <= sampling.max_tokens
            assert answer.segments[-1].trained


class Served:
    """What a server answers to one request, by the native engine; it is lost at the call number `lost`."""

    def __init__(self, engine):
        self.engine, self.lost, self.calls, self.lock = engine, None, 0, threading.Lock()

    def __call__(self, request, sampling):
        with self.lock:
            self.calls += 1
            if self.calls == self.lost:
                raise ServerLostError("gone")
            assert sum(slot.tiles for slot in request.prompt.slots) == (
                0 if request.prompt.pixels is None else len(request.prompt.pixels)
            )
            return self.engine.generate([request], sampling)[0][0]


def test_a_server_gets_whole_answers_with_all_images_and_no_environment_twice_when_it_is_lost(engine_of, world_of):
    engine = engine_of()
    requests, crops = world_of(engine.policy)
    for request in requests:
        asked, world = [], World(crops, late=True)

        def observe(index, number, answer, asked=asked, world=world):
            asked.append((number, len(answer)))
            return world(index, number, answer)

        served = Served(engine)
        turns = GroupTurns(
            0, request, unbegun(0, 3), served, engine._decode, engine.policy.family.stop_ids,
            observe, lambda: False, lambda: None,
        )  # fmt: skip
        for served.lost in (2, 1):
            served.calls = 0
            with pytest.raises(ServerLostError):
                turns.finish(SAMPLING)
        served.lost = None
        group = turns.finish(SAMPLING)
        assert len(set(asked)) == len(asked)
        assert sum(len(answer.segments) > 2 for answer in group) >= 2
        assert all(answer.finish in ("stop", "length") for answer in group)
        [difference] = logprob_differences(engine.policy, [request.prompt], [group], 1.0)
        assert float(difference.max()) < 2e-5
