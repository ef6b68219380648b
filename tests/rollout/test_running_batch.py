"""Requests join and leave a running batch of the native engine, within its room, and get what they get alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foveate.records import SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native import engine as module
from foveate.rollout.native import room
from foveate.rollout.native import shelves as rows
from foveate.rollout.native.batch import DecodeJob
from foveate.rollout.native.engine import NativeEngine

KINDS = [
    SamplingParams(2, 14),
    SamplingParams(1, 40, 0.7, 0.9),
    SamplingParams(3, 5, 0.0),
    SamplingParams(1, 1),
    SamplingParams(2, 23, top_k=20),
]


class Counting(NativeEngine):
    """Keeps the keys of the requests that joined at once, and the most places that were in use."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.joined, self.most = [], 0

    def _prefill(self, batch, jobs):
        self.joined.append([job.key for job in jobs])
        return super()._prefill(batch, jobs)

    def _decode_step(self, batch):
        hidden = super()._decode_step(batch)
        if len(batch.running) > 1:
            self.most = max(self.most, batch.cache.rows.held)
        return hidden


@pytest.fixture(scope="module")
def policy(tiny_policy):
    """Every fifteenth token ends an answer."""
    return replace(tiny_policy, family=replace(tiny_policy.family, stop_ids=tuple(range(0, 300, 15))))


@pytest.fixture
def engine(policy, encode):
    policy.model.eval()
    return Counting(policy, encode.decode)


@pytest.fixture
def jobs(encode, make_task, make_image):
    """Texts and images, each to be sampled in its own way."""
    images = [make_image(60 + 40 * i, 50, i) if i % 2 else None for i in range(5)]
    prompts = [
        encode(make_task(("<image> " if image else "") + "Where is it? " * (1 + 4 * i), *[image] * bool(image)))
        for i, image in enumerate(images)
    ]
    return [
        (Request(prompt, 20 + i), sampling) for i, (prompt, sampling) in enumerate(zip(prompts, KINDS, strict=True))
    ]


@pytest.fixture
def small(monkeypatch):
    """Answers of tens of tokens outgrow their slots."""
    monkeypatch.setattr(rows, "SMALLEST", 4)
    monkeypatch.setattr(rows, "FIRST_ROOM", 4)


def run(engine, batch, jobs, arrivals):
    """The groups, where job i arrives before step `arrivals[i]`."""
    found, step = {}, 0
    while batch.busy or any(arrival >= step for arrival in arrivals.values()):
        batch.waiting += [DecodeJob(i, *jobs[i]) for i, arrival in arrivals.items() if arrival == step]
        if batch.busy:
            found |= {job.key: job.group for job in engine.step(batch)}
        step += 1
    return [found[i] for i in range(len(jobs))]


def require_same(found, expected):
    for group, wanted in zip(found, expected, strict=True):
        for one, other in zip(group, wanted, strict=True):
            assert (one.token_ids, one.finish, one.text) == (other.token_ids, other.finish, other.text)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.usefixtures("small")
def test_an_answer_is_the_same_alone_among_others_late_and_in_another_order(engine, jobs):
    alone = [engine.generate([request], sampling)[0] for request, sampling in jobs]
    lengths = [len(one) for group in alone for one in group]
    assert len(set(lengths)) > 4
    together = run(engine, engine.open(), jobs, dict.fromkeys(range(5), 0))
    backwards = run(engine, engine.open(), jobs, dict.fromkeys(reversed(range(5)), 0))
    late = run(engine, engine.open(), jobs, {1: 0, 0: 3, 4: 3, 3: 6, 2: 11})
    for found in (together, backwards, late):
        require_same(found, alone)


def test_requests_that_arrive_together_join_in_one_packed_row(engine, jobs):
    run(engine, engine.open(), jobs, {1: 0, 0: 2, 2: 2, 3: 2, 4: 4})
    assert engine.joined == [[1], [0, 2, 3], [4]]


