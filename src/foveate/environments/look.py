"""Tools that look at an image again: a part of it enlarged, turned, or with a mark."""

from __future__ import annotations

import math
from typing import Annotated

from PIL import Image, ImageDraw
from pydantic import Field

from foveate.environments.tools import ImageBox

LOOK_BOX = "look_box"
"""A field of `extra_info`: the part of the first image, in thousandths of its sides, that an answer should look at."""
LONGEST_SIDE = 2_048
"""Pixels of the longer side of an image that a tool shows whole."""
ZOOM_BLOCK = 28
"""Pixels that the sides of an enlarged part are a multiple of: models that keep an image's shape do not resize it."""
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
"""Pixels of a side, as a setting."""


def zoom(image: Image.Image, box: ImageBox, *, tile: Side = 448, min_side: Side = 16) -> Image.Image:
    """Shows a part of an image enlarged.

    Args:
        image: The image to look at.
        box: The part of it.
    """
    left, top, right, bottom = _at_least(box, image.size, min_side)
    part = image.crop((left, top, right, bottom))
    scale = max(tile / max(part.size), 1.0)
    width, height = (max(round(side * scale / ZOOM_BLOCK), 1) * ZOOM_BLOCK for side in part.size)
    return part.resize((width, height), Image.Resampling.BICUBIC)


def _at_least(box: ImageBox, size: tuple[int, int], min_side: int) -> tuple[int, int, int, int]:
    """A box in whole pixels inside the image, with sides of at least `min_side` pixels where the image has them."""
    x, width = _side(box[0], box[2], size[0], min_side)
    y, height = _side(box[1], box[3], size[1], min_side)
    return x, y, x + width, y + height


def _side(low: float, high: float, size: int, least: int) -> tuple[int, int]:
    first, last = max(math.floor(low), 0), min(math.ceil(high), size)
    length = min(max(last - first, least), size)
    start = round((first + last - length) / 2)
    return min(max(start, 0), size - length), length


def rotate(image: Image.Image, degrees: int) -> Image.Image:
    """Turns an image clockwise.

    Args:
        image: The image to turn.
        degrees: By how many degrees, such as 90.
    """
    turned = image.rotate(-(degrees % 360), Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))
    return _within(turned, max(image.size))


def mark(image: Image.Image, box: ImageBox) -> Image.Image:
    """Draws a red frame on an image.

    Args:
        image: The image to draw on.
        box: Where the frame goes.
    """
    marked = image.copy()
    width = max(2, round(max(image.size) / 200))
    ImageDraw.Draw(marked).rectangle(tuple(box), outline=(220, 20, 20), width=width)
    return _within(marked, max(image.size))


def _within(image: Image.Image, side: int) -> Image.Image:
    """The image with sides of at most `side` and `LONGEST_SIDE` pixels."""
    scale = min(side, LONGEST_SIDE) / max(image.size)
    if scale >= 1:
        return image
    return image.resize(
        (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BICUBIC
    )
