"""`gymnasium`: an environment with gymnasium's reset and step, in which an answer is an action."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from foveate.data.conversations import read_json_text
from foveate.environments.observe import observation
from foveate.environments.protocol import Environment, EnvironmentFault, Observation, Step
from foveate.environments.results import json_text, result_parts
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
    arrays of bytes (height, width, 3), also in a dict, are images."""
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
        return read_json_text(lines[-1] if lines else "")
    except (ValueError, RecursionError):
        raise UnreadableAction("its last line is no JSON") from None


_ACTIONS: dict[str, Callable[[str], Any]] = {"text": str.strip, "integer": _integer, "json": _json}


class _Gymnasium(Environment):
    def __init__(self, inner: Any, read: Callable[[str], Any], render: bool) -> None:
        self._inner, self._read, self._render = inner, read, render
        self.shows_images = "render" if render else ""

    def reset(self, task: Task, seed: int) -> Sequence[Observation]:
        shown, _ = _values(self._inner.reset(seed=seed % 2**31), ("observation", "info"), "reset")
        return continued_prompt(task, self._parts(shown, "reset"))

    def step(self, answer: str) -> Step:
        try:
            action = self._action(answer)
        except ValueError as error:
            message = observation("user", f"Error: the answer is no action: {one_line(error)[:200]}.")
            return Step((message,), 0.0, info={"calls": [{"name": "action", "error": True}]})
        shown, reward, terminated, truncated, _ = _values(self._inner.step(action), _STEP, "step")
        done = bool(terminated or truncated)
        text, pictures = ("", ()) if done else result_parts(self._parts(shown, "step"), "step")
        messages = () if done else (observation("user", text, *pictures),)
        return Step(messages, reward, done, {"calls": [{"name": "action", "error": False}]})

    def close(self) -> None:
        self._inner.close()

    def _action(self, answer: str) -> Any:
        """The action that an answer is. Raises ValueError for one that is none of the environment's."""
        action = self._read(answer.rpartition("</think>")[2])
        try:
            space = self._inner.action_space
        except AttributeError:  # it does not say what its actions are
            return action
        if isinstance(action, int | str) and not space.contains(action):
            raise UnreadableAction(f"{action!r:.60} is not one of {space!s:.100}")
        return action

    def _parts(self, shown: Any, who: str) -> list[Any]:
        """An observation, and the drawing of it, as the parts of a message."""
        values = [shown, self._inner.render()] if self._render else [shown]
        return [part for value in values if value is not None for part in _parts_of(value, who)]


_STEP = ("observation", "reward", "terminated", "truncated", "info")


def _values(result: Any, names: Sequence[str], who: str) -> Any:
    if not isinstance(result, tuple) or len(result) != len(names):
        found = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise EnvironmentFault(f"{who} returned {found}; it must return ({', '.join(names)}), as in gymnasium")
    return result


def _parts_of(value: Any, who: str) -> list[dict[str, Any]]:
    """An observation as parts: pictures, also those in a dict, are images, and the rest is text."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if _is_picture(value):
        return [_image(value)]
    pictures = {key: one for key, one in value.items() if _is_picture(one)} if isinstance(value, Mapping) else {}
    rest = {key: one for key, one in value.items() if key not in pictures} if pictures else value
    written = [{"type": "text", "text": json_text(_lists(rest), who)}] if rest is not None and rest != {} else []
    return [*map(_image, pictures.values()), *written]


def _is_picture(value: Any) -> bool:
    is_bytes = isinstance(value, np.ndarray) and value.dtype == np.uint8
    return isinstance(value, Image.Image) or (is_bytes and value.ndim == 3 and value.shape[2] in (1, 3, 4))


def _image(value: Any) -> dict[str, Any]:
    if isinstance(value, np.ndarray):
        value = Image.fromarray(value[:, :, 0] if value.shape[2] == 1 else value)
    return {"type": "image", "image": value}


def _lists(value: Any) -> Any:
    """A value with lists in the place of arrays."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _lists(one) for key, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value
