"""Graders in worker processes: no answer takes longer than its limit, and none ends the run.

Answers to mathematics are graded by programs that can run for ever, take all memory or crash, on text that a model
wrote. `Graders` keeps such a program in processes of its own. An answer whose grader raises, hangs, dies or returns NaN
is not graded, with the reason as a note and a count; a process that was lost is replaced, and the run goes on. One that
is half through its limit gets a successor at once, so that what a new process needs to start is not added to the limit.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from foveate.errors import DataError
from foveate.processes import BadMessage, GuardedProcess, WorkerJob, confine, worker_count
from foveate.records import Answer, Score, Task
from foveate.registry import unpickle
from foveate.rewards import REWARDS
from foveate.rewards.build import FAILED, Reward, RewardJob, build_reward, grader_failed, not_graded
from foveate.rewards.requests import RequestThread

logger = logging.getLogger(__name__)

OPENED = "opened"
"""Field of a task's meta: what the prompt has opened for the answer (`<think>`), which is graded in front of it."""

STARTING_LIMIT = 300.0
"""Seconds that a worker process may take to import the reward before the run gives up."""
_TRIES = 3
"""Starts of a process in the place of one that was lost, until the reward itself must be at fault."""

PRELOADED = ["foveate.rewards.pool", "math_verify", "mathruler.grader"]
"""Imported once by the fork server for all workers, where installed."""


