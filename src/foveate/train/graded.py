"""Which answers of a step are compared with each other, and which are trained on.

An answer that could not be graded has no reward: it is neither compared nor trained on. A truncated answer may be
compared and not be trained on (`algorithm.mask_truncated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foveate.environments.protocol import OF_ENVIRONMENT
from foveate.errors import DataError
from foveate.records import Answer, Group


@dataclass(frozen=True, slots=True)
class ComparedGroup:
    """The graded part of group number `place` of a step; `answers` are the places of its answers in that group."""

    place: int
    group: Group
    answers: tuple[int, ...]


def compared_groups(groups: Sequence[Group], *, least: int) -> list[ComparedGroup]:
    """The groups with their graded answers alone, without those that have fewer than `least` of them (all, where a
    group has fewer answers) or whose greedy answer, which the algorithm compares with, is not graded. Raises DataError
    where no answer of the step is graded."""
    require_grades(groups)
    found = []
    for place, group in enumerate(groups):
        graded = tuple(number for number, score in enumerate(group.scores) if score.value is not None)
        if len(graded) < min(least, len(group.answers)) or (group.baseline and group.baseline.value is None):
            continue
        if len(graded) < len(group.answers):
            answers, scores = (tuple(some[number] for number in graded) for some in (group.answers, group.scores))
            group = replace(group, answers=answers, scores=scores)
        found.append(ComparedGroup(place, group, graded))
    return found


def is_truncated(answer: Answer) -> bool:
    """Whether the answer reached its limit of tokens or of time."""
    return answer.finish != "stop"


def require_grades(groups: Sequence[Group]) -> None:
    """Raise DataError, with the first traceback, if no answer of a step was graded: the grader itself is at fault."""
    scores = [(group, score) for group in groups for score in group.scores]
    if any(score.value is not None for _, score in scores):
        return
    group, score = next(((group, score) for group, score in scores if score.trace), scores[0])
    by_environment = score.note.startswith(OF_ENVIRONMENT)
    fix = "environment" if by_environment else "reward, or the ground truth that it reads"
    raise DataError(
        f"none of the {len(scores)} answers of a step could be graded; the first, to {group.task.where}: {score.note}; "
        f"fix the {fix}\n{score.trace}".rstrip()
    )
