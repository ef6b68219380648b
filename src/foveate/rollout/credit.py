"""The score of an answer with an environment: the rewards of its turns, the reward function, or both."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

from foveate.environments.protocol import OF_ENVIRONMENT, Step
from foveate.environments.turns import Turn
from foveate.errors import DataError
from foveate.records import Answer, Score, Task
from foveate.rewards.pool import Graders


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of an answer with its environment. `reward`: of all of its steps as they count, 0 where the answer ended
    before it came to one, None where its environment was done and gave none; `note`: why it is not graded, or nothing;
    `unread`: its environment gave a reward that does not count; `trace`: where its environment failed."""

    turns: tuple[Turn, ...]
    reward: float | None
    note: str
    unread: bool = False
    trace: str = ""


@dataclass(frozen=True, slots=True)
class AnswerCredit:
    """How an answer is scored. Rewards of its environment's steps count where `steps` is "sum" or "final", step t
    `discount`**t times; where `function`, the value of the reward function is added. `chosen`: the settings say in so
    many words that only the function counts."""

    steps: Literal["none", "final", "sum"] = "none"
    discount: float = 1.0
    function: bool = True
    chosen: bool = False

    def of_turns(self, steps: Sequence[Step]) -> list[float | None]:
        """The reward that counts of each turn; None: nothing."""
        if self.steps == "none":
            return [None] * len(steps)
        counted = [None if one.reward is None else self.discount**t * one.reward for t, one in enumerate(steps)]
        return counted if self.steps == "sum" else [*[None] * (len(counted) - 1), *counted[-1:]]

    def score(self, outcome: Outcome, graded: Score) -> Score:
        """The score of an answer. Raises DataError for rewards that do not count."""
        if outcome.note:
            return Score(None, note=outcome.note, trace=outcome.trace)
        if self.steps == "none":
            if outcome.unread and not self.chosen:
                raise DataError(
                    "the environment gives rewards, which do not count: set environment.reward to environment or to "
                    "both, or to function to leave them out"
                )
            return graded
        if outcome.reward is None:
            return Score(None, note=f"{OF_ENVIRONMENT}it gave no reward")
        parts = {"environment": outcome.reward}
        if not self.function:
            return Score(outcome.reward, parts)
        if graded.value is None:
            return graded
        parts = {**graded.parts, **parts, "function": graded.value}
        return replace(graded, value=graded.value + outcome.reward, parts=parts)


FUNCTION_ALONE = AnswerCredit()


def scored(
    graders: Graders,
    answers: Sequence[tuple[Answer, Task]],
    outcomes: Sequence[Outcome | None],
    credit: AnswerCredit = FUNCTION_ALONE,
    fetches: Sequence[Future[Any]] = (),
) -> list[Score]:
    """The score of each answer; with what became of it with its environment, if it had one. fetches: of the answers
    that the reward function grades, where it was foreseen (`Graders.prefetch`)."""
    asked = places_to_grade(outcomes, credit)
    found = graders.grade_many([_without_tiles(*answers[place]) for place in asked], fetches)
    graded = dict(zip(asked, found, strict=True))
    return [
        graded[place] if one is None else credit.score(one, graded.get(place, Score(None)))
        for place, one in enumerate(outcomes)
    ]


def places_to_grade(outcomes: Sequence[Outcome | None], credit: AnswerCredit) -> list[int]:
    """Which answers the reward function grades: not those whose environment failed, or whose reward is its alone."""
    return [
        place for place, one in enumerate(outcomes) if one is None or (not one.note and (credit.function or one.unread))
    ]


def _without_tiles(answer: Answer, task: Task) -> tuple[Answer, Task]:
    """For graders, which read tokens and texts: pixels and the experts of tokens are large."""
    if all(segment.tiles is None and segment.routed_experts is None for segment in answer.segments):
        return answer, task
    light = tuple(replace(segment, tiles=None, routed_experts=None) for segment in answer.segments)
    return replace(answer, segments=light, prompt_experts=None), task
