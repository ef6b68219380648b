"""From a raw row of the parquet schema to a Task, with every fault of the row.

Nothing here raises for bad data: faults are collected, so that a whole dataset can be checked in one pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from foveate.config.data import MAX_PIXELS
from foveate.data.conversations import (
    IMAGE_TAG,
    Conversation,
    answer_text,
    are_messages,
    in_front,
    read_conversation,
    shown,
    valid_unicode,
)
from foveate.data.image_values import is_no_image
from foveate.data.images import SEVERAL, inspect_image
from foveate.data.video_values import inspect_video_entry, is_frame, is_video_entry
from foveate.errors import DataError, join_where
from foveate.records import Image, Message, Task, Video

Field = TypeVar("Field")

VIDEO_TAG = "<video>"
MAX_PROBLEM_LENGTH = 500  # characters of what is told about a problem: values are quoted, and they may be anything

Parsed = tuple["Task | None", "list[Problem]"]
"""The task of a row and what is told of it, or None and its problems."""

_MEDIA_TAG = re.compile(r"<image>|<video>")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands, and where its images may lie. `row` counts from 0, `line` (of text files) from 1. `name` is
    what its file is called in the ids of rows without one; `max_pixels` the most pixels of an image."""

    file: Path
    row: int
    line: int | None
    image_root: Path | None
    name: str
    max_pixels: int = MAX_PIXELS

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + (f" (line {self.line})" if self.line is not None else "")

    @property
    def folders(self) -> list[Path]:
        """Where relative paths are looked up: `image_root`, the folder of the file, the working directory."""
        return [*([self.image_root] if self.image_root else []), self.file.parent, Path.cwd()]


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of one row, or with `warning` what should be told of one that can be used: `str()` is the line that the
    user sees."""

    where: str
    field: str
    what: str
    warning: bool = False

    def __str__(self) -> str:
        what = self.what if len(self.what) <= MAX_PROBLEM_LENGTH else f"{self.what[:MAX_PROBLEM_LENGTH]}…"
        line = f"{join_where([self.where, self.field and f'field {self.field}'])}: {' '.join(what.split())}"
        return line.encode("utf-8", "backslashreplace").decode()


def fault_of(error: DataError, where: str) -> tuple[str, str]:
    """The field and the fault that an error about the row `where` names."""
    field, _, fault = str(error).removeprefix(f"{where}, field ").partition(": ")
    return field, fault


class Faults:
    """The problems of one row, and the remarks on it, gathered while its fields are read one by one."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.problems: list[Problem] = []
        self.remarks: list[Problem] = []

    def add(self, field: str, what: str) -> None:
        self.problems.append(Problem(str(self.place), field, what))

    def remark(self, field: str, remarks: Iterable[str]) -> None:
        """Add what is told of a row that can be used all the same."""
        self.remarks += [Problem(str(self.place), field, what, warning=True) for what in remarks]

    def attempt(self, field: str, read: Callable[..., Field], *arguments: Any) -> Field | None:
        """`read(*arguments)`, or None with a problem of `field` if it raises DataError."""
        try:
            return read(*arguments)
        except DataError as error:
            self.add(field, str(error))
            return None

    def image(self, field: str, value: Any) -> Image | None:
        """One image, or None where it is faulty."""
        found = self.attempt(field, inspect_image, value, self.place.folders, self.place.max_pixels)
        self.remark(field, found[1] if found else ())
        return found[0] if found else None

    def video(self, field: str, value: Any) -> Video | None:
        """One video file, or None where it is faulty."""
        found = self.attempt(field, inspect_video_entry, value, self.place.folders, self.place.max_pixels)
        self.remark(field, found[1] if found else ())
        return found[0] if found else None

    def images(self, field: str, value: Any) -> list[Image | None]:
        """The images of a column: one entry per value of it, None where it is faulty."""
        values = value if isinstance(value, list) else [] if is_no_image(value) else [value]
        return [self.image(field, entry) for entry in values]

    def require_marks(self, field: str, messages: Sequence[Message], images: int) -> None:
        marks = sum(message.content.count(IMAGE_TAG) for message in messages)
        if marks != images:
            self.add(
                field, f"the prompt has {marks} {IMAGE_TAG} marks for {images} images; there must be one mark per image"
            )


# ---------------------------------------------------------------------------------------- rows of the parquet schema


def parse_row(row: Mapping[str, Any], place: Place, *, marks_in_front: bool = False) -> Parsed:
    """A row of the parquet schema as a Task, or None with all its problems; either with what should be told of it.

    The answer is `reward_model.ground_truth` as stored, of messages their text. `extra_info`, without its nulls,
    becomes `meta`, and `ability` joins it. A last turn of the assistant is never part of the prompt: it becomes
    `meta["response"]`. A response is the answer, too, where no other one is given; without any, and of NaN, it
    is None. The id is `extra_info.id`, else the file's name and the row. `system` is a system message to put in front.

    marks_in_front: a prompt without any `<image>` mark gets one per image in front of its first question, as data
    have it whose images stand in a column alone; and so for `<video>`, where no video is a list of frames.
    """
    faults = Faults(place)
    source = faults.attempt("data_source", text_of, row.get("data_source"))
    messages: tuple[Message, ...] = ()
    conversation = faults.attempt("prompt", read_conversation, row.get("prompt"), row.get("system"))
    images = faults.images("images", row.get("images"))
    videos = _videos(faults, row.get("videos"))
    meta = faults.attempt("extra_info", _meta, row.get("extra_info"), row.get("ability")) or {}
    if conversation is not None:
        faults.remark("prompt", conversation.remarks)
        meta = _imitated(faults, meta, conversation)
        messages, images = _placed(faults, conversation, images, marks_in_front)
        if marks_in_front and videos and not any(VIDEO_TAG in message.content for message in messages):
            messages = in_front(messages, len(videos), VIDEO_TAG)
        if not faults.problems:
            messages, images = faults.attempt("videos", with_frames, messages, images, videos) or ((), [])
    truth = _ground_truth(faults, row, meta, conversation)
    if faults.problems or source is None or conversation is None:
        return None, faults.problems + faults.remarks
    task_id = str(meta.get("id", f"{place.name}-{place.row}"))
    files = tuple(video for video in videos if isinstance(video, Video))
    task = Task(task_id, source, messages, tuple(filter(None, images)), truth, meta, str(place), files)
    return task, faults.remarks


