"""Videos as lists of frames: each `<video>` in a prompt becomes its frames as images, in the form of InternVL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from foveate.records import DataError, Image, Message

VIDEO = "<video>"
_MARK = re.compile(r"<image>|<video>")


def with_frames(
    messages: Sequence[Message], images: Sequence[Image], videos: Sequence[Sequence[Image]]
) -> tuple[tuple[Message, ...], tuple[Image, ...]]:
    """Messages and images with the frames of every video at its mark: `Frame1: <image>`, `Frame2: <image>`, ... one a
    line. Raises DataError, without a place, for another number of marks than of images or videos, and for a video
    without frames."""
    found = [mark for message in messages for mark in _MARK.findall(message.content)]
    for mark, given in (("<image>", images), (VIDEO, videos)):
        if found.count(mark) != len(given):
            raise DataError(f"the prompt has {found.count(mark)} {mark} marks for {len(given)}; one each is needed")
    if not all(videos):
        raise DataError("a video has no frames")
    stills, clips = iter(images), iter(videos)
    placed: list[Image] = []

    def place(match: re.Match[str]) -> str:
        if match[0] != VIDEO:
            placed.append(next(stills))
            return match[0]
        frames = next(clips)
        placed.extend(frames)
        return "\n".join(f"Frame{number}: <image>" for number in range(1, len(frames) + 1))

    expanded = tuple(replace(message, content=_MARK.sub(place, message.content)) for message in messages)
    return expanded, tuple(placed)
