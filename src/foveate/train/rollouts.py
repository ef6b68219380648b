"""From the next tasks of a run to groups of scored answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Timer
from typing import Any, Self

from foveate.data.answers import RIGHT, ScoredAnswer, score_fields
from foveate.encoding.reader import Reader
from foveate.environments.turns import Turn
from foveate.errors import DataError
from foveate.records import Answer, Group, Prompt, SamplingParams, Score, Task
from foveate.rewards.pool import Graders
from foveate.rollout.conversations import Conversations
from foveate.rollout.credit import FUNCTION_ALONE, AnswerCredit, Outcome, places_to_grade, scored
from foveate.rollout.engine import Engine, Request
from foveate.rollout.seeds import seed_of
from foveate.train.clock import Clock

Answers = tuple[Answer, ...]
Scores = tuple[Score, ...]
_Waiting = tuple[Task, Answers, Sequence[Outcome | None], list[Future[Any]], Future[Scores]]
"""Answers to be graded, what became of those with environments, what was asked of servers, and where scores go."""


@dataclass(slots=True)
class PendingGroup:
    """A task that is being answered. `place`: its number in the stream; `request`: with what a pause left of its
    answers; `seconds`: for which the engine has worked on it; `kind`: "greedy" for its baseline; `asked`: the task as
    its environment began it, and else itself."""

    place: int
    task: Task
    request: Request
    seconds: float = 0.0
    kind: str = ""
    asked: Task = field(init=False)

    def __post_init__(self) -> None:
        self.asked = self.task

    @property
    def key(self) -> tuple[str, int]:
        """The name of its environments."""
        return self.kind, self.place


@dataclass(frozen=True, slots=True)
class AnsweredGroup:
    """A task with all its answers, which are being graded."""

    place: int
    task: Task
    prompt: Prompt
    answers: Answers
    scores: Future[Scores]
    turns: tuple[tuple[Turn, ...], ...] = ()

    def scored(self, baseline: Score | None) -> Group:
        """The group, as soon as its scores are there. `baseline`: the score of its greedy answer."""
        return Group(self.task, self.prompt, self.answers, self.scores.result(), baseline, self.turns)


class Grading:
    """Grades groups beside what goes on, in a thread that takes all that wait at once. Leaving waits for the rest.
    credit: how environments count, of answers that have one."""

    def __init__(self, graders: Graders, credit: AnswerCredit = FUNCTION_ALONE) -> None:
        self._graders, self._credit = graders, credit
        self._waiting: deque[_Waiting] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grading")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)

    def submit(self, task: Task, answers: Answers, outcomes: Sequence[Outcome] = ()) -> Future[Scores]:
        """`outcomes`: what became of answers with environments."""
        future: Future[Scores] = Future()
        known = outcomes or [None] * len(answers)
        fetches = self._graders.prefetch([(answers[place], task) for place in places_to_grade(known, self._credit)])
        self._waiting.append((task, answers, known, fetches, future))
        self._pool.submit(self._grade)
        return future

    def _grade(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not batch:
            return
        try:
            scores = iter(
                scored(
                    self._graders,
                    [(answer, task) for task, answers, *_ in batch for answer in answers],
                    [one for _, _, outcomes, *_ in batch for one in outcomes],
                    self._credit,
                    [fetch for *_, fetches, _ in batch for fetch in fetches],
                )
            )
            found = [tuple(next(scores) for _ in answers) for _, answers, *_ in batch]
        except BaseException as error:
            for *_, future in batch:
                future.set_exception(error)
            return
        for (*_, future), own in zip(batch, found, strict=True):
            future.set_result(own)


@dataclass(frozen=True, slots=True)
class SyncRollouts:
    """Takes tasks from the stream, has them answered with the weights of the step before, and grades the answers, each
    group while others are still being answered. time_limit: seconds for which the engine works on a group; what is
    unfinished then is cut."""

    reader: Reader
    engine: Engine
    graders: Graders
    sampling: SamplingParams
    seed: int
    greedy_baseline: bool
    time_limit: float | None = None
    conversations: Conversations | None = None

    def draw(self, step: int, count: int, resample_rounds: int, clock: Clock) -> tuple[list[Group], list[Group]]:
        """The `count` groups that a step learns from, and all that were drawn for it (see `resample_groups`)."""
        taken = resample_groups(lambda first, missing: self._draw(step, first, missing, clock), count, resample_rounds)
        self.reader.observe([success_of(group) for group in taken[1]])
        return taken

    @contextmanager
    def at_rest(self, _clock: Clock) -> Iterator[None]:
        """Within it nothing is generated: always so between two calls of `draw`."""
        yield

    def metrics(self) -> dict[str, float]:
        """Of what the rewards ask of servers; and how often environments failed so far, and were begun anew."""
        return self.graders.metrics() | ({} if self.conversations is None else self.conversations.metrics())

    def _draw(self, step: int, first: int, count: int, clock: Clock) -> list[Group]:
        """The groups of the next `count` tasks, which are number `first` and so on of the step. The answers depend on
        the run's seed, the step and that number."""
        with clock.phase("encode"):
            tasks, prompts = zip(*self.reader.take(count), strict=True)
        numbers = range(first, first + count)
        requests = [Request(p, seed_of("train", self.seed, step, i)) for p, i in zip(prompts, numbers, strict=True)]
        pending = [*map(PendingGroup, numbers, tasks, requests)]
        with clock.phase("environment"):
            self.begin(pending, self.sampling)
        with self.grading() as grading:
            with clock.phase("generate"):
                answered = self.answer(pending, self.sampling, grading)
                _require_version(answered, step - 1)
                greedy = self.greedy(pending, grading)
            with clock.phase("reward"):
                baselines = [one.scores.result()[0] for one in greedy] or [None] * count
                return [one.scored(baseline) for one, baseline in zip(answered, baselines, strict=True)]

    def begin(self, pending: Sequence[PendingGroup], sampling: SamplingParams) -> None:
        """Open the environments of all answers, where they have any, whose prompts are what these begin with."""
        if self.conversations is None:
            return
        keys, tasks, requests = zip(*((one.key, one.task, one.request) for one in pending), strict=True)
        begun = self.conversations.begin(keys, tasks, requests, sampling.samples)
        for one, (task, request) in zip(pending, begun, strict=True):
            one.asked, one.request = task, request

    def drop(self, pending: PendingGroup) -> None:
        """A group is given up: its environments end."""
        if self.conversations is not None:
            self.conversations.drop(pending.key, self.sampling.samples)

    def grading(self) -> Grading:
        """Graders for the answers of a round."""
        return Grading(self.graders, FUNCTION_ALONE if self.conversations is None else self.conversations.credit)

    def answer(
        self,
        pending: Sequence[PendingGroup],
        sampling: SamplingParams,
        grading: Grading,
        closing: Callable[[], bool] = lambda: False,
        finished: Callable[[AnsweredGroup], None] = lambda _: None,
    ) -> list[AnsweredGroup]:
        """Have all of them answered, and handed over to be graded, in order; or some, where all is `closing`. Each that
        is finished is told at once."""
        found: dict[int, AnsweredGroup] = {}
        left = pending
        while left and not closing():
            answered, left = self.round(left, sampling, grading, finished)
            found |= {one.place: one for one in answered}
        return [found[one.place] for one in pending if one.place in found]

    def greedy(
        self, pending: Sequence[PendingGroup], grading: Grading, closing: Callable[[], bool] = lambda: False
    ) -> list[AnsweredGroup]:
        """The same with their greedy answers, where the algorithm asks for these."""
        if not self.greedy_baseline:
            return []
        sampling = replace(self.sampling, samples=1, temperature=0.0)
        requests = [replace(one.request, partial_answers=()) for one in pending]
        ones = [PendingGroup(p.place, p.task, r, kind="greedy") for p, r in zip(pending, requests, strict=True)]
        self.begin(ones, sampling)
        return self.answer(ones, sampling, grading, closing)

    def round(
        self,
        pending: Sequence[PendingGroup],
        sampling: SamplingParams,
        grading: Grading,
        finished: Callable[[AnsweredGroup], None] = lambda _: None,
    ) -> tuple[list[AnsweredGroup], list[PendingGroup]]:
        """Have them answered until all are finished, or the engine is paused: those that are finished, and those that
        are left then, with what there is of their answers. Each that is finished goes to be graded at once; `finished`
        is told."""
        done: dict[int, AnsweredGroup] = {}
        talks = self.conversations

        def finish(number: int, answers: Answers, *, is_late: bool = False) -> None:
            one, outcomes = pending[number], tuple[Outcome, ...]()
            if talks is not None:
                anew = None if is_late else talks.restart(one.key, answers)
                if anew is not None:
                    one.request = replace(one.request, partial_answers=anew)
                    return
                answers, outcomes = talks.finish(one.key, answers)
            scores = grading.submit(one.asked, answers, outcomes)
            turns = tuple(outcome.turns for outcome in outcomes)
            done[number] = AnsweredGroup(one.place, one.asked, one.request.prompt, answers, scores, turns)
            finished(done[number])

        begin = time.monotonic()
        observing = () if talks is None else (partial(talks.observe, [one.key for one in pending]),)
        with _limited(self.engine, self.time_limit, pending):
            stream = self.engine.stream([one.request for one in pending], sampling, *observing)
            try:
                for number, answers in stream:
                    if any(answer.finish == "abort" for answer in answers):
                        pending[number].request = replace(pending[number].request, partial_answers=answers)
                    else:
                        finish(number, answers)
            finally:
                stream.close()
        spent = time.monotonic() - begin
        for number, one in enumerate(pending):
            begun = one.request.partial_answers
            if number not in done and begun:
                one.seconds += spent
                if self._is_late(one) and all(len(answer) for answer in begun):
                    finish(number, begun, is_late=True)
                elif self._is_late(one):  # an answer that is still empty cannot be trained
                    one.seconds = 0.0
        return [*done.values()], [one for number, one in enumerate(pending) if number not in done]

    def _is_late(self, pending: PendingGroup) -> bool:
        return self.time_limit is not None and pending.seconds >= self.time_limit - 1e-3


