"""The task of the whole step, the same for every trainer: one picture and one question, and a reward that any answer
can be given. Needs numpy and Pillow."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image
from toy_sizes import sized

QUESTION = "Where is the small red circle left of the big blue square?"
COLUMNS, ROWS, TILE = sized((10, 6, 112), toy=(2, 1, 112))
TILES = COLUMNS * ROWS
"""The picture is cut into these and a thumbnail."""
GROUPS, ANSWERS, ANSWER_TOKENS = sized((2, 16, 64), toy=(2, 4, 6))
LEARNING_RATE = 1e-6
TRAINABLE = ["vision", "projector", "language"]


def picture(seed: int) -> bytes:
    """A PNG of noise in blocks that is cut into `TILES` tiles."""
    blocks = np.random.default_rng(seed).integers(0, 256, (ROWS * 8, COLUMNS * 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(blocks).resize((COLUMNS * TILE, ROWS * TILE), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def reward(token_ids: list[int]) -> float:
    """A number that differs between the answers of random weights, so that every group teaches something."""
    return sum(token_ids) % 7 / 7
