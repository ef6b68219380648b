"""Tools: plain functions with type hints and a docstring, which a model calls.

A parameter of type `PIL.Image.Image` is an image of the conversation, which the model names by its number, from 1 in
the order in which it has seen them. A parameter of type `ImageBox` is a part of that image: the model writes it in the
frame of its family, and the function gets pixels. Keyword-only parameters are settings, which the model does not see. A
tool returns a text, a number, a dict, an image, or several of these.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import NoneType, UnionType
from typing import Any, Literal

from PIL import Image
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from foveate.data.conversations import read_json_text, shown
from foveate.environments import TOOLS
from foveate.environments.calls import ToolCall
from foveate.environments.results import result_parts
from foveate.errors import ConfigError, one_line
from foveate.registry import bind, explain, resolve, suggestion

Frame = Literal["model", "thousandths", "pixels"]
_BOX = tuple[float, float, float, float]


class ImageBox(tuple[float, float, float, float]):
    """A part of an image, as the type of a tool's parameter: (left, top, right, bottom) in pixels of it."""

    __slots__ = ()


_VALUES: dict[Any, Any] = {Image.Image: int, ImageBox: _BOX}
"""What a call gives for a parameter of these types."""


def _without_none(hint: Any) -> Any:
    """The type of an image or a box that may be left out."""
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    kinds = [one for one in typing.get_args(hint) if one is not NoneType] if is_union else []
    return kinds[0] if len(kinds) == 1 and kinds[0] in _VALUES else hint


class CallError(ValueError):
    """A call that cannot be carried out; the model reads why."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An image of the conversation, decoded, and the largest x and y of boxes as the model writes them."""

    picture: Image.Image
    frame: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The text and the pictures that a tool returned, and facts for `Step.info`."""

    text: str
    pictures: tuple[Image.Image, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tool:
    """A function with its settings filled in, under the name by which the model calls it.

    Raises ConfigError for a parameter without a type hint, with one of a type that no call can give, or that no call
    fills in."""

    name: str
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        for key, one in inspect.signature(self.function).parameters.items():
            if key not in self.parameters and (one.kind is not one.KEYWORD_ONLY or one.default is one.empty):
                raise ConfigError(
                    f"tool {self.name}: no call fills in its parameter {one}; name each that the model gives, and give "
                    "those behind `*` a default or a place in the tool's settings"
                )
        for key in self.parameters:
            if key not in self.hints:
                raise ConfigError(f"tool {self.name}: parameter {key} has no type hint, which the model is shown")
        for key, hint in self.hints.items():
            try:
                TypeAdapter(_VALUES.get(hint, hint))
            except (PydanticUserError, TypeError):
                raise ConfigError(
                    f"tool {self.name}: parameter {key} has the type {inspect.formatannotation(hint)}; allowed: "
                    "PIL.Image.Image and ImageBox, alone or with None, and texts, numbers, lists, dicts and Literal"
                ) from None

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that the model fills in."""
        found = inspect.signature(self.function).parameters
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return {key: one for key, one in found.items() if one.kind in kinds}

    @property
    def _whole(self) -> Callable[..., Any]:
        """The function without its settings, whose hints and docstring these are."""
        return self.function.func if isinstance(self.function, partial) else self.function

    @cached_property
    def hints(self) -> dict[str, Any]:
        try:
            found = typing.get_type_hints(self._whole)
        except (NameError, TypeError, AttributeError) as error:
            raise ConfigError(f"tool {self.name}: its type hints cannot be read ({one_line(error)})") from None
        return {key: _without_none(hint) for key, hint in found.items() if key in self.parameters}

    @cached_property
    def image_parameter(self) -> str | None:
        """The first parameter that is an image, which boxes are parts of."""
        return next((key for key, hint in self.hints.items() if hint is Image.Image), None)

    @property
    def returns_image(self) -> bool:
        """Whether it says that every result is an image."""
        return typing.get_type_hints(self._whole).get("return") is Image.Image

    def schema(self, frame: Frame = "model") -> dict[str, Any]:
        """The JSON schema that the prompt shows. Raises ConfigError where the docstring leaves out a parameter."""
        from transformers.utils.chat_template_utils import get_json_schema  # seconds, and workers need none of it

        plain: dict[Any, Any] = {Image.Image: int, ImageBox: list[float]}

        def described() -> None: ...

        described.__name__, described.__doc__ = self.name, inspect.getdoc(self._whole)
        described.__annotations__ = {key: plain.get(hint, hint) for key, hint in self.hints.items()}
        vars(described)["__signature__"] = inspect.Signature(
            [one.replace(annotation=described.__annotations__[key]) for key, one in self.parameters.items()]
        )
        try:
            schema = get_json_schema(described)
        except Exception as error:  # its classes are not exported
            raise ConfigError(f"tool {self.name}: {one_line(error)}; see docs/environments.md for an example") from None
        for key, hint in self.hints.items():
            about = schema["function"]["parameters"]["properties"][key]
            if hint is Image.Image:
                about["description"] += " Its number, from 1 in the order of the conversation."
            if hint is ImageBox:
                unit = "pixels" if frame == "pixels" else "thousandths of the image's sides"
                about["description"] += f" [left, top, right, bottom] in {unit}."
        return schema

    def __call__(self, call: ToolCall, images: Sequence[Seen], frame: Frame) -> ToolResult:
        """Carry out a call. Raises CallError for arguments that do not fit, and what the function raises as ValueError
        is one, too; other exceptions pass."""
        given = self._arguments(call)
        info: dict[str, Any] = {}
        seen = None
        for key, hint in self.hints.items():
            if hint is Image.Image and key in given:
                number = given[key]
                image = self._image(key, number, images)
                given[key] = image.picture
                if key == self.image_parameter:
                    seen, info["image"] = image, number
        for key, hint in self.hints.items():
            if hint is ImageBox and key in given:
                given[key] = self._box(key, given[key], seen, frame)
                if seen is not None:
                    sides = (seen.picture.width, seen.picture.height) * 2
                    info["box"] = [round(1000 * value / side, 1) for value, side in zip(given[key], sides, strict=True)]
        try:
            result = finished(self._called(given))
        except ValueError as error:
            raise CallError(f"{self.name}: {one_line(error)[:300]}") from None
        text, pictures = result_parts(result, f"tool {self.name}")
        if any(not picture.width or not picture.height for picture in pictures):
            raise CallError(f"{self.name}: the result is an image without pixels")
        return ToolResult(text, pictures, info)

    def _called(self, given: Mapping[str, Any]) -> Any:
        bound = inspect.BoundArguments(inspect.signature(self.function), OrderedDict(given))  # some are by position
        bound.apply_defaults()
        return self.function(*bound.args, **bound.kwargs)

    def _arguments(self, call: ToolCall) -> dict[str, Any]:
        """The arguments of a call with the types of the parameters; images still as numbers."""
        allowed = f"its arguments: {', '.join(self.parameters) or 'none'}"
        for key in call.arguments:
            if key not in self.parameters:
                raise CallError(
                    f"{self.name} has no argument {key[:40]!r}{suggestion(key, self.parameters, then=allowed)}"
                )
        for key, parameter in self.parameters.items():
            if parameter.default is parameter.empty and key not in call.arguments:
                raise CallError(f"{self.name} needs the argument {key}; {allowed}")
        given = {  # null for what is None where it is left out
            key: value
            for key, value in call.arguments.items()
            if value is not None or self.parameters[key].default is not None
        }
        return {key: self._read(key, value, call.as_text) for key, value in given.items()}

    def _read(self, key: str, value: Any, as_text: bool) -> Any:
        hint = _VALUES.get(self.hints[key], self.hints[key])
        if as_text and hint is not str:
            try:
                value = read_json_text(value)
            except (ValueError, RecursionError):
                value = value.strip()
        try:
            return TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            raise CallError(f"{self.name}: {key} {_explained(error, hint, value)}") from None

    def _image(self, key: str, number: int, images: Sequence[Seen]) -> Seen:
        if not 1 <= number <= len(images):
            known = f"from 1 to {len(images)}" if images else "of which there are none"
            raise CallError(f"{self.name}: {key} must be the number of an image, {known}; found {number}")
        return images[number - 1]

    def _box(self, key: str, box: Sequence[float], seen: Seen | None, frame: Frame) -> ImageBox:
        """A box in pixels of its image."""
        if not (box[0] < box[2] and box[1] < box[3]):
            raise CallError(f"{self.name}: {key} must be [left, top, right, bottom] with left < right and top < bottom")
        if seen is None:
            return ImageBox(box)
        width, height = seen.picture.size
        right, bottom = {"thousandths": (1000.0, 1000.0), "pixels": (width, height)}.get(frame, seen.frame)
        scaled = ImageBox(value * scale for value, scale in zip(box, (width / right, height / bottom) * 2, strict=True))
        if scaled[0] >= width or scaled[1] >= height or scaled[2] <= 0 or scaled[3] <= 0:
            raise CallError(f"{self.name}: {key} lies outside of the image")
        return ImageBox(min(max(value, 0.0), side) for value, side in zip(scaled, (width, height) * 2, strict=True))


