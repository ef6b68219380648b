"""Made-up parts around `foveate.train.async_rollouts`: tasks, engines and rewards that are numbers, and a page that
trains."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from foveate.data.stream import Stream
from foveate.records import Answer, Group, Message, Prompt, SamplingParams, Score, Task
from foveate.train.async_rollouts import AsyncRollouts
from foveate.train.clock import Clock
from foveate.train.rollouts import SyncRollouts

TASKS = 40


class Tasks:
    """A reader whose tasks are the numbers of its stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def take(self, count: int) -> list[tuple[Task, Prompt]]:
        rows = self.stream.draw(count)
        return [
            (Task(str(row), "made up", (Message("user", ""),), (), row), Prompt((row,), (), None, (row,)))
            for row in rows
        ]

    def observe(self, scores: Sequence[float | None]) -> None:
        """A shuffled stream depends on no score."""


class Engine:
    """Answers with the number of the prompt. `lag` makes it answer with older weights than it was given; `before` is
    called before each group. It notices when it is published to while it answers."""

    def __init__(self, *, lag: Callable[[int], int] = lambda _: 0, before: Callable[[int], None] = lambda _: None):
        self.version, self.answering, self.answered = 0, False, 0
        self.lag, self.before = lag, before
        self.paused = False

    def generate(self, requests: Sequence[Any], sampling: SamplingParams) -> Any:
        return [group for _, group in self.stream(requests, sampling)]

    def stream(self, requests: Sequence[Any], sampling: SamplingParams) -> Iterator[Any]:
        self.answering = True
        try:
            for index, request in reversed([*enumerate(requests)]):
                row = request.prompt.token_ids[0]
                self.before(row)
                if self.paused:
                    return
                self.answered += 1
                version = self.version - self.lag(row)
                answer = Answer.sampled((row,), (0.0,), str(row), "stop", version)
                yield index, (answer,) * sampling.samples
        finally:
            self.answering = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def publish(self, version: int) -> None:
        assert not self.answering
        self.version = version


class TokenByToken(Engine):
    """Answers grow side by side, a token at a time, to `length`. held(row, tokens so far): whether an answer does not
    grow for now; where none does, `stuck` is called and the engine waits for a pause. It begins `at_once` requests at
    most. Log-probs are the versions, negative. `asked` lists (row, tokens there were) of all requests, `made` counts
    the tokens of each row."""

    def __init__(
        self, held: Callable[[int, int], bool] = lambda _row, _made: False, *, length: int = 6, at_once: int = 100
    ) -> None:
        super().__init__()
        self.length, self.held, self.at_once = length, held, at_once
        self.stuck: Callable[[], None] = lambda: None
        self.changed = threading.Condition()
        self.asked: list[tuple[int, int]] = []
        self.made: dict[int, int] = {}

    def stream(self, requests: Sequence[Any], sampling: SamplingParams) -> Iterator[Any]:
        some = [*enumerate(requests)][: self.at_once]
        grown = {i: request.partial_answers[0] if request.partial_answers else None for i, request in some}
        self.asked += [
            (r.prompt.token_ids[0], len(r.partial_answers[0].token_ids) if r.partial_answers else 0) for _, r in some
        ]
        self.answering = True
        try:
            while grown and not self.paused:
                moved = False
                for index in [*grown]:
                    row, before = requests[index].prompt.token_ids[0], grown[index]
                    made = 0 if before is None else len(before.token_ids)
                    if self.held(row, made):
                        continue
                    moved, self.made[row] = True, made + 1
                    finish = "stop" if made + 1 == self.length else "abort"
                    one = Answer.sampled((row,), (float(-self.version),), str(row), finish, self.version)
                    grown[index] = one if before is None else before.continued_by(one, one.text)
                    if finish == "stop":
                        yield index, (grown.pop(index),) * sampling.samples
                if not moved:
                    self.stuck()
                    with self.changed:
                        self.changed.wait_for(lambda: self.paused, timeout=0.02)
            yield from ((index, (one,) * sampling.samples) for index, one in grown.items() if one is not None)
        finally:
            self.answering = False

    def pause(self) -> None:
        with self.changed:
            self.paused = True
            self.changed.notify_all()


@dataclass
class Rewards:
    """Grades by number: rows of `equal` teach nothing."""

    equal: set[int] = field(default_factory=set)
    delay: float = 0.0
    graded: int = 0

    def prefetch(self, _pairs: Sequence[tuple[Answer, Task]]) -> list[Any]:
        """They ask no server."""
        return []

    def metrics(self) -> dict[str, float]:
        return {}

    def grade_many(self, pairs: Sequence[tuple[Answer, Task]], _fetches: Sequence[Any] = ()) -> list[Score]:
        time.sleep(self.delay)
        self.graded += 1
        return [Score(0.0 if task.answer in self.equal else float(i)) for i, (_, task) in enumerate(pairs)]


@dataclass
class Bench:
    """What a page holds: the stream that counts what was trained, and what runs ahead of it."""

    engine: Engine
    staleness: int = 1
    count: int = 4
    last: int = 8
    step: int = 0
    rewards: Rewards = field(default_factory=Rewards)
    resample_rounds: int = 0
    partial: bool = False
    over_sample: int = 0
    time_limit: float | None = None
    state: dict[str, Any] | None = None
    trained: list[list[int]] = field(default_factory=list)
    ages: list[list[int]] = field(default_factory=list)
    said: list[dict[str, float]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def run(self, steps: int | None = None, between: Callable[[], None] = lambda: None) -> Bench:
        self.stream = Stream(TASKS, 0, self.count)
        if self.state is None:
            self.stream.draw(self.step * self.count)
        else:
            self.stream.restore(self.state)
        self.engine.version = self.step
        source = Tasks(copy.copy(self.stream))
        sampler = SyncRollouts(source, self.engine, self.rewards, SamplingParams(2), 0, False, self.time_limit)
        ahead = AsyncRollouts(
            sampler,
            self.stream,
            staleness=self.staleness,
            count=self.count,
            step=self.step,
            last=self.last,
            partial=self.partial,
            over_sample=self.over_sample,
        )
        with closing(ahead):
            for step in range(self.step + 1, (steps or self.last) + 1):
                clock = Clock()
                groups, _ = ahead.draw(step, self.count, self.resample_rounds, clock)
                between()
                self.groups += groups
                self.trained.append([group.task.answer for group in groups])
                self.ages.append([step - 1 - group.answers[0].version for group in groups])
                self.said.append(ahead.metrics())
                with ahead.at_rest(clock):
                    self.engine.publish(step)
                    self.saved = self.stream.state()
        return self


def rows(count: int) -> list[int]:
    return Stream(TASKS, 0, 4).draw(count)
