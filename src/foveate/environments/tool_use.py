"""Environments whose answers call tools; `tools` lets a model use any of them before it answers a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import PIL.Image

from foveate.data.images import load_image
from foveate.environments.calls import MalformedCall, ToolCall, parse_calls
from foveate.environments.observe import encoded, observation, task_messages
from foveate.environments.protocol import Environment, EnvironmentFault, EnvironmentLimits, Observation, Step
from foveate.environments.tools import CallError, Frame, Seen, Tool, ToolResult, build_tool, tool_named
from foveate.errors import ConfigError
from foveate.records import Image, Task
from foveate.rewards.boxes import BOX_FRAME, FRAME

IN_THOUSANDTHS = (FRAME, FRAME)
_NO_ROOM = "Error: the result has no room in this turn."


@lru_cache(maxsize=2)
def _decoded(image: Image) -> PIL.Image.Image:
    """The image that a process decoded last is kept: answers of a group look at the same one."""
    return load_image(image)


class Calling(Environment):
    """The base of environments whose answers call tools: an answer without a call is the last one. Images of the
    conversation are numbered from 1 in the order in which the model sees them, those of the prompt first. `shown`:
    whether prompts show the tools."""

    def __init__(self, tools: Iterable[Tool], frame: Frame, max_calls: int, shown: bool) -> None:
        if max_calls < 1:
            raise ConfigError(f"max_calls must be at least 1, found {max_calls}")
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ConfigError(f"two tools are called {tool.name!r}, and a call could mean either: rename one")
            self._tools[tool.name] = tool
        self.shows_images = next((f"tool {one.name}" for one in self._tools.values() if one.returns_image), "")
        self._frame: Frame = frame
        self._max_calls, self._shown_tools = max_calls, shown
        self._images: list[Image] = []
        self._first_frame = IN_THOUSANDTHS

    def tools(self) -> Sequence[Mapping[str, Any]]:
        schemas = [tool.schema(self._frame) for tool in self._tools.values()]
        return schemas if self._shown_tools else []

    def reset(self, task: Task, seed: int) -> Sequence[Observation]:
        right, bottom = task.meta.get(BOX_FRAME, IN_THOUSANDTHS)
        self._first_frame = float(right), float(bottom)
        messages = self.opening(task, seed)
        self._images = [image for message in messages for image in message.images]
        return messages

    def opening(self, task: Task, seed: int) -> Sequence[Observation]:  # noqa: ARG002
        """The messages of the prompt, as `reset`."""
        return task_messages(task)

    def step(self, answer: str) -> Step:
        calls = parse_calls(answer)
        if not calls:
            return self.answered(answer)
        messages, done = list[Observation](), list[dict[str, Any]]()
        taken = calls[: self._max_calls]
        for left, call in zip(reversed(range(len(taken))), taken, strict=True):
            before = len(self._images)
            message, info = self._carried_out(call)
            if messages and self._is_too_much([*messages, message], left):
                del self._images[before:]
                message = observation("tool", _NO_ROOM)
                info = {"name": info["name"], "error": True}
            messages.append(message)
            done.append(info)
        if len(calls) > self._max_calls:
            messages.append(observation("tool", f"Error: at most {self._max_calls} calls of a turn are carried out."))
        return self.called(messages, {"calls": done})

    def _is_too_much(self, messages: Sequence[Observation], left: int) -> bool:
        """Whether results that a step may show one by one are too many together, with `left` calls still to come."""
        most = self.step_limits or EnvironmentLimits()
        texts = sum(len(one.content) for one in messages) + left * len(_NO_ROOM)
        images = sum(len(one.images) for one in messages)
        return images > most.max_images or texts > most.max_text

    def answered(self, answer: str) -> Step:  # noqa: ARG002
        """The end of a conversation: an answer that calls nothing."""
        return Step(done=True)

    def called(self, messages: list[Observation], info: Mapping[str, Any]) -> Step:
        """The reply to a turn with calls: the results of the tools."""
        return Step(tuple(messages), info=info)

    def _carried_out(self, call: ToolCall | MalformedCall) -> tuple[Observation, dict[str, Any]]:
        """The result of a call as a message, and what the metrics are told of it."""
        name = call.name if isinstance(call, ToolCall) and call.name in self._tools else ""
        try:
            if isinstance(call, MalformedCall):
                raise CallError(f"the call cannot be read: {call.reason}")
            tool = tool_named(self._tools, call.name)
            result = tool(call, self._Numbered(self), self._frame)
        except CallError as error:
            return observation("tool", f"Error: {error}"), {"name": name, "error": True}
        return self._shown(name, result), {"name": name, "error": False, **result.info}

    def _shown(self, name: str, result: ToolResult) -> Observation:
        """A result with the numbers of its images."""
        first = len(self._images) + 1
        try:
            images = [encoded(picture) for picture in result.pictures]
        except EnvironmentFault as error:
            raise EnvironmentFault(f"tool {name}: {error}") from None
        self._images += images
        numbers = [f"Image {first + index}" for index in range(len(images))]
        text = "\n".join(part for part in (", ".join(numbers), result.text) if part)
        return observation("tool", text or "Done.", *images)

    class _Numbered(Sequence[Seen]):
        """The images of a conversation, each decoded when it is looked at."""

        def __init__(self, environment: Calling) -> None:
            self._of = environment

        def __len__(self) -> int:
            return len(self._of._images)

        def __getitem__(self, index: Any) -> Any:
            of = self._of
            picture = _decoded(of._images[index]).copy()  # a tool may draw on it
            absolute = of._first_frame != IN_THOUSANDTHS
            own = (float(picture.width), float(picture.height)) if absolute else IN_THOUSANDTHS
            return Seen(picture, own if index else of._first_frame)


class ToolUse(Calling):
    """Answers to a task with the help of tools, scored by the run's reward. tools: names of `foveate environments`,
    import paths of plain functions (TRL's tools are such), or {name, settings}. frame: in what the model writes boxes:
    as its family does, in thousandths of the image's sides, or in pixels of the image. max_calls: of one turn. shown:
    whether prompts show the tools; the conversations of `foveate prepare` do not."""

    def __init__(
        self,
        *,
        tools: list[str | dict[str, Any]],
        frame: Frame = "model",
        max_calls: int = 4,
        shown: bool = True,
    ) -> None:
        if not tools:
            raise ConfigError("tools must name at least one tool")
        super().__init__(map(build_tool, tools), frame, max_calls, shown)
