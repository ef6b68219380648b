"""`foveate data show`: rows as a person reads them, in the terminal and as a page with pictures and boxes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jinja2

from foveate.data.conversations import IMAGE_TAG
from foveate.data.images import load_image
from foveate.data.table import TaskTable
from foveate.errors import DataError
from foveate.evaluate.draw import TRUE_COLOUR, LabelledBox, draw_boxes, encode_jpeg
from foveate.files import atomic_write_text
from foveate.records import Image, Task
from foveate.rewards.boxes import Box

TEXT_LIMIT = 600
PICTURE_SIDE = 640
ANSWERS = ("response", "chosen", "rejected")


def row_text(table: TaskTable, index: int) -> str:
    """One row for the terminal: where it stands, its fields, its conversation; or what is wrong with it."""
    task, problems = table.inspect(index)
    if task is None:
        return "\n".join([f"-- row {index} cannot be used", *(f"   {problem}" for problem in problems), ""])
    lines = [f"-- {task.where}", *(f"   {name}: {value}" for name, value in _facts(task)), ""]
    return "\n".join(lines)


def write_page(path: Path, table: TaskTable, rows: Sequence[int]) -> None:
    """Write an HTML page that needs no other file: the rows with their pictures, and the true boxes drawn on them.
    Raises DiskError where it cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("foveate.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("show.html.j2").render(
        names=table.names, total=len(table), rows=[_page_row(table, index) for index in rows]
    )
    atomic_write_text(path, page)


@dataclass(frozen=True, slots=True)
class PageTurn:
    """One message of a conversation, in pieces: a text, or the place of a picture among those of the row."""

    role: str
    pieces: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class PageRow:
    """One row of the page: a heading, (field, value) lines, pictures as data URIs, and problems. A conversation of
    several turns stands as `turns` with its pictures where they were shown; a picture without data cannot be read."""

    where: str
    facts: tuple[tuple[str, str], ...]
    pictures: tuple[str, ...]
    problems: tuple[str, ...]
    turns: tuple[PageTurn, ...] = ()


def _page_row(table: TaskTable, index: int) -> PageRow:
    task, problems = table.inspect(index)
    if task is None:
        return PageRow(f"row {index}", (), (), tuple(map(str, problems)))
    boxes = true_boxes(task)
    pictures, broken = [], []
    for image in task.images:
        try:
            pictures.append(_picture(image, boxes if len(task.images) == 1 else (), task.where))
        except DataError as error:
            broken.append(str(error))
            pictures.append("")
    turns = _turns(task)
    told = {*ANSWERS, *(message.role for message in task.messages)} if turns else set[str]()
    facts = tuple((name, value) for name, value in _facts(task) if name not in told)
    return PageRow(task.where, facts, tuple(pictures), tuple(broken), turns)


def _turns(task: Task) -> tuple[PageTurn, ...]:
    """The messages of a conversation in which the assistant speaks before its end, with the answer that ends it."""
    if not any(message.role == "assistant" for message in task.messages):
        return ()
    numbers = count()
    turns = [PageTurn(one.role, tuple(_pieces(one.content, numbers))) for one in task.messages]
    ends = (
        PageTurn(f"assistant, {name}", (_shortened(str(task.meta[name])),)) for name in ANSWERS if name in task.meta
    )
    return (*turns, *ends)


def _pieces(content: str, numbers: Iterator[int]) -> Iterator[str | int]:
    """The text of a message, and the numbers of its pictures, in order."""
    first, *rest = content.split(IMAGE_TAG)
    for place, text in enumerate((first, *rest)):
        if place:
            yield next(numbers)
        if text.strip():
            yield _shortened(text.strip("\n"))


def _picture(image: Image, boxes: Sequence[Box], where: str) -> str:
    labelled = [LabelledBox(box, "", TRUE_COLOUR) for box in boxes]
    drawn = draw_boxes(load_image(image, where), labelled)
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(drawn, PICTURE_SIDE, quality=85)).decode()}"


def true_boxes(task: Task) -> tuple[Box, ...]:
    """The ground truth of a task as boxes in 0..1000: one, several, or none if it is something else."""
    entries = task.answer if isinstance(task.answer, list) else []
    boxes = entries if entries and all(isinstance(entry, list) for entry in entries) else [entries]
    return tuple((box[0], box[1], box[2], box[3]) for box in boxes if _is_box(box))


def _is_box(value: Any) -> bool:
    return len(value) == 4 and all(isinstance(number, int | float) and 0 <= number <= 1000 for number in value)


def _facts(task: Task) -> Iterator[tuple[str, str]]:
    yield "id", task.id
    yield "data_source", task.source
    for image in task.images:
        name = str(image.path) if image.path is not None else f"embedded, {len(image.data or b''):,} bytes"
        yield "image", f"{name} ({image.width} x {image.height})"
    for message in task.messages:
        yield message.role, _shortened(message.content)
    if task.answer is not None:
        yield "answer", _shortened(_plain(task.answer))
    for name in ANSWERS:
        if name in task.meta:
            yield name, _shortened(str(task.meta[name]))
    rest = {name: value for name, value in task.meta.items() if name not in (*ANSWERS, "id")}
    if rest:
        yield "extra_info", _shortened(", ".join(f"{name}={_plain(value)}" for name, value in rest.items()))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list) else str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]} … ({len(text) - TEXT_LIMIT} more characters)"
