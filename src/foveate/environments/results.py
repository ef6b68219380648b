"""Text and pictures of whatever tools and environments of others return, for a message.

Taken is what can be meant in one way: texts, numbers, images, dicts and lists that JSON can hold, and parts as in chat
messages. Anything else would reach the model as the name of a Python type, and is a fault of the code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from foveate.environments.protocol import EnvironmentFault

ALLOWED = "a text, a number, a PIL image, a dict or a list that JSON can hold, or a list of texts and PIL images"
_MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio")
_SOURCES = ("url", "path", "base64", "data", "source")


def result_parts(result: Any, who: str) -> tuple[str, tuple[Image.Image, ...]]:
    """The text and the pictures of what was returned: one value, several, or parts as in chat messages. `who` returned
    it, for messages. Raises EnvironmentFault for a value of another type."""
    parts = result if isinstance(result, list | tuple) and any(map(_is_part, result)) else [result]
    texts, pictures = [], []
    for part in parts:
        value = part[part["type"]] if isinstance(part, Mapping) and _is_part(part) else part
        if isinstance(value, Image.Image):
            pictures.append(value)
        elif value is not None:
            texts.append(value if isinstance(value, str) else json_text(value, who))
    return "\n".join(texts), tuple(pictures)


def _is_part(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return isinstance(value, Image.Image)
    kind = {"text": str, "image": Image.Image}.get(str(value.get("type")))
    return kind is not None and isinstance(value.get(str(value["type"])), kind)


def json_text(value: Any, who: str) -> str:
    """A value as JSON. Raises EnvironmentFault for one that JSON cannot hold."""
    try:
        return json.dumps(_plain(value, who, ""), ensure_ascii=False)
    except RecursionError:
        raise EnvironmentFault(f"{who} returned a {type(value).__name__} that holds itself") from None


def _plain(value: Any, who: str, inside: str) -> Any:
    """A value as JSON holds it; `inside`: of what it is a part."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.number | np.bool_):
        return value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str | int | float | bool | None) for key in value):
        kind = value.get("type")
        if kind in _MEDIA and any(key in value for key in (kind, *_SOURCES)):
            raise EnvironmentFault(
                f"{who} returned a part of type {kind!r} without a PIL image; return the image itself, decoded by PIL"
            )
        return {key: _plain(one, who, "a dict") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, who, "a list") for one in value]
    raise EnvironmentFault(f"{who} returned {_described(value, inside)}; allowed: {ALLOWED}{_advice(value)}")


def _described(value: Any, inside: str) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    one = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"{inside} with {one} in it" if inside else one


def _advice(value: Any) -> str:
    if isinstance(value, Image.Image):
        return " (as [text, image], not inside of another value)"
    if isinstance(value, np.ndarray):
        return " (an array that is a picture: PIL.Image.fromarray(array); another one: array.tolist())"
    if isinstance(value, bytes | bytearray):
        return " (bytes that are a picture: decode them with PIL)"
    return ""
