"""From the next tasks of a run to groups of scored answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from foveate.encoding.reader import Reader
from foveate.errors import DataError
from foveate.records import Completion, Group, SamplingParams, Score, Task
from foveate.rewards.pool import Graders
from foveate.rollout.base import Answering, Request
from foveate.rollout.seeds import seed_of
from foveate.train.clock import Clock


@dataclass(frozen=True, slots=True)
class Sampler:
    """Takes tasks from the stream, has them answered with the weights of the step before, and grades the answers."""

    reader: Reader
    engine: Answering
    graders: Graders
    sampling: SamplingParams
    seed: int
    greedy_baseline: bool

    def draw(self, step: int, count: int, refills: int, clock: Clock) -> tuple[list[Group], list[Group]]:
        """The `count` groups that a step learns from, and all that were drawn for it (see `refilled`)."""
        return refilled(lambda first, missing: self._draw(step, first, missing, clock), count, refills)

    @contextmanager
    def at_rest(self, _clock: Clock) -> Iterator[None]:
        """Within it nothing is generated: always so between two calls of `draw`."""
        yield

    def metrics(self) -> dict[str, float]:
        """Nothing beside what the groups themselves say."""
        return {}

    def _draw(self, step: int, first: int, count: int, clock: Clock) -> list[Group]:
        """The groups of the next `count` tasks, which are number `first` and so on of the step. The answers depend on
        the run's seed, the step and that number."""
        with clock.phase("encode"):
            tasks, prompts = zip(*self.reader.take(count), strict=True)
        with clock.phase("generate"):
            seeds = [seed_of("train", self.seed, step, i) for i in range(first, first + count)]
            answers = self.engine.generate([*map(Request, prompts, seeds)], self.sampling)
            _require_version(answers, step - 1)
            greedy = []
            if self.greedy_baseline:
                one = replace(self.sampling, samples=1, temperature=0.0)
                greedy = self.engine.generate([*map(Request, prompts, seeds)], one)
        with clock.phase("reward"):
            scores = self.grade([*tasks, *tasks[: len(greedy)]], [*answers, *greedy])
        baselines = [own[0] for own in scores[count:]] or [None] * count
        return [*map(Group, tasks, prompts, answers, scores[:count], baselines)]

    def grade(self, tasks: Sequence[Task], answers: Sequence[tuple[Completion, ...]]) -> list[tuple[Score, ...]]:
        """The scores of all answers, graded at once, by task."""
        pairs = [(answer.text, task) for task, some in zip(tasks, answers, strict=True) for answer in some]
        scores = iter(self.graders.grade_many(pairs))
        return [tuple(next(scores) for _ in some) for some in answers]


def refilled(draw: Callable[[int, int], list[Group]], count: int, refills: int) -> tuple[list[Group], list[Group]]:
    """The `count` groups that a step learns from, and all that were drawn for it. draw(how many there are, how many
    more to draw).

    Dynamic sampling (DAPO, arXiv 2503.14476): groups of equal rewards, which teach nothing, are replaced by groups
    of the next tasks, as many as are missing in each of at most `refills` rounds. What is missing even then is
    filled with groups of equal rewards, so that the size of a step stays the same.
    """
    drawn = draw(0, count)
    for _ in range(refills):
        missing = count - sum(map(_is_informative, drawn))
        if missing <= 0:
            break
        drawn += draw(len(drawn), missing)
    wanted = [group for group in drawn if _is_informative(group)] if refills else drawn
    spare = [group for group in drawn if not _is_informative(group)]
    return [*wanted, *spare[: count - len(wanted)]], drawn


def _is_informative(group: Group) -> bool:
    return len({score.value for score in group.scores}) > 1


def _require_version(answers: Sequence[tuple[Completion, ...]], version: int) -> None:
    found = {completion.version for group in answers for completion in group}
    if found != {version}:
        raise DataError(f"the engine answered with weights of step {sorted(found)}, the policy is at step {version}")
