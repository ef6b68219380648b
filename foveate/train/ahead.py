"""Generation that goes on while the policy learns: groups are made ahead of the steps that train on them.

A thread draws the next tasks, has them answered and grades each group as it finishes. How far it may run ahead follows
from `rollout.staleness` alone: a group made with weights v is trained in step v + 1 + staleness at the latest, and the
thread waits where the next group would come later. So groups are not made to be thrown away, and what waits is bounded
by staleness + 1 steps.

New weights are published between rounds (a round is a step's groups, or what of them may be made), never under a
request: every answer is of one version. A publish waits until the groups of the next step are there, which the step
needs anyway; with staleness 1 a run is then a function of its settings, whatever the clock says.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from foveate.data.stream import Stream
from foveate.errors import EngineError
from foveate.records import Completion, Group, SamplingParams, Score, Task
from foveate.rollout.base import Request, Streaming
from foveate.rollout.seeds import seed_of
from foveate.train.clock import Clock
from foveate.train.groups import Sampler, refilled


@dataclass(frozen=True, slots=True)
class _Made:
    """A group that waits to be trained, the oldest weights in it, and its share of the seconds of its round."""

    group: Group
    version: int
    seconds: Mapping[str, float]


class Ahead:
    """Stands where `Sampler` stands on the page, with `staleness` 1 or more. The thread runs until `close`; an error in
    it is raised by the next call.

    sampler: whose reader is at the position of `stream`, and has a stream of its own; stream: counts the tasks whose
    groups were trained, or dropped, in order: what a continued run starts from. count: groups of a step; step, last:
    the steps done and to do.
    """

    def __init__(
        self, sampler: Sampler, engine: Streaming, stream: Stream, *, staleness: int, count: int, step: int, last: int
    ) -> None:
        self._sampler, self._engine, self._stream = sampler, engine, stream
        self._staleness, self._count, self._last = staleness, count, last
        self._position = stream.position  # of the next group to make
        self._changed = threading.Condition()
        # What follows is shared with the thread, and touched only by who holds `_changed`.
        self._ready: deque[_Made] = deque()
        self._begun = step
        self._in_work = self._wanted = 0
        self._rests = self._closing = False
        self._error: BaseException | None = None
        self._said: dict[str, float] = {}
        self._grading = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._thread = threading.Thread(target=self._produce, name="generation", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, which aborts what is being answered and waits for the group that is being graded."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._grading.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------------------------------------ what a step asks

    def draw(self, step: int, count: int, refills: int, clock: Clock) -> tuple[list[Group], list[Group]]:
        """As `Sampler.draw`: the next groups in the order of the stream. Waiting for them is the phase "wait" of the
        clock; encoding, generation and reward ran beside other phases."""
        with self._changed:
            self._begun = step
        self._said = {"groups_dropped": 0.0}
        groups, drawn = refilled(lambda _, missing: self._take(step, missing, clock), count, refills)
        ages = [step - 1 - answer.version for group in drawn for answer in group.completions]
        self._said |= {"staleness/mean": sum(ages) / len(ages), "staleness/max": float(max(ages))}
        return groups, drawn

    @contextmanager
    def at_rest(self, clock: Clock) -> Iterator[None]:
        """Within it nothing is encoded, generated or graded: to publish, evaluate and save. Waits until the round under
        way is done and the next step's groups are there."""
        with clock.phase("wait"), self._changed:
            self._rests = True
            self._wait_until(lambda: not self._in_work and self._has_next_step())
        try:
            yield
        finally:
            with self._changed:
                self._rests = False
                self._changed.notify_all()

    def metrics(self) -> dict[str, float]:
        """Of the last `draw`: how many steps old its answers' weights were, 0 for those of the step before; how many
        groups were too old to be trained; and how many were waiting behind it."""
        return self._said

    def _take(self, step: int, count: int, clock: Clock) -> list[Group]:
        """The next `count` groups that are not too old for a step; older ones are dropped and counted."""
        taken: list[Group] = []
        dropped = 0
        with clock.phase("wait"), self._changed:
            while len(taken) < count:
                self._wanted = count - len(taken)
                self._changed.notify_all()
                self._wait_until(lambda: bool(self._ready))
                made = self._ready.popleft()
                self._stream.take(1)
                if made.version < step - 1 - self._staleness:
                    dropped += 1
                    self._require_progress(made, step, dropped)
                    continue
                taken.append(made.group)
                for name, seconds in made.seconds.items():
                    clock.beside[name] = clock.beside.get(name, 0.0) + seconds
            self._wanted = 0
            self._said["groups_dropped"] += dropped
            self._said["groups_waiting"] = float(len(self._ready) + self._in_work)
        return taken

    def _require_progress(self, made: _Made, step: int, dropped: int) -> None:
        """Groups are made to be young enough; where more than can wait are not, the weights do not arrive."""
        if dropped > (self._staleness + 1) * self._count:
            raise EngineError(
                f"the engine answered {dropped} prompts in a row with weights of step {made.version} or older, the "
                f"policy is at step {step - 1} and rollout.staleness is {self._staleness}: new weights do not arrive"
            )

    def _wait_until(self, done: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._error is not None or done())
        if self._error is not None:
            raise self._error

    def _has_next_step(self) -> bool:
        return len(self._ready) >= self._count * min(1, self._last - self._begun)

    # -------------------------------------------------------------------------------------------------- the thread

    def _allowance(self) -> int:
        """How many groups may be made now: those that are waited for, and of each later step in which the present
        weights may still be trained."""
        horizon = min(self._engine.version + self._staleness + 1, self._last)
        return (horizon - self._begun) * self._count + self._wanted - len(self._ready)

    def _may_go_on(self) -> bool:
        return self._allowance() > 0 and not (self._rests and self._has_next_step())

    def _produce(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._may_go_on())
                    if self._closing:
                        return
                    self._in_work = min(self._count, self._allowance())
                round_ = self._round(self._in_work)
                with self._changed:
                    self._ready.extend(round_)
                    self._in_work = 0
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error, self._in_work = error, 0
                self._changed.notify_all()

    def _round(self, count: int) -> list[_Made]:
        """The groups of the next `count` tasks, each graded while the others are still being answered."""
        sampler, clock, version = self._sampler, Clock(), self._engine.version
        with clock.phase("encode"):
            tasks, prompts = zip(*sampler.reader.take(count), strict=True)
        seeds = [seed_of("ahead", sampler.seed, self._position + i) for i in range(count)]
        requests = [*map(Request, prompts, seeds)]
        self._position += count
        with clock.phase("generate"):
            answers, scores = self._answered(tasks, requests, sampler.sampling)
            baselines: list[Future[tuple[Score, ...]]] = []
            if sampler.greedy_baseline:
                one = replace(sampler.sampling, samples=1, temperature=0.0)
                _, baselines = self._answered(tasks, requests, one)
        with clock.phase("reward"):
            graded = [score.result() for score in scores]
            greedy = [score.result()[0] for score in baselines] or [None] * count
        newest = max(answer.version for group in answers for answer in group)
        if newest > version:
            raise EngineError(f"the engine answered with weights of step {newest}, but was given those of {version}")
        share = {name: seconds / count for name, seconds in clock.seconds.items()}
        groups = map(Group, tasks, prompts, answers, graded, greedy)
        return [_Made(group, min(answer.version for answer in group.completions), share) for group in groups]

    def _answered(
        self, tasks: Sequence[Task], requests: Sequence[Request], sampling: SamplingParams
    ) -> tuple[list[tuple[Completion, ...]], list[Future[tuple[Score, ...]]]]:
        """The answers to all requests in order, and their scores, which come later."""
        answers: dict[int, tuple[Completion, ...]] = {}
        scores: dict[int, Future[tuple[Score, ...]]] = {}
        stream = self._engine.stream(requests, sampling)
        try:
            for index, group in stream:
                answers[index] = group
                scores[index] = self._grading.submit(self._graded, tasks[index], group)
                if self._closing:
                    raise _ClosedError
        finally:
            stream.close()
        order = range(len(requests))
        return [answers[i] for i in order], [scores[i] for i in order]

    def _graded(self, task: Task, answers: tuple[Completion, ...]) -> tuple[Score, ...]:
        return self._sampler.grade([task], [answers])[0]


class _ClosedError(Exception):
    """Ends the thread amid a round."""
