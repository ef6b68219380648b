"""Scenes of six sources, each with a reward of its own: a mixture for runs that train several skills at once.

count: how many shapes; read: the number on a plate; point: a click at a shape; compare: which of two shapes
is bigger; list: all kinds, in any order; choose: the kind of a shape. Every row has a demonstration in
`extra_info.response`, the type of Vero's rewards in `extra_info.reward_type` where there is one, and as ground truth a
text.

`shortcut` makes demonstrations with the flaws of careless annotation: a response is right with the given probability,
and otherwise one too many, the digits swapped, x for y, the smaller one, a kind short, another kind.
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

from foveate.datasets.distinct import distinct_of_split
from foveate.datasets.shapes import (
    COLOURS,
    SHAPES,
    Scene,
    Shape,
    draw_scene,
    light_background,
    other_look,
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
_Look = tuple[str, str]
_LETTERS = "ABCD"
_SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True, slots=True)
class MixedScene:
    """A picture with a question: its shapes, the number on its plate ("" for none), and as text the question, the
    ground truth, a right answer and that of a careless annotator."""

    scene: Scene
    plate: str
    question: str
    truth: str
    response: str
    careless: str

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
    make = _MAKERS[source]
    return distinct_of_split(split, count, lambda _: make(rng, side), lambda scene: int(scene.signature, 16))


def mixed_rows(seed: int, split: str, count: int, side: int = 100, shortcut: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rows of the field's parquet schema, the sources in turn. `extra_info.response` is a demonstration that is right
    with the probability `shortcut`."""
    rng = np.random.default_rng([seed, _SPLITS[split], len(MIXED_SOURCES)])
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
                "response": made.response if rng.random() < shortcut else made.careless,
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
    shortcut: float = 1.0,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `train.parquet` and `test.parquet` with the asked number of rows, and `manifest.json` with their hashes.
    Files appear whole or not at all, and the same arguments give the same bytes. `advance` is told of each row."""
    made = {split: mixed_rows(seed, split, count, side, shortcut) for split, count in rows.items()}
    facts = {"seed": seed, "side": side, "shortcut": shortcut, "rows": rows}
    write_splits(folder, made, _EXTRA_INFO, facts, advance)


# ----------------------------------------------------------------------------------------------------- the six sources


def _scene(
    rng: np.random.Generator, side: int, looks: list[_Look], cells: list[tuple[float, float]], radii: list[int]
) -> Scene:
    """Shapes at cells of the picture, in shares of its side, a little beside their middles."""
    shapes = []
    for (colour, kind), cell, r in zip(looks, cells, radii, strict=True):
        x, y = (round(side * (place + rng.uniform(-0.03, 0.03))) for place in cell)
        shapes.append(Shape(kind, colour, x, y, r))
    return Scene(side, light_background(rng), tuple(shapes), "", "mixed", "", 0, -1)


def _looks(rng: np.random.Generator, count: int) -> list[_Look]:
    """Kinds, all different, with colours."""
    return [(str(rng.choice(list(COLOURS))), str(kind)) for kind in rng.permutation(SHAPES)[:count]]


def _cells(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Some of the six cells of two rows."""
    cells = [(x, y) for x in (0.18, 0.5, 0.82) for y in (0.27, 0.73)]
    return [cells[int(i)] for i in rng.permutation(len(cells))[:count]]


def _count(rng: np.random.Generator, side: int) -> MixedScene:
    number = int(rng.integers(1, 6))
    looks = [other_look(rng, set()) for _ in range(number)]
    cells = _cells(rng, number)
    scene = _scene(rng, side, looks, cells, [radius_of(rng, side, 0.08, 0.12) for _ in looks])
    return MixedScene(scene, "", "How many shapes are there?", str(number), str(number), str(number + 1))


def _read(rng: np.random.Generator, side: int) -> MixedScene:
    number = str(int(rng.integers(10, 100)))
    return MixedScene(
        _scene(rng, side, [], [], []), number, "Which number is on the plate?", number, number, number[::-1]
    )


def _point(rng: np.random.Generator, side: int) -> MixedScene:
    [(colour, kind)] = _looks(rng, 1)
    scene = _scene(rng, side, [(colour, kind)], _cells(rng, 1), [radius_of(rng, side, 0.1, 0.14)])
    x1, y1, x2, y2 = box = to_thousandths(scene.shapes[0].box, side)
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    return MixedScene(scene, "", f"Point at the {kind}.", json.dumps([*box]), f"[{x}, {y}]", f"[{y}, {x}]")


def _compare(rng: np.random.Generator, side: int) -> MixedScene:
    sides = ["left", "right"]
    bigger = int(rng.integers(2))
    radii = [radius_of(rng, side, *((0.16, 0.2) if i == bigger else (0.08, 0.12))) for i in range(2)]
    scene = _scene(rng, side, _looks(rng, 2), [(0.27, 0.5), (0.73, 0.5)], radii)
    return MixedScene(scene, "", "Which shape is bigger?", sides[bigger], sides[bigger], sides[1 - bigger])


def _list(rng: np.random.Generator, side: int) -> MixedScene:
    looks = _looks(rng, int(rng.integers(2, 4)))
    cells = [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)][: len(looks)]
    scene = _scene(rng, side, looks, cells, [radius_of(rng, side, 0.1, 0.13) for _ in looks])
    kinds = [kind for _, kind in looks]
    right, careless = ", ".join(kinds), ", ".join(kinds[:-1])
    return MixedScene(scene, "", "Which shapes are there?", json.dumps(kinds), right, careless)


def _choose(rng: np.random.Generator, side: int) -> MixedScene:
    [(colour, kind)] = _looks(rng, 1)
    scene = _scene(rng, side, [(colour, kind)], [(0.5, 0.5)], [radius_of(rng, side, 0.2, 0.3)])
    order = [str(one) for one in rng.permutation(SHAPES)]
    options = "\n".join(f"{letter}. {one}" for letter, one in zip(_LETTERS, order, strict=True))
    other = SHAPES[(SHAPES.index(kind) + 1) % len(SHAPES)]
    return MixedScene(scene, "", f"Which shape is this?\n{options}", _LETTERS[order.index(kind)], kind, other)


_MAKERS: dict[str, Callable[[np.random.Generator, int], MixedScene]] = {
    "count": _count, "read": _read, "point": _point, "compare": _compare, "list": _list, "choose": _choose,
}  # fmt: skip