class Graders:
    """A reward behind a pool of worker processes, and itself a reward: `graders(answer, task)`.

    Workers are started once, from a fork server that has imported what they need (seconds, once; a replacement takes
    tens of milliseconds, and the imports of your own reward), and end with `close`, with the `with` block, or with
    the process that owns them. Late ones included there are at most twice as many as `workers`.

    Args:
        name, settings: the reward, as in `build_reward`. They are checked here, in the calling process.
        workers: how many processes; 0 grades in the calling process, without limit, and is the default for the rewards
            that `foveate.rewards.REWARDS` calls quick. For others the default is one per CPU core, `MOST_WORKERS` at
            most. Rewards that ask a server do that outside of them, many at once.
        time_limit: seconds that one answer may take.
        memory_limit: GB of memory that one worker may allocate; a grader that asks for more gets a MemoryError.

    Attributes:
        failures: how many answers were not graded so far, by reason: "raised", "not_finite", "timed_out", "died".

    Raises ConfigError for an unknown reward or setting. A reward is wrong for every answer if it returns no score, or
    cannot be imported by a worker: grading then raises DataError.
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
        usual = 0 if name in REWARDS and REWARDS[name].quick else None
        self._count = worker_count("reward", workers, time_limit, memory_limit, usual=usual)
        self.failures: Counter[str] = Counter()
        self.time_limit = time_limit
        self._reward = build_reward(name, settings)
        self._requests = RequestThread() if self._reward.fetch else None
        self._job = WorkerJob.here("reward", name, settings, time_limit, memory_limit)
        self._workers = [_Worker(self._job) for _ in range(self._count)]
        self._late: list[_Worker] = []
        """Workers beyond half of their limit, whose places successors have taken."""

    def __call__(self, answer: Answer | str, task: Task) -> Score:
        """The score of one answer."""
        return self.grade_many([(answer, task)])[0]

    def grade_many(
        self, answers: Sequence[tuple[Answer | str, Task]], fetches: Sequence[Future[Any]] = ()
    ) -> list[Score]:
        """The scores of answers to tasks, in their order. Of an answer whose record is not known the text is enough
        for rewards that read no more. What the prompt of a task has opened for the answer counts as written. Answers to
        the same task should stand together: it is sent to a worker once for all that follow each other.
        fetches: what `prefetch` has given for these answers, where it was called."""
        asked = self._read(answers)
        if self._requests is None:
            scores = self._grade([(*one, ()) for one in asked])
        else:
            scores = self._grade_fetched(asked, fetches or self._fetches(asked))
        failed = [(task, score) for (_, task), score in zip(answers, scores, strict=True) if score.value is None]
        self.failures.update(_reason(score) for _, score in failed)
        if failed and self._count:
            task, score = failed[0]
            logger.warning(
                "%s: %s (%d of %d answers are not graded)", task.where, score.note, len(failed), len(answers)
            )
        return scores

    def prefetch(self, answers: Sequence[tuple[Answer | str, Task]]) -> list[Future[Any]]:
        """Ask servers, without waiting, what the reward asks them of answers that will be graded: a future for each,
        for `grade_many`; none for a reward that asks no server."""
        return self._fetches(self._read(answers)) if self._requests else []

    def metrics(self) -> dict[str, float]:
        """Since they were asked for last: requests to servers, the share of those that need not be sent, their seconds
        and the tokens that the servers read and wrote. Empty for a reward that asks none."""
        if self._requests is None:
            return {}
        counts = self._requests.counts()
        sent, cached = counts["requests"], counts["cached"]
        return {
            "reward/requests": sent,
            "reward/requests_cached": cached / max(1, sent + cached),
            "reward/request_seconds": counts["seconds"] / max(1, sent),
            "reward/request_tokens": counts["tokens"],
        }

    def _read(self, answers: Sequence[tuple[Answer | str, Task]]) -> list[tuple[Answer | str, Task]]:
        return [(self._reward.read(_with_opened(answer, task)), task) for answer, task in answers]

    def _fetches(self, asked: Sequence[tuple[Answer | str, Task]]) -> list[Future[Any]]:
        fetch, requests = self._reward.fetch, self._requests
        assert fetch is not None
        assert requests is not None
        return [requests.submit(fetch, answer, task) for answer, task in asked]

    def _grade_fetched(self, asked: Sequence[tuple[Answer | str, Task]], fetches: Sequence[Future[Any]]) -> list[Score]:
        """Grade answers whose reward asks servers: those of which a request fails are not graded."""
        scores: dict[int, Score] = {}
        jobs: dict[int, RewardJob] = {}
        for index, (one, fetch) in enumerate(zip(asked, fetches, strict=True)):
            try:
                jobs[index] = (*one, (fetch.result(),))
            except Exception as error:
                scores[index] = grader_failed(error)
        scores |= dict(zip(jobs, self._grade([*jobs.values()]), strict=True))
        return [scores[index] for index in range(len(asked))]

    def _grade(self, jobs: Sequence[RewardJob]) -> list[Score]:
        if self._reward.together is not None:
            found = self._reward.together(jobs)
            jobs = [(answer, task, own) for (answer, task, _), own in zip(jobs, found, strict=True)]
        if self._count:
            return self._grade_apart(jobs)
        return [self._reward(answer, task, *fetched) for answer, task, fetched in jobs]

    def close(self) -> None:
        """End the worker processes and the requests that are under way. Grading again would start new processes."""
        if self._requests:
            self._requests.close()
            self._requests = None
        for worker in self._workers + self._late:
            worker.kill()
        self._workers, self._late = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _grade_apart(self, answers: Sequence[RewardJob]) -> list[Score]:
        self._workers = self._workers or [_Worker(self._job) for _ in range(self._count)]
        scores: dict[int, Score] = {}
        waiting = Waiting([task for _, task, _ in answers], self._count)
        try:
            while len(scores) < len(answers):
                self._hand_out(answers, waiting)
                scores.update(self._collect())
        except BaseException:
            self.close()  # or the answers under way would be taken for those of the next call
            raise
        return [scores[index] for index in range(len(answers))]

    def _hand_out(self, answers: Sequence[RewardJob], waiting: Waiting) -> None:
        """Give each idle worker the next answer. One that died while it had nothing to do is replaced."""
        for position, worker in enumerate(self._workers):
            if worker.is_idle and worker.pipe.poll():
                worker.kill()
                self._workers[position] = worker.successor(self._job)
            elif worker.is_idle and (index := waiting.take(position)) is not None:
                worker.send(index, *answers[index])

    def _collect(self) -> dict[int, Score]:
        """Wait for the next result, the next end of a time limit or of half of one; replace workers that are late or
        lost."""
        busy = [worker for worker in self._workers + self._late if not worker.is_idle]
        events = [worker.deadline if worker in self._late else worker.halfway for worker in busy]
        ready = set(connection.wait([worker.pipe for worker in busy], max(min(events) - time.monotonic(), 0.0)))
        scores: dict[int, Score] = {}
        for worker in busy:
            if worker.pipe in ready:
                scores.update(worker.receive())
            if worker.is_alive and not worker.is_idle and time.monotonic() >= worker.deadline:
                scores.update(worker.give_up())
            if worker in self._late and (worker.is_idle or not worker.is_alive):
                worker.kill()
                self._late.remove(worker)
            elif worker in self._workers and (worker.is_late or not worker.is_alive):
                self._workers[self._workers.index(worker)] = worker.successor(self._job)
                self._late += [worker] if worker.is_alive else []
        return scores


class Waiting:
    """The answers that wait for a worker, in runs to one task. A worker keeps to its run: what its reward remembers of
    a task, such as the parsed ground truth, need not be found out in every process. When no run is left, the longest of
    those under way is shared."""

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        self._runs: deque[deque[int]] = deque()
        for index, task in enumerate(tasks):
            if not index or task is not tasks[index - 1]:
                self._runs.append(deque())
            self._runs[-1].append(index)
        self._under_way: list[deque[int]] = [deque() for _ in range(workers)]

    def take(self, worker: int) -> int | None:
        """The next answer for the worker at this place, or None if none waits."""
        if not self._under_way[worker] and self._runs:
            self._under_way[worker] = self._runs.popleft()
        if self._under_way[worker]:
            return self._under_way[worker].popleft()
        longest = max(self._under_way, key=len)
        return longest.pop() if longest else None


class _Worker(GuardedProcess):
    """One worker process as its owner sees it: starting, idle, or busy with the answer of index `answer`."""

    def __init__(self, job: WorkerJob, tries: int = 0) -> None:
        """`tries`: how many more may take its place where it dies before it is ready; the first ones of a run must
        start."""
        super().__init__(_grade_for_ever, job, PRELOADED)
        self.answer: int | None = None
        self.tries = tries
        self._limit = job.time_limit
        self._starting = True
        self._task: Task | None = None
        self.deadline = self.halfway = time.monotonic() + STARTING_LIMIT

    def successor(self, job: WorkerJob) -> _Worker:
        """One in its place."""
        return _Worker(job, self.tries - 1 if self._starting else _TRIES)

    @property
    def is_idle(self) -> bool:
        return self.answer is None and not self._starting

    @property
    def is_late(self) -> bool:
        """Whether half of its time for an answer is over."""
        return self.answer is not None and time.monotonic() >= self.halfway

    def send(self, index: int, answer: Answer | str, task: Task, fetched: tuple[Any, ...]) -> None:
        """Have an answer graded. A worker that is gone is noticed by the `receive` that follows."""
        self.answer = index
        now = time.monotonic()
        self.halfway, self.deadline = now + self._limit / 2, now + self._limit
        try:
            self.send_message((answer, None if task is self._task else task, fetched), self.deadline)
        except OSError:
            return
        self._task = task

    def receive(self) -> dict[int, Score]:
        """The message of the worker: the score of its answer by index, or nothing but that it is ready."""
        try:
            message = self.receive_message()
        except BadMessage as error:
            return self._lost(f"its process died ({error})")
        except (EOFError, OSError):
            return self._lost(f"its process died ({self.end()})")
        if not message:  # half of one
            return {}
        [said] = message
        if isinstance(said, Failure):
            raise DataError(said.message)
        if not isinstance(said, Score | None) or (said is None) != self._starting:
            return self._lost("its process died (it sent no score)")
        index, self.answer, self._starting = self.answer, None, False
        return {} if index is None or said is None else {index: said}

    def give_up(self) -> dict[int, Score]:
        """End a worker whose time is over."""
        return self._lost(f"timed out after {self._limit:g} s")

    def _lost(self, how: str) -> dict[int, Score]:
        self.kill()
        if self._starting and self.tries:
            logger.warning("a process for the reward did not start: %s; starting another one", how)
            return {}
        if self._starting or self.answer is None:
            raise DataError(f"a process for the reward did not start: {how}; workers 0 grades without processes")
        return {self.answer: not_graded(how)}


def with_opened(task: Task, opened: str) -> Task:
    """The task with what its prompt has opened for the answer."""
    return replace(task, meta={**task.meta, OPENED: opened}) if opened else task


def _with_opened(answer: Answer | str, task: Task) -> Answer | str:
    """The answer as graders read it: behind what its prompt has opened."""
    opened = task.meta.get(OPENED, "")
    if not opened:
        return answer
    return opened + answer if isinstance(answer, str) else replace(answer, text=opened + answer.text)


def _reason(score: Score) -> str:
    """Why an answer was not graded."""
    reasons = {"timed out": "timed_out", "its process died": "died", "gave": "not_finite"}
    said = score.note.removeprefix(f"{FAILED}: ")
    return next((reason for start, reason in reasons.items() if said.startswith(start)), "raised")


# -------------------------------------------------------------------------------------------- in a worker process


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker's last word: the reward itself is wrong, not an answer."""

    message: str


def _grade_for_ever(job: WorkerJob, pipe: Connection, owner: Connection) -> None:
    """Grade answers, as `Reward.read` gives them, from the pipe until it closes; a task of None is the one before.
    Sends None when it is ready, then a Score for each answer, or a `Failure` at any time."""
    confine(job, pipe, owner)
    try:
        unpickle(job.functions)
        reward = build_reward(job.name, job.settings)
    except Exception as error:
        pipe.send(Failure(f"reward {job.name} cannot be built in a worker process: {type(error).__name__}: {error}"))
        return
    pipe.send(None)
    own = os.getpid()
    current: Task | None = None
    while True:
        try:
            answer, task, fetched = pipe.recv()
        except EOFError:
            return
        current = current if task is None else task
        assert current is not None
        score = _graded(reward, answer, current, *fetched)
        if os.getpid() != own:  # the grader forked, and this is the copy: its scores would be taken for other answers'
            os._exit(0)
        pipe.send(score)


def _graded(reward: Reward, answer: Answer | str, task: Task, *fetched: Any) -> Score | Failure:
    try:
        return reward(answer, task, *fetched)
    except DataError as error:
        return Failure(str(error))
    except (Exception, KeyboardInterrupt) as error:
        return grader_failed(error)
