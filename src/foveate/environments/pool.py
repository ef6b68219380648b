"""Environments in worker processes: no answer waits for another's, and none ends the run.

Each worker hosts many environments and carries out one command at a time, within a time limit. One thread hands out
commands and collects results; callers get futures. The environment whose command raises, hangs or ends its process
fails with a note. The others of a process that was lost are rebuilt in another one when they are needed next: from
their own state, or by replaying their answers, where each observation must be the one that was shown before. Where a
command has taken half of its time, those that wait behind it move to another process.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from math import inf
from multiprocessing import Pipe, connection
from queue import SimpleQueue
from threading import Thread, current_thread
from types import TracebackType
from typing import Any, Self

from foveate.environments.build import build_environment, made_once
from foveate.environments.host import CannotBuild, EnvironmentCommand, EnvironmentHost, EnvironmentReply
from foveate.environments.instances import (
    TRIES,
    EnvironmentInstance,
    EnvironmentWorker,
    PendingCommand,
    cancel_future,
    resolve_future,
)
from foveate.environments.protocol import EnvironmentFailure, EnvironmentRecord, FailureKind, Opened, Step
from foveate.errors import DataError
from foveate.processes import BadMessage, WorkerJob, worker_count
from foveate.records import Task

logger = logging.getLogger(__name__)


class Environments:
    """The environments of a run, an `EnvironmentPool`. Workers end with `shutdown`, with the `with` block, or with the
    process that owns them; late ones included there are at most twice as many as `workers`.

    Args:
        name, settings: the environment, as in `build_environment`. They are checked here, in the calling process.
        workers: how many processes; 0 runs environments in the calling thread, without limits of time and memory. By
            default one per CPU core, `MOST_WORKERS` at most.
        time_limit: seconds that one step may take.
        memory_limit: GB of memory that one worker may allocate; one that asks for more gets a MemoryError.

    Attributes:
        tools, max_turns, has_last_reward: as in `EnvironmentPool`.
        failures: how many answers lost their environment so far, by kind.
        rebuilt: how many environments were rebuilt so far.

    Raises ConfigError for an unknown environment or setting.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        workers: int | None = None,
        time_limit: float = 10.0,
        memory_limit: float = 8.0,
    ) -> None:
        self._count = worker_count("environment", workers, time_limit, memory_limit)
        make, limits = build_environment(name, settings)
        self.tools, self.has_last_reward = made_once(name, make)
        self.max_turns = limits.max_turns
        self.failures: Counter[FailureKind] = Counter()
        self.rebuilt = 0
        self._job = WorkerJob.here("environment", name, settings, time_limit, memory_limit)
        self._host = None if self._count else EnvironmentHost(make, limits, in_run=True)
        self._instances: dict[Hashable, EnvironmentInstance] = {}
        self._numbers = iter(range(2**62))
        self._fault: DataError | None = None
        self._stopping = False
        self._workers = [EnvironmentWorker(self._job) for _ in range(self._count)]
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._woken, self._wake = Pipe(duplex=False)
        os.set_blocking(self._wake.fileno(), False)
        self._thread = Thread(target=self._run, name="environments", daemon=True)
        if self._count:
            self._thread.start()

    # --------------------------------------------------------------------------------------------- for the caller

    def open(self, task: Task, seed: int, key: Hashable) -> Future[Opened | EnvironmentFailure]:
        instance = self._new(task, EnvironmentRecord(seed, (), ()), key)
        return self._ask(instance, EnvironmentCommand("reset", instance.number, (task, seed)))

    def step(self, key: Hashable, answer: str) -> Future[Step | EnvironmentFailure]:
        instance = self._instances[key]
        return self._ask(instance, EnvironmentCommand("step", instance.number, answer))

    def last_reward(self, key: Hashable) -> Future[Step | EnvironmentFailure]:
        instance = self._instances[key]
        return self._ask(instance, EnvironmentCommand("last_reward", instance.number))

    def restore(self, task: Task, record: EnvironmentRecord, key: Hashable) -> Future[Opened | EnvironmentFailure]:
        instance = self._new(task, record, key)
        if not record.digests:
            return self._ask(instance, EnvironmentCommand("reset", instance.number, (task, record.seed)))
        return self._ask(instance, None)

    def state(self, key: Hashable) -> EnvironmentRecord:
        return self._instances[key].record

    def close(self, key: Hashable) -> None:
        instance = self._instances.pop(key, None)
        if instance is not None:
            self._call(lambda: self._close(instance))

    def shutdown(self) -> None:
        """End the worker processes. Futures that still wait are cancelled."""
        self._stopping = True
        if self._thread.is_alive() and current_thread() is not self._thread:
            self._call(lambda: None)
            self._thread.join()
        for instance in self._instances.values():
            self._close(instance)
        self._instances = {}
        self._fault = self._fault or DataError("the environments of this run have ended")
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _new(self, task: Task, record: EnvironmentRecord, key: Hashable) -> EnvironmentInstance:
        before = self._instances.get(key)
        assert before is None or before.failure is not None, f"the environment {key} is still open"
        instance = self._instances[key] = EnvironmentInstance(next(self._numbers), task, record)
        return instance

    def _ask(self, instance: EnvironmentInstance, command: EnvironmentCommand | None) -> Future[Any]:
        future: Future[Any] = Future()
        self._call(lambda: self._enqueue(instance, PendingCommand(command, future)))
        return future

    def _call(self, function: Callable[[], None]) -> None:
        """Have something done by the thread of the pool, or at once where there is none."""
        if not self._thread.is_alive():
            function()
            return
        self._calls.put(function)
        with suppress(BlockingIOError):  # it is awake already
            os.write(self._wake.fileno(), b"\n")

    # ------------------------------------------------------------------------------------- in the pool's own thread

    def _enqueue(self, instance: EnvironmentInstance, job: PendingCommand) -> None:
        if self._fault is not None or instance.failure is not None:
            resolve_future(job.future, self._fault or instance.failure)
        else:
            instance.waiting.append(job)
            self._schedule(instance)

    def _schedule(self, instance: EnvironmentInstance) -> None:
        """Have the next command of an environment carried out, by a worker that has it, or in which it is rebuilt."""
        if self._host is not None:
            if instance.record.digests and instance.opened is None:
                instance.rebuild()
            while instance.has_work and instance.failure is None:
                job = instance.next_job()
                self._finish(
                    instance, job, EnvironmentReply() if job.command is None else self._host.handle(job.command)
                )
        elif instance.has_work:
            self._leave_late(instance)
            if instance.worker is None:
                instance.worker = min(self._workers, key=lambda worker: (worker.is_late, len(worker.instances)))
                instance.worker.instances.add(instance)
                instance.rebuild()
                self.rebuilt += bool(instance.rebuilding)
            if instance is not instance.worker.current:
                instance.worker.queue.setdefault(instance)

    def _finish(
        self, instance: EnvironmentInstance, job: PendingCommand, reply: EnvironmentReply | EnvironmentFailure
    ) -> None:
        """Take the result of a command."""
        if isinstance(reply, EnvironmentFailure):
            if reply.kind == "fault":
                self._give_up(DataError(f"environment {self._job.name}: {reply.note}"))
            self._fail(instance, reply, job)
            return
        result = reply.result
        if job.expected is not None and job.expected != reply.digest:
            note = "the environment showed other things when its answers were replayed; the answer starts again"
            worker = instance.worker
            self._fail(instance, EnvironmentFailure("start_again", note), job)
            if worker is not None:
                worker.leave(instance)
            elif self._host is not None:
                self._host.handle(EnvironmentCommand("close", instance.number))
            return
        if isinstance(result, Opened):
            instance.opened = result
        if job.command is None:
            result = instance.opened
        elif job.expected is None:
            result = self._recorded(instance, job.command, reply)
        resolve_future(job.future, result)

    def _recorded(self, instance: EnvironmentInstance, command: EnvironmentCommand, reply: EnvironmentReply) -> Any:
        """The result of a command that is no replay, which from now on belongs to what a rebuilt one must show."""
        record, step = instance.record, reply.result
        instance.retried = False
        if isinstance(step, Opened):
            instance.record = replace(record, digests=(reply.digest,))
        if isinstance(step, Step) and command.name == "step":
            answers, digests = (*record.answers, command.argument), (*record.digests, reply.digest)
            instance.record = EnvironmentRecord(record.seed, answers, digests, reply.state)
            if len(answers) >= self.max_turns and not step.done:
                return replace(step, done=True, info={**step.info, "turn_limit": True})
        return step

    def _fail(
        self, instance: EnvironmentInstance, failure: EnvironmentFailure, job: PendingCommand | None = None
    ) -> None:
        if instance.closed:
            return
        if not self.failures[failure.kind]:
            logger.warning("%s: environment failed: %s", instance.task.where or instance.task.id, failure.note)
        self.failures[failure.kind] += 1
        instance.failure = failure
        if instance.worker is not None:
            instance.worker.forget(instance)
        for one in [*([job] if job else []), *instance.waiting]:
            resolve_future(one.future, self._fault or failure)
        instance.waiting.clear()
        instance.rebuilding.clear()

    def _close(self, instance: EnvironmentInstance) -> None:
        """End an environment: its future is cancelled, and its worker closes it when it can."""
        instance.closed = True
        worker, jobs = instance.worker, [*instance.waiting]
        jobs += [worker.job] if worker is not None and worker.current is instance and worker.job else []
        for job in jobs:
            cancel_future(job.future)
        instance.waiting.clear()
        instance.rebuilding.clear()
        command = EnvironmentCommand("close", instance.number)
        if self._host is not None:
            self._host.handle(command)
        elif worker is not None and worker.is_alive:
            instance.waiting.append(PendingCommand(command))
            self._schedule(instance)

    def _run(self) -> None:
        try:
            while not self._stopping:
                while not self._calls.empty():
                    self._calls.get()()
                for worker in [*self._workers]:
                    worker.give_next()
                self._retire()
                self._collect()
        except BaseException as error:
            self._give_up(DataError(f"environments stopped: {type(error).__name__}: {error}"))
            raise
        finally:
            for worker in self._workers:
                worker.kill()
            while not self._calls.empty():
                self._calls.get()()

    def _collect(self) -> None:
        """Wait for a call, for the next result, or for the next end of a time limit or of half of one."""
        events = [event for worker in self._workers for event in (worker.halfway, worker.deadline)]
        until = min(events, default=inf)
        timeout = None if until == inf else max(until - time.monotonic(), 0.0)
        ready = set(connection.wait([self._woken, *(worker.pipe for worker in self._workers)], timeout))
        if self._woken in ready:
            os.read(self._woken.fileno(), 2**16)
        now = time.monotonic()
        for worker in [*self._workers]:
            if worker.pipe in ready:
                self._receive(worker)
            if worker in self._workers and now >= worker.deadline:
                self._lose(worker, EnvironmentFailure("timed_out", f"timed out after {self._job.time_limit:g} s"))
            elif worker.pipe not in ready and now >= worker.halfway:
                self._relieve(worker)

    def _receive(self, worker: EnvironmentWorker) -> None:
        try:
            message = worker.receive_message()
        except BadMessage as error:
            self._lose(worker, EnvironmentFailure("died", f"its process died ({error})"))
            return
        except (EOFError, OSError):
            self._lose(worker, EnvironmentFailure("died", f"its process died ({worker.end()})"))
            return
        if not message:  # half of one; the time limit goes on
            return
        [said] = message
        if isinstance(said, CannotBuild):
            self._give_up(DataError(said.message))
            worker.kill()
            self._workers.remove(worker)
            return
        if not isinstance(said, EnvironmentReply | EnvironmentFailure | None) or (said is None) != worker.is_starting:
            self._lose(worker, EnvironmentFailure("died", "its process died (it sent no reply)"))
            return
        instance, job = worker.received()
        if instance is None or job is None or said is None:
            return
        self._finish(instance, job, said)
        if instance.closed and not instance.has_work:
            worker.forget(instance)
        elif instance.failure is None or instance.closed:
            self._schedule(instance)

    def _lose(self, worker: EnvironmentWorker, failure: EnvironmentFailure) -> None:
        """End a worker and put another one in its place. The environment that it was busy with fails where it has hung,
        or has lost a process with the same command before."""
        current, instances = worker.current, [*worker.instances]
        worker.kill()
        if worker.is_starting and not worker.tries:
            self._give_up(DataError(f"a process for the environment did not start: {failure.note}"))
        self._workers.remove(worker)
        if self._fault is not None:
            return
        if len(self._workers) < self._count:
            self._workers.append(EnvironmentWorker(self._job, worker.tries - 1 if worker.is_starting else TRIES))
        for instance in instances:
            worker.forget(instance)
            if instance is current and (failure.kind != "died" or instance.retried or instance.closed):
                self._fail(instance, failure, worker.job)
                continue
            if instance is current and worker.job is not None:  # the system may have ended the process, not this one
                instance.retry(worker.job)
            if not instance.closed:
                self._schedule(instance)

    def _relieve(self, worker: EnvironmentWorker) -> None:
        """Let those that wait behind a command of which half of the time is over move to another worker."""
        worker.halfway = inf
        for instance in [*worker.queue]:
            self._schedule(instance)

    def _leave_late(self, instance: EnvironmentInstance) -> None:
        """Take an environment out of a worker that is late with another one, where there is one in time."""
        worker = instance.worker
        if worker is None or not worker.is_late or instance is worker.current or instance.closed:
            return
        in_time = sum(not one.is_late for one in self._workers)
        if in_time < self._count and len(self._workers) < 2 * self._count:
            self._workers.append(EnvironmentWorker(self._job, TRIES))
        elif not in_time:
            return
        worker.leave(instance)
        instance.number = next(self._numbers)  # what is left of it there is not taken for it

    def _retire(self) -> None:
        """End workers beyond those that were asked for when they have nothing left."""
        for worker in [*self._workers]:
            if len(self._workers) > self._count and not worker.instances and worker.current is None:
                worker.kill()
                self._workers.remove(worker)

    def _give_up(self, fault: DataError) -> None:
        self._fault = fault
        logger.warning("%s", fault)
        for worker in self._workers:
            for job in [worker.job, *(job for instance in worker.instances for job in instance.waiting)]:
                resolve_future(job.future if job else None, fault)
