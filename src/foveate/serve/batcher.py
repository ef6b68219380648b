"""Concurrent requests answered together: whatever waits when the engine is free makes up its next wave."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from dataclasses import dataclass, field

from foveate.records import Answer, SamplingParams
from foveate.rollout.engine import Engine, Request

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    sampling: SamplingParams
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[Answer, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.future = self.loop.create_future()

    def settle(self, answers: tuple[Answer, ...] | None, error: BaseException | None) -> None:
        self.loop.call_soon_threadsafe(self._settle, answers, error)

    def _settle(self, answers: tuple[Answer, ...] | None, error: BaseException | None) -> None:
        if self.future.done():  # the client has gone
            return
        if error is not None:
            self.future.set_exception(error)
        elif answers is not None:
            self.future.set_result(answers)


class Batcher:
    """Runs an engine in a thread of its own. Requests with the same sampling parameters share a wave of at most `most`
    requests; the one that has waited longest chooses which. Since an answer depends on its own request alone, so does
    a reply."""

    def __init__(self, engine: Engine, most: int = 64) -> None:
        self._engine, self._most = engine, most
        self._arrived: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def answer(self, request: Request, sampling: SamplingParams) -> tuple[Answer, ...]:
        """The answers to one request; raises what the engine raised."""
        waiting = _Waiting(request, sampling, asyncio.get_running_loop())
        self._arrived.put(waiting)
        return await waiting.future

    def close(self) -> None:
        """End the thread after the wave that it is at."""
        self._arrived.put(None)
        self._thread.join()

    def _work(self) -> None:
        waiting: list[_Waiting] = []
        while self._take(waiting):
            waiting = [one for one in waiting if not one.future.cancelled()]
            if not waiting:
                continue
            wave = [one for one in waiting if one.sampling == waiting[0].sampling][: self._most]
            waiting = [one for one in waiting if one not in wave]
            try:
                answers = self._engine.generate([one.request for one in wave], wave[0].sampling)
            except Exception as error:  # the border around an engine: its clients are told, and the server goes on
                logger.exception("the engine failed on %d requests", len(wave))
                for one in wave:
                    one.settle(None, error)
            else:
                for one, answer in zip(wave, answers, strict=True):
                    one.settle(answer, None)

    def _take(self, waiting: list[_Waiting]) -> bool:
        """Add what has arrived, blocking where nothing waits; False when the server ends."""
        while not waiting or not self._arrived.empty():
            one = self._arrived.get()
            if one is None:
                return False
            waiting.append(one)
        return True
