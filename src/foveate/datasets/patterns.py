"""Scenes of coloured shapes with a pattern of fine lines each, too fine to be seen when the picture is one small tile.

A scene has two like objects, told apart by a relation word as in `foveate.datasets.shapes`, and a distractor. From line
to line there are 4 of 448 pixels: a tile of 112 pixels cannot show them, whatever the model, and a part of the picture
that holds little more than the shape shows them well. All patterns are half ink, so that their mean says nothing. A
picture with one large shape has wide lines, which one tile shows.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from foveate.datasets.shapes import (
    COLOURS,
    Scene,
    Shape,
    draw_scene,
    draw_shape,
    light_background,
    make_scene,
    other_look,
    radius_of,
    to_thousandths,
)

PATTERNS = ("rows", "columns", "rising", "falling", "checks")
"""Horizontal and vertical lines, lines that rise or fall to the right, and a chessboard. None has a special place, such
as a centre, that a tile would show."""
_PERIOD = 4 / 448
"""From line to line, as a share of the picture's side."""
_LARGE = 0.28, 0.45
"""Half-widths of large shapes, as shares of the picture's side."""
_INSIDE = 0.8
"""The pattern reaches over this share of the half-width, so that the shape keeps its colour and outline."""
_CONTRAST = 0.75


@dataclass(frozen=True, slots=True)
class PatternScene:
    """A scene of shapes, the pattern of each, and the distance between its lines in pixels and their phase."""

    scene: Scene
    patterns: tuple[str, ...]
    period: float
    phase: float

    @property
    def signature(self) -> str:
        """A hash of what is drawn: scenes with the same signature have the same pixels."""
        drawn = repr((self.scene.signature, self.patterns, self.period, self.phase))
        return hashlib.sha256(drawn.encode()).hexdigest()[:16]

    @property
    def side(self) -> int:
        return self.scene.side

    @property
    def question(self) -> str:
        return f"<image>\nWhich pattern is on {self.scene.expression}?"

    @property
    def answer(self) -> str:
        return self.patterns[self.scene.target]

    @property
    def box(self) -> list[int]:
        """The shape that is asked for, in thousandths of the sides."""
        return [*to_thousandths(self.scene.shapes[self.scene.target].box, self.side)]

    @property
    def large(self) -> bool:
        """Whether one tile shows the pattern."""
        return len(self.patterns) == 1

    def draw(self) -> Image.Image:
        """The picture, RGB."""
        image = draw_scene(self.scene)
        for shape, pattern in zip(self.scene.shapes, self.patterns, strict=True):
            r = round(shape.r * _INSIDE)
            inside = Image.new("L", (2 * r + 1, 2 * r + 1))
            draw_shape(ImageDraw.Draw(inside), Shape(shape.kind, shape.colour, r, r, r), 255)
            ink = 0 if sum(COLOURS[shape.colour]) > 380 else 255
            share = _CONTRAST * pattern_ink(pattern, r, self.period, self.phase)
            mask = Image.fromarray((np.asarray(inside) * share).astype(np.uint8))
            image.paste((ink,) * 3, (shape.x - r, shape.y - r), mask)
        return image


def pattern_ink(pattern: str, r: int, period: float, phase: float) -> np.ndarray:
    """How much ink a pattern has at each pixel of a square of 2 r + 1 pixels: 0 to 1, one half on the mean."""
    y, x = np.mgrid[-r : r + 1, -r : r + 1].astype(np.float32)
    turn, slope = 2 * math.pi / period, math.sqrt(0.5)
    if pattern == "checks":
        wave = 2 * np.cos(turn * slope * x + phase) * np.cos(turn * slope * y + phase)
    else:
        along = {"rows": y, "columns": x, "rising": slope * (x + y), "falling": slope * (x - y)}
        wave = np.cos(turn * along[pattern] + phase)
    return np.clip(0.5 + wave, 0.0, 1.0)


def make_patterns(rng: np.random.Generator, side: int, large: bool = False) -> PatternScene:
    """A random scene: two like objects and a distractor, as `pair` of the shapes, with three patterns; `large`: one
    shape whose pattern one tile shows."""
    scene = _large_shape(rng, side) if large else make_scene(rng, "pair", side)
    patterns = tuple(str(one) for one in rng.choice(PATTERNS, len(scene.shapes), replace=False))
    period = side * _PERIOD * (rng.uniform(2.4, 5.0) if large else 1.0)
    return PatternScene(scene, patterns, period, float(rng.uniform(0, 2 * math.pi)))


def _large_shape(rng: np.random.Generator, side: int) -> Scene:
    colour, kind = other_look(rng, set())
    r = radius_of(rng, side, *_LARGE)
    x, y = (int(value) for value in rng.integers(r + 1, side - r - 1, size=2))
    expression = f"the {colour} {kind}"
    return Scene(side, light_background(rng), (Shape(kind, colour, x, y, r),), expression, "large", "", 0, -1)
