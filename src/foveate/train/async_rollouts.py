"""Generation that goes on while the policy learns: groups are made ahead of the steps that train on them.

A thread draws the next tasks, has them answered and grades each group as it finishes. How far it may run ahead follows
from `rollout.staleness` alone: a group begun with weights v is trained in step v + 1 + staleness at the latest, and the
thread waits where the next group would come later. So groups are not made to be thrown away, and what waits is bounded
by staleness + 1 steps.

New weights are published between rounds (a round is a step's groups, or what of them may be made), never under a
request: every answer is of one version. A publish waits until the groups of the next step are there, which the step
needs anyway; with staleness 1 a run is then a function of its settings, whatever the clock says.

With `rollout.partial` a publish waits for nobody: the engine is paused, and after the publish each unfinished answer
goes on from its tokens, under the new weights. Its version is then the oldest of those that sampled it. Steps take the
groups in the order of the stream, so that the last one that may train a group waits for it. With `rollout.over_sample`
they take those that have finished, the oldest first. Where the next step lacks groups, others take the place of those
that were interrupted, up to this number, and what becomes too old is dropped and counted.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from foveate.data.stream import Stream
from foveate.errors import EngineError
from foveate.records import Answer, Group, Score
from foveate.rollout.engine import Request
from foveate.rollout.seeds import seed_of
from foveate.train.clock import Clock
from foveate.train.rollouts import AnsweredGroup, PendingGroup, Scores, SyncRollouts, resample_groups


@dataclass(frozen=True, slots=True)
class _Made:
    """A group that waits to be trained, and the seconds since the one before."""

    group: Group
    version: int
    seconds: dict[str, float]


class AsyncRollouts:
    """Stands where `SyncRollouts` stands on the page, with `staleness` 1 or more. The thread runs until `close`; an
    error in it is raised by the next call.

    sampler: whose reader is at the position of `stream`, and has a stream of its own; stream: counts the tasks whose
    groups were trained, or dropped: what a continued run starts from. count: groups of a step; step, last: the steps
    done and to do. partial: whether unfinished answers go on over a publish; over_sample: groups that may be under way
    beyond those that steps need, which are then taken as they finish.
    """

    def __init__(
        self,
        sampler: SyncRollouts,
        stream: Stream,
        *,
        staleness: int,
        count: int,
        step: int,
        last: int,
        partial: bool = False,
        over_sample: int = 0,
    ) -> None:
        self._sampler, self._engine, self._stream = sampler, sampler.engine, stream
        self._staleness, self._count, self._last = staleness, count, last
        self._partial, self._over_sample = partial, over_sample
        self._source = copy.copy(stream)  # at the next group to begin
        self._open: list[PendingGroup] = []  # begun, and to go on in the next round
        self._spent: dict[str, float] = {}  # seconds that no group has been given yet
        self._changed = threading.Condition()
        # What follows is shared with the thread, and touched only by who holds `_changed`.
        self._ready: dict[int, _Made] = {}
        self._begun = step
        self._in_work = self._wanted = self._dropped = 0
        self._rests = self._closing = self._busy = self._drawing = False
        self._error: BaseException | None = None
        self._said: dict[str, float] = {}
        self._thread = threading.Thread(target=self._produce, name="generation", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, which aborts what is being answered and waits for the groups that are being graded."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._engine.pause()
        self._thread.join()
        self._engine.resume()

    # ------------------------------------------------------------------------------------------------ what a step asks

    def draw(self, step: int, count: int, resample_rounds: int, clock: Clock) -> tuple[list[Group], list[Group]]:
        """As `SyncRollouts.draw`: the next groups. Waiting for them is the phase "wait" of the clock; encoding,
        generation and reward ran beside other phases."""
        with self._changed:
            self._begun, self._drawing = step, True
        groups, drawn = resample_groups(lambda _, missing: self._take(step, missing, clock), count, resample_rounds)
        answers = [answer for group in drawn for answer in group.answers]
        ages = [step - 1 - answer.version for answer in answers]
        mixed = sum(len(answer.versions) > 1 for answer in answers) / len(answers)
        with self._changed:
            self._said = {
                "rollout/groups_dropped": float(self._dropped),
                "rollout/groups_waiting": float(len(self._ready) + self._in_work),
                "rollout/staleness_mean": sum(ages) / len(ages),
                "rollout/staleness_max": float(max(ages)),
                **({"rollout/staleness_mixed": mixed} if self._partial else {}),
            }
            self._dropped, self._drawing = 0, False
        return groups, drawn

    @contextmanager
    def at_rest(self, clock: Clock) -> Iterator[None]:
        """Within it nothing is encoded, generated or graded: to publish, evaluate and save. Waits until the round under
        way is done and the next step's groups are there; where answers may be continued, interrupts them instead."""
        with clock.phase("wait"):
            with self._changed:
                self._rests = True
            if self._partial:
                self._engine.pause()
            with self._changed:
                self._wait_until(lambda: not self._busy and (self._partial or self._has_next_step()))
            if self._partial:
                self._engine.resume()
        try:
            yield
        finally:
            with self._changed:
                self._rests = False
                self._changed.notify_all()

    def metrics(self) -> dict[str, float]:
        """Of the last `draw`: how many steps old its answers' weights were, 0 for those of the step before, and the
        share of answers of several versions; how many groups were too old to be trained; and how many were waiting
        behind it. And what the sampler says."""
        return {**self._said, **self._sampler.metrics()}

    def _take(self, step: int, count: int, clock: Clock) -> list[Group]:
        """The next `count` groups that are not too old for a step; older ones are dropped and counted."""
        taken: list[Group] = []
        dropped = 0
        with clock.phase("wait"), self._changed:
            while len(taken) < count:
                self._wanted = count - len(taken)
                self._changed.notify_all()
                if self._partial and self._busy and self._allowance() > 0:
                    self._engine.pause()  # for a round with more of them
                self._wait_until(lambda: self._next() is not None)
                place = self._next()
                assert place is not None
                made = self._ready.pop(place)
                self._stream.finish(place)
                if made.version < self._oldest(step):
                    dropped += 1
                    self._dropped += 1
                    self._require_progress(made, step, dropped)
                    continue
                taken.append(made.group)
                for name, seconds in made.seconds.items():
                    clock.overlapped[name] = clock.overlapped.get(name, 0.0) + seconds
            self._wanted = 0
        return taken

    def _next(self) -> int | None:
        """The place of the group that comes next, if it is there: the next of the stream, or of those that are there
        the one that will be too old first."""
        if self._over_sample:
            return min(self._ready, key=lambda place: self._ready[place].version, default=None)
        [place] = self._stream.coming(1)
        return place if place in self._ready else None

    def _oldest(self, step: int) -> int:
        """The oldest weights of which a step may train an answer."""
        return step - 1 - self._staleness

    def _require_progress(self, made: _Made, step: int, dropped: int) -> None:
        """Groups are made to be young enough; where more than can wait are not, the weights do not arrive."""
        if dropped > (self._staleness + 1) * self._count + self._over_sample:
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
        """How many groups may be begun now: those that are waited for, and of each later step in which the present
        weights may still be trained; and some in the place of those that were interrupted, where the next step lacks
        groups. More than can be trained in time would be made to be dropped."""
        horizon = min(self._engine.version + self._staleness + 1, self._last)
        needed = (horizon - self._begun) * self._count + self._wanted
        lacking = max(0, self._count - len(self._ready)) if needed > 0 else 0
        more = min(self._over_sample, len(self._open), lacking)
        return needed + more - len(self._ready) - self._in_work

    def _may_go_on(self) -> bool:
        if self._rests and (self._partial or self._has_next_step()):
            return False
        return bool(self._open) or self._allowance() > 0

    def _produce(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._may_go_on())
                    if self._closing:
                        return
                    self._drop_open()
                    fresh = max(0, self._allowance())
                    if not self._partial:
                        fresh = min(fresh, self._count)
                    self._in_work += fresh
                    self._busy = True
                self._round(fresh)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error, self._busy = self._error or error, False
            self._changed.notify_all()

    def _drop_open(self) -> None:
        """Give up what can no longer be trained, however soon it finishes."""
        oldest = self._oldest(self._begun if self._drawing else self._begun + 1)
        for pending in [
            pending
            for pending in self._open
            if _oldest_of(pending.request.partial_answers, self._engine.version) < oldest
        ]:
            self._open.remove(pending)
            self._sampler.drop(pending)
            self._stream.finish(pending.place)
            self._in_work -= 1
            self._dropped += 1

    def _round(self, fresh: int) -> None:
        """Go on with what was begun, and begin the next `fresh` tasks. Each group is graded while the others are still
        being answered."""
        sampler, version = self._sampler, self._engine.version
        pending = self._open + self._begin(fresh)
        self._since = time.monotonic()
        with sampler.grading() as grading:
            if self._partial:
                _, self._open = sampler.round(pending, sampler.sampling, grading, partial(self._finish, version, None))
                self._engine.resume()
                return
            self._open = []
            if not sampler.greedy_baseline:
                finish = partial(self._finish, version, None)
                sampler.answer(pending, sampler.sampling, grading, lambda: self._closing, finish)
                return
            answered = sampler.answer(pending, sampler.sampling, grading, lambda: self._closing)
            greedy = sampler.greedy(pending, grading, lambda: self._closing)
            for one, other in zip(answered, greedy, strict=False) if not self._closing else ():
                self._finish(version, other.scores.result()[0], one)

    def _begin(self, count: int) -> list[PendingGroup]:
        if not count:
            return []
        clock, sampler = Clock(), self._sampler
        with clock.phase("encode"):
            taken = sampler.reader.take(count)
        self._spend("encode", clock.seconds["encode"])
        places = self._source.coming(count)
        self._source.draw(count)
        begun = [
            PendingGroup(place, task, Request(prompt, seed_of("ahead", sampler.seed, place)))
            for place, (task, prompt) in zip(places, taken, strict=True)
        ]
        sampler.begin(begun, sampler.sampling)
        return begun

    def _finish(self, version: int, baseline: Score | None, group: AnsweredGroup) -> None:
        """A group is answered: it is ready as soon as it is graded."""
        newest = max(sampler for answer in group.answers for sampler, _ in answer.versions)
        if newest > version:
            raise EngineError(f"the engine answered with weights of step {newest}, but was given those of {version}")
        now = time.monotonic()
        self._spend("generate", now - self._since)
        self._since = now
        seconds, self._spent = self._spent, {}
        group.scores.add_done_callback(partial(self._ripen, group, baseline, seconds))

    def _ripen(
        self, group: AnsweredGroup, baseline: Score | None, seconds: dict[str, float], scores: Future[Scores]
    ) -> None:
        error = scores.exception()
        if error is not None:
            self._fail(error)
            return
        oldest = _oldest_of(group.answers, self._engine.version)
        with self._changed:
            self._ready[group.place] = _Made(group.scored(baseline), oldest, seconds)
            self._in_work -= 1
            self._changed.notify_all()

    def _spend(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds


def _oldest_of(answers: tuple[Answer, ...], now: int) -> int:
    """The oldest weights that sampled any of them; those of now where there is no token yet."""
    return min((answer.version for answer in answers if len(answer)), default=now)
