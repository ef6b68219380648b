"""Scenes of six sources, each with a reward of its own: a mixture for runs that train several skills at once.

count: how many shapes of a colour; read: the number on a plate; point: a click at a shape; compare: which of two shapes
is bigger; list: all colours, in any order; choose: which of four shapes has a colour. Every row has a demonstration in
`extra_info.response`, the type of Vero's rewards in `extra_info.reward_type` where there is one, and as ground truth a
text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from foveate.datasets.shapes import (
    COLOURS,
    SHAPES,
    Scene,
    Shape,
    draw_scene,
    light_background,
    other_look,
    place_apart,
    radius_of,
    to_thousandths,
)
from foveate.datasets.traces import write_splits
from foveate.environments.observe import encoded
from foveate.environments.screen import draw_text

MIXED_SOURCES = ("count", "read", "point", "compare", "list", "choose")
REWARD_OF_SOURCE = {
    "count": "counting", "read": "string_match", "point": "click", "compare": "string_match", "list": "string_list",
    "choose": "multiple_choice",
}  # fmt: skip
"""The reward of each source."""
_VERO_TYPES = {
    "count": "counting", "read": "string_match", "point": "clicking", "compare": "string_match",
    "choose": "multiple_choice",
}  # fmt: skip
_LETTERS = "ABCD"
_SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True, slots=True)
class MixedScene:
    """A picture with a question: its shapes, the number on its plate ("" for none), and the question, the ground truth
    and a right answer as text."""

    scene: Scene
    plate: str
    question: str
    truth: str
    response: str

    @property
    def signature(self) -> str:
        """A hash of the picture and the question."""
        return hashlib.sha256(f"{self.scene.signature} {self.plate} {self.question}".encode()).hexdigest()[:16]


def draw_mixed(mixed: MixedScene) -> Image.Image:
    """The picture of a scene, RGB."""
    image = draw_scene(mixed.scene)
    if mixed.plate:
        side = mixed.scene.side
        top, height = side // 3, side // 3
        ImageDraw.Draw(image).rectangle((side // 6, top, side - side // 6, top + height), fill=(245, 245, 245))
        width = 6 * len(mixed.plate) * max(round(height / 11), 1)
        draw_text(image, ((side - width) / 2, top + height / 2), mixed.plate, height, (20, 20, 20))
    return image


def mixed_scenes(seed: int, split: str, source: str, count: int, side: int = 100) -> Iterator[MixedScene]:
    """`count` distinct scenes of a source, the same for the same seed; no scene of one split appears in the other: one
    in eight belongs to `test`, whatever the seed."""
    rng = np.random.default_rng([seed, _SPLITS[split], MIXED_SOURCES.index(source)])
    seen: set[str] = set()
    while len(seen) < count:
        made = _MAKERS[source](rng, side)
        if made is None:
            continue
        belongs = "test" if int(made.signature, 16) % 8 == 0 else "train"
        if belongs == split and made.signature not in seen:
            seen.add(made.signature)
            yield made


def mixed_rows(seed: int, split: str, count: int, side: int = 100) -> Iterator[dict[str, Any]]:
    """Rows of the field's parquet schema, the sources in turn."""
    share = -(-count // len(MIXED_SOURCES))
    streams = {source: mixed_scenes(seed, split, source, share, side) for source in MIXED_SOURCES}
    for index in range(count):
        source = MIXED_SOURCES[index % len(MIXED_SOURCES)]
        made = next(streams[source])
        yield {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"<image>\n{made.question}"}],
            "images": [{"bytes": encoded(draw_mixed(made)).data, "path": None}],
            "ability": source,
            "reward_model": {"style": "rule", "ground_truth": made.truth},
            "extra_info": {
                "split": split,
                "index": index,
                "id": f"{split}-{source}-{made.signature}",
                "width": side,
                "height": side,
                "reward_type": _VERO_TYPES.get(source),
                "response": made.response,
            },
        }


_EXTRA_INFO = {
    "split": pa.string(), "index": pa.int64(), "id": pa.string(), "width": pa.int64(), "height": pa.int64(),
    "reward_type": pa.string(), "response": pa.string(),
}  # fmt: skip


