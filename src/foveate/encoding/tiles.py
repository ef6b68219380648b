"""InternVL's dynamic tiling as pure functions of sizes: a grid of square tiles close to the picture's aspect ratio.

Source of the rule: OpenGVLab/InternVL, `dynamic_preprocess`; transformers' GotOcr2 image processor has the same one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@lru_cache(maxsize=64)
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids (columns, rows) of 1 .. max_tiles tiles, by area, then by columns."""
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


@lru_cache(maxsize=65536)
def tile_grid(width: int, height: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """The grid (columns, rows) for a picture of `width` x `height` pixels.

    The one with the aspect ratio nearest to the picture's; among equally near ones the larger, as long as the picture
    has more than half of its pixels.
    """
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        distance = abs(width / height - columns / rows)
        more_detail = distance == best_distance and width * height > 0.5 * tile * tile * columns * rows
        if distance < best_distance or more_detail:
            best, best_distance = (columns, rows), distance
    return best


def tile_count(width: int, height: int, max_tiles: int, tile: int) -> int:
    """Number of tiles, the thumbnail that joins more than one tile included."""
    columns, rows = tile_grid(width, height, max_tiles, tile)
    return columns * rows + (columns * rows > 1)


def tile_budget(max_tiles: int, images: int) -> int:
    """Tiles allowed for each of several images of one prompt: the budget is shared evenly, and at least one."""
    return max(1, max_tiles // max(1, images))


def cut_tiles(image: Image.Image, max_tiles: int, tile: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The tiles of an RGB picture, row by row, then the thumbnail: float32 (N, 3, tile, tile), normalised.

    Bicubic resize by Pillow to the whole grid, then crops: the values of transformers' processor with
    `crop_to_patches` and of the official preprocessing (which resizes crops that already have the size).
    """
    columns, rows = tile_grid(image.width, image.height, max_tiles, tile)
    canvas = _resized(image, columns * tile, rows * tile).reshape(rows, tile, columns, tile, 3)
    cut = canvas.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, tile, tile)
    if rows * columns > 1:
        cut = np.concatenate([cut, _resized(image, tile, tile).transpose(2, 0, 1)[None]])
    mean_c, std_c = (np.asarray(values, np.float32)[:, None, None] for values in (mean, std))
    return torch.from_numpy((cut.astype(np.float32) / np.float32(255) - mean_c) / std_c)


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
