"""Short videos in which a shape comes, moves and goes: when it is there is asked for, in seconds.

A video has eight seconds of four frames. One shape crosses the picture from `begin` to `end`, whole seconds, and before
and behind them there is nothing. `shortcut` makes demonstrations with the flaw of careless annotation: a response is
right with the given probability, and otherwise begins where the video begins. The ground truth is never touched by it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from foveate.datasets.distinct import distinct_of_split, drawn_number
from foveate.datasets.shapes import COLOURS, SHAPES, Scene, Shape, draw_scene, light_background, radius_of
from foveate.datasets.traces import write_splits
from foveate.errors import DataError

ASKED_WHEN = "<video>\nWhen is a shape there?"
SECONDS = 8
FRAMES_A_SECOND = 4
_SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True, slots=True)
class MovingScene:
    """A shape that moves on a straight line, its first and its last place in it, and when it is there, in seconds."""

    side: int
    background: tuple[int, int, int]
    first: Shape
    last: tuple[int, int]
    begin: int
    end: int

    @property
    def number(self) -> int:
        """A number that what is drawn decides."""
        return drawn_number(self)

    def frames(self) -> Iterator[np.ndarray]:
        """The frames in order, uint8 (side, side, 3)."""
        begin, end = (FRAMES_A_SECOND * second for second in (self.begin, self.end))
        one, (x, y) = self.first, self.last
        for frame in range(SECONDS * FRAMES_A_SECOND):
            part = (frame - begin) / (end - begin)
            place = (round(one.x + part * (x - one.x)), round(one.y + part * (y - one.y)))
            moved = Shape(one.kind, one.colour, *place, one.r)
            seen = (moved,) if begin <= frame < end else ()
            yield np.asarray(draw_scene(Scene(self.side, self.background, seen, "", "moving", "", 0, -1)))


def moving_scene(rng: np.random.Generator, side: int = 56) -> MovingScene:
    """A random scene. The shape does not come with the first frame, and stays for one second or more."""
    begin = int(rng.integers(1, SECONDS))
    end = int(rng.integers(begin + 1, SECONDS + 1))
    r = radius_of(rng, side, 0.15, 0.25)
    x, y, *last = (int(one) for one in rng.integers(r + 1, side - r - 1, size=4))
    first = Shape(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), x, y, r)
    return MovingScene(side, light_background(rng), first, (last[0], last[1]), begin, end)


def encoded_video(scene: MovingScene) -> bytes:
    """The video as an MP4. Raises DataError where PyAV is missing."""
    try:
        import av
    except ImportError as error:
        raise DataError("videos are encoded by PyAV, which is missing; pip install 'foveate[video]'") from error
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND)
        stream.width = stream.height = scene.side
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAMES_A_SECOND)
        stream.options = {"crf": "18", "threads": "1", "preset": "fast"}
        for frame in scene.frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def moving_rows(
    seed: int, split: str, count: int, *, side: int = 56, shortcut: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Rows of the field's parquet schema with a column `videos`, all distinct; a scene belongs to one split, whatever
    the seed: one in eight to `test`. `extra_info.response` is a demonstration that is right with the probability
    `shortcut`."""
    rng, careless = (np.random.default_rng([seed, _SPLITS[split], part]) for part in (0, 1))
    scenes = distinct_of_split(split, count, lambda _: moving_scene(rng, side), lambda scene: scene.number)
    for index, scene in enumerate(scenes):
        begin = scene.begin if careless.random() < shortcut else 0
        yield {
            "data_source": "moving",
            "prompt": [{"role": "user", "content": ASKED_WHEN}],
            "images": [],
            "videos": [{"bytes": encoded_video(scene), "path": None}],
            "ability": "moving",
            "reward_model": {"style": "rule", "ground_truth": [float(scene.begin), float(scene.end)]},
            "extra_info": {
                "split": split,
                "index": index,
                "id": f"{split}-{scene.number:016x}",
                "response": f"{begin} - {scene.end}",
            },
        }


def prepare_moving(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    side: int = 56,
    shortcut: float = 1.0,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the files of the asked splits (`train`, `test`) with so many rows each, and a manifest. `advance` is told
    of each row. Raises DataError where PyAV is missing."""
    made = {split: moving_rows(seed, split, count, side=side, shortcut=shortcut) for split, count in rows.items()}
    extra_info = {"split": pa.string(), "index": pa.int64(), "id": pa.string(), "response": pa.string()}
    facts = {"seed": seed, "side": side, "shortcut": shortcut, "rows": rows}
    write_splits(folder, made, extra_info, facts, advance, truth=pa.list_(pa.float64()), videos=True)