def prepare_mixed(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    side: int = 100,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `train.parquet` and `test.parquet` with the asked number of rows, and `manifest.json` with their hashes.
    Files appear whole or not at all, and the same arguments give the same bytes. `advance` is told of each row."""
    made = {split: mixed_rows(seed, split, count, side) for split, count in rows.items()}
    write_splits(folder, made, _EXTRA_INFO, {"seed": seed, "side": side, "rows": rows}, advance)


# ----------------------------------------------------------------------------------------------------- the six sources


def _scene(rng: np.random.Generator, side: int, looks: list[tuple[str, str]], radii: list[int]) -> Scene | None:
    centres = place_apart(rng, side, radii)
    if centres is None:
        return None
    shapes = tuple(
        Shape(kind, colour, x, y, r) for (colour, kind), (x, y), r in zip(looks, centres, radii, strict=True)
    )
    return Scene(side, light_background(rng), shapes, "", "mixed", "", 0, -1)


def _looks(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    used: set[tuple[str, str]] = set()
    return [other_look(rng, used) for _ in range(count)]


def _count(rng: np.random.Generator, side: int) -> MixedScene | None:
    number = int(rng.integers(1, 6))
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    others = int(rng.integers(0, 3))
    kinds = [str(kind) for kind in rng.choice(SHAPES, number + others)]
    looks = [(colours[0] if i < number else colours[1 + i % 3], kind) for i, kind in enumerate(kinds)]
    scene = _scene(rng, side, looks, [radius_of(rng, side, 0.08, 0.11) for _ in looks])
    asked = f"How many {colours[0]} shapes are there?"
    return scene and MixedScene(scene, "", asked, str(number), str(number))


def _read(rng: np.random.Generator, side: int) -> MixedScene | None:
    scene = Scene(side, light_background(rng), (), "", "mixed", "", 0, -1)
    number = str(int(rng.integers(10, 100)))
    return MixedScene(scene, number, "Which number is on the plate?", number, number)


def _point(rng: np.random.Generator, side: int) -> MixedScene | None:
    looks = _looks(rng, 3)
    scene = _scene(rng, side, looks, [radius_of(rng, side, 0.12, 0.18) for _ in looks])
    if scene is None:
        return None
    x1, y1, x2, y2 = to_thousandths(scene.shapes[0].box, side)
    asked = f"Point at the {' '.join(looks[0])}."
    return MixedScene(scene, "", asked, json.dumps([x1, y1, x2, y2]), f"[{(x1 + x2) // 2}, {(y1 + y2) // 2}]")


def _compare(rng: np.random.Generator, side: int) -> MixedScene | None:
    looks = _looks(rng, 2)
    radii = [radius_of(rng, side, 0.17, 0.22), radius_of(rng, side, 0.07, 0.12)]
    scene = _scene(rng, side, looks, radii)
    first, second = (looks[int(i)] for i in rng.permutation(2))
    asked = f"Which is bigger, the {' '.join(first)} or the {' '.join(second)}?"
    bigger = " ".join(looks[0])
    return scene and MixedScene(scene, "", asked, bigger, bigger)


def _list(rng: np.random.Generator, side: int) -> MixedScene | None:
    colours = sorted(str(name) for name in rng.permutation(list(COLOURS))[: int(rng.integers(2, 4))])
    looks = [(colour, str(rng.choice(SHAPES))) for colour in colours]
    scene = _scene(rng, side, looks, [radius_of(rng, side, 0.1, 0.16) for _ in looks])
    return scene and MixedScene(scene, "", "Which colours are there?", json.dumps(colours), ", ".join(colours))


def _choose(rng: np.random.Generator, side: int) -> MixedScene | None:
    colours = [str(name) for name in rng.permutation(list(COLOURS))[:4]]
    kinds = [str(kind) for kind in rng.permutation(SHAPES)]
    scene = _scene(rng, side, list(zip(colours, kinds, strict=True)), [radius_of(rng, side, 0.1, 0.14)] * 4)
    place = int(rng.integers(4))
    order = [str(kind) for kind in rng.permutation(SHAPES)]
    letter = _LETTERS[order.index(kinds[place])]
    options = "\n".join(f"{one}. {kind}" for one, kind in zip(_LETTERS, order, strict=True))
    return scene and MixedScene(scene, "", f"Which shape is {colours[place]}?\n{options}", letter, letter)


_MAKERS: dict[str, Callable[[np.random.Generator, int], MixedScene | None]] = {
    "count": _count, "read": _read, "point": _point, "compare": _compare, "list": _list, "choose": _choose,
}  # fmt: skip
