"""Which column of a file holds what, by the names that datasets give their columns, and which columns nobody reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from foveate.data.image_values import is_no_image, looks_like_image

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "messages", "conversations", "conversation", "problem", "question", "query", "instruction"),
    "images": ("images", "image", "image_path", "image_paths", "img", "imgs", "picture", "pictures"),
    "videos": ("videos", "video"),
    "answer": ("reward_model.ground_truth", "answer", "solution", "ground_truth", "answers"),
    "source": ("data_source", "source"),
    "id": ("extra_info.id", "id", "question_id", "uid"),
    "system": ("system", "system_prompt"),
    "response": ("extra_info.response", "response", "completion", "output"),
    "chosen": ("extra_info.chosen", "chosen"),
    "rejected": ("extra_info.rejected", "rejected"),
    "ability": ("ability",),
}
"""The columns, and fields of them, in which a role is looked for without a mapping: the first with a value counts."""

SCHEMA_FIELDS = {
    "source": "data_source", "answer": "reward_model.ground_truth", "id": "extra_info.id",
    "response": "extra_info.response", "chosen": "extra_info.chosen", "rejected": "extra_info.rejected",
}  # fmt: skip
"""The field of the parquet schema that a role fills, where it has another name."""
CONTAINERS = ("reward_model", "extra_info")
CONSTANT = "="

_MEDIA = {
    "images": (
        *COLUMNS["images"], "photo", "photos", "pic", "pics", "frames", "screenshot", "screenshots", "image_url",
        "image_urls", "image_bytes", "image_file", "image_files", "img_path", "images_path", "pixel_values",
    ),
    "videos": (*COLUMNS["videos"], "video_path", "video_paths", "video_url"),
    "audio": ("audio", "audios", "audio_path"),
}  # fmt: skip
_ANSWERS = (
    *COLUMNS["answer"][1:], "label", "labels", "target", "targets", "gt", "truth", "groundtruth", "gt_answer",
    "correct_answer", "final_answer", "reference_answer", "expected_answer",
)  # fmt: skip
_NUMBERED = re.compile(r"(image|img|picture|video|frame)s?_?\d+")
_LETTER = re.compile(r"[A-J]")


@dataclass(frozen=True, slots=True)
class Roles:
    """The use of the columns of a row. candidates: for each role the columns, with the fields below them, in which it
    is looked for; letters: columns A, B, ... with the options of a question; kept: all others, which join
    `extra_info`; paths: all candidates together."""

    candidates: Mapping[str, tuple[str, ...]]
    letters: tuple[str, ...]
    kept: tuple[str, ...]
    paths: frozenset[str]


@lru_cache(maxsize=4096)
def roles_of(names: tuple[str, ...], mapping: tuple[tuple[str, str], ...] = ()) -> Roles:
    """The roles of columns with these names: those of the mapping as it says, all others by `COLUMNS`."""
    given = dict(mapping)
    taken = {column.split(".")[0] for column in given.values() if not column.startswith(CONSTANT)}
    by_name = {name.lower(): name for name in reversed(names)}
    candidates: dict[str, tuple[str, ...]] = {}
    for role, known in COLUMNS.items():
        if role in given:
            candidates[role] = (given[role],)
            continue
        found = []
        for path in known:
            column, _, field = path.partition(".")
            name = by_name.get(column)
            if name is not None and name not in taken:
                found.append(f"{name}.{field}" if field else name)
        if found:
            candidates[role] = tuple(found)
    candidates |= {role: (column,) for role, column in given.items() if role not in COLUMNS}
    letters = tuple(name for name in names if _LETTER.fullmatch(name) and name not in taken)
    letters = letters if letters[:2] == ("A", "B") else ()
    read = {path.split(".")[0] for paths in candidates.values() for path in paths} | {*CONTAINERS, *letters}
    paths = frozenset(path for paths in candidates.values() for path in paths)
    return Roles(candidates, letters, tuple(name for name in names if name not in read), paths)


@lru_cache(maxsize=2**14)
def nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that a name is, or is nearly: of as many words."""
    lower = name.lower()
    if lower in known:
        return lower
    alike = [one for one in known if one.count("_") == lower.count("_")]
    return next(iter(difflib.get_close_matches(lower, alike, 1, 0.8)), None)


def unread_media(row: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of columns that hold no role, those that look like images, videos or audio, by name or by what they hold, each
    with what it looks like."""
    for name in names:
        value = row.get(name)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, bool | int | float) or is_no_image(value):
            continue
        kinds = (kind for kind, known in _MEDIA.items() if nearest(name, known))
        kind = next(kinds, "images" if looks_like_image(value) or _NUMBERED.fullmatch(name.lower()) else None)
        if kind is not None:
            yield name, kind


def unread_answers(row: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Of columns that hold no role, those whose names say that they are answers."""
    return (name for name in names if not is_no_image(row.get(name)) and nearest(name, _ANSWERS))


def form_of(row: Mapping[str, Any], used: Mapping[str, str]) -> str:
    """The name that people have for rows like this one."""
    prompt = used.get("prompt", "")
    if "reward_model" in row:
        return "rows of verl's schema"
    if "chosen" in used:
        return "preference pairs"
    if prompt in ("conversations", "conversation"):
        return "conversations, as LLaVA, ShareGPT and InternVL have them"
    if prompt == "messages":
        return "messages"
    return {"problem": "problems and answers, as EasyR1 has them", "prompt": "prompts, as TRL has them"}.get(
        prompt, "questions"
    )
