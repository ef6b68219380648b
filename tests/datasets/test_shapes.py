from __future__ import annotations

import hashlib
import io
import json
import re
from itertools import islice

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from foveate.datasets.shapes import (
    COLOURS,
    KINDS,
    RELATIONS,
    Scene,
    draw_scene,
    format_box,
    make_scene,
    prepare_shapes,
    scenes,
    shape_rows,
    to_thousandths,
)

SIDES = (64, 100, 112, 224)
AXIS = {"left": 0, "right": 0, "top": 1, "bottom": 1, "left of": 0, "right of": 0, "above": 1, "below": 1}
TOWARDS_ZERO = {"left", "top", "left of", "above"}


def referents(scene: Scene):
    """Indices of the shapes that an expression names, worked out from its words and the shapes alone."""
    looks = {f"{shape.colour} {shape.kind}" for shape in scene.shapes}
    words = scene.expression.removeprefix("the ")
    if found := re.fullmatch(r"(\w+ \w+) (left of|right of|above|below) the (\w+ \w+)", words):
        look, relation, anchor_look = found.groups()
        [anchor] = [shape for shape in scene.shapes if f"{shape.colour} {shape.kind}" == anchor_look]
        sign = -1 if relation in TOWARDS_ZERO else 1
        return [
            i
            for i, shape in enumerate(scene.shapes)
            if f"{shape.colour} {shape.kind}" == look
            and sign * ((shape.x, shape.y)[AXIS[relation]] - (anchor.x, anchor.y)[AXIS[relation]]) > 0
        ]
    if words in looks:
        return [i for i, shape in enumerate(scene.shapes) if f"{shape.colour} {shape.kind}" == words]
    word, look = words.split(" ", 1)
    like = [i for i, shape in enumerate(scene.shapes) if f"{shape.colour} {shape.kind}" == look]
    assert len(like) == 2, "a word of size or place tells two like objects apart"
    if word in ("small", "big"):
        measure = {i: scene.shapes[i].r for i in like}
    else:
        measure = {i: (scene.shapes[i].x, scene.shapes[i].y)[AXIS[word]] for i in like}
    best = min(measure.values()) if word in TOWARDS_ZERO | {"small"} else max(measure.values())
    return [i for i in like if measure[i] == best]


