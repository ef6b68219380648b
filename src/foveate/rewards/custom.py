"""Rewards written for verl and its descendants: a `compute_score` function in a file."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from foveate.records import Score, Task
from foveate.registry import ConfigError, resolve
from foveate.rewards.build import Reward

DATA = ("data_source", "solution_str", "ground_truth", "extra_info")


def compute_score(*, path: str, name: str = "compute_score", arguments: dict[str, Any] = {}) -> Reward:  # noqa: B006
    """The reward `name(data_source, solution_str, ground_truth, extra_info, **arguments)` of a Python file.

    Args:
        path: the file, `rewards/mine.py`, or an installed module, `my_package.rewards`.
        name: the function in it. It returns a number, or a mapping with the number under "score" whose other numbers
            become parts of the score.
        arguments: further keyword arguments (`custom_reward_function.reward_kwargs`).

    The ground truth comes as it is stored, `extra_info` as a new dict. Raises ConfigError, before any answer, for a
    file or function that is not there, a coroutine, and arguments that the function does not take or misses.
    """
    function = resolve({}, f"{path}:{name}", "compute_score function")
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward compute_score: {name!r} in {path} must be a plain function, found {function!r:.60}")
    try:
        inspect.signature(function).bind(**dict.fromkeys(DATA), **arguments)
    except TypeError as error:
        raise ConfigError(
            f"reward compute_score: {name} in {path} cannot be called with {', '.join((*DATA, *arguments))} ({error}); "
            "further arguments are given under `arguments`"
        ) from None

    def reward(text: str, task: Task) -> Score:
        result = function(
            data_source=task.source,
            solution_str=text,
            ground_truth=task.answer,
            extra_info=dict(task.meta),
            **arguments,
        )
        return as_score(result)

    return reward


def as_score(result: Any) -> Score:
    """A number, or a mapping with a number under "score" whose other numbers are parts, as a Score. Raises TypeError or
    ValueError for anything else."""
    if not isinstance(result, dict):
        return Score(float(result))
    if "score" not in result:
        raise ValueError(f'a mapping without "score": {", ".join(map(str, result))}')
    numbers = {str(key): float(value) for key, value in result.items() if isinstance(value, int | float | np.number)}
    return Score(float(result["score"]), {key: value for key, value in numbers.items() if key != "score"})
