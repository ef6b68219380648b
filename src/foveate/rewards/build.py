"""From the name of a reward and its settings to the function that grades, and to the check of its ground truth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from foveate.records import Score, Task
from foveate.registry import bind, resolve
from foveate.rewards import BUILDERS, CHECK_BUILDERS, CHECKS, REWARDS

Reward = Callable[[str, Task], Score]
Check = Callable[[Task], list[tuple[str, str]]]


def make_reward(name: str, settings: Mapping[str, Any]) -> Reward:
    """A reward from the tables or by import path, with its settings filled in. What it raises for an answer is left to
    the border around graders (`foveate.rewards.grade`). Raises ConfigError for an unknown name or setting."""
    function = bind(resolve({**REWARDS, **BUILDERS}, name, "reward"), settings, f"reward {name}")
    return function() if name in BUILDERS else function


def make_check(name: str, settings: Mapping[str, Any]) -> Check | None:
    """What validation demands of the ground truth for a reward with these settings, or None for one that takes any.
    Raises ConfigError for an unknown name, and for a missing setting of a reward that is made of others."""
    if name in CHECK_BUILDERS:
        return bind(resolve(CHECK_BUILDERS, name, "check"), settings, f"reward {name}")()
    if name not in CHECKS:
        resolve({**REWARDS, **BUILDERS}, name, "reward")
        return None
    check = resolve(CHECKS, name, "check")
    read = {key: settings[key] for key in inspect.signature(check).parameters if key in settings}
    return bind(check, read, f"reward {name}")
