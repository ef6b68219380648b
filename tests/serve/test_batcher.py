"""Requests that share an engine: they join while others run, and leave when they are done or abandoned."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from foveate.records import SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.serve import batcher as batching
from foveate.serve.batcher import Batcher, Job

GREEDY = SamplingParams(1, 6, 0.0)


class CountingEngine(NativeEngine):
    """Keeps how many rows each step had, and how many requests joined at once; fails on the prompts of requests with
    the seed 13, and in a step where `breaks` is set."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.steps, self.batches, self.breaks = [], [], False

    def _prefill(self, batch, joining):
        self.batches.append(len(joining))
        if any(one.request.seed == 13 for one in joining):
            raise RuntimeError("out of memory")
        return super()._prefill(batch, joining)

    def step(self, batch):
        self.steps.append(len(batch.live))
        return super().step(batch)

    def _decode_step(self, batch):
        if self.breaks:
            self.breaks = False
            raise RuntimeError("a kernel failed")
        return super()._decode_step(batch)


@pytest.fixture
def engine(tiny_policy, encode):
    return CountingEngine(tiny_policy, encode.decode)


@pytest.fixture
def batcher(engine):
    one = Batcher(engine, 4096)
    yield one
    one.close()


@pytest.fixture
def prompt(encode, make_task):
    return encode(make_task("hello"))


def endless(tokens):
    """A sampling whose answers of the tiny model do not stop by themselves so soon."""
    return SamplingParams(1, tokens, 1.0, top_k=0)


def test_answers_are_those_of_the_engine_whatever_else_runs(batcher, engine, prompt):
    kinds = [SamplingParams(1, 9, 0.0), SamplingParams(2, 5, 1.0), SamplingParams(1, 12, 0.7, 0.9)]
    asked = [(seed, kinds[seed % 3]) for seed in range(12)]

    async def ask():
        return await asyncio.gather(*(batcher.answer(Job(prompt, seed, kind)) for seed, kind in asked))

    answers = asyncio.run(ask())
    for (seed, kind), found in zip(asked, answers, strict=True):
        [alone] = engine.generate([Request(prompt, seed)], kind)
        assert [(one.token_ids, one.finish) for one in found] == [(one.token_ids, one.finish) for one in alone]


def test_a_request_joins_while_a_longer_one_runs(batcher, engine, prompt):
    order = []

    async def ask(name, tokens):
        await batcher.answer(Job(prompt, 1, SamplingParams(1, tokens, 1.0), lambda *_: False))
        order.append(name)

    async def both():
        long = asyncio.ensure_future(ask("long", 200))
        while not engine.steps:
            await asyncio.sleep(0.001)
        await ask("short", 3)
        assert not long.done()
        long.cancel()

    asyncio.run(both())
    assert order == ["short"]


def test_requests_that_come_within_a_few_steps_join_together(batcher, engine, prompt):
    others = []

    async def ask_one():
        others.append(asyncio.ensure_future(batcher.answer(Job(prompt, len(others), GREEDY))))
        await asyncio.sleep(0)

    async def all_of_them():
        loop = asyncio.get_running_loop()

        def ask_another(*_):  # with each of the first eight tokens, two of which are of one step
            if len(others) < 8:
                asyncio.run_coroutine_threadsafe(ask_one(), loop).result()
            return False

        await batcher.answer(Job(prompt, 1, endless(30), ask_another))
        await asyncio.gather(*others)

    asyncio.run(all_of_them())
    assert engine.batches == [1, 5, 3]


def test_an_abandoned_request_leaves_at_the_next_step(batcher, engine, prompt):
    heard = []

    async def ask():
        job = Job(prompt, 1, SamplingParams(1, 250, 1.0), lambda *_: bool(heard.append(len(engine.steps))))
        task = asyncio.ensure_future(batcher.answer(job))
        while len(heard) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        seen = len(engine.steps)
        await batcher.answer(Job(prompt, 2, GREEDY))
        return seen

    seen = asyncio.run(ask())
    assert len(engine.steps) <= seen + 3 + GREEDY.max_tokens, "the abandoned answer was sampled on"


def test_who_waits_gets_the_place_of_a_request_that_had_its_turn(engine, prompt, monkeypatch):
    monkeypatch.setattr(batching, "TURN", 4)
    batcher = Batcher(engine, len(prompt) + 40)
    long, short = SamplingParams(1, 40, 1.0), SamplingParams(1, 2, 0.5)
    ends = []

    async def ask(name, sampling):
        ends.append((name, await batcher.answer(Job(prompt, 8, sampling))))

    async def all_of_them():
        first = asyncio.ensure_future(ask("long", long))
        while not engine.steps:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, *(ask(f"short {i}", short) for i in range(3)))

    asyncio.run(all_of_them())
    batcher.close()
    [alone] = engine.generate([Request(prompt, 8)], long)
    assert ends[-1][0] == "long"
    assert [one.token_ids for one in ends[-1][1]] == [one.token_ids for one in alone]


def test_the_batch_stays_within_the_budget(engine, prompt):
    budget = 3 * (len(prompt) + GREEDY.max_tokens)
    batcher = Batcher(engine, budget)

    async def ask():
        await asyncio.gather(*(batcher.answer(Job(prompt, seed, GREEDY)) for seed in range(20, 40)))

    asyncio.run(ask())
    batcher.close()
    assert max(engine.batches) <= 3
    assert sum(engine.batches) == 20


def test_an_engine_that_fails_tells_its_clients_and_goes_on(batcher, prompt):
    async def ask(seed):
        return await batcher.answer(Job(prompt, seed, GREEDY))

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(ask(13))
    assert asyncio.run(ask(14))[0].token_ids


def test_prompts_that_fail_leave_the_answers_that_are_under_way_alone(batcher, engine, prompt):
    async def both():
        long = asyncio.ensure_future(batcher.answer(Job(prompt, 5, SamplingParams(1, 30, 1.0))))
        while not engine.steps:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher.answer(Job(prompt, 13, GREEDY))
        return await long

    [alone] = engine.generate([Request(prompt, 5)], SamplingParams(1, 30, 1.0))
    assert [one.token_ids for one in asyncio.run(both())] == [one.token_ids for one in alone]


def test_a_step_that_fails_tells_those_who_have_rows_and_the_server_goes_on(batcher, engine, prompt):
    async def ask(seed):
        return await batcher.answer(Job(prompt, seed, GREEDY))

    engine.breaks = True
    with pytest.raises(RuntimeError, match="a kernel failed"):
        asyncio.run(ask(14))
    assert asyncio.run(ask(14))[0].token_ids


def test_the_images_of_answers_that_are_done_are_freed_while_their_batch_goes_on(
    batcher, encode, make_task, make_image
):
    prompts = [encode(make_task("<image>\nwhat?", make_image(90, 60, seed))) for seed in range(4)]
    images = [weakref.ref(prompt.pixels) for prompt in prompts]
    jobs = []

    async def ask():
        jobs.extend(Job(prompt, 1, SamplingParams(1, 200, 1.0)) for prompt in prompts[:1])
        jobs.extend(Job(prompt, 1, SamplingParams(1, 2, 1.0)) for prompt in prompts[1:])
        prompts.clear()
        long, *short = [asyncio.ensure_future(batcher.answer(job)) for job in jobs]
        await asyncio.gather(*short)
        jobs.clear()
        gc.collect()
        freed = [image() is None for image in images[1:]]
        is_done = long.done()
        long.cancel()
        return freed, is_done

    assert asyncio.run(ask()) == ([True] * 3, False)
