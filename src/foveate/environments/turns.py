"""The turns of an answer, for whoever looks at it later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foveate.environments.protocol import Observation, Step
from foveate.records import Image


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: said by the policy (role "assistant", so many `tokens`, with the reward of the step that
    ended here and the calls that it made), or by its environment."""

    role: str
    text: str
    images: tuple[Image, ...] = ()
    tokens: int | None = None
    reward: float | None = None
    calls: tuple[Mapping[str, Any], ...] = ()

    def stepped(self, step: Step, reward: float | None) -> Turn:
        """A turn of the policy with what its environment made of it."""
        calls = step.info.get("calls", ())
        is_list = isinstance(calls, list | tuple)
        return replace(self, reward=reward, calls=tuple(c for c in calls if isinstance(c, Mapping)) if is_list else ())

    def rewarded(self, reward: float | None) -> Turn:
        """A turn with one more reward."""
        return self if reward is None else replace(self, reward=(self.reward or 0.0) + reward)


def with_last_reward(steps: Sequence[Step], turns: int, reward: float | None) -> list[Step]:
    """The replies to an answer of so many turns that a limit has ended, with the reward for its end: a part of that of
    the last turn, also where the environment has not replied to it."""
    if reward is None:
        return [*steps]
    if len(steps) < max(turns, 1):
        return [*steps, Step(reward=reward)]
    return [*steps[:-1], replace(steps[-1], reward=(steps[-1].reward or 0.0) + reward)]


def is_over(steps: Sequence[Step]) -> bool:
    """Whether the environment itself has ended the answer, and no limit on turns."""
    return bool(steps) and steps[-1].done and not steps[-1].info.get("turn_limit")


def observed_turns(messages: Sequence[Observation]) -> list[Turn]:
    """The messages of an environment as turns."""
    return [Turn(one.role, one.content, one.images) for one in messages]
