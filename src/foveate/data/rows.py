"""From a raw row to a Task, with every fault of the row: rows of the parquet schema, and RefCOCO-style rows.

Nothing here raises for bad data: faults are collected, so that a whole dataset can be checked in one pass.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from foveate.data.images import read_image
from foveate.errors import DataError, join_where
from foveate.records import Image, Message, Task

Field = TypeVar("Field")

ROLES = ("system", "user", "assistant")
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
THOUSANDTHS = 1000.0
MAX_PROBLEM_LENGTH = 500  # characters of what is told about a problem: values are quoted, and they may be anything
EDGE_SLACK = 0.5  # pixels by which an annotated box may pass the edge (rounded annotations do); it is cut there

# How the box of an expression is asked for; the first is InternVL's own, the last the one of the Qwen3-VL recipes.
PROMPT_FORMS = {
    "internvl": "Please provide the bounding box coordinate of the region this sentence describes: <ref>{sent}</ref>",
    "amodal": "Please provide the amodal bounding box coordinate of the region this sentence describes: "
    "<ref>{sent}</ref>",
    "qwen": "Locate {sent}, output its bbox coordinates using JSON format",
    "qwen_amodal": "Locate {sent} amodally, output its bbox coordinates using JSON format",
}
AMODAL = ("amodal", "qwen_amodal")
IMITATED = ("response", "chosen")  # fields of extra_info that stand in for a ground truth

_MEDIA_TAG = re.compile(r"<image>|<video>")
_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands, and where its images may lie. `row` counts from 0, `line` (of text files) from 1."""

    file: Path
    row: int
    line: int | None
    image_root: Path | None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + (f" (line {self.line})" if self.line is not None else "")

    @property
    def folders(self) -> list[Path]:
        """Where relative paths are looked up: `image_root`, the folder of the file, the working directory."""
        return [*([self.image_root] if self.image_root else []), self.file.parent, Path.cwd()]


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of one row: `str()` is the line that the user sees."""

    where: str
    field: str
    what: str

    def __str__(self) -> str:
        what = self.what if len(self.what) <= MAX_PROBLEM_LENGTH else f"{self.what[:MAX_PROBLEM_LENGTH]}…"
        line = f"{join_where([self.where, self.field and f'field {self.field}'])}: {' '.join(what.split())}"
        return line.encode("utf-8", "backslashreplace").decode()


class _Faults:
    """The problems of one row, gathered while its fields are read one by one."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.problems: list[Problem] = []

    def add(self, field: str, what: str) -> None:
        self.problems.append(Problem(str(self.place), field, what))

    def attempt(self, field: str, read: Callable[..., Field], *arguments: Any) -> Field | None:
        """`read(*arguments)`, or None with a problem of `field` if it raises DataError."""
        try:
            return read(*arguments)
        except DataError as error:
            self.add(field, str(error))
            return None


# ---------------------------------------------------------------------------------------- rows of the parquet schema


def parse_row(row: Mapping[str, Any], place: Place) -> tuple[Task | None, list[Problem]]:
    """A row of the parquet schema as a Task, or None with all its problems.

    The answer is `reward_model.ground_truth` as stored; `extra_info`, without its nulls, becomes `meta`, and `ability`
    joins it. A row to imitate (with `extra_info.response` or `extra_info.chosen`) needs no ground truth. The id is
    `extra_info.id`, else the file's name and the row.
    """
    faults = _Faults(place)
    source = faults.attempt("data_source", _text, row.get("data_source"))
    messages = faults.attempt("prompt", _messages, row.get("prompt"))
    images = _images(faults, "images", row.get("images"))
    videos = _videos(faults, row.get("videos"))
    imitated = isinstance(extra := row.get("extra_info"), dict) and any(extra.get(name) for name in IMITATED)
    answer = faults.attempt("reward_model.ground_truth", _ground_truth, row.get("reward_model"), imitated)
    meta = faults.attempt("extra_info", _meta, row.get("extra_info"), row.get("ability"))
    if messages is not None and row.get("videos") is None:
        _count_marks(faults, "images", messages, len(images))
    elif messages is not None and not faults.problems:
        messages, images = faults.attempt("videos", with_frames, messages, images, videos) or (None, [])
    if faults.problems or source is None or messages is None or meta is None:
        return None, faults.problems
    task_id = str(meta.get("id", f"{place.file.stem}-{place.row}"))
    return Task(task_id, source, messages, tuple(filter(None, images)), answer, meta, str(place)), []


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"must be a text that is not empty, not {_shown(value)}")
    return _unicode(value)


