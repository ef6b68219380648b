"""Pictures that are plain or fine: which shapes there are, one big object or four small ones.

A picture has four quarters, each of them a tile of a model whose tiles are half as wide. The first one holds objects,
and the others nothing. `plain` pictures have one big object there, `fine` ones four small objects in two rows,
whose shapes are named in reading order. A model that has a fourth of the tokens for every tile must put
what a fine quarter shows into so many fewer: what these lose is what a router of tiles can save (`foveate.train.vir`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from foveate.datasets.distinct import distinct_of_split, drawn_number
from foveate.datasets.shapes import COLOURS, SHAPES, Scene, Shape, draw_scene, light_background
from foveate.datasets.traces import write_splits
from foveate.environments.observe import encoded

ASKED_SHAPES = "<image>\nWhich shapes are there?"
DETAIL_SPLITS = ("train", "test")
GRAIN = 3
"""Most by which a pixel differs from what is drawn, of 255."""


@dataclass(frozen=True, slots=True)
class DetailScene:
    """Shapes in the first quarter of a picture, in reading order."""

    side: int
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]

    @property
    def source(self) -> str:
        """`plain` or `fine`."""
        return "plain" if len(self.shapes) == 1 else "fine"

    @property
    def kinds(self) -> str:
        """The words of the right answer."""
        return " ".join(shape.kind for shape in self.shapes)

    @property
    def number(self) -> int:
        """A number that what is drawn decides."""
        return drawn_number((self.side, self.background, self.shapes))


def detail_scene(rng: np.random.Generator, *, fine: bool, side: int = 112) -> DetailScene:
    """A random picture of one kind. Small objects have half-widths of about a third of their cell."""
    quarter, cell = side // 2, side // 4
    hues = [str(hue) for hue in rng.permutation(list(COLOURS))[: 4 if fine else 1]]
    kinds = [SHAPES[int(one)] for one in rng.integers(len(SHAPES), size=len(hues))]
    width, places = (cell, ((0, 0), (cell, 0), (0, cell), (cell, cell))) if fine else (quarter, ((0, 0),))
    shapes = []
    free = max(width // 20, 1)  # about the middle of a cell: models this small learn shapes at places that they know
    for kind, hue, (column, row) in zip(kinds, hues, places, strict=True):
        r = int(rng.integers(round(0.3 * width), round(0.4 * width) + 1))
        x, y = (width // 2 + int(one) for one in rng.integers(-free, free + 1, size=2))
        shapes.append(Shape(kind, hue, column + x, row + y, r))
    return DetailScene(side, light_background(rng), tuple(shapes))


def detail_scenes(seed: int, split: str, count: int, *, fine: float, side: int = 112) -> Iterator[DetailScene]:
    """`count` distinct pictures, a share `fine` of them fine, the same for the same seed. A picture belongs to one
    split, whatever the seed: one in eight to `test`."""
    rng = np.random.default_rng([seed, DETAIL_SPLITS.index(split)])

    def draw(found: int) -> DetailScene:
        return detail_scene(rng, fine=int(fine * (found + 1)) > int(fine * found), side=side)

    return distinct_of_split(split, count, draw, lambda scene: scene.number)


def detail_rows(seed: int, split: str, count: int, *, fine: float = 0.4, side: int = 112) -> Iterator[dict[str, Any]]:
    """Rows in the field's parquet schema, the ground truth and the demonstrated answer the shapes."""
    for index, scene in enumerate(detail_scenes(seed, split, count, fine=fine, side=side)):
        yield {
            "data_source": scene.source,
            "prompt": [{"role": "user", "content": ASKED_SHAPES}],
            "images": [{"bytes": encoded(_drawn(scene)).data, "path": None}],
            "ability": "details",
            "reward_model": {"style": "rule", "ground_truth": scene.kinds},
            "extra_info": {
                "split": split,
                "index": index,
                "id": f"{split}-{scene.number:016x}",
                "kind": scene.source,
                "response": scene.kinds,
            },
        }


def _drawn(scene: DetailScene) -> Image.Image:
    """The picture with a faint grain: tiles that are equal to the last bit would tie in their route, and a tile is
    compressed only if the router says more of it than of another one."""
    flat = draw_scene(Scene(scene.side, scene.background, scene.shapes, "", scene.source, "", 0, -1))
    grain = np.random.default_rng(scene.number).integers(-GRAIN, GRAIN + 1, (scene.side, scene.side, 3))
    return Image.fromarray((np.asarray(flat, np.int16) + grain).clip(0, 255).astype(np.uint8))


def prepare_details(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    fine: float = 0.4,
    side: int = 112,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the files of the asked splits (`train`, `test`) with so many rows each, and a manifest. `advance` is told
    of each row."""
    made = {split: detail_rows(seed, split, count, fine=fine, side=side) for split, count in rows.items()}
    extra_info = {
        "split": pa.string(),
        "index": pa.int64(),
        "id": pa.string(),
        "kind": pa.string(),
        "response": pa.string(),
    }
    write_splits(folder, made, extra_info, {"seed": seed, "fine": fine, "side": side, "rows": rows}, advance)
