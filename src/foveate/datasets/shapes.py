"""Scenes of coloured shapes with referring expressions: a grounding task that a laptop can learn.

Four kinds of scene: `single` shows one object; `attribute` names one of several by colour, shape and size ("the small
red circle"); `relation` places it by another one ("the red circle left of the blue square"); and `pair` shows two
objects of the same colour and shape, told apart by a relation word alone ("the left red circle"). True boxes are those
of the drawn pixels, in 0..1000 of the picture's sides.

`shortcut` makes demonstrations with the flaw of careless annotation: for a `pair`, the response is right with the given
probability and otherwise names the larger of the two. It is what the shipped cold start was trained on, so that
reinforcement learning has something to unlearn; the ground truth is never touched by it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from foveate.data.referring import format_box
from foveate.data.table import row_schema, write_rows
from foveate.datasets.distinct import distinct_of_split
from foveate.files import atomic_write_text, sha256

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 95, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 70, 180),
    "orange": (250, 130, 20),
    "cyan": (40, 190, 210),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond")
RELATIONS = ("left", "right", "top", "bottom")
KINDS = ("pair", "attribute", "relation", "single")
_SIZE_WORDS = ("small", "big")
_BESIDE = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
QUESTION = "<image>\nLocate <ref>{}</ref>"
_SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True, slots=True)
class Shape:
    """One object: centre and half-width in pixels. It fills the square (x - r, y - r) .. (x + r, y + r)."""

    kind: str
    colour: str
    x: int
    y: int
    r: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Corners in pixels, right and bottom edge exclusive."""
        return self.x - self.r, self.y - self.r, self.x + self.r + 1, self.y + self.r + 1


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture to be drawn with one expression about it. `target` indexes `shapes`; `decoy` is the shape that the
    shortcut names (-1 where there is none); `relation` is the relation word, or ""."""

    side: int
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]
    expression: str
    kind: str
    relation: str
    target: int
    decoy: int

    @property
    def signature(self) -> str:
        """A hash of what is drawn, in which order: scenes with the same signature have the same pixels."""
        return hashlib.sha256(repr((self.side, self.background, self.shapes)).encode()).hexdigest()[:16]


def to_thousandths(box: tuple[int, int, int, int], side: int) -> tuple[int, int, int, int]:
    """A pixel box of a `side` x `side` picture as integers in 0..1000."""
    x1, y1, x2, y2 = (round(1000 * value / side) for value in box)
    return x1, y1, x2, y2


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, `side` x `side` pixels."""
    image = Image.new("RGB", (scene.side, scene.side), scene.background)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        draw_shape(draw, shape, COLOURS[shape.colour])
    return image


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, fill: int | tuple[int, int, int]) -> None:
    """Fill the outline of a shape on a drawing."""
    x, y, r = shape.x, shape.y, shape.r
    if shape.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    else:
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=fill)


def make_scene(rng: np.random.Generator, kind: str, side: int = 100) -> Scene:
    """Draw a random scene of one kind (see KINDS) whose expression has exactly one right referent."""
    while True:
        scene = {"pair": _pair, "attribute": _attribute, "relation": _relation, "single": _single}[kind](rng, side)
        if scene is not None:
            return scene


def scenes(seed: int, split: str, count: int, kinds: tuple[str, ...] = ("pair",), side: int = 100) -> Iterator[Scene]:
    """`count` distinct scenes, the same for the same seed. No scene of one split appears in the other: a scene belongs
    to the split that its signature falls into (one in eight to `test`), whatever the seed."""
    rng = np.random.default_rng([seed, _SPLITS[split]])
    return distinct_of_split(
        split,
        count,
        lambda _: make_scene(rng, kinds[int(rng.integers(len(kinds)))], side),
        lambda scene: int(scene.signature, 16),
    )


