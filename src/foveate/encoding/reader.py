"""The tasks of a run with their prompts, in the order of its stream. Worker processes may encode them ahead of the
step, which then does not wait for images to be decoded."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Self

import numpy as np
import torch

from foveate.data.augment import Augment
from foveate.data.stream import Stream
from foveate.data.table import TaskTable
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.processes import end_with, lifeline, worker_context
from foveate.records import Prompt, Task

Encoded = tuple[Task, Prompt, np.ndarray | None]
"""A message of a process: the pixels beside the prompt, because tensors would travel through shared memory."""


class Reader:
    """The next tasks of a stream with their prompts; each is encoded once. A context manager: processes end with it.

    With `workers` 0 tasks are encoded when they are taken. With more, as many as were taken last are encoded ahead, in
    the order of the stream, whose position counts those that were taken: a run resumes from it with the same tasks, and
    its prompts are the same for any number of workers. `augment` changes their images, by row and place.
    """

    def __init__(
        self, table: TaskTable, stream: Stream, encoder: Encoder, workers: int = 0, augment: Augment | None = None
    ) -> None:
        self.encoder = encoder
        self._plain = encoder.plain  # prompts are routed when they are taken, all together
        self._table, self._stream, self._augment = table, stream, augment
        self._pool: ProcessPoolExecutor | None = None
        self._first: int | None = None  # the place of the first task that was taken since the last `observe`
        self._ahead: deque[tuple[_Place, Future[Encoded]]] = deque()
        if workers:
            owner, self._lifeline = lifeline()
            self._pool = ProcessPoolExecutor(
                workers, worker_context([__name__]), _begin, (owner, table, self._plain, augment)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, count: int | None = None) -> list[tuple[Task, Prompt]]:
        """The next `count` tasks of the stream (one batch by default). Raises DataError naming the row for one that
        cannot be encoded, and if a process was killed."""
        wanted = self._stream.batch if count is None else count
        self._first = self._stream.position if self._first is None else self._first
        if self._pool is None:
            tasks = [(self._table[place[0]], place) for place in _drawn(self._stream, wanted)]
            return self._routed([(task, _encoded(task, self._plain, self._augment, place)) for task, place in tasks])
        self._submit(wanted)
        self._stream.draw(wanted)
        now = [self._ahead.popleft() for _ in range(wanted)]
        self._submit(wanted)
        try:
            return self._routed([_received(future.result()) for _, future in now])
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes images was killed (out of memory?); use fewer with data.image_workers"
            ) from error

    def _routed(self, taken: Sequence[tuple[Task, Prompt]]) -> list[tuple[Task, Prompt]]:
        prompts = self.encoder.routed([prompt for _, prompt in taken])
        return [(self.encoder.for_graders(task), one) for (task, _), one in zip(taken, prompts, strict=True)]

    def observe(self, scores: Sequence[float | None]) -> None:
        """Tell the stream what the tasks scored that were taken since the last call, in their order; None for one that
        was not graded."""
        for place, score in enumerate(scores, start=self._first or 0):
            if score is not None:
                self._stream.observe(place, score)
        self._first = None

    def _submit(self, count: int) -> None:
        """Have the next `count` tasks from the stream's position on in work, and keep what already is."""
        assert self._pool is not None
        coming = _drawn(copy.copy(self._stream), max(count, len(self._ahead)))
        if [place for place, _ in self._ahead] != coming[: len(self._ahead)]:  # the stream was set to another place
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
        for place in coming[len(self._ahead) :]:
            self._ahead.append((place, self._pool.submit(_encode, place)))


_Place = tuple[int, int]
"""A row, and the place of the stream at which it is taken."""


def _drawn(stream: Stream, count: int | None) -> list[_Place]:
    """The next rows of a stream."""
    places = stream.coming(stream.batch if count is None else count)
    return list(zip(stream.draw(count), places, strict=True))


def _encoded(task: Task, encoder: Encoder, augment: Augment | None, place: _Place) -> Prompt:
    return encoder(task) if augment is None else encoder(task, augment.drawn(*place))


def _received(sent: Encoded) -> tuple[Task, Prompt]:
    task, prompt, pixels = sent
    return task, prompt if pixels is None else replace(prompt, pixels=torch.from_numpy(pixels))


_WORK: list[tuple[TaskTable, Encoder, Augment | None]] = []
"""In a worker process: the table, the encoder and the augmentation that it was started for."""


def _begin(owner: Connection, table: TaskTable, encoder: Encoder, augment: Augment | None) -> None:
    end_with(owner)
    torch.set_num_threads(1)
    _WORK[:] = [(table, encoder, augment)]


def _encode(place: _Place) -> Encoded:
    table, encoder, augment = _WORK[0]
    task = table[place[0]]
    prompt = _encoded(task, encoder, augment, place)
    return task, replace(prompt, pixels=None), None if prompt.pixels is None else prompt.pixels.numpy()