def _unicode(text: str) -> str:
    """JSON can hold halves of characters, which no file and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"is not valid Unicode: {_shown(text[error.start])} at character {error.start}") from None
    return text


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"must be a list of messages {{role, content}}, at least one, not {_shown(value)}")
    messages = []
    for position, entry in enumerate(value):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise DataError(f"message {position} must be {{role, content}} with a text as content, not {_shown(entry)}")
        if entry.get("role") not in ROLES:
            raise DataError(f"message {position} has the role {entry.get('role')!r}; allowed: {', '.join(ROLES)}")
        messages.append(Message(entry["role"], _unicode(entry["content"])))
    return tuple(messages)


def _images(faults: _Faults, field: str, value: Any) -> list[Image | None]:
    """The images of a row: one entry per value of the column, None where it is faulty."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [faults.attempt(field, read_image, entry, faults.place.folders) for entry in values]


def _videos(faults: _Faults, value: Any) -> list[list[Image | None]]:
    """The frames of each video of a row; of a single one, a list of its frames is enough."""
    values = value if isinstance(value, list) else []
    several = values if all(isinstance(video, list) for video in values) else [values]
    return [_images(faults, "videos", video) for video in several]


def _ground_truth(reward_model: Any, imitated: bool) -> Any:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if truth is None and not imitated:
        raise DataError("is missing; the row has no answer to be scored against")
    return truth


def _meta(extra_info: Any, ability: Any) -> dict[str, Any]:
    if not isinstance(extra_info, dict | None):
        raise DataError(f"must be a mapping, not {_shown(extra_info)}")
    meta = {name: value for name, value in (extra_info or {}).items() if value is not None}
    return meta if ability is None else {"ability": ability, **meta}


def _count_marks(faults: _Faults, field: str, messages: tuple[Message, ...], images: int) -> None:
    marks = sum(message.content.count(IMAGE_TAG) for message in messages)
    if marks != images:
        faults.add(
            field, f"the prompt has {marks} {IMAGE_TAG} marks for {images} images; there must be one mark per image"
        )


def with_frames(
    messages: Sequence[Message], images: Sequence[Image], videos: Sequence[Sequence[Image]]
) -> tuple[tuple[Message, ...], tuple[Image, ...]]:
    """Messages and images with the frames of every video at its mark: `Frame1: <image>`, `Frame2: <image>`, ... one a
    line. Raises DataError, without a place, for another number of marks than of images or videos, and for a video
    without frames."""
    found = [mark for message in messages for mark in _MEDIA_TAG.findall(message.content)]
    for mark, given in ((IMAGE_TAG, images), (VIDEO_TAG, videos)):
        if found.count(mark) != len(given):
            raise DataError(f"the prompt has {found.count(mark)} {mark} marks for {len(given)}; one each is needed")
    if not all(videos):
        raise DataError("a video has no frames")
    stills, clips = iter(images), iter(videos)
    placed: list[Image] = []

    def place(match: re.Match[str]) -> str:
        if match[0] != VIDEO_TAG:
            placed.append(next(stills))
            return match[0]
        frames = next(clips)
        placed.extend(frames)
        return "\n".join(f"Frame{number}: <image>" for number in range(1, len(frames) + 1))

    expanded = tuple(replace(message, content=_MEDIA_TAG.sub(place, message.content)) for message in messages)
    return expanded, tuple(placed)


# ------------------------------------------------------------------------------------------------ referring expressions


def parse_referring(
    row: Mapping[str, Any], place: Place, prompt_form: str, box_field: str = "bbox", keep: Sequence[str] = ()
) -> tuple[Task | None, list[Problem]]:
    """A RefCOCO-style row as a grounding Task, or None with all its problems.

    Fields: image (a path); sent, the expression; bbox, [x1, y1, x2, y2] in pixels; width and height in pixels, which
    must be those of the image if given; id. Instead of sent and bbox, conversations [{from, value}] may give question
    and answer, the box then as `<box>[x1,y1,x2,y2]</box>` in 0..1000. The answer is a list in 0..1000: floats
    1000 x / width and 1000 y / height from pixels, the numbers as written from conversations.

    box_field: "bbox" (then modal_bbox where a row has no bbox) or "modal_bbox": where a box in pixels is looked for
    first; rows without any take the box of the conversation. An amodal box may pass the edges, behind which the object
    goes on, and is cut there. keep: numbers between 0 and 1 that a row must have (the IoU of a model's answer), which
    join `meta`.

    With `sent` the question is `PROMPT_FORMS[prompt_form]`; without it, the form "internvl" keeps the question of the
    conversation, and the others are filled with the last `<ref>` in it.
    """
    faults = _Faults(place)
    images = _images(faults, "image", row.get("image"))
    if len(images) != 1:
        faults.add("image", f"a referring expression needs one image, not {len(images)}")
    image = images[0] if images else None
    if image is not None:
        faults.attempt("width, height", _same_size, row, image)
    fields = [name for name in (box_field, "bbox", "modal_bbox") if row.get(name) is not None]
    if fields:
        slack = math.inf if prompt_form in AMODAL else EDGE_SLACK
        answer = faults.attempt(fields[0], _box_of_pixels, row[fields[0]], image, slack)
    else:
        answer = faults.attempt("conversations", _box_of_conversation, row.get("conversations"))
    question = faults.attempt("sent", _question, row, prompt_form)
    kept = {name: faults.attempt(name, _share, row.get(name)) for name in keep}
    if question is not None:
        _count_marks(faults, "image", (Message("user", question[0]),), len(images))
    if faults.problems or question is None or image is None:
        return None, faults.problems
    meta = {"ability": "grounding", "width": image.width, "height": image.height, "question": question[1], **kept}
    task_id = str(row.get("id", f"{place.file.stem}-{place.row}"))
    return Task(task_id, "grounding", (Message("user", question[0]),), (image,), answer, meta, str(place)), []