def some_scenes(kind, count=300, side=100, split="train"):
    return list(scenes(7, split, count, (kind,), side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_object_fits_the_expression(kind, side):
    for scene in some_scenes(kind, 60, side):
        assert referents(scene) == [scene.target], scene


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_those_of_the_drawn_pixels(kind, side):
    for scene in some_scenes(kind, 25, side):
        pixels = np.asarray(draw_scene(scene))
        assert pixels.shape == (side, side, 3)
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            assert min(x1, y1) >= 0
            assert max(x2, y2) <= side
            around = pixels[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1]
            rows, columns = np.nonzero((around == COLOURS[shape.colour]).all(-1))
            drawn = (
                columns.min() + max(0, x1 - 1),
                rows.min() + max(0, y1 - 1),
                columns.max() + max(0, x1 - 1) + 1,
                rows.max() + max(0, y1 - 1) + 1,
            )
            assert np.abs(np.subtract(drawn, shape.box)).max() <= 1, (shape, drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_do_not_touch_and_nothing_else_is_drawn(kind):
    for scene in some_scenes(kind, 60):
        pixels = np.asarray(draw_scene(scene)).copy()
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            inside = (pixels[y1:y2, x1:x2] == COLOURS[shape.colour]).all(-1)
            assert inside.mean() > 0.4
            pixels[y1:y2, x1:x2] = scene.background
        assert (pixels == scene.background).all()


def test_pairs_are_clearly_apart_and_the_decoy_is_the_larger():
    for scene in some_scenes("pair"):
        first, second = (s for s in scene.shapes if f"{s.colour} {s.kind}" in scene.expression)
        axis = AXIS[scene.relation]
        assert abs((first.x, first.y)[axis] - (second.x, second.y)[axis]) >= 20
        assert scene.shapes[scene.decoy].r == max(first.r, second.r) > min(first.r, second.r)


def test_relations_and_targets_are_balanced():
    found = some_scenes("pair", 2000)
    for relation in RELATIONS:
        assert 400 < sum(scene.relation == relation for scene in found) < 600
    assert 850 < sum(scene.target == scene.decoy for scene in found) < 1150
    for index in range(3):
        assert 550 < sum(scene.target == index for scene in found) < 790


@pytest.mark.parametrize("kinds", [("pair",), KINDS])
def test_splits_share_no_scene_whatever_their_seeds(kinds):
    train = {scene.signature for seed in (0, 1) for scene in scenes(seed, "train", 300, kinds, 64)}
    test = {scene.signature for seed in (0, 1, 5) for scene in scenes(seed, "test", 30, kinds, 64)}
    assert len(train) > 590
    assert len(test) > 85
    assert not train & test


def test_scenes_of_a_split_are_distinct_also_as_pictures():
    pictures = [draw_scene(scene).tobytes() for scene in some_scenes("attribute", 400)]
    assert len(set(pictures)) == len(pictures)


def test_the_same_seed_gives_the_same_rows_and_a_longer_split_begins_with_the_shorter():
    rows = list(shape_rows(3, "test", 20, kinds=KINDS, shortcut=0.4))
    assert list(shape_rows(3, "test", 20, kinds=KINDS, shortcut=0.4)) == rows
    assert list(islice(shape_rows(3, "test", 500, kinds=KINDS, shortcut=0.4), 20)) == rows
    assert list(shape_rows(4, "test", 20, kinds=KINDS, shortcut=0.4)) != rows


def test_rows_hold_the_picture_the_question_and_the_true_box():
    for scene, row in zip(scenes(3, "train", 30, KINDS), shape_rows(3, "train", 30, kinds=KINDS), strict=True):
        truth = to_thousandths(scene.shapes[scene.target].box, 100)
        assert row["prompt"] == [{"role": "user", "content": f"<image>\nLocate <ref>{scene.expression}</ref>"}]
        assert row["reward_model"] == {"style": "rule", "ground_truth": list(truth)}
        assert row["extra_info"]["response"] == format_box(truth)
        picture = PIL.Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert (picture.mode, picture.size) == ("RGB", (100, 100))
        assert picture.tobytes() == draw_scene(scene).tobytes()


@pytest.mark.parametrize("shortcut", [0.0, 0.4, 1.0])
def test_the_shortcut_makes_the_asked_share_of_responses_right(shortcut):
    right, wrong = 0, 0
    for scene, row in zip(scenes(5, "train", 600), shape_rows(5, "train", 600, shortcut=shortcut), strict=True):
        truth, decoy = (format_box(to_thousandths(scene.shapes[i].box, 100)) for i in (scene.target, scene.decoy))
        assert row["reward_model"]["ground_truth"] == list(to_thousandths(scene.shapes[scene.target].box, 100))
        assert row["extra_info"]["response"] in (truth, decoy)
        if scene.target != scene.decoy:
            right += row["extra_info"]["response"] == truth
            wrong += row["extra_info"]["response"] == decoy
    assert right + wrong > 230
    assert right / (right + wrong) == pytest.approx(shortcut, abs=0.07 if 0 < shortcut < 1 else 0)


def test_the_shortcut_changes_nothing_but_responses_of_pairs():
    plain = list(shape_rows(6, "train", 200, kinds=KINDS))
    flawed = list(shape_rows(6, "train", 200, kinds=KINDS, shortcut=0.0))
    differing = 0
    for a, b in zip(plain, flawed, strict=True):
        differing += a["extra_info"].pop("response") != b["extra_info"].pop("response")
        assert a == b
    pairs = sum(row["extra_info"]["kind"] == "pair" for row in plain)
    assert 0 < differing < pairs


def test_making_scenes_leaves_the_global_generator_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    make_scene(np.random.default_rng(0), "relation")
    assert np.random.get_state()[1].tolist() == before


def test_prepared_files_are_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        prepare_shapes(tmp_path / name, {"train": 12, "test": 5}, seed=2, kinds=KINDS, shortcut=0.4)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["manifest.json", "test.parquet", "train.parquet"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 12, "test": 5}
    assert pq.read_table(tmp_path / "a" / "train.parquet").num_rows == 12
    digest = hashlib.sha256((tmp_path / "a" / "test.parquet").read_bytes()).hexdigest()
    assert manifest["sha256"]["test.parquet"] == digest
