"""Requests answered together: each joins when it comes, and leaves when it is done or its client has gone."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.batch import DecodeBatch, DecodeJob
from foveate.serve.limits import tell_loop

logger = logging.getLogger(__name__)

TURN = 32
"""Steps for which a request keeps its place while others wait."""
GATHER = 4
"""Steps between admissions: prompts that are prefilled together cost little more than one."""


class SteppingEngine(Protocol):
    """The part of an engine that the batcher uses; `foveate.rollout.native.engine.NativeEngine` has it."""

    def open(self, token_budget: int | None = None, turn: int | None = None) -> DecodeBatch: ...

    def step(self, batch: DecodeBatch) -> list[DecodeJob]: ...


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. `heard` is called in the engine's thread with every token, as (number of the answer, token,
    log-prob), and says whether the answer ends there. With `ignores_stop` the model's stop tokens end none."""

    prompt: Prompt
    seed: int
    sampling: SamplingParams
    heard: Callable[[int, int, float], bool] = field(default=lambda *_: False)
    ignores_stop: bool = False
    cancelled: bool = False
    loop: asyncio.AbstractEventLoop = field(init=False)
    future: asyncio.Future[tuple[Answer, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future = self.loop.create_future()

    def next_token(self, answer: int, token: int, logprob: float) -> str:
        """The finish of an answer that ends with this token, else ""."""
        if self.cancelled:
            return "abort"
        return "stop" if self.heard(answer, token, logprob) else ""

    def settle(self, outcome: tuple[Answer, ...] | Exception) -> None:
        tell_loop(self.loop, self._settle, outcome)

    def _settle(self, outcome: tuple[Answer, ...] | Exception) -> None:
        if self.future.done():  # the client has gone
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Batcher:
    """Runs an engine in a thread of its own. A request joins the batch at the next step, or a few steps later together
    with others, and leaves it when it is done: a short answer does not wait for a long one. The batch has room for at
    most `token_budget` tokens. Where there is no room for a request, one that had its turn is put back, and goes on
    later from the tokens that it has. Since an answer depends on its own request alone, so does a reply."""

    def __init__(self, engine: SteppingEngine, token_budget: int = 32_768) -> None:
        self.token_budget = token_budget
        self._engine = engine
        self._arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._batch = engine.open(token_budget, TURN)
        self._steps = 0
        """Since requests were last taken in."""
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
            self._step()

    def _take(self) -> bool:
        """Take in what has arrived, blocking where there is nothing to do; False when the server ends."""
        self._batch.waiting[:] = [one for one in self._batch.waiting if not one.key.cancelled]
        is_time = not self._batch.busy or self._steps >= GATHER
        while not self._batch.busy or (is_time and not self._arrived.empty()):
            job = self._arrived.get()
            if job is not None and not job.cancelled:
                request = Request(job.prompt, job.seed)
                self._batch.waiting.append(
                    DecodeJob(job, request, job.sampling, job.next_token, ignores_stop=job.ignores_stop)
                )
                self._steps = 0
            if self._closing.is_set():
                return False
        return not self._closing.is_set()

    def _step(self) -> None:
        self._steps += 1
        try:
            done = self._engine.step(self._batch)
        except Exception as error:
            self._tell(error)
        else:
            for one in done:
                one.key.settle(one.group)

    def _tell(self, error: Exception) -> None:
        """The border around an engine: the clients of what failed are told, and the server goes on."""
        failed = self._batch.failed
        if failed:  # the prompts of newcomers
            self._batch.failed = []
        else:
            failed, waiting = self._batch.running, self._batch.waiting
            self._batch = self._engine.open(self.token_budget, TURN)
            self._batch.waiting += waiting
        logger.error("the engine failed on %d requests", len(failed), exc_info=error)
        for one in failed:
            one.key.settle(error)