def text_of(value: Any) -> str:
    """The value itself. Raises DataError for what is no text, is empty, or is not valid Unicode."""
    if not isinstance(value, str) or not value:
        raise DataError(f"must be a text that is not empty, not {shown(value)}")
    return valid_unicode(value)


def _videos(faults: Faults, value: Any) -> list[Video | list[Image | None]]:
    """The videos of a row: files, or the frames of each; of a single one, a list of its frames is enough."""
    if is_no_image(value):
        return []
    values = value if isinstance(value, list) else [value]
    has_files = any(map(is_video_entry, values)) if values is value else not is_frame(value)
    if not has_files and not all(isinstance(video, list) for video in values):
        return [_frames(faults, values)]
    found = [_frames(faults, video) if isinstance(video, list) else faults.video("videos", video) for video in values]
    return [video for video in found if video is not None]  # else the row is faulty


def _frames(faults: Faults, values: list[Any]) -> list[Image | None]:
    """The frames of a video, one image each: animations, whose first image alone would be seen, are a problem."""
    known = len(faults.remarks)
    found = faults.images("videos", values)
    if any(SEVERAL in remark.what for remark in faults.remarks[known:]):
        what = "a frame is an animation, of which nothing but the first image would be seen"
        faults.add("videos", f"{what}; write it as a video, as by ffmpeg -i IN OUT.mp4, or as a list of images")
    return found


def _imitated(faults: Faults, meta: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
    """The fields of a row with its answers as text: those given, and a last turn of the conversation."""
    texts = {
        name: faults.attempt(f"extra_info.{name}", answer_text, meta[name], conversation.messages)
        for name in ("response", "chosen", "rejected")
        if isinstance(meta.get(name), list | Mapping)
    }
    meta = {**meta, **texts}
    if conversation.response is None:
        return meta
    if meta.get("response", conversation.response) != conversation.response:
        faults.add(
            "extra_info.response", "the row has a response, and another one as the last turn of its conversation"
        )
    return {**meta, "response": conversation.response}


def _ground_truth(faults: Faults, row: Mapping[str, Any], meta: dict[str, Any], talk: Conversation | None) -> Any:
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if (truth is None or truth == "") and isinstance(meta.get("response"), str):
        return meta["response"]
    if talk is not None and are_messages(truth):
        return faults.attempt("reward_model.ground_truth", answer_text, truth, talk.messages)
    return None if isinstance(truth, float) and math.isnan(truth) else truth


def _meta(extra_info: Any, ability: Any) -> dict[str, Any]:
    if not isinstance(extra_info, dict | None):
        raise DataError(f"must be a mapping, not {shown(extra_info)}")
    meta = {name: value for name, value in (extra_info or {}).items() if value is not None}
    return meta if ability is None else {"ability": ability, **meta}


def _placed(
    faults: Faults, conversation: Conversation, images: list[Image | None], marks_in_front: bool
) -> tuple[tuple[Message, ...], list[Image | None]]:
    """Messages and images in the order of their marks: those that stand in the content itself, and those of the
    column."""
    messages, inline = conversation.messages, conversation.images
    if marks_in_front and images and not inline:
        return in_front(messages, len(images)), images
    marks = sum(value is None for value in inline)
    if marks != len(images):
        said = f"{marks} {IMAGE_TAG} marks for {len(images)} images"
        faults.add("images", f"the prompt has {said}; there must be one mark per image")
        return messages, []
    column = iter(images)
    return messages, [next(column) if value is None else faults.image("prompt", value) for value in inline]


def with_frames(
    messages: Sequence[Message], images: Sequence[Image | None], videos: Sequence[Video | Sequence[Image | None]]
) -> tuple[tuple[Message, ...], list[Image | None]]:
    """Messages and images with the frames of every video at its mark: `Frame1: <image>`, `Frame2: <image>`, ... one a
    line; the mark of a video file stays. Raises DataError, without a place, for another number of marks than of images
    or videos, and for a video without frames."""
    found = [mark for message in messages for mark in _MEDIA_TAG.findall(message.content)]
    if not videos and found == [IMAGE_TAG] * len(images):
        return tuple(messages), [*images]
    for mark, given in ((IMAGE_TAG, images), (VIDEO_TAG, videos)):
        if found.count(mark) != len(given):
            raise DataError(f"the prompt has {found.count(mark)} {mark} marks for {len(given)}; one each is needed")
    if not all(videos):
        raise DataError("a video has no frames")
    stills, clips = iter(images), iter(videos)
    placed: list[Image | None] = []

    def place(match: re.Match[str]) -> str:
        if match[0] != VIDEO_TAG:
            placed.append(next(stills))
            return match[0]
        frames = next(clips)
        if isinstance(frames, Video):
            return match[0]
        placed.extend(frames)
        return "\n".join(f"Frame{number}: <image>" for number in range(1, len(frames) + 1))

    expanded = tuple(replace(message, content=_MEDIA_TAG.sub(place, message.content)) for message in messages)
    return expanded, placed
