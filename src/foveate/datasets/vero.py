"""Prepare Vero-600k (zlab-princeton/Vero-600k on the Hugging Face hub; arXiv 2604.04917): rows of six domains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.data.hub import dataset_folder, is_hub_name
from foveate.data.parsers import Parser
from foveate.data.rows import Parsed, Place, Problem, parse_row
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, prepare_splits
from foveate.errors import DataError, require
from foveate.records import Task
from foveate.rewards.boxes import FRAME
from foveate.rewards.matching import truth_boxes
from foveate.rewards.vero import REWARD_TYPE, TYPES

DATASET = "zlab-princeton/Vero-600k"
_NEEDED = ("prompt", "reward_model", "ability", "extra_info")
_READ = (*_NEEDED, "image", "images", "id", "data_source")
_IN_PIXELS = ("grounding", "clicking")
_KEPT = (REWARD_TYPE, "tolerance", "question")


@dataclass(frozen=True, slots=True)
class VeroRows(Parser):
    """Rows of Vero as tasks of the vero reward. Their domain becomes the data_source, for shares and metrics, and the
    dataset that they come from `extra_info.dataset`. Boxes of the ground truth, in pixels there, become thousandths."""

    def columns(self, names: Sequence[str]) -> list[str]:
        missing = [name for name in _NEEDED if name not in names]
        if missing or not {"image", "images"} & {*names}:
            raise DataError(
                f"column {', '.join(missing or ['image'])} is missing; Vero's rows have image (or images), "
                f"{', '.join(_NEEDED)}, the file has {', '.join(names)}"
            )
        return [name for name in _READ if name in names]

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        info = raw.get("extra_info")
        info = info if isinstance(info, Mapping) else {}
        kept = {name: info[name] for name in _KEPT if info.get(name) is not None}
        if "tolerance" in kept:
            kept["tolerance"] = _number(kept["tolerance"])
        images = raw.get("images") if raw.get("image") is None else [raw["image"]]
        if not images:
            return None, [Problem(str(place), "image", "is missing; every row of Vero has one")]
        named = {"id": raw.get("id"), "dataset": raw.get("data_source")}
        task, told = parse_row(
            {
                "data_source": raw.get("ability"),
                "prompt": _messages(raw.get("prompt"), info.get("question")),
                "images": images,
                "ability": raw.get("ability"),
                "reward_model": raw.get("reward_model"),
                "extra_info": {**kept, **{name: str(value) for name, value in named.items() if value is not None}},
            },
            place,
            marks_in_front=True,
        )
        if task is None:
            return task, told
        kind = task.meta.get(REWARD_TYPE)
        if kind not in TYPES:
            fault = f"{kind!r} is no type of Vero's rows; known: {', '.join(TYPES)}"
            return None, [*told, Problem(task.where, f"extra_info.{REWARD_TYPE}", fault)]
        return (_in_thousandths(task), told) if kind in _IN_PIXELS else (task, told)

    def column_of(self, field: str) -> list[list[str]]:
        return [[{"data_source": "ability", "images": "image"}.get(field, field)]]


def _messages(prompt: Any, question: Any) -> Any:
    """The messages of a row in any of the forms that Vero's own script reads: a list of them, or lists of roles and
    contents; contents as text or in parts; without any text the question. Another value as it is."""
    if isinstance(prompt, Mapping) and isinstance(prompt.get("role"), list) and isinstance(prompt.get("content"), list):
        pairs = zip(prompt["role"], prompt["content"], strict=False)
        prompt = [{"role": role, "content": content} for role, content in pairs]
    if not isinstance(prompt, list) or not all(isinstance(message, Mapping) for message in prompt):
        return prompt
    read = [{**message, "content": _text(message.get("content"))} for message in prompt]
    is_empty = not any(message["content"] for message in read)
    return [{"role": "user", "content": question}] if is_empty and question else read


def _text(content: Any) -> Any:
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    return "".join("<image>" if part.get("type") == "image" else str(part.get("text") or "") for part in content)


def _number(value: Any) -> Any:
    """A tolerance as a number; the value itself where it is none, which the check of its reward tells."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _in_thousandths(task: Task) -> Task:
    """A task whose true boxes, in pixels, are written as thousandths of the sides, held inside the image as published;
    as it is where there are none, which the check of its reward tells."""
    try:
        boxes = truth_boxes(task)
    except DataError:
        return task
    sides = (task.images[0].width, task.images[0].height) * 2 if task.images else (FRAME,) * 4
    scaled = [
        [round(min(max(v * FRAME / side, 0.0), FRAME), 2) for v, side in zip(box, sides, strict=True)] for box in boxes
    ]
    return replace(task, answer=json.dumps(scaled))


def prepare_vero(source: str, out: Path, *, reading: ReadOptions = AS_IS) -> Prepared:
    """Vero-600k as one parquet file per split (train, validation), with a manifest.

    source: a folder of parquet files, as the hub has them (one folder per dataset), or the name of the dataset on the
    hub, which is downloaded. Raises DataError where there is none, or the hub is not reached, and for rows that cannot
    be used.
    """
    folder = Path(source)
    if not folder.exists():
        require(
            is_hub_name(source),
            f"{source}: no such file or folder, and no name of a dataset (owner/name); give the folder of a local copy",
        )
        folder = dataset_folder(source)
    return prepare_splits(folder, out, VeroRows(), settings={"dataset": DATASET}, reading=reading)
