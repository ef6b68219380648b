"""The turns of answers as they are kept: texts, calls, and small copies of the images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from foveate.data.answers import AnswerTurn, ImageReference
from foveate.data.conversations import IMAGE_TAG, with_words
from foveate.data.images import load_image
from foveate.environments.look import LOOK_BOX
from foveate.environments.turns import Turn
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.predictions import observed_path
from foveate.records import Image, Task
from foveate.rewards.boxes import Box, iou


def kept_turns(turns: Iterable[Turn], run_folder: Path | None) -> tuple[AnswerTurn, ...]:
    """The turns as they are written. With a folder of a run, their images are saved there, made small."""
    return tuple(
        AnswerTurn(
            turn.role,
            turn.text if turn.role == "assistant" else _without_marks(turn.text),
            turn.tokens,
            turn.reward,
            tuple(json.loads(json.dumps(dict(call))) for call in turn.calls),
            tuple(_kept(image, run_folder) for image in turn.images),
        )
        for turn in turns
    )


def _without_marks(text: str) -> str:
    """The words of an observation; its images are kept beside them."""
    return with_words(text.replace(IMAGE_TAG, "")).strip()


def _kept(image: Image, run_folder: Path | None) -> ImageReference:
    if run_folder is None:
        return ImageReference(None, image.width, image.height)
    content = image.data if image.data is not None else str(image.path).encode()
    path = observed_path(run_folder, f"{sha256(content).hexdigest()[:32]}.jpg")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save_thumbnail(load_image(image, "an observation"), path)
    return ImageReference(str(path.relative_to(run_folder)), image.width, image.height)


def turn_metrics(answers: Sequence[Sequence[Turn | AnswerTurn]], places: Iterable[Box | None] = ()) -> dict[str, float]:
    """How many turns answers have on the mean, and how many calls of tools: in all, that went wrong, and of each tool,
    per answer. `places`: the part of the first image that each answer should look at, where its task says one (see
    `place_to_look`); then `tool/iou` is the mean overlap of their looks with it."""
    if not answers:
        return {}
    calls = [call for turns in answers for turn in turns for call in turn.calls]
    names = sorted({str(call["name"]) for call in calls if call.get("name")})
    count = len(answers)
    overlaps = [
        iou(look, place)
        for turns, place in zip(answers, places, strict=False)
        if place is not None
        for look in looks_of(turns)
    ]
    return {
        **{f"tool/{name}": sum(str(call.get("name")) == name for call in calls) / count for name in names},
        "turns/mean": sum(turn.role == "assistant" for turns in answers for turn in turns) / count,
        "turns/max": float(max(sum(turn.role == "assistant" for turn in turns) for turns in answers)),
        "tool/calls": len(calls) / count,
        "tool/errors": sum(bool(call.get("error")) for call in calls) / count,
        **({"tool/iou": sum(overlaps) / len(overlaps)} if overlaps else {}),
    }


def looks_of(turns: Iterable[Turn | AnswerTurn]) -> list[Box]:
    """The parts of the first image, in thousandths, that the calls of an answer looked at."""
    calls = [call for turn in turns for call in turn.calls if not call.get("error") and call.get("image", 1) == 1]
    return [box for call in calls if (box := as_box(call.get("box"))) is not None]


def place_to_look(task: Task) -> Box | None:
    """The part of the first image that an answer should look at: `look_box` of `extra_info`, in thousandths."""
    return as_box(task.meta.get(LOOK_BOX))


def as_box(value: Any) -> Box | None:
    """Four numbers as a box; None for anything else."""
    is_list = isinstance(value, list | tuple) and len(value) == 4
    if not (is_list and all(isinstance(side, int | float) for side in value)):
        return None
    x1, y1, x2, y2 = map(float, value)
    return x1, y1, x2, y2
