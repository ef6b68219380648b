"""From a request to the prompt of its engine, within the bounds on memory that all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.records import Prompt, SamplingParams, Task
from foveate.serve.limits import Budget, ServeLimits, give_memory_back, tell_loop
from foveate.serve.protocol import ChatRequest, Refused, read_request

_THREADS = 2
_LARGE = 4_000_000
"""Pixels of an image whose memory is given back at once."""
_QUICK = 2**16
"""Bytes of a body that is read at once."""
_Result = TypeVar("_Result")


class Preparing:
    """Measures what a request asks for before memory is spent on it: first its texts, then its tokens, then the pixels
    of its images. `room` bounds the tokens of a prompt with all its answers."""

    def __init__(self, encoder: Encoder, room: int, limits: ServeLimits) -> None:
        self._encoder, self._room = encoder, room
        self._tensors, self._pixels = Budget(limits.image_bytes), Budget(limits.decoded_pixels)
        self._threads = ThreadPoolExecutor(_THREADS, "prepare")
        longest = max(map(len, encoder.tokenizer.get_vocab()))
        self._most_characters = encoder.max_prompt_tokens * longest
        dummy = encoder.family.dummy_image
        self._entry_bytes = 0 if dummy is None else dummy.pixels[0].nbytes

    @asynccontextmanager
    async def prompt(
        self, asked: ChatRequest, sampling: SamplingParams
    ) -> AsyncIterator[tuple[Prompt, SamplingParams]]:
        """The prompt of a request, and its sampling with the tokens that there is room for. Raises Refused."""
        most = self._encoder.max_prompt_tokens
        if asked.characters > self._most_characters or len(asked.messages) > most:
            raise _too_long(f"the prompt has {asked.characters:,} characters in {len(asked.messages):,} messages", most)
        if asked.images > most:  # each is a token at least
            raise _too_long(f"the prompt has {asked.images:,} images", most)
        task, length = await self._in_thread(lambda: self._measured(asked))
        if length > most:
            raise _too_long(f"the prompt has {length} tokens with its images", most)
        sampling = self._with_room(asked, sampling, length)
        held = await self._tensors.take(self._tensor_bytes(task))
        try:
            pixels = await self._pixels.take(max((image.width * image.height for image in task.images), default=0))
            loop = asyncio.get_running_loop()
            work = self._threads.submit(_refusing, lambda: self._encoded(task, pixels))
            work.add_done_callback(lambda _: tell_loop(loop, self._pixels.give_back, pixels))
            yield await asyncio.wrap_future(work), sampling
        finally:
            self._tensors.give_back(held)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _measured(self, asked: ChatRequest) -> tuple[Task, int]:
        """The request as a task, and the length of its prompt from texts and image headers."""
        task = asked.task("the request")
        return task, self._encoder.length(task)

    def _encoded(self, task: Task, pixels: int) -> Prompt:
        try:
            return self._encoder(task)
        finally:
            if pixels > _LARGE:
                give_memory_back()

    def _with_room(self, asked: ChatRequest, sampling: SamplingParams, length: int) -> SamplingParams:
        room = (self._room - length) // sampling.samples
        is_asked_for = asked.max_tokens is not None or asked.max_completion_tokens is not None
        if room < (sampling.max_tokens if is_asked_for else 1):
            raise Refused(
                400, f"a prompt of {length:,} tokens and {sampling.samples} answers of up to {sampling.max_tokens:,} "
                f"exceed the {self._room:,} tokens that this server holds (--token-budget); ask for fewer",
                "max_tokens",
                "context_length_exceeded",
            )  # fmt: skip
        return replace(sampling, max_tokens=min(sampling.max_tokens, room))

    def _tensor_bytes(self, task: Task) -> int:
        family, budget = self._encoder.family, self._encoder.budget
        each = family.share(budget, len(task.images))
        return sum(family.shape(image.width, image.height, each).entries * self._entry_bytes for image in task.images)

    async def request(self, body: bytes) -> ChatRequest:
        """The request in a body; a large one is read beside the event loop. Raises Refused."""
        return read_request(body) if len(body) < _QUICK else await self._in_thread(lambda: read_request(body))

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        started: Future[_Result] = self._threads.submit(_refusing, work)
        return await asyncio.wrap_future(started)


def _refusing(work: Callable[[], _Result]) -> _Result:
    try:
        return work()
    except DataError as error:
        raise Refused(400, str(error), "messages", "invalid_value") from None


def _too_long(found: str, most: int) -> Refused:
    what = f"{found}, the limit is {most} tokens (foveate serve --max-prompt-tokens)"
    return Refused(400, what, "messages", "context_length_exceeded")
