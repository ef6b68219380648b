"""Rewards of graders in processes of their own: each of these imports this file, which imports no torch."""

from __future__ import annotations

import time

from foveate.records import Score, Task

PLACE = __file__


def sleeps_for_ever(text: str, task: Task) -> Score:
    """Hangs on every answer to the first task."""
    if task.where.endswith(" row 1"):
        time.sleep(1e6)
    return Score(-len(text))


def form_only(text: str, _: Task) -> float:
    return float(text.startswith("<think>\n"))


def never_readable(_text: str, task: Task) -> float:
    raise KeyError(task.answer)


def short_is_right(text: str, _: Task) -> Score:
    """A reward that calls an answer a hit or a miss, without any box."""
    right = float(len(text) % 2)
    return Score(right, {"hit": right})