def test_long_prompts_join_in_several_rows_while_others_are_answered(engine, jobs, monkeypatch):
    monkeypatch.setattr(module, "_PREFILL", 150)
    run(engine, engine.open(), jobs, {1: 0, 0: 2, 2: 2, 3: 2, 4: 2})
    assert engine.joined[0] == [1]
    assert [key for keys in engine.joined for key in keys] == [1, 0, 2, 3, 4]
    assert len(engine.joined) > 2
    assert all(len(keys) == 1 or sum(len(jobs[key][0].prompt) for key in keys) <= 150 for keys in engine.joined)


def test_many_prompts_go_through_a_processor_in_rows_that_fit_its_caches(engine, jobs, monkeypatch):
    alone = [engine.generate([request], sampling)[0] for request, sampling in jobs]
    lengths = {key: len(request.prompt) for key, (request, _) in enumerate(jobs)}
    monkeypatch.setattr(room, "_ROW", most := max(lengths.values()) + 1)
    engine.joined.clear()
    require_same(run(engine, engine.open(), jobs, dict.fromkeys(lengths, 0)), alone)
    assert [key for keys in engine.joined for key in keys] == [*lengths]
    assert len(engine.joined) > 1
    assert all(sum(lengths[key] for key in keys) <= most for keys in engine.joined)


@pytest.fixture
def endless(engine):
    """An engine whose answers have their full length."""
    family = replace(engine.policy.family, stop_ids=(-1,))
    return Counting(replace(engine.policy, family=family), engine._decode)


@pytest.mark.usefixtures("small")
def test_who_joined_last_is_put_back_where_answers_outgrow_the_room_and_goes_on_later(endless, jobs):
    engine, prompt = endless, jobs[0][0].prompt
    same = [(Request(prompt, seed), SamplingParams(2, 30)) for seed in range(3)]
    alone = [engine.generate([request], sampling)[0] for request, sampling in same]
    engine.joined.clear()
    room = 3 * len(prompt) + 6 * 8  # the slots of 16 places have room for less than all
    found = run(engine, engine.open(room), same, dict.fromkeys(range(3), 0))
    require_same(found, alone)
    assert engine.joined[0] == [0, 1, 2]
    assert [2] in engine.joined[1:]
    assert not any(0 in keys for keys in engine.joined[1:])
    assert 0 < engine.most <= room


@pytest.mark.usefixtures("small")
def test_who_waits_gets_its_turn_and_answers_stay_the_same(engine, jobs):
    alone = [engine.generate([request], sampling)[0] for request, sampling in jobs]
    engine.joined.clear()
    room = max(len(request.prompt) for request, _ in jobs) + 60
    found = run(engine, engine.open(room, turn=3), jobs, {1: 0, 4: 1, 0: 2, 2: 2, 3: 2})
    require_same(found, alone)
    assert engine.joined[0] == [1]
    assert any(1 in keys for keys in engine.joined[1:])


def test_a_stream_answers_more_prompts_than_there_is_room_for_at_once(engine, jobs):
    sampling = SamplingParams(2, 20)
    requests = [replace(request, seed=seed) for seed in range(3) for request, _ in jobs]
    expected = engine.generate(requests, sampling)
    bounded = Counting(engine.policy, engine._decode, token_budget=400)
    require_same(bounded.generate(requests, sampling), expected)
    assert 0 < bounded.most <= 400
    assert len(bounded.joined) > 2
    assert bounded.stats.decode_steps < sum(max(map(len, group)) for group in expected), "they share steps"


def test_rows_that_join_late_take_fewer_steps_than_one_batch_after_the_other(endless, jobs):
    """Two long answers, and short ones for which there is room beside them one after the other."""
    engine, request, seeds = endless, jobs[0][0], range(40, 52)
    each = [(replace(request, seed=seed), SamplingParams(1, 60 if seed < 42 else 6)) for seed in seeds]
    room = 2 * (len(request.prompt) + 60) + 2 * (len(request.prompt) + 6)
    run(engine, engine.open(room), each, dict.fromkeys(range(len(each)), 0))
    assert engine.stats.decode_steps == 59
    assert engine.most <= room
