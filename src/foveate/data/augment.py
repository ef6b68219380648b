"""Images made worse at random, as supervised training of InternVL does: compressed as JPEG, and of lower resolution.

Source: OpenGVLab/InternVL, `build_transform`, which compresses each tile with a quality of 75 to 100. Here the whole
image is compressed, before it is tiled, and keeps its size, so that the length of its prompt follows from its header.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL.Image

from foveate.config.data import MOST_PIXELS
from foveate.data.images import open_picture

JPEG_SIDE = 65_500
"""Pixels of the longest side that libjpeg writes; longer images are not compressed."""


@dataclass(frozen=True, slots=True)
class Augment:
    """jpeg: the least and the greatest quality; resize: the least and the greatest share of its sides to which an image
    is shrunk, and then grown again; None for neither. seed: of the run."""

    seed: int
    jpeg: tuple[int, int] | None = None
    resize: tuple[float, float] | None = None

    def drawn(self, row: int, place: int) -> Degrade:
        """The change of the images of a row at a place of the stream, another one in each epoch, and wherever a source
        comes again within one; it depends on these numbers and the seed alone."""
        return Degrade(self, np.random.default_rng((self.seed, row, place, 0x4A50)))


class Degrade:
    """Makes the images of one row worse, one after the other."""

    def __init__(self, augment: Augment, draw: np.random.Generator) -> None:
        self._augment, self._draw = augment, draw

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """An RGB image of the same size."""
        jpeg, resize = self._augment.jpeg, self._augment.resize
        if resize is not None:
            share, size = self._draw.uniform(*resize), image.size
            small = max(1, round(image.width * share)), max(1, round(image.height * share))
            if small != size:
                image = image.resize(small, PIL.Image.Resampling.BICUBIC)
                image = image.resize(size, PIL.Image.Resampling.BICUBIC)
        if jpeg is None:
            return image
        quality, packed = int(self._draw.integers(jpeg[0], jpeg[1] + 1)), BytesIO()
        if max(image.size) > JPEG_SIDE:
            return image
        image.save(packed, "JPEG", quality=quality)
        with open_picture(packed.getvalue(), MOST_PIXELS) as (opened, _):
            return opened.convert("RGB")
