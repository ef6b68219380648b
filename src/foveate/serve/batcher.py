"""Requests answered together: each joins when it comes, and leaves when it is done or its client has gone."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.batch import DecodeBatch, Watch

logger = logging.getLogger(__name__)

MOST_REQUESTS, MOST_BATCHES = 64, 3
"""Requests of a batch, and batches that take turns."""
TURN = 32
"""Steps for which a batch keeps its place while others wait."""
FIRST_ROOM = 256
"""Tokens that the cache has room for at first in each answer. It doubles where they are used up."""


class SteppingEngine(Protocol):
    """The part of an engine that the batcher uses; `foveate.rollout.native.engine.NativeEngine` has it."""

    def begin(
        self, requests: Sequence[Request], sampling: SamplingParams, watch: Watch | None = None
    ) -> DecodeBatch: ...

    def step(self, decode_batch: DecodeBatch) -> dict[int, tuple[Answer, ...]]: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. `heard` is called in the engine's thread with every token, as (number of the answer, token,
    log-prob), and says whether the answer ends there. `answers` are those that were begun, or none."""

    prompt: Prompt
    seed: int
    sampling: SamplingParams
    heard: Callable[[int, int, float], bool] = field(default=lambda *_: False)
    answers: tuple[Answer, ...] = ()
    cancelled: bool = False
    lengths: list[int] = field(init=False)
    loop: asyncio.AbstractEventLoop = field(init=False)
    future: asyncio.Future[tuple[Answer, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [0] * self.sampling.samples
        self.loop = asyncio.get_running_loop()
        self.future = self.loop.create_future()

    @property
    def begun(self) -> list[int]:
        """The tokens of its unfinished answers."""
        return [len(answer) for answer in self.answers if answer.finish == "abort"] or [0]

    @property
    def room(self) -> int:
        """Tokens that an answer may have in the next batch, if it may have so many."""
        room = FIRST_ROOM
        while room <= max(self.begun):
            room *= 2
        return room

    @property
    def kind(self) -> tuple[int, SamplingParams]:
        """Equal for jobs that may share a batch."""
        return self.room, replace(self.sampling, max_tokens=0)

    def next_token(self, answer: int, token: int, logprob: float) -> str:
        """The finish of an answer that ends with this token, else ""."""
        if self.cancelled:
            return "abort"
        self.lengths[answer] += 1
        if self.heard(answer, token, logprob):
            return "stop"
        return "length" if self.lengths[answer] == self.sampling.max_tokens else ""

    def settle(self, outcome: tuple[Answer, ...] | Exception) -> None:
        with suppress(RuntimeError):  # the loop has ended, and its clients with it
            self.loop.call_soon_threadsafe(self._settle, outcome)

    def _settle(self, outcome: tuple[Answer, ...] | Exception) -> None:
        if self.future.done():  # the client has gone
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


@dataclass(slots=True, eq=False)
class _Running:
    kind: tuple[int, SamplingParams]
    jobs: list[Job]
    tokens: int
    batch: DecodeBatch
    steps: int = 0


class Batcher:
    """Runs an engine in a thread of its own. Batches take turns, a step each, so that a short answer does not wait for
    a long one; a request that comes while they run gets a batch with the others that wait and are sampled alike. All
    batches together hold at most `token_budget` tokens. Where there is no place, a batch that had its turn makes room:
    its answers are continued later from the tokens that they have, in one batch with the new ones where they may share
    it. Since an answer depends on its own request alone, so does a reply."""

    def __init__(self, engine: SteppingEngine, token_budget: int = 32_768) -> None:
        self.token_budget = token_budget
        self._engine = engine
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._running: list[_Running] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def answer(self, job: Job) -> tuple[Answer, ...]:
        """The answers to a request; raises what the engine raised. Cancelled, it leaves its batch at the next step."""
        self._arrived.put(job)
        try:
            return await job.future
        finally:
            job.cancelled = True

    def close(self, timeout: float | None = None) -> None:
        """End the thread after the step that it is at."""
        self._closing.set()
        self._arrived.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while self._take():
            self._waiting = [job for job in self._waiting if not job.cancelled]
            self._begin_what_fits()
            if self._waiting:
                self._make_room()
            for running in [*self._running]:
                self._step(running)

    def _take(self) -> bool:
        """Take in what has arrived, blocking where there is nothing to do; False when the server ends."""
        while not (self._waiting or self._running) or not self._arrived.empty():
            job = self._arrived.get()
            if job is not None:
                self._waiting.append(job)
            if self._closing.is_set():
                return False
        return not self._closing.is_set()

    def _begin_what_fits(self) -> None:
        while self._waiting and len(self._running) < MOST_BATCHES:
            kind = self._waiting[0].kind
            free = self.token_budget - sum(running.tokens for running in self._running)
            chosen: list[Job] = []
            for job in self._waiting:
                if job.kind != kind:
                    continue
                is_first = not (chosen or self._running)
                if len(chosen) == MOST_REQUESTS or not (is_first or _tokens([*chosen, job]) <= free):
                    break
                chosen.append(job)
            if not chosen:
                return
            self._waiting = [job for job in self._waiting if job not in chosen]
            self._begin(kind, chosen)

    def _begin(self, kind: tuple[int, SamplingParams], jobs: list[Job]) -> None:
        def watch(request: int, answer: int, token: int, logprob: float) -> str:
            return jobs[request].next_token(answer, token, logprob)

        sampling = replace(kind[1], max_tokens=_longest_answer(jobs))
        requests = [Request(job.prompt, job.seed, job.answers) for job in jobs]
        try:
            batch = self._engine.begin(requests, sampling, watch)
        except Exception as error:
            self._tell(jobs, error)
        else:
            self._running.append(_Running(kind, jobs, _tokens(jobs), batch))

    def _make_room(self) -> None:
        """Let one batch that had its turn go, for those that wait: the smallest that may share a batch with the first
        of them, else the one that has run longest."""
        done = [running for running in self._running if running.steps >= TURN]
        alike = [running for running in done if running.kind == self._waiting[0].kind]
        if not done:
            return
        leaving = min(alike, key=lambda one: one.tokens) if alike else max(done, key=lambda one: one.steps)
        self._engine.pause()
        try:
            self._step(leaving)
        finally:
            self._engine.resume()
        self._begin_what_fits()

    def _step(self, running: _Running) -> None:
        try:
            complete = self._engine.step(running.batch)
        except Exception as error:
            self._tell(running.jobs, error)
            self._running.remove(running)
            return
        running.steps += 1
        for number, answers in complete.items():
            self._put_back_or_settle(running.jobs[number], answers)
        if not running.batch.live:
            self._running.remove(running)

    def _tell(self, jobs: Sequence[Job], error: Exception) -> None:
        """The border around an engine: the clients of what failed are told, and the server goes on."""
        logger.error("the engine failed on %d requests", len(jobs), exc_info=error)
        for job in jobs:
            job.settle(error)

    def _put_back_or_settle(self, job: Job, answers: tuple[Answer, ...]) -> None:
        """Answers that ended with their batch and not by themselves are continued in another one."""
        most = job.sampling.max_tokens
        job.answers = tuple(
            replace(one, finish="abort") if one.finish == "length" and len(one) < most else one for one in answers
        )
        is_open = any(answer.finish == "abort" for answer in job.answers)
        if is_open and not job.cancelled:
            self._waiting.append(job)
            return
        job.prompt = replace(job.prompt, pixels=None)  # its batch may go on for long
        job.settle(job.answers)


def _longest_answer(jobs: Sequence[Job]) -> int:
    return min(max(job.room for job in jobs), max(job.sampling.max_tokens for job in jobs))


def _tokens(jobs: Sequence[Job]) -> int:
    """Tokens that a batch of some jobs holds at most. Answers that were begun end at one place of its cache, so that
    shorter ones have empty places before them."""
    begun = [tokens for job in jobs for tokens in job.begun]
    answer = _longest_answer(jobs) + max(begun) - min(begun)
    return len(jobs) * (max(len(job.prompt) for job in jobs) + jobs[0].sampling.samples * answer)