def finished(result: Any) -> Any:
    """The result of a call, which may be a coroutine, also where this thread runs a loop already, as notebooks do."""
    if not inspect.isawaitable(result):
        return result

    async def awaited() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(awaited())).result()


def _explained(error: ValidationError, hint: Any, value: Any) -> str:
    """The rest of a sentence about an argument of the wrong type."""
    first: dict[str, Any] = dict(error.errors()[0])
    if hint == _BOX:
        return f"must be four numbers, [left, top, right, bottom]; found {shown(value)}"
    where = [f"entry {one + 1}" if isinstance(one, int) else f"{one!r:.40}" for one in first["loc"]]
    return " ".join([*where, explain(first)])


def build_tool(given: str | Mapping[str, Any]) -> Tool:
    """A tool by its name or import path, alone or as {name, settings}. Raises ConfigError for an unknown name or
    setting."""
    spec: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
    unknown = spec.keys() - {"name", "settings"}
    if unknown or not isinstance(spec.get("name"), str) or not isinstance(spec.get("settings", {}), Mapping):
        raise ConfigError(f"a tool is a name, or {{name: NAME, settings: {{...}}}}; found {given!r:.80}")
    function = resolve(TOOLS, spec["name"], "tool")
    bound = bind(function, spec.get("settings", {}), f"tool {spec['name']}")
    return Tool(function.__name__, bound)


def method_tool(name: str, method: Callable[..., Any]) -> Tool:
    """A tool that is a method of an object."""
    return Tool(name, method)


def tool_named(tools: Mapping[str, Tool], name: str) -> Tool:
    """The tool of a call. Raises CallError for one that there is not."""
    if name not in tools:
        raise CallError(f"there is no tool {name[:40]!r}{suggestion(name, tools, then='tools')}: {', '.join(tools)}")
    return tools[name]
