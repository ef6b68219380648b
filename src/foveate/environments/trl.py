"""`trl`: a class as TRL's `environment_factory` takes it, whose public methods are the tools of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from foveate.data.conversations import with_words
from foveate.environments.observe import observation, task_messages
from foveate.environments.protocol import Environment, Observation, Step
from foveate.environments.results import result_parts
from foveate.environments.tool_use import Calling
from foveate.environments.tools import Frame, Tool, build_tool, finished, method_tool
from foveate.errors import ConfigError, DataError
from foveate.records import Task
from foveate.registry import resolve
from foveate.rewards.build import ROW_COLUMNS

_RESERVED = ("reset", "get_reward")


def trl(
    *,
    factory: str,
    tools: list[str | dict[str, Any]] | None = None,
    frame: Frame = "model",
    max_calls: int = 4,
    shown: bool = True,
) -> Environment:
    """A class, or a function that makes an object, as TRL's `environment_factory` takes it: `reset(**row)` returns None
    or what the prompt is continued with, public methods are tools, and `get_reward()` is the reward, where there is
    one. factory: its import path, such as my_env.py:Game; tools: others, as in `tools`."""
    made = resolve({}, factory, "TRL environment")
    if not callable(made):
        raise ConfigError(f"environment trl: {factory} is {made!r:.60}; it must be a class, or a function")
    instance = made()
    methods = _public_methods(instance)
    if "reset" not in methods:
        raise ConfigError(f"environment trl: {factory} has no method reset(**row)")
    own = [method_tool(name, method) for name, method in methods.items() if name not in _RESERVED]
    return _TRL(methods, [*map(build_tool, tools or []), *own], frame, max_calls, shown)


def gives_reward(factory: str) -> bool:
    """Whether the objects of a factory have TRL's `get_reward`. Raises ConfigError for an unknown one."""
    made = resolve({}, factory, "TRL environment")
    return "get_reward" in dir(made if inspect.isclass(made) or not callable(made) else made())


def _public_methods(instance: Any) -> dict[str, Callable[..., Any]]:
    found = inspect.getmembers(instance, predicate=inspect.ismethod)
    return {name: method for name, method in found if not name.startswith("_")}


class _TRL(Calling):
    def __init__(
        self,
        methods: Mapping[str, Callable[..., Any]],
        tools: Sequence[Tool],
        frame: Frame,
        max_calls: int,
        shown: bool,
    ) -> None:
        super().__init__(tools, frame, max_calls, shown)
        self._reset, self._reward = methods["reset"], methods.get("get_reward")

    def opening(self, task: Task, seed: int) -> Sequence[Observation]:
        row = {name: read(task) for name, read in ROW_COLUMNS.items()} | dict(task.meta) | {"seed": seed}
        row["prompt"] = [{"role": message.role, "content": with_words(message.content)} for message in task.messages]
        return continued_prompt(task, _called(self._reset, row))

    def answered(self, answer: str) -> Step:  # noqa: ARG002
        return Step(reward=self.last_reward(), done=True)

    def last_reward(self) -> float | None:
        return None if self._reward is None else _called(self._reward, {})


def _called(method: Callable[..., Any], row: Mapping[str, Any]) -> Any:
    """The result of a method, which may be a coroutine, with those of some arguments that it takes."""
    parameters = inspect.signature(method).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return finished(method(**{key: value for key, value in row.items() if takes_any or key in parameters}))


def continued_prompt(task: Task, shown: Any) -> tuple[Observation, ...]:
    """The messages of a task, the last one continued by what an environment shows: None, a text, images, or parts."""
    messages = task_messages(task)
    if shown is None:
        return messages
    text, pictures = result_parts(shown, "reset")
    more = observation("user", text, *pictures)
    last = messages[-1]
    if last.role != "user":
        raise DataError(f"the last message of the prompt is the {last.role}'s; it must be the user's to be continued")
    content = "\n".join(part for part in (last.content, more.content) if part)
    return (*messages[:-1], replace(last, content=content, images=(*last.images, *more.images)))
