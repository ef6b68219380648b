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
    its prompts are the same for any number of workers.
    """

    def __init__(self, table: TaskTable, stream: Stream, encoder: Encoder, workers: int = 0) -> None:
        self.encoder = encoder
        self._table, self._stream = table, stream
        self._pool: ProcessPoolExecutor | None = None
        self._first: int | None = None  # the place of the first task that was taken since the last `observe`
        self._ahead: deque[tuple[int, Future[Encoded]]] = deque()
        if workers:
            owner, self._lifeline = lifeline()
            self._pool = ProcessPoolExecutor(workers, worker_context([__name__]), _begin, (owner, table, encoder))

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
            tasks = [self._table[index] for index in self._stream.draw(wanted)]
            return [(self.encoder.for_graders(task), self.encoder(task)) for task in tasks]
        self._submit(wanted)
        self._stream.draw(wanted)
        now = [self._ahead.popleft() for _ in range(wanted)]
        self._submit(wanted)
        try:
            received = [_received(future.result()) for _, future in now]
            return [(self.encoder.for_graders(task), prompt) for task, prompt in received]
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes images was killed (out of memory?); use fewer with data.image_workers"
            ) from error

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
        coming = copy.copy(self._stream).draw(max(count, len(self._ahead)))
        if [index for index, _ in self._ahead] != coming[: len(self._ahead)]:  # the stream was set to another place
            self._ahead.clear()
        for index in coming[len(self._ahead) :]:
            self._ahead.append((index, self._pool.submit(_encode, index)))


def _received(sent: Encoded) -> tuple[Task, Prompt]:
    task, prompt, pixels = sent
    return task, prompt if pixels is None else replace(prompt, pixels=torch.from_numpy(pixels))


_WORK: list[tuple[TaskTable, Encoder]] = []
"""In a worker process: the table and the encoder that it was started for."""


def _begin(owner: Connection, table: TaskTable, encoder: Encoder) -> None:
    end_with(owner)
    torch.set_num_threads(1)
    _WORK[:] = [(table, encoder)]


def _encode(index: int) -> Encoded:
    table, encoder = _WORK[0]
    task = table[index]
    prompt = encoder(task)
    return task, replace(prompt, pixels=None), None if prompt.pixels is None else prompt.pixels.numpy()
