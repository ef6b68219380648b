"""From a raw row of a file to a Task: rows of the schema, RefCOCO-style rows, and rows with other columns.

A parser is plain data, so that worker processes can be given one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from foveate.data.rows import IMAGE_TAG, PROMPT_FORMS, Place, Problem, parse_referring, parse_row
from foveate.data.sources import dig
from foveate.errors import DataError
from foveate.records import Task
from foveate.registry import suggestion

Parsed = tuple[Task | None, list[Problem]]

REQUIRED = ("data_source", "prompt")
OPTIONAL = ("reward_model", "images", "videos", "ability", "extra_info")
REFERRING = ("image", "sent", "bbox", "modal_bbox", "width", "height", "conversations", "id")

# The targets that a column can be mapped to, and where it goes in a row of the schema.
TARGETS = {
    "prompt": "the question as text, or messages [{role, content}] or [{from, value}]",
    "images": "an image or a list of images: paths, bytes, or {path, bytes}",
    "videos": "the frames of a video, or a list of such lists: images as above",
    "answer": "the ground truth of the reward",
    "source": "the name of the dataset; without it the name of the file",
    "id": "a name of the row",
    "system": "a system prompt",
    "response": "the answer that supervised training imitates",
    "chosen": "the better answer of a preference pair",
    "rejected": "the worse answer of a preference pair",
}
CONSTANT = "="
_OWN = (
    "prompt",
    "images",
    "videos",
    "answer",
    "system",
)  # with a place of their own; the others are extra_info
_ROLES = {"human": "user", "gpt": "assistant"}


class Parser(Protocol):
    """From a raw row to a Task, or to None with all problems of the row."""

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read of a file with these. Raises DataError, without a place, if needed ones are missing."""
        ...

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed: ...

    def column_of(self, field: str) -> list[str]:
        """The column, and the fields below it, that a field of the schema (`extra_info.id`) is read from."""
        return field.split(".")


@dataclass(frozen=True, slots=True)
class SchemaRows(Parser):
    """Rows of the parquet schema; rows without a prompt are taken for referring expressions.

    prompt_form, box_field, keep: for referring expressions, see `rows.parse_referring`."""

    prompt_form: str = "internvl"
    box_field: str = "bbox"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_form not in PROMPT_FORMS:
            raise DataError(
                f"setting prompt_form: unknown form {self.prompt_form!r}; allowed: {', '.join(PROMPT_FORMS)}"
            )

    def columns(self, names: Sequence[str]) -> list[str]:
        if "prompt" not in names and "image" in names and ("sent" in names or "conversations" in names):
            return [name for name in (*REFERRING, *self.keep) if name in names]
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise DataError(
                f"column {', '.join(missing)} is missing; the file has {', '.join(names)}; needed are "
                f"{', '.join(REQUIRED)}, understood also {', '.join(OPTIONAL)}; other names are given by data.columns"
            )
        return [name for name in (*REQUIRED, *OPTIONAL) if name in names]

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        if "prompt" in raw:
            return parse_row(raw, place)
        return parse_referring(raw, place, self.prompt_form, self.box_field, self.keep)


class MappedRows:
    """Rows with columns of other names.

    mapping: target (see `TARGETS`) -> column of the file; a dot goes into a field (`meta.label`), and `=text` stands
    for the text itself in every row (`source: =clevr`). Other targets join `extra_info` under their own name. A
    question without `<image>` marks gets one per image in front. Raises DataError if `prompt` is missing, or neither
    answer, response nor chosen is there, or chosen is without rejected.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self.mapping = dict(mapping)
        given = f"data.columns: has {', '.join(mapping)}"
        if "prompt" not in mapping:
            raise DataError(
                f"{given}, but prompt is missing; write prompt=COLUMN{suggestion('prompt', mapping)}; "
                f"targets: {', '.join(TARGETS)}"
            )
        if not {"answer", "response", "chosen"} & set(mapping):
            raise DataError(f"{given}, but none of answer (for RL), response (for SFT) and chosen (for MPO)")
        if ("chosen" in mapping) != ("rejected" in mapping):
            raise DataError(f"{given}; a preference pair needs both chosen and rejected")

    def columns(self, names: Sequence[str]) -> list[str]:
        wanted = {target: self.column_of(target)[0] for target, name in self.mapping.items() if not _constant(name)}
        for target, name in wanted.items():
            if name not in names:
                raise DataError(
                    f"column {name!r}, named by data.columns as {target}, is missing{suggestion(name, names)}; "
                    f"the file has {', '.join(names)}"
                )
        return sorted(set(wanted.values()))

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        fields = {
            target: name[1:] if _constant(name) else dig(raw, name.split(".")) for target, name in self.mapping.items()
        }
        images = fields.get("images")
        images = images if isinstance(images, list) else [] if images is None else [images]
        extra = {name: value for name, value in fields.items() if name not in _OWN}
        source = extra.pop("source", place.file.stem)
        row = {
            "data_source": source,
            "prompt": _conversation(fields["prompt"], fields.get("system"), len(images)),
            "images": images,
            "videos": fields.get("videos"),
            "reward_model": {"style": "rule", "ground_truth": fields.get("answer")},
            "extra_info": extra,
        }
        task, problems = parse_row(row, place)
        return task, [self._renamed(problem) for problem in problems]

    def column_of(self, field: str) -> list[str]:
        target = {"data_source": "source", "reward_model.ground_truth": "answer"}.get(field, field)
        return self.mapping.get(target.removeprefix("extra_info."), target).split(".")

    def _renamed(self, problem: Problem) -> Problem:
        column = ".".join(self.column_of(problem.field))
        return problem if column == problem.field else replace(problem, field=f"{problem.field} (column {column})")


def _constant(name: str) -> bool:
    return name.startswith(CONSTANT)


def _conversation(prompt: Any, system: Any, images: int) -> Any:
    """Messages in the form of the schema; what cannot be one is left to the check of the row."""
    if isinstance(prompt, str) and prompt:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        return prompt
    turns = [_turn(turn) for turn in prompt]
    texts = [turn["content"] for turn in turns if isinstance(turn.get("content"), str)]
    asked = next((turn for turn in turns if turn.get("role") == "user" and isinstance(turn.get("content"), str)), None)
    if images and asked is not None and not any(IMAGE_TAG in text for text in texts):
        asked["content"] = f"{IMAGE_TAG}\n" * images + asked["content"]
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and system else turns


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    if "from" in turn:
        return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return {"role": turn.get("role"), "content": turn.get("content")}
