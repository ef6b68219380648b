"""The bookkeeping of the pool: environments with their commands, and the worker processes that they are in."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from foveate.environments.host import EnvironmentCommand, WorkerJob, host_for_ever
from foveate.environments.protocol import EnvironmentFailure, EnvironmentRecord, Opened
from foveate.errors import DataError
from foveate.processes import GuardedProcess
from foveate.records import Task
from foveate.rewards.pool import STARTING_LIMIT

TRIES = 3
"""Starts of a process in the place of one that was lost, until the environment itself must be at fault."""
HOST_MODULES = ["foveate.environments.host"]
"""Imported once by the fork server for all workers."""


@dataclass(frozen=True, slots=True)
class PendingCommand:
    """A command, the future that waits for it, and for one that rebuilds, the digest that must be seen again. Without
    a command it waits for the rebuilding before it."""

    command: EnvironmentCommand | None
    future: Future[Any] | None = None
    expected: str | None = None


@dataclass(slots=True, eq=False)
class EnvironmentInstance:
    """The environment of one answer. `rebuilding`: commands that come before those that wait; `retried`: whether a
    process ended during its next command."""

    number: int
    task: Task
    record: EnvironmentRecord
    waiting: deque[PendingCommand] = field(default_factory=deque)
    rebuilding: deque[PendingCommand] = field(default_factory=deque)
    worker: EnvironmentWorker | None = None
    opened: Opened | None = None
    retried: bool = False
    failure: EnvironmentFailure | None = None
    closed: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self.rebuilding or self.waiting)

    def next_job(self) -> PendingCommand:
        return (self.rebuilding or self.waiting).popleft()

    def retry(self, job: PendingCommand) -> None:
        """Carry out a command again that a lost process has not finished."""
        self.retried = True
        if job.expected is None:
            self.waiting.appendleft(job)

    def rebuild(self) -> None:
        """Put in front what brings it back to where its record stands; nothing for one that was not opened yet."""
        record = self.record
        self.rebuilding = deque()
        if record.digests:
            self._again("reset", (self.task, record.seed), record.digests[0])
        if record.state is not None:
            self._again("restore", record.state, "")
            return
        for answer, digest in zip(record.answers, record.digests[1:], strict=True):
            self._again("step", answer, digest)

    def _again(self, name: Any, argument: Any, digest: str) -> None:
        self.rebuilding.append(PendingCommand(EnvironmentCommand(name, self.number, argument), None, digest))


class EnvironmentWorker(GuardedProcess):
    """One worker process as its owner sees it: starting, idle, or busy with a `job` of its `current` environment.
    `queue` holds, in order, the environments that have commands."""

    def __init__(self, job: WorkerJob, tries: int = 0) -> None:
        """`tries`: how many more may take its place where it dies before it is ready."""
        super().__init__(host_for_ever, job, HOST_MODULES)
        self.tries, self.is_starting = tries, True
        self.instances: set[EnvironmentInstance] = set()
        self.queue: dict[EnvironmentInstance, None] = {}
        self.current: EnvironmentInstance | None = None
        self.job: PendingCommand | None = None
        self.deadline, self.halfway = time.monotonic() + STARTING_LIMIT, inf
        self._limit = job.time_limit

    @property
    def is_late(self) -> bool:
        """Whether half of its time for a command is over."""
        return self.current is not None and time.monotonic() >= self.deadline - self._limit / 2

    def give_next(self) -> None:
        """Send the next command, if it waits for one. A worker that is gone is noticed when its pipe is read."""
        while self.current is None and not self.is_starting and self.queue:
            instance = next(iter(self.queue))
            del self.queue[instance]
            if not instance.has_work:
                continue
            job = instance.next_job()
            if job.command is None:  # all before it is done
                resolve_future(job.future, instance.opened)
                self.queue.update({instance: None} if instance.has_work else {})
                continue
            self.current, self.job = instance, job
            now = time.monotonic()
            self.halfway, self.deadline = now + self._limit / 2, now + self._limit
            with suppress(OSError):
                command = replace(job.command, number=instance.number)  # it may have moved since it was asked
                self.send_message(command, self.deadline)

    def received(self) -> tuple[EnvironmentInstance | None, PendingCommand | None]:
        """Its command has a result, or it is ready: it waits for the next one."""
        done = self.current, self.job
        self.current, self.job, self.is_starting = None, None, False
        self.deadline = self.halfway = inf
        return done

    def leave(self, instance: EnvironmentInstance) -> None:
        """An environment goes on elsewhere, or not at all, and what is left of it here is closed."""
        self.forget(instance)
        rest = EnvironmentInstance(instance.number, instance.task, instance.record, worker=self, closed=True)
        rest.waiting.append(PendingCommand(EnvironmentCommand("close", rest.number)))
        self.instances.add(rest)
        self.queue.setdefault(rest)

    def forget(self, instance: EnvironmentInstance) -> None:
        """An environment is no longer here."""
        self.instances.discard(instance)
        self.queue.pop(instance, None)
        instance.worker = None
        instance.rebuilding.clear()


def resolve_future(future: Future[Any] | None, result: Any) -> None:
    """Give a result, or an error, to whoever waits for it; of what was cancelled nobody does."""
    if future is None or future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(result, DataError):
        future.set_exception(result)
    else:
        future.set_result(result)


def cancel_future(future: Future[Any] | None) -> None:
    if future is not None and not future.done():
        future.cancel()
        future.set_running_or_notify_cancel()
