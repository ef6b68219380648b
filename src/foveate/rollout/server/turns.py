"""Answers that a server goes on with: interrupted ones, and those of several turns, each by requests of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from foveate.parallel.packing import answer_slots
from foveate.records import Answer, Prompt, SamplingParams, Segment
from foveate.rollout.engine import Observe, Request, behind, has_turn_ended
from foveate.rollout.seeds import seed_of
from foveate.rollout.server.experts import begun_with

_LOOK = 0.1
"""Seconds after which an answer that waits for an observation notices that its stream has ended."""


def extended(prompt: Prompt, answer: Answer) -> Prompt:
    """The prompt with an answer so far behind it, whose images are its own now."""
    images = [segment.tiles for segment in answer.segments if segment.tiles is not None]
    if prompt.pixels is not None:
        images.insert(0, prompt.pixels)
    slots = (replace(slot, position=slot.position + len(prompt)) for slot in answer_slots(answer))
    engine_ids = np.concatenate([segment.engine_ids for segment in answer.segments]).tolist()
    return Prompt(
        prompt.token_ids + answer.token_ids,
        (*prompt.slots, *slots),
        torch.cat(images) if images else None,
        (*prompt.engine_ids, *engine_ids),
    )


@dataclass(frozen=True, slots=True)
class GroupTurns:
    """The answers to one request, side by side, each as far as it can. `answers` are those so far, where they are kept
    when a server is lost: it is asked again from there, so that no environment is asked twice.

    ask: one answer to a request; decode: as the engine's; stop_ids: tokens that end a turn; ended: set when the stream
    ends or the engine is paused; waits: called again and again while an answer waits for what it observes."""

    index: int
    request: Request
    answers: list[Answer]
    ask: Callable[[Request, SamplingParams], Answer]
    decode: Callable[[tuple[int, ...]], str]
    stop_ids: Sequence[int]
    observe: Observe | None
    ended: Callable[[], bool]
    waits: Callable[[], None]

    def finish(self, sampling: SamplingParams) -> tuple[Answer, ...]:
        """All answers, those with finish "abort" whose stream has ended before."""
        open_ = [number for number, answer in enumerate(self.answers) if answer.finish == "abort"]
        with ThreadPoolExecutor(max(1, len(open_))) as pool:
            for done in [pool.submit(self._finish_one, number, sampling) for number in open_]:
                done.result()
        return tuple(self.answers)

    def _finish_one(self, number: int, sampling: SamplingParams) -> None:
        while True:
            if self.observe is None or not has_turn_ended(self.answers[number], self.stop_ids):
                answer = self._sample(number, sampling)
                is_over = answer.finish != "stop" or self.observe is None
                self.answers[number] = answer if is_over else replace(answer, finish="abort")
                if is_over:
                    return
            answer = replace(self.answers[number], finish="stop")
            assert self.observe is not None
            seen = self._wait(self.observe(self.index, number, answer))
            if isinstance(seen, Segment) and len(answer) + len(seen) < sampling.max_tokens:
                self.answers[number] = behind(answer, seen)
            elif seen is not False:
                self.answers[number] = replace(answer, finish="stop" if seen is None else "length")
            if seen is None or self.answers[number].finish != "abort" or self.ended():
                return

    def _sample(self, number: int, sampling: SamplingParams) -> Answer:
        """The answer of this number, sampled on: its tokens so far are part of the prompt now."""
        before = self.answers[number]
        seed = seed_of("go on", self.request.seed, number, len(before))
        rest = replace(sampling, samples=1, max_tokens=sampling.max_tokens - len(before))
        more = self.ask(Request(extended(self.request.prompt, before), seed), rest)
        last = before.segments[-1]
        turn = tuple(last.token_ids.tolist()) if last.trained else ()
        before = begun_with(self.request.prompt, before, more)
        return before.continued_by(more, self.decode(turn + more.token_ids))

    def _wait(self, future: Future[Segment | None]) -> Segment | bool | None:
        """The observation; False where the stream has ended before."""
        while not self.ended():
            try:
                return future.result(_LOOK)
            except TimeoutError:
                self.waits()
        return False


def unbegun(version: int, samples: int) -> list[Answer]:
    """Answers without a token, to go on from."""
    return [Answer.sampled((), (), "", "abort", version)] * samples


class StreamEnd:
    """Says whether a stream has ended, by itself or because its engine is paused."""

    def __init__(self, paused: threading.Event) -> None:
        self._paused, self._closed = paused, threading.Event()

    def close(self) -> None:
        self._closed.set()

    def __call__(self) -> bool:
        return self._closed.is_set() or self._paused.is_set()
