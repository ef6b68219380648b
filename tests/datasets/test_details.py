"""Pictures that are plain or fine: one big object, or four small ones in one quarter."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from foveate.datasets.details import detail_rows, detail_scenes, prepare_details
from foveate.datasets.shapes import SHAPES
from foveate.files import sha256


def test_a_picture_has_its_objects_in_the_first_quarter_and_their_shapes_are_the_answer():
    rows = list(detail_rows(0, "train", 20, fine=0.4))
    assert [row["data_source"] for row in rows].count("fine") == 8
    for row in rows:
        picture = np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")).astype(int)
        assert picture.shape == (112, 112, 3)
        drawn = np.abs(picture - np.median(picture, (0, 1))).sum(-1) > 30  # most of it is background
        assert [drawn[y : y + 56, x : x + 56].any() for y in (0, 56) for x in (0, 56)] == [True, False, False, False]
        answer = row["reward_model"]["ground_truth"]
        assert row["extra_info"]["response"] == answer
        assert len(answer.split()) == {"plain": 1, "fine": 4}[row["data_source"]]
        assert {*answer.split()} <= {*SHAPES}


def test_fine_pictures_have_four_colours_and_splits_share_no_picture(tmp_path):
    train, test = (list(detail_scenes(0, split, 40, fine=0.5)) for split in ("train", "test"))
    assert {scene.number for scene in train}.isdisjoint(scene.number for scene in test)
    for scene in (*train, *test):
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes) in (1, 4)
    for name in ("a", "b"):
        prepare_details(tmp_path / name, {"train": 4, "test": 2}, seed=3)
    assert sha256(tmp_path / "a" / "train.parquet") == sha256(tmp_path / "b" / "train.parquet")
