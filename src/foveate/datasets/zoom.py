"""Scenes whose question hangs on a mark that is too small for one tile: a task for a tool that looks closer.

A scene has coloured plates with a digit each, and the question asks for the digit on one of them; or one square with a
pattern (`foveate.datasets.patterns`), and it asks for that. Its rows for supervised
training teach to write calls of `zoom` and to read what it shows, without an error in any of them. Four kinds are
mixed: `read` shows one large plate and is answered at once; `place` names the box to look at; `search` asks as the task
does and looks at the right plate; `direct` is an ordinary question with its answer, as data without tools have them.
Where to look is left to reinforcement learning but for the share of `search`, and when to look where there are `direct`
ones, too: their answers are right, but too small to be seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from foveate.datasets.distinct import distinct_of_split
from foveate.datasets.patterns import make_patterns
from foveate.datasets.shapes import COLOURS
from foveate.datasets.traces import DRAWN_SPLITS, drawn_task, recorded_trace, write_splits
from foveate.environments.calls import hermes_call
from foveate.environments.look import LOOK_BOX
from foveate.environments.observe import encoded
from foveate.environments.screen import draw_text
from foveate.environments.tool_use import ToolUse
from foveate.errors import ConfigError

ASKED = "<image>\nWhich digit is on the {} plate?"
ASKED_AT = "<image>\nWhich {} is at {}?"
MarkKind = Literal["digit", "pattern"]
"""Digits on plates, or a pattern on a square."""
GRID, PLATES = 4, 4
"""Cells of a scene along each side, unless said otherwise, and how many of them have a plate."""
READ, SEARCH = 0.4, 0.2
"""Shares of the traces that read one large plate, and that search, unless said otherwise."""
_AROUND = 0.35
"""A named place reaches beyond its plate by up to this share of its side, too little to show another digit."""
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
    def question(self) -> str:
        return ASKED.format(self.asked.colour)

    @property
    def answer(self) -> str:
        return str(self.asked.digit)

    @property
    def box(self) -> list[int]:
        """The plate that is asked for, in thousandths of the sides."""
        return [round(1000 * value / self.side) for value in self.asked.box]

    @property
    def large(self) -> bool:
        return len(self.plates) == 1

    def draw(self) -> Image.Image:
        return draw_plates(self)


class LookScene(Protocol):
    """A scene with a question and its answer, which stands in `box`, in thousandths of the sides. large: it can be read
    without a look."""

    @property
    def signature(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def box(self) -> list[int]: ...
    @property
    def large(self) -> bool: ...
    def draw(self) -> Image.Image: ...


_Scene = TypeVar("_Scene", bound=LookScene)


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


def make_plates(rng: np.random.Generator, side: int, plates: int = PLATES, cells: int = GRID) -> PlateScene:
    """A random scene with plates in cells of a grid of `cells` x `cells`; with one plate, a large one."""
    colours = [str(colour) for colour in rng.choice([*COLOURS], plates, replace=False)]
    shade = int(rng.integers(225, 256))
    glyph = max(side // _GLYPH, 11)
    if plates == 1:
        glyph = round(side * rng.uniform(0.1, 0.25))
        half = round(max(side * rng.uniform(0.15, 0.45), 0.8 * glyph))
        x, y = (int(rng.integers(half, side - half + 1)) for _ in range(2))
        boxes = [(x - half, y - half, x + half, y + half)]
    else:
        taken = rng.choice(cells * cells, plates, replace=False)
        boxes = [_in_cell(rng, int(cell) % cells, int(cell) // cells, side // cells) for cell in taken]
    drawn = [Plate(colour, int(rng.integers(10)), box) for colour, box in zip(colours, boxes, strict=True)]
    return PlateScene(side, shade, tuple(drawn), int(rng.integers(plates)), glyph)


def _in_cell(rng: np.random.Generator, column: int, row: int, cell: int) -> tuple[int, int, int, int]:
    size = round(cell * rng.uniform(0.45, 0.65))
    x, y = (place * cell + int(rng.integers(cell - size)) for place in (column, row))
    return x, y, x + size, y + size


def _around(rng: np.random.Generator, scene: LookScene) -> list[int]:
    """A box that shows what is asked for with some of what is around it."""
    left, top, right, bottom = scene.box
    less, more = (rng.uniform(0, _AROUND, 2) * (right - left) for _ in range(2))
    box = (left - less[0], top - less[1], right + more[0], bottom + more[1])
    return [round(min(max(value, 0), 1000)) for value in box]


def _loosely(rng: np.random.Generator, box: Sequence[int], loose: float) -> list[int]:
    """A box around another one that stands anywhere in it, with sides longer by a share of up to `loose`."""
    left, top, right, bottom = box
    longer = 1 + rng.uniform(0, loose)
    starts, sides = [], []
    for low, high in ((left, right), (top, bottom)):
        length = min(longer * (high - low), 1000)
        start = rng.uniform(max(high - length, 0), min(low, 1000 - length))
        starts.append(round(start))
        sides.append(round(length))
    return [*starts, *(start + length for start, length in zip(starts, sides, strict=True))]


def plate_scenes(seed: int, split: str, count: int, side: int, cells: int = GRID) -> Iterator[PlateScene]:
    """`look_scenes` of plates."""
    return look_scenes(seed, split, count, lambda rng: make_plates(rng, side, cells=cells))


def look_scenes(seed: int, split: str, count: int, make: Callable[[np.random.Generator], _Scene]) -> Iterator[_Scene]:
    """`count` distinct scenes, the same for the same seed. A scene belongs to the split that its signature falls into:
    one in eight to `test`, and of the rest one in four to `traces`."""
    rng = np.random.default_rng([seed, DRAWN_SPLITS.index(split)])
    return distinct_of_split(split, count, lambda _: make(rng), lambda scene: int(scene.signature, 16), has_traces=True)


@dataclass(frozen=True, slots=True)
class LookScenes:
    """How scenes are drawn: what is on them, pictures of `side` pixels, marks in some of `cells` x `cells` cells, and
    the share of tasks with one large mark, which need no look."""

    marks: MarkKind = "digit"
    side: int = 448
    cells: int = GRID
    large: float = 0.0

    def one(self, rng: np.random.Generator, large: bool) -> LookScene:
        """A random scene; `large`: with one mark, which is read at once."""
        if self.marks == "pattern":
            return make_patterns(rng, self.side, self.cells, 1.0 if large else -1.0)
        return make_plates(rng, self.side, 1 if large else PLATES, self.cells)

    def small(self, seed: int, split: str, count: int) -> Iterator[LookScene]:
        return look_scenes(seed, split, count, lambda rng: self.one(rng, large=False))

    def tasks(self, seed: int, split: str, count: int) -> Iterator[LookScene]:
        """Scenes of tasks."""
        share = self.large
        return look_scenes(seed, split, count, lambda rng: self.one(rng, large=share > 0 and rng.random() < share))


_PLAIN = LookScenes()


def zoom_rows(seed: int, split: str, count: int, scenes: LookScenes = _PLAIN) -> Iterator[dict[str, Any]]:
    """Rows of tasks in the field's parquet schema; the ground truth is the digit, or the name of the pattern."""
    for index, scene in enumerate(scenes.tasks(seed, split, count)):
        content = {
            "prompt": [{"role": "user", "content": scene.question}],
            "images": [{"bytes": encoded(scene.draw()).data, "path": None}],
            "response": None,
        }
        yield _row(scene, split, index, "read" if scene.large else "search", scene.box, content)