def _same_size(row: Mapping[str, Any], image: Image) -> None:
    said = (row.get("width", image.width), row.get("height", image.height))
    if said != (image.width, image.height):
        raise DataError(
            f"the row says {_shown(said[0])} x {_shown(said[1])} pixels, but the image is {image.width} x "
            f"{image.height} as shown; the box would be wrong"
        )


def _share(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise DataError(f"must be a number from 0 to 1, not {_shown(value)}")


def _box_of_pixels(value: Any, image: Image | None, slack: float) -> list[float] | None:
    """Pixels to 0..1000, cut at the edges, which may be passed by `slack` pixels. Without a readable image only the
    numbers themselves are checked."""
    x1, y1, x2, y2 = _box(value, "in pixels")
    if image is None:
        return None
    width, height = image.width, image.height
    beyond = max(-x1, -y1, x2 - width, y2 - height)
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if beyond > slack or x2 <= x1 or y2 <= y1:
        raise DataError(f"{_shown(value)} lies outside the image of {width} x {height} pixels")
    return [x1 * THOUSANDTHS / width, y1 * THOUSANDTHS / height, x2 * THOUSANDTHS / width, y2 * THOUSANDTHS / height]


def _box_of_conversation(conversations: Any) -> list[float]:
    """The last `<box>` of the reply, as written (0..1000)."""
    boxes = _BOX.findall(_turn(conversations, 1))
    if not boxes:
        raise DataError("the row has neither bbox nor a reply with <box>[x1,y1,x2,y2]</box>")
    try:
        value = json.loads(boxes[-1])
    except json.JSONDecodeError:
        raise DataError(f"<box>{_shown(boxes[-1])}</box> is not [x1,y1,x2,y2]") from None
    while isinstance(value, list) and len(value) == 1:  # [[x1,y1,x2,y2]], the model's own form
        value = value[0]
    box = _box(value, "in 0..1000")
    if min(box) < 0 or max(box) > THOUSANDTHS:
        raise DataError(f"{_shown(value)} lies outside the image: coordinates are 0..1000 of its sides")
    return value


def _box(value: Any, unit: str) -> list[float]:
    numbers = value if isinstance(value, list) else []
    real = [float(n) for n in numbers if _is_real(n)]
    if len(numbers) != 4 or len(real) != 4:
        raise DataError(f"{_shown(value)} is not a box: it must be four finite numbers [x1, y1, x2, y2] {unit}")
    if real[2] <= real[0] or real[3] <= real[1]:
        raise DataError(f"{_shown(value)} has no area: x2 must be greater than x1, and y2 greater than y1")
    return real


def _is_real(value: Any) -> bool:
    """A finite number; whole numbers beyond the range of floats, which JSON can hold, are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < sys.float_info.max


def _question(row: Mapping[str, Any], prompt_form: str) -> tuple[str, str]:
    """The content of the prompt, and the expression in it (or the whole question where there is none)."""
    sent = row.get("sent")
    if sent is not None:
        sent = _text(sent)
    else:
        if row.get("conversations") is None:
            raise DataError("the row has neither sent nor conversations; one must name what to look for")
        asked = _turn(row["conversations"], 0)
        refs = _REF.findall(asked)
        if prompt_form == "internvl":
            return asked, refs[-1] if refs else asked.replace(IMAGE_TAG, "").strip()
        if not refs:
            raise DataError(f"neither sent nor <ref>..</ref> in the question to fill the prompt form {prompt_form!r}")
        sent = refs[-1]
    return f"{IMAGE_TAG}\n{PROMPT_FORMS[prompt_form].format(sent=sent)}", sent


def _turn(conversations: Any, position: int) -> str:
    turns = conversations if isinstance(conversations, list) else []
    turn = turns[position] if len(turns) > position else None
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError("conversations must be [{from, value}, ...], a question and then a reply")
    return _unicode(turn["value"])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
