"""Referring expressions: RefCOCO-style rows as grounding tasks, and the units that boxes are given in."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foveate.data.conversations import IMAGE_TAG, shown, valid_unicode
from foveate.data.image_values import is_no_image
from foveate.data.images import read_image
from foveate.data.rows import Faults, Parsed, Place, text_of
from foveate.errors import DataError
from foveate.records import Image, Message, Task

THOUSANDTHS = 1000.0
EDGE_SLACK = 0.5  # pixels by which an annotated box may pass the edge (rounded annotations do); it is cut there
FRACTION_SLACK = 0.005  # the same for fractions, as a share of the side

# How the box of an expression is asked for; the first is InternVL's own, the last the one of the Qwen3-VL recipes.
PROMPT_FORMS = {
    "internvl": "Please provide the bounding box coordinate of the region this sentence describes: <ref>{sent}</ref>",
    "amodal": "Please provide the amodal bounding box coordinate of the region this sentence describes: "
    "<ref>{sent}</ref>",
    "qwen": "Locate {sent}, output its bbox coordinates using JSON format",
    "qwen_amodal": "Locate {sent} amodally, output its bbox coordinates using JSON format",
}
AMODAL = ("amodal", "qwen_amodal")
BOX_UNITS = {
    "xyxy": "[x1, y1, x2, y2] in pixels",
    "xywh": "[x, y, width, height] in pixels",
    "fractions": "[x1, y1, x2, y2] as fractions of the sides",
    "fractions-xywh": "[x, y, width, height] as fractions of the sides",
    "thousandths": "[x1, y1, x2, y2] in thousandths of the sides",
}
"""The units that a box can be given in."""
AUTO = "auto"
BOX_FIELDS = ("bbox", "modal_bbox")
FRACTIONS = ("fractions", "fractions-xywh")

TINY = 8
"""Pixels of the longer side of an image up to which a box within one pixel may be meant so."""
_ENOUGH, _SHARE = 3, 0.02
"""How many rows of a file, and which share of them, must be no boxes in the usual unit before another one is taken."""
_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_ONLY_A_BOX = re.compile(r"\s*(?:<ref>[^<]*</ref>\s*)?<box>[^<]*</box>\s*")


@dataclass(frozen=True, slots=True)
class GroundingRows:
    """RefCOCO-style rows as grounding tasks.

    Fields: image (a path); sent, the expression; bbox, four numbers, in pixels unless `box_unit` says otherwise; width
    and height in pixels, which must be those of the image if given; id. Instead of sent and bbox, conversations [{from,
    value}] may give question and answer, the box then as `<box>[x1,y1,x2,y2]</box>` in 0..1000. The answer is a list in
    0..1000: floats 1000 x / width and 1000 y / height from pixels, the numbers as written from conversations.

    prompt_form: with `sent` the question is `PROMPT_FORMS[prompt_form]`; without it, the form "internvl" keeps the
    question of the conversation, and the others are filled with the last `<ref>` in it. box_field: "bbox" (then
    modal_bbox where a row has no bbox) or "modal_bbox": where a box is looked for first; rows without any take the box
    of the conversation. An amodal box may pass the edges, behind which the object goes on, and is cut there. keep:
    numbers between 0 and 1 that a row must have (the IoU of a model's answer), which join `meta`. box_unit: a key of
    `BOX_UNITS`, or "auto": pixels unless the first rows of a file say otherwise. guessed: the unit is what they said.
    """

    prompt_form: str = "internvl"
    box_field: str = "bbox"
    keep: tuple[str, ...] = ()
    box_unit: str = AUTO
    guessed: bool = False
    remark: str = ""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("prompt_form", self.prompt_form, PROMPT_FORMS), ("box_unit", self.box_unit, (AUTO, *BOX_UNITS))
        ):  # fmt: skip
            if value not in allowed:
                raise DataError(f"setting {name}: unknown {value!r}; allowed: {', '.join(allowed)}")

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read: all."""
        return list(names)

    def column_of(self, field: str) -> list[list[str]]:
        return [[field.removeprefix("extra_info.")]]

    def must_look(self, names: Sequence[str] | None) -> bool:  # noqa: ARG002 - boxes may stand in several columns
        return self.box_unit == AUTO

    def settled(self, rows: Sequence[Mapping[str, Any]], place: Place) -> GroundingRows:
        """The same with the unit of the boxes in these rows, the first of a file."""
        if self.box_unit != AUTO:
            return self
        unit, why = recognise_unit(
            [(row[field], _size_of(row, place)) for row in rows if (field := _box_field(row, self.box_field))],
            self.slack,
        )
        remark = f"boxes are read as {BOX_UNITS[unit]}: {why} (another unit: --box-unit)" if why else ""
        return replace(self, box_unit=unit, guessed=True, remark=remark)

    def described(self, row: Mapping[str, Any]) -> list[str]:
        """The fields that are read, and the unit of the boxes where it is not the usual one."""
        fields = ("image", "sent", *BOX_FIELDS, "conversations", "width", "height", "id")
        known = [name for name in fields if name in row]
        others = [name for name in row if name not in (*fields, *self.keep)]
        left = f"; left out: {', '.join(others)}" if others else ""
        return [f"RefCOCO-style rows: {', '.join(known)}{left}", *([self.remark] if self.remark else [])]

    @property
    def slack(self) -> float:
        """Pixels by which a box may pass the edges."""
        return math.inf if self.prompt_form in AMODAL else EDGE_SLACK

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        """A row as a grounding Task, or None with all its problems."""
        faults = Faults(place)
        if "prompt" in raw:
            faults.add("prompt", "this is no RefCOCO-style row: give image, and sent with bbox, or conversations")
            return None, faults.problems
        images = faults.images("image", raw.get("image"))
        if len(images) != 1:
            faults.add("image", f"a referring expression needs one image, not {len(images)}")
        image = images[0] if images else None
        if image is not None:
            faults.attempt("width, height", _same_size, raw, image)
        field = _box_field(raw, self.box_field)
        if field is not None:
            answer = faults.attempt(field, self._box, raw[field], image)
        else:
            answer = faults.attempt("conversations", _box_of_conversation, raw.get("conversations"))
        question = faults.attempt("sent", _question, raw, self.prompt_form)
        kept = {name: faults.attempt(name, _share_of_one, raw.get(name)) for name in self.keep}
        if question is not None:
            faults.require_marks("image", (Message("user", question[0]),), len(images))
        if faults.problems or question is None or image is None:
            return None, faults.problems + faults.remarks
        meta = {"ability": "grounding", "width": image.width, "height": image.height, "question": question[1], **kept}
        task_id = f"{place.name}-{place.row}" if raw.get("id") is None else str(raw["id"])
        messages = (Message("user", question[0]),)
        return Task(task_id, "grounding", messages, (image,), answer, meta, str(place)), faults.remarks

    def _box(self, value: Any, image: Image | None) -> list[float] | None:
        """A box in 0..1000, cut at the edges. Without a readable image only the numbers themselves are checked."""
        unit = "xyxy" if self.box_unit == AUTO else self.box_unit
        numbers = _four(value, BOX_UNITS[unit])
        size = (image.width, image.height) if image is not None else None
        if (self.guessed or self.box_unit == AUTO) and unit not in FRACTIONS and size and are_fractions(numbers, size):
            raise DataError(
                f"{shown(value)} looks like fractions of the sides: an image of {size[0]} x {size[1]} pixels, and no "
                f"coordinate above 1, while boxes are read as {BOX_UNITS[unit]}; write all in one unit, or name it "
                "(--box-unit)"
            )
        try:
            pixels = _pixels(numbers, unit, size, self.slack)
        except DataError as error:
            units = FRACTIONS if size and are_fractions(numbers, size) else BOX_UNITS
            others = [name for name in units if name != unit and size and _fits(numbers, name, size, self.slack)]
            hint = f"; as {BOX_UNITS[others[0]]} it would fit (--box-unit {others[0]})" if others else ""
            raise DataError(f"{shown(value)} {error}{hint}") from None
        if size is None:
            return None
        if unit == "thousandths":
            return numbers
        if unit == "fractions":
            return [min(max(number, 0), 1) * THOUSANDTHS for number in numbers]
        return [corner * THOUSANDTHS / side for corner, side in zip(pixels, (*size, *size), strict=True)]


def format_box(box_1000: Sequence[float]) -> str:
    """The answer form of InternVL for a box in 0..1000: `<box>[[x1,y1,x2,y2]]</box>`, whole numbers."""
    return "<box>[[{},{},{},{}]]</box>".format(*map(round, box_1000))


def is_only_a_box(text: str) -> bool:
    """Whether a reply is one box, maybe with the name of its object, and nothing else."""
    return _ONLY_A_BOX.fullmatch(text) is not None


def recognise_unit(boxes: Sequence[tuple[Any, tuple[int, int] | None]], slack: float = EDGE_SLACK) -> tuple[str, str]:
    """The unit in which the boxes of a file are given, and why it is another one than the usual: "xyxy" and nothing
    where they fit as corners in pixels, or too few do not. boxes: with the size of their image, None if not known."""
    known = [(numbers, size) for value, size in boxes if (numbers := _numbers(value)) and size]
    if not known:
        return "xyxy", ""
    total = len(known)
    fitting = {unit: sum(_fits(numbers, unit, size, slack) for numbers, size in known) for unit in BOX_UNITS}
    shares = sum(are_fractions(numbers, size) for numbers, size in known)
    usual, units = ("fractions", FRACTIONS[1:]) if shares > total / 2 else ("xyxy", ("xywh", "thousandths"))
    misfits = total - fitting[usual]
    if misfits >= max(_ENOUGH, _SHARE * total):
        for unit in units:
            if fitting[unit] == total:
                return unit, f"{misfits} of the first {total} boxes are none as {BOX_UNITS[usual]}, and all are so"
    if usual == "xyxy":
        return usual, ""
    return usual, f"no coordinate of {'the' if shares == total else f'{shares} of the'} first {total} boxes is above 1"


def are_fractions(numbers: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box in an image of this size can only be meant in fractions of the sides: as anything else it would
    lie in the corner of the image, within one pixel or thousandth."""
    within = all(-FRACTION_SLACK <= number <= 1 + FRACTION_SLACK for number in numbers)
    return within and max(size) > TINY


def _fits(numbers: Sequence[float], unit: str, size: tuple[int, int], slack: float) -> bool:
    try:
        _pixels(numbers, unit, size, slack)
    except DataError:
        return False
    return True


def _pixels(numbers: Sequence[float], unit: str, size: tuple[int, int] | None, slack: float) -> list[float]:
    """The corners of a box in pixels, cut at the edges, which may be passed by `slack` pixels. Raises DataError,
    without the box in front, for one that has no area or lies outside."""
    x1, y1, x2, y2 = numbers
    if unit in ("xywh", "fractions-xywh"):
        x2, y2 = x1 + x2, y1 + y2
    if x2 <= x1 or y2 <= y1:
        raise DataError(f"has no area as {BOX_UNITS[unit]}: x2 must be greater than x1, and y2 greater than y1")
    if size is None:
        return [x1, y1, x2, y2]
    width, height = size
    if unit in (*FRACTIONS, "thousandths"):
        whole, beyond = (THOUSANDTHS, 0.0) if unit == "thousandths" else (1.0, FRACTION_SLACK)
        if max(x2, y2) > whole + beyond or min(x1, y1) < -beyond:
            raise DataError(f"lies outside the image: coordinates are 0..{whole:g} of its sides")
        x1, y1, x2, y2 = (min(max(corner, 0.0), whole) for corner in (x1, y1, x2, y2))
        x1, x2, y1, y2 = x1 * width / whole, x2 * width / whole, y1 * height / whole, y2 * height / whole
    beyond = max(-x1, -y1, x2 - width, y2 - height)
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if beyond > slack or x2 <= x1 or y2 <= y1:
        raise DataError(f"lies outside the image of {width} x {height} pixels")
    return [x1, y1, x2, y2]


def _box_field(row: Mapping[str, Any], first: str) -> str | None:
    return next((name for name in (first, *BOX_FIELDS) if row.get(name) is not None), None)


def _size_of(row: Mapping[str, Any], place: Place) -> tuple[int, int] | None:
    """The size of the image of a row, from its file or else as the row says."""
    value = row.get("image")
    try:
        image = read_image(value[0] if isinstance(value, list) and value else value, place.folders, place.max_pixels)
    except DataError:
        width, height = row.get("width"), row.get("height")
        return (width, height) if isinstance(width, int) and isinstance(height, int) and width * height > 0 else None
    return image.width, image.height


def _same_size(row: Mapping[str, Any], image: Image) -> None:
    sizes = {"width": image.width, "height": image.height}
    said = {name: row.get(name) for name in sizes if not is_no_image(row.get(name))}
    if any(str(value) != str(sizes[name]) and value != sizes[name] for name, value in said.items()):
        raise DataError(
            f"the row says {shown(said.get('width', image.width))} x {shown(said.get('height', image.height))} pixels, "
            f"but the image is {image.width} x {image.height} as shown; the box would be wrong"
        )


def _share_of_one(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise DataError(f"must be a number from 0 to 1, not {shown(value)}")


def _box_of_conversation(conversations: Any) -> list[float]:
    """The last `<box>` of the reply, as written (0..1000)."""
    boxes = _BOX.findall(_turn(conversations, 1))
    if not boxes:
        raise DataError("the row has neither bbox nor a reply with <box>[x1,y1,x2,y2]</box>")
    try:
        value = json.loads(boxes[-1])
    except (ValueError, RecursionError):  # JSON may have thousands of digits or brackets
        raise DataError(f"<box>{shown(boxes[-1])}</box> is not [x1,y1,x2,y2]") from None
    while isinstance(value, list) and len(value) == 1:  # [[x1,y1,x2,y2]], the model's own form
        value = value[0]
    try:
        numbers = _four(value, BOX_UNITS["thousandths"])
        _pixels(numbers, "thousandths", (1000, 1000), 0)
        if are_fractions(numbers, (1000, 1000)):
            raise DataError("looks like fractions of the sides: a box in a reply is in 0..1000, so multiply by 1000")
    except DataError as error:
        raise DataError(f"{shown(value)} {error}") from None
    return value


def _four(value: Any, unit: str) -> list[float]:
    numbers = _numbers(value)
    if numbers is None:
        raise DataError(f"{shown(value)} is not a box: it must be four finite numbers {unit}")
    return numbers


def _numbers(value: Any) -> list[float] | None:
    """Four finite numbers, or None; a list that stands in a cell of text is read, too."""
    if isinstance(value, str) and value.startswith("[") and len(value) < 200:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    numbers = value if isinstance(value, list) else []
    return [float(n) for n in numbers] if len(numbers) == 4 and all(map(_is_real, numbers)) else None


def _is_real(value: Any) -> bool:
    """A finite number; whole numbers beyond the range of floats, which JSON can hold, are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < sys.float_info.max


def _question(row: Mapping[str, Any], prompt_form: str) -> tuple[str, str]:
    """The content of the prompt, and the expression in it (or the whole question where there is none)."""
    sent = row.get("sent")
    if sent is not None:
        sent = text_of(sent)
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
    return valid_unicode(turn["value"])
