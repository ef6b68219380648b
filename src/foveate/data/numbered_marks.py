"""Prompts whose images have numbers, `<image 1>`, as those of MMMU: with the marks and the order that foveate takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from foveate.data.conversations import IMAGE_TAG, ROLE_NAMES, TURN_KEYS
from foveate.errors import DataError

_NUMBERED = re.compile(r"<image[ _]?(\d{1,2})>")


def without_numbers(prompt: Any, images: Any) -> tuple[Any, Any]:
    """The prompt with `<image>` for each numbered mark, and the images in the order of these marks; both as they are
    where there are no numbers, or no images in a column. Raises DataError, without a place, for a number that has no
    image, an image that has no mark, and marks of both kinds."""
    given = images if isinstance(images, list) else [images]
    if not given or images is None or images == "":
        return prompt, images
    asked: list[str] = []
    _changed(prompt, lambda text: asked.append(text) or text)
    numbers = [int(found) for text in asked for found in _NUMBERED.findall(text)]
    if not numbers:
        return prompt, images
    if any(IMAGE_TAG in text for text in asked):
        raise DataError(f"the prompt has {IMAGE_TAG} and numbered marks (<image {numbers[0]}>); write one kind")
    if {*numbers} != {*range(1, len(given) + 1)}:
        marks = ", ".join(f"<image {number}>" for number in numbers)
        raise DataError(f"the prompt has the marks {marks} for {len(given)} images; each image needs one, from 1 on")
    return _changed(prompt, lambda text: _NUMBERED.sub(IMAGE_TAG, text)), [given[number - 1] for number in numbers]


def _changed(prompt: Any, change: Callable[[str], str]) -> Any:
    """The prompt with every text of it changed, but for those of the assistant."""
    if isinstance(prompt, str):
        return change(prompt)
    if isinstance(prompt, list):
        return [_changed(one, change) for one in prompt]
    if not isinstance(prompt, Mapping):
        return prompt
    role = next((prompt[key] for key in TURN_KEYS if key in prompt), "user")
    if not isinstance(role, str) or ROLE_NAMES.get(role, role) == "assistant":
        return prompt
    texts = (*TURN_KEYS.values(), "text")
    return {name: _changed(value, change) if name in texts else value for name, value in prompt.items()}
