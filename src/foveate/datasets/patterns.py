"""Scenes with one coloured square in a grid, and on it a pattern of lines that one small tile cannot show.

From line to line there are 4 of 448 pixels: brought to a tile of 112 pixels every pattern becomes the same even colour,
whatever the model, and a part of the picture that holds little more than the square shows it well. A large scene is
such a part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from foveate.datasets.shapes import COLOURS, light_background
from foveate.environments.look import zoom
from foveate.environments.tools import ImageBox

PATTERNS = ("rows", "columns", "rising", "falling", "checks")
"""Horizontal and vertical lines, lines that rise or fall to the right, and a chessboard. None has a special place, such
as a centre, that a tile would show."""
_HALF, _BESIDE = (16 / 448, 20 / 448), 0.02
"""Half-widths of squares, and how far they stand beside the middle of a cell, as shares of the picture's side."""
_CONTRAST = 0.75


@dataclass(frozen=True, slots=True)
class PatternScene:
    """A picture with one square: its middle and half-width in pixels, colour, pattern and where that begins. view: the
    part of the picture that is shown, in pixels, where it is not all of it."""

    side: int
    background: tuple[int, int, int]
    colour: str
    x: int
    y: int
    r: int
    pattern: str
    phase: int
    view: tuple[int, int, int, int] | None = None

    @property
    def signature(self) -> str:
        """A hash of what is drawn: scenes with the same signature have the same pixels."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def question(self) -> str:
        return "<image>\nWhich pattern is on the square?"

    @property
    def answer(self) -> str:
        return self.pattern

    @property
    def box(self) -> list[int]:
        """The square, in thousandths of the sides of what is shown."""
        left, top, right, bottom = self.view or (0, 0, self.side, self.side)
        x, y, r = self.x, self.y, self.r
        places = (x - r - left, y - r - top, x + r - left, y + r - top)
        sides = (right - left, bottom - top) * 2
        return [min(max(round(1000 * place / side), 0), 1000) for place, side in zip(places, sides, strict=True)]

    @property
    def large(self) -> bool:
        """Whether one tile shows the pattern."""
        return self.view is not None

    def draw(self) -> Image.Image:
        """The picture, RGB."""
        image = Image.new("RGB", (self.side, self.side), self.background)
        corner = self.x - self.r, self.y - self.r
        ImageDraw.Draw(image).rectangle((*corner, self.x + self.r - 1, self.y + self.r - 1), fill=COLOURS[self.colour])
        ink = 0 if sum(COLOURS[self.colour]) > 380 else 255
        period = max(4, 4 * round(self.side / 448))
        mask = Image.fromarray(
            (255 * _CONTRAST * pattern_ink(self.pattern, 2 * self.r, period, self.phase)).astype("u1")
        )
        image.paste((ink,) * 3, corner, mask)
        return image if self.view is None else zoom(image, ImageBox(self.view), tile=self.side // 4)


def pattern_ink(pattern: str, side: int, period: int, phase: int) -> np.ndarray[Any, Any]:
    """Where a square of `side` pixels has ink: 0 or 1, one half of every `period` pixels."""
    y, x = np.mgrid[phase : side + phase, phase : side + phase]
    half = period // 2
    if pattern == "checks":
        return (x // half + y // half) % 2
    return {"rows": y, "columns": x, "rising": x + y, "falling": x - y}[pattern] // half % 2


def make_patterns(rng: np.random.Generator, side: int, cells: int, loose: float = -1.0) -> PatternScene:
    """A random scene with a square in one of `cells` x `cells` cells; loose >= 0: a part of it, whose sides are longer
    than the square's by a share of up to this one."""
    x, y = (round(side * ((int(rng.integers(cells)) + 0.5) / cells + rng.uniform(-_BESIDE, _BESIDE))) for _ in range(2))
    r = round(side * rng.uniform(*_HALF))
    view = None
    if loose >= 0:
        longest = round(2 * r * (1 + rng.uniform(0, loose)))
        left, top = (int(rng.integers(at + r - longest, at - r + 1)) for at in (x, y))
        view = (left, top, left + longest, top + longest)
    pattern, colour = str(rng.choice(PATTERNS)), str(rng.choice([*COLOURS]))
    return PatternScene(side, light_background(rng), colour, x, y, r, pattern, int(rng.integers(4)), view)
