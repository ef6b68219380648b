"""Scenes whose question hangs on a glyph that is too small for one tile: a task for a tool that looks closer.

A scene has coloured plates with a digit each; the question asks for the digit on one of them. Its rows for supervised
training teach to write calls of `zoom` and to read what it shows, without an error in any of them. Three kinds are
mixed: `read` shows one large plate and is answered at once; `place` names the box to look at; `search` asks as the task
does and looks at the right plate. Where to look is left to reinforcement learning but for the share of `search`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from foveate.datasets.shapes import COLOURS
from foveate.datasets.traces import DRAWN_SPLITS, drawn_task, recorded_trace, write_splits
from foveate.environments.calls import hermes_call
from foveate.environments.observe import encoded
from foveate.environments.screen import draw_text
from foveate.environments.tool_use import ToolUse

ASKED = "<image>\nWhich digit is on the {} plate?"
ASKED_AT = "<image>\nWhich digit is at {}?"
GRID, PLATES = 4, 4
"""Cells of a scene along each side, and how many of them have a plate."""
_GLYPH = 40
"""A glyph of 11 pixels stands in a picture of this many times its height."""


@dataclass(frozen=True, slots=True)
class Plate:
    """A square with a digit: corners in pixels, right and bottom edge exclusive."""

    colour: str
    digit: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class PlateScene:
    """A picture to be drawn, of which plate `target` is asked for. glyph: the height of its digits in pixels."""

    side: int
    shade: int
    plates: tuple[Plate, ...]
    target: int
    glyph: int

    @property
    def signature(self) -> str:
        """A hash of what is drawn: scenes with the same signature have the same pixels."""
        return hashlib.sha256(repr((self.side, self.shade, self.plates)).encode()).hexdigest()[:16]

    @property
    def asked(self) -> Plate:
        return self.plates[self.target]

    @property
    def box(self) -> list[int]:
        """The plate that is asked for, in thousandths of the sides."""
        return [round(1000 * value / self.side) for value in self.asked.box]


def draw_plates(scene: PlateScene) -> Image.Image:
    """The picture of a scene, RGB."""
    image = Image.new("RGB", (scene.side, scene.side), (scene.shade,) * 3)
    for plate in scene.plates:
        left, top, right, bottom = plate.box
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=COLOURS[plate.colour])
        width = 6 * max(round(scene.glyph / 11), 1)
        dark = sum(COLOURS[plate.colour]) > 380
        place = ((left + right - width) / 2, (top + bottom) / 2)
        draw_text(image, place, str(plate.digit), scene.glyph, (0, 0, 0) if dark else (255, 255, 255))
    return image


def make_plates(rng: np.random.Generator, side: int, plates: int = PLATES) -> PlateScene:
    """A random scene with plates in cells of a grid; with one plate, a large one."""
    colours = [str(colour) for colour in rng.choice([*COLOURS], plates, replace=False)]
    shade = int(rng.integers(225, 256))
    glyph = max(side // _GLYPH, 11)
    if plates == 1:
        half, glyph = round(side * rng.uniform(0.25, 0.45)), round(side * rng.uniform(0.17, 0.25))
        x, y = (int(rng.integers(half, side - half + 1)) for _ in range(2))
        boxes = [(x - half, y - half, x + half, y + half)]
    else:
        cells = rng.choice(GRID * GRID, plates, replace=False)
        boxes = [_in_cell(rng, int(cell) % GRID, int(cell) // GRID, side // GRID) for cell in cells]
    drawn = [Plate(colour, int(rng.integers(10)), box) for colour, box in zip(colours, boxes, strict=True)]
    return PlateScene(side, shade, tuple(drawn), int(rng.integers(plates)), glyph)


def _in_cell(rng: np.random.Generator, column: int, row: int, cell: int) -> tuple[int, int, int, int]:
    size = round(cell * rng.uniform(0.45, 0.65))
    x, y = (place * cell + int(rng.integers(cell - size)) for place in (column, row))
    return x, y, x + size, y + size


def plate_scenes(seed: int, split: str, count: int, side: int) -> Iterator[PlateScene]:
    """`count` distinct scenes, the same for the same seed. A scene belongs to the split that its signature falls into:
    one in eight to `test`, and of the rest one in four to `traces`."""
    rng = np.random.default_rng([seed, DRAWN_SPLITS.index(split)])
    seen: set[str] = set()
    while len(seen) < count:
        scene = make_plates(rng, side)
        number = int(scene.signature, 16)
        belongs = "test" if number % 8 == 0 else "traces" if number // 8 % 4 == 0 else "train"
        if belongs == split and scene.signature not in seen:
            seen.add(scene.signature)
            yield scene


def zoom_rows(seed: int, split: str, count: int, *, side: int = 448) -> Iterator[dict[str, Any]]:
    """Rows of tasks in the field's parquet schema; the ground truth is the digit."""
    for index, scene in enumerate(plate_scenes(seed, split, count, side)):
        content = {
            "prompt": [{"role": "user", "content": ASKED.format(scene.asked.colour)}],
            "images": [{"bytes": encoded(draw_plates(scene)).data, "path": None}],
            "response": None,
        }
        yield _row(scene, split, index, "search", content)


def zoom_traces(
    seed: int, count: int, *, side: int = 448, tile: int = 448, read: float = 0.3, search: float = 0.2
) -> Iterator[dict[str, Any]]:
    """Conversations to imitate: a share `read` without a call, a share `search` that finds its plate, the rest with the
    place in the question. tile: as in the settings of `zoom`."""
    rng = np.random.default_rng([seed, DRAWN_SPLITS.index("traces"), 1])
    environment = ToolUse(tools=[{"name": "zoom", "settings": {"tile": tile}}])
    for index, small in enumerate(plate_scenes(seed, "traces", count, side)):
        draw = rng.random()
        kind = "read" if draw < read else "search" if draw < read + search else "place"
        scene = make_plates(rng, side, plates=1) if kind == "read" else small
        call = [] if kind == "read" else [hermes_call("zoom", {"image": 1, "box": scene.box})]
        text = ASKED_AT.format(scene.box) if kind == "place" else ASKED.format(scene.asked.colour)
        task = drawn_task(text, encoded(draw_plates(scene)), {})
        yield _row(scene, "traces", index, kind, recorded_trace(environment, task, 0, [*call, str(scene.asked.digit)]))


def _row(scene: PlateScene, split: str, index: int, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "data_source": "zoom",
        "prompt": content["prompt"],
        "images": content["images"],
        "ability": "reading",
        "reward_model": {"style": "rule", "ground_truth": str(scene.asked.digit)},
        "extra_info": {
            "split": split,
            "index": index,
            "id": f"{split}-{scene.signature}",
            "kind": kind,
            "box": scene.box,
            "response": content["response"],
        },
    }


def prepare_zoom(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    side: int = 448,
    tile: int = 448,
    search: float = 0.2,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the files of the asked splits (`train`, `test`, `traces`) with so many rows each, and a manifest. `search`
    of the traces look for the plate themselves. `advance` is told of each row."""
    made = {
        split: zoom_traces(seed, count, side=side, tile=tile, search=search)
        if split == "traces"
        else zoom_rows(seed, split, count, side=side)
        for split, count in rows.items()
    }
    fields = {"split": pa.string(), "index": pa.int64(), "id": pa.string(), "kind": pa.string()}
    extra_info = {**fields, "box": pa.list_(pa.int64()), "response": pa.string()}
    manifest = {"seed": seed, "side": side, "tile": tile, "search": search, "rows": rows}
    write_splits(folder, made, extra_info, manifest, advance)