def oracle_rows(seed: int, count: int, scenes: LookScenes = _PLAIN, tile: int = 448) -> Iterator[dict[str, Any]]:
    """The rows of `test` with the right look already taken: what a model that reads answers where it need not look."""
    environment = _environment(tile)
    for index, scene in enumerate(scenes.tasks(seed, "test", count)):
        task = drawn_task(scene.question, encoded(scene.draw()), {})
        looks = [] if scene.large else [_look(scene.box)]
        content = recorded_trace(environment, task, 0, [*looks, scene.answer])
        yield _row(scene, "oracle", index, "oracle" if looks else "read", scene.box, {**content, "response": None})


def zoom_traces(
    seed: int,
    count: int,
    scenes: LookScenes = _PLAIN,
    *,
    tile: int = 448,
    read: float = READ,
    search: float = SEARCH,
    direct: float = 0.0,
    loose: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Conversations to imitate: shares `read` and `direct` without a call, a share `search` that finds its plate, the
    rest with the place in the question. tile: as in the settings of `zoom`. loose: of boxes that are searched."""
    rng = np.random.default_rng([seed, DRAWN_SPLITS.index("traces"), 1])
    kinds, shares = ("read", "direct", "search", "place"), (read, direct, search, max(1 - read - direct - search, 0.0))
    environment = _environment(tile)
    for index, small in enumerate(scenes.small(seed, "traces", count)):
        kind = str(rng.choice(kinds, p=shares))
        scene = scenes.one(rng, large=True) if kind == "read" else small
        box = _around(rng, scene) if kind == "place" else scene.box
        if kind == "search" and loose:
            box = _loosely(rng, box, loose)
        looks = [_look(box)] if kind in ("search", "place") else []
        text = ASKED_AT.format(scenes.marks, box) if kind == "place" else scene.question
        task = drawn_task(text, encoded(scene.draw()), {})
        content = recorded_trace(environment, task, 0, [*looks, scene.answer])
        yield _row(scene, "traces", index, kind, box, content)


def _environment(tile: int) -> ToolUse:
    return ToolUse(tools=[{"name": "zoom", "settings": {"tile": tile}}])


def _look(box: list[int]) -> str:
    return hermes_call("zoom", {"image": 1, "box": box})


def _row(
    scene: LookScene, split: str, index: int, kind: str, box: list[int], content: dict[str, Any]
) -> dict[str, Any]:
    return {
        "data_source": "zoom",
        "prompt": content["prompt"],
        "images": content["images"],
        "ability": "reading",
        "reward_model": {"style": "rule", "ground_truth": scene.answer},
        "extra_info": {
            "split": split,
            "index": index,
            "id": f"{split}-{scene.signature}",
            "kind": kind,
            LOOK_BOX: box,
            "response": content["response"],
        },
    }


def prepare_zoom(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    marks: MarkKind = "digit",
    side: int = 448,
    cells: int = GRID,
    large: float = 0.0,
    tile: int = 448,
    read: float = READ,
    search: float = SEARCH,
    direct: float = 0.0,
    loose: float = 0.0,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the files of the asked splits (`train`, `test`, `oracle`, `traces`) with so many rows each, and a manifest.
    `marks`, `side`, `cells` and `large`: as in `LookScenes`. `read`, `search`, `direct`: shares of the traces; `loose`:
    by which share the sides of boxes that they find are longer at most. `advance` is told of each row. Raises
    ConfigError for shares that are more than 1 together."""
    if read + search + direct > 1 + 1e-9:
        shares = f"--read {read:g}, --search {search:g} and --direct {direct:g}"
        raise ConfigError(f"{shares} are more than 1 together; lower one")

    scenes = LookScenes(marks, side, cells, large)

    def made(split: str, count: int) -> Iterator[dict[str, Any]]:
        if split == "traces":
            return zoom_traces(seed, count, scenes, tile=tile, read=read, search=search, direct=direct, loose=loose)
        if split == "oracle":
            return oracle_rows(seed, count, scenes, tile)
        return zoom_rows(seed, split, count, scenes)

    fields = {"split": pa.string(), "index": pa.int64(), "id": pa.string(), "kind": pa.string()}
    extra_info = {**fields, LOOK_BOX: pa.list_(pa.int64()), "response": pa.string()}
    how = {**asdict(scenes), "tile": tile, "read": read, "search": search, "direct": direct, "loose": loose}
    splits = {split: made(split, count) for split, count in rows.items()}
    write_splits(folder, splits, extra_info, {"seed": seed, **how, "rows": rows}, advance)
