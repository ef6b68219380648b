"""The border around graders: whatever a grader does, an answer gets a score and the run goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from foveate.records import FAILED, DataError, Score, Task
from foveate.rewards.build import Check, Reward, make_check, make_reward

logger = logging.getLogger(__name__)


def build_reward(name: str, settings: Mapping[str, Any]) -> Reward:
    """A reward from the table or by import path, with its settings filled in and behind the border of `grade`.
    Raises ConfigError for an unknown name or setting."""
    return partial(grade, make_reward(name, settings))


def truth_check(name: str, settings: Mapping[str, Any] | None = None) -> Check | None:
    """What validation demands of the ground truth for a reward, or None for one that takes any."""
    return make_check(name, settings or {})


def grade(reward: Reward, text: str, task: Task) -> Score:
    """The reward of an answer. A grader that raises or gives no finite number scores 0, with the reason as a note.

    Raises DataError for a function that does not return a Score: no answer could ever earn anything.
    """
    try:
        score = reward(text, task)
    except Exception as error:
        logger.warning("%s: the grader failed (%s: %s); the answer scores 0", task.where, type(error).__name__, error)
        return Score(0.0, note=f"{FAILED}: {type(error).__name__}: {error}")
    if not isinstance(score, Score):
        raise DataError(
            f"the reward returned {type(score).__name__} {score!r:.60}; it must return a foveate.records.Score"
        )
    parts = {name: float(value) for name, value in score.parts.items()}
    if not math.isfinite(score.value):
        return Score(0.0, parts, note=f"{FAILED}: gave {score.value}")
    return Score(float(score.value), parts, score.note)
