"""`gymnasium`: an environment with gymnasium's reset and step, in which an answer is an action."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from foveate.data.conversations import valid_unicode
from foveate.environments.observe import observation
from foveate.environments.protocol import Environment, Observation, Step
from foveate.environments.tools import result_parts
from foveate.environments.trl import continued_prompt
from foveate.errors import ConfigError, one_line
from foveate.records import Task
from foveate.registry import resolve

ActionForm = Literal["text", "integer", "json"]


def gymnasium(
    *,
    make: str,
    settings: dict[str, Any] | None = None,
    action: str = "text",
    render: bool = False,
) -> Environment:
    """An environment with `reset(seed=...) -> (observation, info)` and `step(action) -> (observation, reward,
    terminated, truncated, info)`. make: an id of gymnasium's registry, or the import path of what makes it; settings:
    its arguments; action: how an answer becomes an action (text; integer: its last whole number; json: its last line;
    or the import path of a function of the text); render: show what its `render` draws, too. Observations that are
    arrays of bytes (height, width, 3) are images."""
    read = _ACTIONS.get(action) or resolve({}, action, "action")
    return _Gymnasium(_made(make, settings or {}), read, render)


def _made(make: str, settings: dict[str, Any]) -> Any:
    if ":" in make and ("." in make.partition(":")[0]):
        return resolve({}, make, "gymnasium environment")(**settings)
    try:
        library = importlib.import_module("gymnasium")
    except ModuleNotFoundError:
        raise ConfigError(
            f"environment gymnasium: {make!r} is an id of gymnasium, which is not installed; run pip install "
            "gymnasium, or name what makes it by its import path, such as my_env.py:make"
        ) from None
    try:
        return library.make(make, **settings)
    except Exception as error:  # of many kinds, all for what it does not know
        raise ConfigError(f"environment gymnasium: {make!r} cannot be made ({one_line(error)[:200]})") from None


class UnreadableAction(ValueError):
    """An answer that is no action; the model reads why."""


def _integer(text: str) -> int:
    words = [word.strip(".,:;!()[]*`'\"") for word in text.split()]
    numbers = [word for word in words if word.lstrip("-").isdecimal() and len(word) < 20]
    if not numbers:
        raise UnreadableAction("there is no whole number in it")
    return int(numbers[-1])


def _json(text: str) -> Any:
    lines = text.strip().splitlines()
    try:
        action = json.loads(lines[-1] if lines else "")
        valid_unicode(json.dumps(action, ensure_ascii=False))
        return action
    except (ValueError, RecursionError):
        raise UnreadableAction("its last line is no JSON") from None


_ACTIONS: dict[str, Callable[[str], Any]] = {"text": str.strip, "integer": _integer, "json": _json}


class _Gymnasium(Environment):
    def __init__(self, inner: Any, read: Callable[[str], Any], render: bool) -> None:
        self._inner, self._read, self._render = inner, read, render

    def reset(self, task: Task, seed: int) -> Sequence[Observation]:
        shown, _ = self._inner.reset(seed=seed % 2**31)
        return continued_prompt(task, self._parts(shown))

    def step(self, answer: str) -> Step:
        try:
            action = self._read(answer.rpartition("</think>")[2])
        except ValueError as error:
            message = observation("user", f"Error: the answer is no action: {one_line(error)[:200]}.")
            return Step((message,), 0.0, info={"calls": [{"name": "action", "error": True}]})
        shown, reward, terminated, truncated, _ = self._inner.step(action)
        done = bool(terminated or truncated)
        text, pictures = ("", ()) if done else result_parts(self._parts(shown))
        messages = () if done else (observation("user", text, *pictures),)
        return Step(messages, float(reward), done, {"calls": [{"name": "action", "error": False}]})

    def close(self) -> None:
        self._inner.close()

    def _parts(self, shown: Any) -> list[Any]:
        """An observation, and the drawing of it, as the parts of a message."""
        values = [shown, self._inner.render()] if self._render else [shown]
        return [_part(value) for value in values if value is not None]


def _part(value: Any) -> dict[str, Any]:
    if isinstance(value, Image.Image):
        return {"type": "image", "image": value}
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
        return {"type": "image", "image": Image.fromarray(value)}
    if isinstance(value, str):
        return {"type": "text", "text": value}
    return {"type": "text", "text": json.dumps(value, default=_plain, ensure_ascii=False)}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
