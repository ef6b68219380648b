"""The turns of answers as they are kept: texts, calls, and small copies of the images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from foveate.data.answers import AnswerTurn, ImageReference
from foveate.data.conversations import IMAGE_TAG, IMAGE_WORD
from foveate.data.images import load_image
from foveate.environments.turns import Turn
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.predictions import observed_path
from foveate.records import Image


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
    return text.replace(IMAGE_TAG, "").replace(IMAGE_WORD, IMAGE_TAG).strip()


def _kept(image: Image, run_folder: Path | None) -> ImageReference:
    if run_folder is None:
        return ImageReference(None, image.width, image.height)
    content = image.data if image.data is not None else str(image.path).encode()
    path = observed_path(run_folder, f"{sha256(content).hexdigest()[:32]}.jpg")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save_thumbnail(load_image(image, "an observation"), path)
    return ImageReference(str(path.relative_to(run_folder)), image.width, image.height)


def turn_metrics(answers: Sequence[Sequence[Turn]]) -> dict[str, float]:
    """How many turns answers have on the mean, and how many calls of tools: in all, that went wrong, and of each tool,
    per answer."""
    if not answers:
        return {}
    calls = [call for turns in answers for turn in turns for call in turn.calls]
    names = sorted({str(call["name"]) for call in calls if call.get("name")})
    count = len(answers)
    return {
        "turns/mean": sum(turn.role == "assistant" for turns in answers for turn in turns) / count,
        "turns/max": float(max(sum(turn.role == "assistant" for turn in turns) for turns in answers)),
        "tool/calls": len(calls) / count,
        "tool/errors": sum(bool(call.get("error")) for call in calls) / count,
        **{f"tool/{name}": sum(call.get("name") == name for call in calls) / count for name in names},
    }
