from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import GotOcr2ImageProcessorPil

from foveate.data.images import load_image, read_image
from foveate.encoding.tiles import cut_tiles, tile_budget, tile_count, tile_grid
from foveate.models.checkpoint.configs import IMAGENET_MEAN, IMAGENET_STD

DATA = Path(__file__).parent.parent / "data"
REFERENCE = json.loads((DATA / "tiling.json").read_text())["tiling"]
OFFICIAL = json.loads(gzip.decompress((DATA / "official_preprocessing.json.gz").read_bytes()))["cases"]
"""What the official preprocessing made of pictures: the shape, the mean, and values at random places."""
SIZES = [
    (56, 56), (57, 56), (56, 57), (1, 1), (1, 90), (200, 3), (112, 56), (100, 100), (100, 99), (168, 112), (300, 200),
    (213, 377), (111, 333), (640, 480), (55, 400), (84, 84),
]  # fmt: skip


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("max_tiles", sorted({case["max_tiles"] for case in REFERENCE}))
def test_grids_equal_the_reference(max_tiles):
    cases = [case for case in REFERENCE if case["max_tiles"] == max_tiles]
    assert len(cases) > 100
    for case in cases:
        size = case["width"], case["height"]
        assert list(tile_grid(*size, max_tiles, 448)) == case["grid"], case
        assert tile_count(*size, max_tiles, 448) == case["tiles"], case


@pytest.mark.parametrize("max_tiles", [1, 2, 6, 12])
@pytest.mark.parametrize("tile", [56, 448])
def test_tile_counts_equal_transformers_processor(tile, max_tiles):
    processor = GotOcr2ImageProcessorPil(
        size={"height": tile, "width": tile}, crop_to_patches=True, max_patches=max_tiles
    )
    rng = np.random.default_rng(0)
    sizes = [*SIZES, *((int(w), int(h)) for w, h in np.exp(rng.uniform(0, 8, (300, 2))).astype(int) + 1)]
    for width, height in sizes:
        wanted = processor.get_number_of_image_patches(height, width)
        assert tile_count(width, height, max_tiles, tile) == wanted, (width, height)


@pytest.mark.parametrize("max_tiles", [1, 4, 12])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixel_values_equal_transformers_processor(size, max_tiles):
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56},
        crop_to_patches=True,
        max_patches=max_tiles,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    picture = noise(*size)
    wanted = torch.from_numpy(np.stack(processor(picture)["pixel_values"]))
    got = cut_tiles(picture, max_tiles, 56, IMAGENET_MEAN, IMAGENET_STD)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: f"{case.get('photo') or case['noise']}-{case['max_tiles']}")
def test_pixel_values_equal_the_official_preprocessing(case):
    if "photo" in case:
        picture = load_image(read_image(f"refphotos/images/{case['photo']}.jpg", [DATA]))
    else:
        picture = noise(*case["noise"])
    got = cut_tiles(picture, case["max_tiles"], case["tile"], IMAGENET_MEAN, IMAGENET_STD)
    assert list(got.shape) == case["shape"]
    torch.testing.assert_close(got.flatten()[case["at"]], torch.tensor(case["values"]), rtol=0, atol=1e-6)
    assert got.double().mean().item() == pytest.approx(case["mean"], abs=1e-6)


def test_tiles_are_cut_row_by_row_and_the_thumbnail_comes_last():
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    picture = PIL.Image.fromarray(np.repeat(colours.repeat(56, 0).repeat(56, 1)[:, :, None], 3, 2))
    tiles = cut_tiles(picture, 6, 56, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    assert tiles.shape == (7, 3, 56, 56)
    assert tiles[:6, 0, 28, 28].round().tolist() == [0, 40, 80, 120, 160, 200]
    assert tiles[6, 0, 0, 0] < tiles[6, 0, 0, -1] < tiles[6, 0, -1, -1]


def test_one_tile_has_no_thumbnail():
    assert cut_tiles(noise(500, 100), 1, 56, IMAGENET_MEAN, IMAGENET_STD).shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    ("max_tiles", "images", "each"), [(12, 1, 12), (12, 5, 2), (12, 13, 1), (1, 3, 1), (12, 0, 12)]
)
def test_the_budget_is_shared_evenly_and_leaves_each_image_a_tile(max_tiles, images, each):
    assert tile_budget(max_tiles, images) == each
