"""Boxes drawn on images, and images made small. Boxes are in thousandths of the image, as the models write them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from foveate.files import atomic_write_bytes

if TYPE_CHECKING:
    from foveate.rewards.boxes import Box

TRUE_COLOUR = "#12a150"
PREDICTED_COLOUR = "#2458e6"


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A box (0 to 1000 on both axes) with the words and the colour that it is drawn in."""

    box: Box
    label: str
    colour: str


def true_and_predicted(true_box: Box | None, predicted_box: Box | None) -> tuple[LabelledBox, ...]:
    """The boxes of one answer: the predicted one in blue, below the true one in green; None is left out."""
    both = ((predicted_box, "predicted", PREDICTED_COLOUR), (true_box, "true", TRUE_COLOUR))
    return tuple(LabelledBox(box, label, colour) for box, label, colour in both if box is not None)


def draw_boxes(image: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """A copy of the image in RGB with the boxes on it, later ones on top.

    Corners may come in any order; parts outside the image are not drawn. Line width and type grow with the image.
    """
    canvas = as_shown(image)
    pen = ImageDraw.Draw(canvas)
    width = max(2, round(max(canvas.size) / 220))
    font = ImageFont.load_default(size=max(10, max(canvas.size) / 36))
    for position, entry in enumerate(boxes):
        left, top, right, bottom = box_in_pixels(entry.box, canvas.size)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=width + 2)
        pen.rectangle((left, top, right, bottom), outline=entry.colour, width=width)
        if entry.label:
            # Boxes that lie on each other keep both labels: one above, the next below.
            _draw_label(pen, entry, (left, bottom if position % 2 else top), font, canvas.size, above=not position % 2)
    return canvas


def box_in_pixels(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in thousandths as left, top, right, bottom in pixels of an image of `size` (width, height).

    Each axis is scaled by its own side; the result lies within the image, and left <= right, top <= bottom.
    """
    (left, right), (top, bottom) = (
        sorted(min(max(value, 0.0), 1000.0) / 1000 * (side - 1) for value in pair)
        for pair, side in (((box[0], box[2]), size[0]), ((box[1], box[3]), size[1]))
    )
    return left, top, right, bottom


def as_shown(image: Image.Image) -> Image.Image:
    """A copy in RGB, turned as its EXIF data says, transparent parts on white."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def save_thumbnail(image: Image.Image, path: Path, max_side: int = 400) -> None:
    """Write the image as JPEG, its longer side at most `max_side` pixels, its shape kept; small ones never grow."""
    atomic_write_bytes(path, encode_jpeg(image, max_side, quality=85))


def encode_jpeg(image: Image.Image, max_side: int, quality: int) -> bytes:
    """The image as shown, shrunk to `max_side` pixels at most, as the bytes of a JPEG file."""
    small = as_shown(image)
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=quality, subsampling="4:4:4", optimize=True)
    return encoded.getvalue()


def _draw_label(
    pen: ImageDraw.ImageDraw,
    entry: LabelledBox,
    corner: tuple[float, float],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    above: bool,
) -> None:
    """The label on a filled plate above or below a corner, moved inwards where it would leave the image."""
    left, top, right, bottom = pen.textbbox((0, 0), entry.label, font=font)
    plate_width, plate_height = right - left + 6, bottom - top + 4
    x = max(0.0, min(corner[0], size[0] - plate_width))
    y = max(0.0, min(corner[1] - plate_height if above else corner[1], size[1] - plate_height))
    pen.rectangle((x, y, x + plate_width, y + plate_height), fill=entry.colour)
    pen.text((x + 3 - left, y + 2 - top), entry.label, fill="white", font=font)