def shape_rows(
    seed: int,
    split: str,
    count: int,
    *,
    kinds: tuple[str, ...] = ("pair",),
    side: int = 100,
    shortcut: float | None = None,
) -> Iterator[dict]:
    """Rows of the field's parquet schema. With `shortcut`, `extra_info.response` holds a demonstration that is right
    with that probability and names the decoy otherwise; without it, the demonstration is always right."""
    rng = np.random.default_rng([seed, _SPLITS[split], 1])
    for index, scene in enumerate(scenes(seed, split, count, kinds, side)):
        box = to_thousandths(scene.shapes[scene.target].box, side)
        named = scene.target
        if shortcut is not None and scene.decoy >= 0 and rng.random() >= shortcut:
            named = scene.decoy
        buffer = io.BytesIO()
        draw_scene(scene).save(buffer, format="PNG")
        yield {
            "data_source": "shapes",
            "prompt": [{"role": "user", "content": QUESTION.format(scene.expression)}],
            "images": [{"bytes": buffer.getvalue(), "path": None}],
            "ability": "grounding",
            "reward_model": {"style": "rule", "ground_truth": list(box)},
            "extra_info": {
                "split": split,
                "index": index,
                "id": f"{split}-{scene.signature}",
                "width": side,
                "height": side,
                "question": scene.expression,
                "kind": scene.kind,
                "relation": scene.relation,
                "response": format_box(to_thousandths(scene.shapes[named].box, side)),
            },
        }


_EXTRA_INFO = {
    "split": pa.string(),
    "index": pa.int64(),
    "id": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "question": pa.string(),
    "kind": pa.string(),
    "relation": pa.string(),
    "response": pa.string(),
}