@contextmanager
def _limited(engine: Engine, seconds: float | None, pending: Sequence[PendingGroup]) -> Iterator[None]:
    """Within it the engine is paused when the first of them has had its time."""
    if seconds is None:
        yield
        return
    timer = Timer(max(0.0, seconds - max(one.seconds for one in pending)), engine.pause)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        engine.resume()


def resample_groups(
    draw: Callable[[int, int], list[Group]], count: int, resample_rounds: int
) -> tuple[list[Group], list[Group]]:
    """The `count` groups that a step learns from, and all that were drawn for it. draw(how many there are, how many
    more to draw).

    Dynamic sampling (DAPO, arXiv 2503.14476): groups of equal rewards, which teach nothing, are replaced by groups
    of the next tasks, as many as are missing in each of at most `resample_rounds` rounds. What is missing even then is
    filled with groups of equal rewards, so that the size of a step stays the same. Answers that are not graded have no
    reward.
    """
    drawn = draw(0, count)
    for _ in range(resample_rounds):
        missing = count - sum(map(_is_informative, drawn))
        if missing <= 0:
            break
        drawn += draw(len(drawn), missing)
    wanted = [group for group in drawn if _is_informative(group)] if resample_rounds else drawn
    spare = [group for group in drawn if not _is_informative(group)]
    spare.sort(key=lambda group: sum(score.value is not None for score in group.scores) < 2)  # these are dropped later
    return [*wanted, *spare[: count - len(wanted)]], drawn


def success_of(group: Group) -> float | None:
    """The share of a group's graded answers that are right (`foveate.data.answers.RIGHT`); None without any."""
    graded = [
        ScoredAnswer(answer.text, answer.finish, answer.trained_tokens, **score_fields(score))
        for answer, score in zip(group.answers, group.scores, strict=True)
        if score.value is not None
    ]
    return sum(map(RIGHT, graded)) / len(graded) if graded else None


def _is_informative(group: Group) -> bool:
    if group.baseline is not None and group.baseline.value is None:
        return False
    return len({score.value for score in group.scores if score.value is not None}) > 1


def _require_version(answered: Sequence[AnsweredGroup], version: int) -> None:
    found = {answer.version for one in answered for answer in one.answers}
    if found != {version}:
        raise DataError(f"the engine answered with weights of step {sorted(found)}, the policy is at step {version}")
