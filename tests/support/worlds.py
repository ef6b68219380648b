"""Environments small enough for tests, and a model that ends its turns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from foveate.data.images import load_image
from foveate.environments.observe import observation, task_messages
from foveate.environments.protocol import Environment, Step

HERE = str(Path(__file__))


class Corners(Environment):
    """Shows a corner of the first image behind each of the first two turns, and ends with the third."""

    def __init__(self, *, rewards: bool = False, fails_at: int = 0) -> None:
        self.rewards, self.fails_at, self.turn = rewards, fails_at, 0

    def reset(self, task: Any, seed: int) -> Any:  # noqa: ARG002
        self.image = load_image(task.images[0], task.where)
        return task_messages(task)

    def step(self, answer: str) -> Step:
        self.turn += 1
        if self.fails_at and len(answer) % 3 == 0 and self.turn >= self.fails_at:
            raise RuntimeError("no such corner")
        box = [(0, 0, 500, 500), (500, 500, 1000, 1000)][self.turn % 2]
        corner = self.image.crop(
            tuple(part * side // 1000 for part, side in zip(box, self.image.size * 2, strict=True))
        )
        call = {"name": "zoom", "error": len(answer) % 2 == 0, "image": 1, "box": box}
        reward = float(len(answer) % 5) if self.rewards else None
        message = observation("tool", f"corner {self.turn}", corner)
        return Step((message,), reward, self.turn >= 3, {"calls": [call]})


class Drawn(Environment):
    """Asks a question of its own about the image turned round, once, and gives a reward for it."""

    def reset(self, task: Any, seed: int) -> Any:
        image = load_image(task.images[0], task.where)
        return [observation("system", "Be brief."), observation("user", f"what is {seed % 7}?", image.rotate(90))]

    def step(self, answer: str) -> Step:
        return Step((), float(len(answer) % 3), True)


class Broken(Drawn):
    """Fails with every task."""

    def reset(self, task: Any, seed: int) -> Any:  # noqa: ARG002
        return [observation("user", task.meta["goal"])]


class Lengthy(Drawn):
    """Its prompt has no room."""

    def reset(self, task: Any, seed: int) -> Any:  # noqa: ARG002
        return [observation("user", "red " * 4000)]


def with_short_turns(folder: Path, target: Path, every: int = 8) -> Path:
    """A copy of a model folder in which one token of so many ends a turn."""
    shutil.copytree(folder, target)
    path = target / "generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({**content, "eos_token_id": [*_listed(content["eos_token_id"]), *range(20, 300, every)]})
    )
    return target


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