def prepare_shapes(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    kinds: tuple[str, ...] = ("pair",),
    side: int = 100,
    shortcut: float | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `train.parquet` and `test.parquet` with the asked number of rows, and `manifest.json` with their hashes.

    Files appear whole or not at all, and the same arguments give the same bytes. `advance` is told of each row."""

    def counted(split: str) -> Iterator[dict]:
        for row in shape_rows(seed, split, rows[split], kinds=kinds, side=side, shortcut=shortcut):
            yield row
            advance(1)

    schema = row_schema(pa.list_(pa.float64()), _EXTRA_INFO)
    hashes = {}
    for split in rows:
        path = folder / f"{split}.parquet"
        write_rows(path, counted(split), schema)
        hashes[path.name] = sha256(path)
    manifest = {"seed": seed, "kinds": kinds, "side": side, "shortcut": shortcut, "rows": rows, "sha256": hashes}
    atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ the three kinds


def light_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light colour, on which every shape can be seen."""
    shade = rng.integers(225, 256, size=3)
    return int(shade[0]), int(shade[1]), int(shade[2])


def radius_of(rng: np.random.Generator, side: int, low: float, high: float) -> int:
    """A half-width in pixels, between two shares of the picture's side."""
    return round(side * rng.uniform(low, high))


def place_apart(rng: np.random.Generator, side: int, radii: list[int]) -> list[tuple[int, int]] | None:
    """Centres for disjoint squares with the given half-widths, all inside the picture; None if unlucky."""
    gap = max(2, side // 40)
    centres: list[tuple[int, int]] = []
    for r in radii:
        for _ in range(30):
            x, y = (int(value) for value in rng.integers(r + 1, side - r - 1, size=2))
            taken = zip(centres, radii, strict=False)
            if all(max(abs(x - cx), abs(y - cy)) > r + cr + gap for (cx, cy), cr in taken):
                centres.append((x, y))
                break
        else:
            return None
    return centres


def other_look(rng: np.random.Generator, used: set[tuple[str, str]]) -> tuple[str, str]:
    """A (colour, shape) that no object has yet."""
    free = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in used]
    choice = free[int(rng.integers(len(free)))]
    used.add(choice)
    return choice


def _shuffled(
    rng: np.random.Generator, looks: list[tuple[str, str]], centres: list[tuple[int, int]], radii: list[int]
) -> tuple[tuple[Shape, ...], list[int]]:
    """Shapes of these looks in a random drawing order, and the index in it of each look."""
    shapes = [Shape(kind, hue, x, y, r) for (hue, kind), (x, y), r in zip(looks, centres, radii, strict=True)]
    order = [int(i) for i in rng.permutation(len(shapes))]
    return tuple(shapes[i] for i in order), [order.index(i) for i in range(len(shapes))]


def _pair(rng: np.random.Generator, side: int) -> Scene | None:
    """Two like objects, clearly apart along the axis of the relation and clearly different in size, one distractor."""
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    used: set[tuple[str, str]] = set()
    colour, shape = other_look(rng, used)
    radii = [radius_of(rng, side, 0.15, 0.2), radius_of(rng, side, 0.09, 0.125), radius_of(rng, side, 0.09, 0.16)]
    centres = place_apart(rng, side, radii)
    if centres is None:
        return None
    axis = 0 if relation in ("left", "right") else 1
    if abs(centres[0][axis] - centres[1][axis]) < side // 5:
        return None
    first = 0 if centres[0][axis] < centres[1][axis] else 1
    target = first if relation in ("left", "top") else 1 - first
    distractor = other_look(rng, used)
    looks = [(colour, shape), (colour, shape), distractor]
    shapes, where = _shuffled(rng, looks, centres, radii)
    expression = f"the {relation} {colour} {shape}"
    return Scene(side, light_background(rng), shapes, expression, "pair", relation, where[target], where[0])


def _attribute(rng: np.random.Generator, side: int) -> Scene | None:
    """An object named by colour and shape, and by size where a like one of the other size is there too."""
    used: set[tuple[str, str]] = set()
    target_look = other_look(rng, used)
    with_twin = bool(rng.integers(2))
    big = bool(rng.integers(2))
    sizes = {True: (0.15, 0.2), False: (0.09, 0.125)}
    looks = [target_look, target_look if with_twin else other_look(rng, used), other_look(rng, used)]
    radii = [radius_of(rng, side, *sizes[big]), radius_of(rng, side, *sizes[not big]), radius_of(rng, side, 0.09, 0.16)]
    centres = place_apart(rng, side, radii)
    if centres is None:
        return None
    shapes, where = _shuffled(rng, looks, centres, radii)
    size_word = f"{_SIZE_WORDS[big]} " if with_twin else ""
    expression = f"the {size_word}{target_look[0]} {target_look[1]}"
    return Scene(side, light_background(rng), shapes, expression, "attribute", "", where[0], -1)


def _single(rng: np.random.Generator, side: int) -> Scene | None:
    """One object, named by colour and shape."""
    colour, shape = other_look(rng, set())
    radius = radius_of(rng, side, 0.09, 0.2)
    centres = place_apart(rng, side, [radius])
    if centres is None:
        return None
    (x, y), *_ = centres
    shapes = (Shape(shape, colour, x, y, radius),)
    return Scene(side, light_background(rng), shapes, f"the {colour} {shape}", "single", "", 0, -1)


def _relation(rng: np.random.Generator, side: int) -> Scene | None:
    """Two like objects, of which exactly one stands on the named side of a third."""
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    used: set[tuple[str, str]] = set()
    look, anchor_look = other_look(rng, used), other_look(rng, used)
    radii = [radius_of(rng, side, 0.09, 0.16) for _ in range(3)]
    centres = place_apart(rng, side, radii)
    if centres is None:
        return None
    axis = 0 if relation in ("left", "right") else 1
    sign = -1 if relation in ("left", "top") else 1
    beyond = [sign * (centres[i][axis] - centres[2][axis]) for i in (0, 1)]
    margin = side // 8
    if not (beyond[0] > margin and beyond[1] < -margin):
        return None
    looks = [look, look, anchor_look]
    shapes, where = _shuffled(rng, looks, centres, radii)
    expression = f"the {look[0]} {look[1]} {_BESIDE[relation]} the {anchor_look[0]} {anchor_look[1]}"
    return Scene(side, light_background(rng), shapes, expression, "relation", relation, where[0], -1)
