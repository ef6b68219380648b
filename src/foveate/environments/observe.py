"""Messages of environments: made from text and pictures, taken from a task, and checked before a policy reads them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any, SupportsFloat

import numpy as np
import PIL.Image

from foveate.data.conversations import IMAGE_TAG, IMAGE_WORD, valid_unicode
from foveate.data.images import has_16_bits, read_image, upright_rgb
from foveate.environments.protocol import EnvironmentFault, EnvironmentLimits, Observation, Step
from foveate.errors import DataError
from foveate.records import Image, Task

OBSERVED_ROLES = ("system", "user", "tool")
MOST_OF_8_BITS = 255
MOST_INFO, MOST_STATE, MOST_MESSAGES = 20_000, 1_000_000, 1000
"""Characters of the JSON of a step's info, and of a state; messages of a step, and of an opening."""


class BeyondLimits(DataError):
    """A reply that is larger than the limits allow."""


def observation(role: str, text: str, *pictures: PIL.Image.Image | Image) -> Observation:
    """A message with its images in front of the text. `<image>` in the text is a word and marks none of them."""
    images = tuple(one if isinstance(one, Image) else encoded(one) for one in pictures)
    parts = [IMAGE_TAG] * len(images) + ([text.replace(IMAGE_TAG, IMAGE_WORD)] if text or not images else [])
    return Observation(role, "\n".join(parts), images)


def encoded(picture: PIL.Image.Image) -> Image:
    """A picture as a record: PNG without loss, 8-bit RGB, upright. Raises DataError for one without pixels, and
    EnvironmentFault for pixels that 8 bits do not hold: the code that made it is to say what is white."""
    if not picture.width or not picture.height:
        raise DataError(f"an image has {picture.width} x {picture.height} pixels; each side must have at least 1")
    if picture.mode == "F" or (has_16_bits(picture) and _beyond_8_bits(picture)):
        raise EnvironmentFault(
            f"an image has pixels of Pillow's mode {picture.mode} beyond 0 to 255, which have no agreed white; scale "
            "them and convert it to RGB"
        )
    buffer, shown = BytesIO(), upright_rgb(picture)
    shown.save(buffer, format="PNG", compress_level=1)
    return Image(None, buffer.getvalue(), shown.width, shown.height)


def _beyond_8_bits(picture: PIL.Image.Image) -> bool:
    values = np.asarray(picture)
    return bool(values.min() < 0 or values.max() > MOST_OF_8_BITS)


def task_messages(task: Task) -> tuple[Observation, ...]:
    """The messages of a task, each with the images of its marks."""
    messages, first = [], 0
    for message in task.messages:
        last = first + message.content.count(IMAGE_TAG)
        messages.append(Observation(message.role, message.content, task.images[first:last]))
        first = last
    return tuple(messages)


def checked_opening(messages: Any, task: Task, limits: EnvironmentLimits) -> tuple[Observation, ...]:
    """The messages of `reset`, as `checked_messages`. A prompt may be as long as that of its task."""
    own = sum(len(message.content) for message in task.messages)
    checked = checked_messages(messages, task.images, limits, roles=(*OBSERVED_ROLES, "assistant"), more_text=own)
    if not any(message.role != "system" for message in checked):
        raise DataError("reset gave no message of the user")
    return checked


def checked_step(step: Any, limits: EnvironmentLimits) -> Step:
    """A reply with plain values, as `checked_messages`. Raises DataError for what is no `Step`, for a reward that is no
    finite number, and for info that JSON cannot hold."""
    if not isinstance(step, Step):
        raise DataError(f"step returned {type(step).__name__} {step!r:.60}; it must return a Step")
    reward = _number(step.reward)
    if not isinstance(step.done, bool | np.bool_):
        raise DataError(f"done of a step is {step.done!r:.60}; it must be true or false")
    info = plain_json(dict(step.info), "info", MOST_INFO)
    return Step(checked_messages(step.messages, (), limits), reward, bool(step.done), info)


def _number(reward: Any) -> float | None:
    """A reward as a number: also one of NumPy or a tensor of one value."""
    number = math.nan
    if isinstance(reward, SupportsFloat) and not (isinstance(reward, np.ndarray) and reward.ndim):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            number = float(reward)
    if reward is not None and not math.isfinite(number):
        raise DataError(f"the reward of a step is {reward!r:.60}; it must be a finite number or None")
    return None if reward is None else number


def checked_messages(
    messages: Any,
    known: Sequence[Image],
    limits: EnvironmentLimits,
    *,
    roles: Sequence[str] = OBSERVED_ROLES,
    more_text: int = 0,
) -> tuple[Observation, ...]:
    """Observations with images whose headers were read. Images among `known`, which were read before, are no part of
    the limits. Raises BeyondLimits, and DataError for what is no message."""
    if not isinstance(messages, list | tuple) or not all(isinstance(one, Observation) for one in messages):
        raise DataError(f"the messages are {messages!r:.60}; they must be a list of Observation")
    if len(messages) > MOST_MESSAGES:
        raise BeyondLimits(f"{len(messages):,} messages; {MOST_MESSAGES} are allowed")
    given = [image for message in messages for image in message.images if image not in known]
    _limit(len(given), limits.max_images, "images", "max_images")
    _limit(sum(len(str(one.content)) for one in messages), limits.max_text + more_text, "characters", "max_text")
    return tuple(_checked_message(message, known, limits, roles) for message in messages)


def _checked_message(
    message: Observation, known: Sequence[Image], limits: EnvironmentLimits, roles: Sequence[str]
) -> Observation:
    if message.role not in roles:
        raise DataError(f"a message has the role {message.role!r:.60}; allowed: {', '.join(roles)}")
    if not isinstance(message.content, str) or message.content.count(IMAGE_TAG) != len(message.images):
        raise DataError(f"a message with {len(message.images)} images must have one {IMAGE_TAG} in its text for each")
    images = tuple(image if image in known else _checked_image(image, limits) for image in message.images)
    try:
        return Observation(message.role, valid_unicode(message.content), images)
    except DataError as error:
        raise DataError(f"the text of a message {error}") from None


def _checked_image(image: Any, limits: EnvironmentLimits) -> Image:
    if not isinstance(image, Image):
        raise DataError(f"an image is {type(image).__name__}; it must be a foveate.records.Image (see `observation`)")
    _limit(image.width * image.height, limits.max_pixels, "pixels of an image", "max_pixels")
    found = read_image(image.data if image.path is None else image.path, (), limits.max_pixels)
    return found if found.path is None else replace(found, path=None, data=found.path.read_bytes())  # as it is now


def _limit(found: int, most: int, what: str, setting: str) -> None:
    if found > most:
        raise BeyondLimits(f"a step has {found:,} {what}; at most {most:,} are taken (setting {setting})")


def plain_json(value: Any, what: str, most: int) -> Any:
    """A value as JSON gives it back. Raises DataError for one that it cannot hold, BeyondLimits for a long one."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{what} must hold what JSON can hold ({error})") from None
    if len(text) > most:
        raise BeyondLimits(f"{what} has {len(text):,} characters as JSON; at most {most:,} are taken")
    return json.loads(text)


def digest_of(messages: Sequence[Observation], done: bool = False) -> str:
    """A hash of all that the model sees of messages."""
    seen = hashlib.sha256(f"{done}".encode())
    for message in messages:
        seen.update(f"\n{message.role}\n{len(message.content)}\n{message.content}".encode())
        for image in message.images:
            seen.update(hashlib.sha256(image.data or str(image.path).encode()).digest())
    return seen.hexdigest()[:32]
