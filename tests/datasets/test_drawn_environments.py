from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from foveate.data.images import load_image
from foveate.datasets.gui import gui_rows, gui_scenes, prepare_gui
from foveate.datasets.patterns import PATTERNS, make_patterns
from foveate.datasets.zoom import (
    LookScenes,
    draw_plates,
    make_plates,
    oracle_rows,
    plate_scenes,
    prepare_zoom,
    zoom_rows,
    zoom_traces,
)
from foveate.environments.calls import ToolCall, parse_calls
from foveate.environments.gui import Gui
from foveate.environments.look import LOOK_BOX
from foveate.environments.observe import encoded
from foveate.errors import ConfigError
from foveate.records import Message, Task


def test_a_scene_belongs_to_one_split_whatever_the_seed():
    seen = {split: {scene.signature for seed in (0, 1) for scene in plate_scenes(seed, split, 30, 112)}
            for split in ("train", "test", "traces")}  # fmt: skip
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    screens = {split: {*gui_scenes(0, split, 12)} for split in ("train", "test", "traces")}
    assert not screens["train"] & screens["test"]


def test_the_digit_stands_on_the_plate_that_is_asked_for():
    for row, scene in zip(zoom_rows(3, "train", 8), plate_scenes(3, "train", 8, 448), strict=True):
        assert scene.asked.colour in row["prompt"][0]["content"]
        assert row["reward_model"]["ground_truth"] == str(scene.asked.digit)
        assert len({plate.colour for plate in scene.plates}) == len(scene.plates) == 4
        part = draw_plates(scene).crop(scene.asked.box)
        assert len(part.getcolors()) == 2  # the plate and its digit, whole
        assert all(other.box == scene.asked.box or _apart(other.box, scene.asked.box) for other in scene.plates)
        assert scene.glyph * 4 < 112 // 2  # less than 3 pixels in a tile of 112


def _apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_every_trace_looks_at_the_right_plate_and_reads_it():
    kinds = set()
    for row in zoom_traces(0, 24, tile=112, direct=0.2):
        kind, turns = row["extra_info"]["kind"], row["prompt"]
        kinds.add(kind)
        assert row["extra_info"]["response"] == row["reward_model"]["ground_truth"]
        assert sum(turn["content"].count("<image>") for turn in turns) == len(row["images"])
        if kind in ("read", "direct"):
            assert [turn["role"] for turn in turns] == ["user"]
            continue
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
        box = row["extra_info"]["look_box"]
        assert parse_calls(turns[1]["content"]) == [ToolCall("zoom", {"image": 1, "box": box})]
        assert (str(box) in turns[0]["content"]) == (kind == "place")
        assert turns[2]["content"] == "<image>\nImage 2"
    assert kinds == {"read", "place", "search", "direct"}


def test_a_named_place_shows_the_digit_that_is_asked_for_and_no_other():
    for row in zoom_traces(1, 60, LookScenes(side=400, cells=3), tile=112, search=0.0):
        if row["extra_info"]["kind"] != "place":
            continue
        left, top, right, bottom = row["extra_info"]["look_box"]
        assert 0 <= left < right <= 1000
        assert 0 <= top < bottom <= 1000
        assert (right - left) * (bottom - top) < 160_000


def test_the_oracle_rows_are_those_held_out_with_the_right_look_behind_them():
    tasks, looks = zoom_rows(5, "test", 4, LookScenes(side=224)), oracle_rows(5, 4, LookScenes(side=224), 112)
    for task, row in zip(tasks, looks, strict=True):
        assert row["prompt"][0] == task["prompt"][0]
        assert row["images"][0] == task["images"][0]
        assert parse_calls(row["prompt"][1]["content"])[0].arguments["box"] == task["extra_info"]["look_box"]
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "tool"]
        assert len(row["images"]) == 2
        assert row["reward_model"] == task["reward_model"]
        assert row["extra_info"]["response"] is None


def test_a_large_plate_is_readable_in_one_tile():
    for seed in range(8):
        scene = make_plates(np.random.default_rng(seed), 448, plates=1)
        assert scene.glyph >= 448 // 10
        assert scene.glyph <= scene.asked.box[2] - scene.asked.box[0]
        assert load_image(encoded(draw_plates(scene))).size == (448, 448)


def test_small_patterns_look_alike_in_one_tile_and_have_contrast_where_they_are_enlarged():
    scene = make_patterns(np.random.default_rng(3), 448, 3)
    pictures = [replace(scene, pattern=pattern).draw() for pattern in PATTERNS]
    x, y, r = scene.x // 4, scene.y // 4, scene.r // 2
    tiles = [picture.resize((112, 112), Image.Resampling.BICUBIC) for picture in pictures]
    views = np.stack([np.asarray(tile.crop((x - 2, y - 2, x + 2, y + 2)), float) for tile in tiles])
    assert views.std((0, 1, 2)).max() < 2
    for picture in pictures:
        part = picture.crop((scene.x - r, scene.y - r, scene.x + r, scene.y + r))
        assert np.asarray(part, float).std((0, 1)).max() > 40


def test_a_large_pattern_is_a_part_that_holds_the_square():
    rng = np.random.default_rng(4)
    for _ in range(12):
        scene = make_patterns(rng, 448, 3, 1.0)
        left, top, right, bottom = scene.box
        assert scene.draw().size == (112, 112)
        assert right - left >= 480
        assert bottom - top >= 480
        assert not make_patterns(rng, 448, 3).large


def test_tasks_of_patterns_ask_for_one_square_and_some_have_a_large_one():
    kinds = []
    for row in zoom_rows(2, "test", 24, LookScenes("pattern", large=0.3)):
        kinds.append(row["extra_info"]["kind"])
        assert row["reward_model"]["ground_truth"] in PATTERNS
        assert row["prompt"][0]["content"] == "<image>\nWhich pattern is on the square?"
    assert {*kinds} == {"read", "search"}
    assert kinds.count("read") < 16


def test_loose_boxes_hold_the_shape_and_are_wider():
    scenes = LookScenes("pattern")
    rows = [row["extra_info"] for row in zoom_traces(4, 24, scenes, tile=112, search=0.6, loose=1.0)]
    drawn = zip(scenes.small(4, "traces", 24), rows, strict=True)
    looks = [(scene.box, row[LOOK_BOX]) for scene, row in drawn if row["kind"] == "search"]
    assert len(looks) > 6
    for inner, outer in looks:
        wide, wider = inner[2] - inner[0], outer[2] - outer[0]
        assert wide - 1 <= wider <= 2 * wide + 1
        assert all(-1 <= low <= within + 1 for low, within in zip(outer[:2], inner[:2], strict=True))
        assert all(within - 1 <= high <= 1001 for within, high in zip(inner[2:], outer[2:], strict=True))
    assert sum(outer[2] - outer[0] for _, outer in looks) > 1.2 * sum(inner[2] - inner[0] for inner, _ in looks)


def test_shares_that_are_more_than_all_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--read 0.4, --search 0.5 and --direct 0.2 are more than 1 together"):
        prepare_zoom(tmp_path, {"traces": 1}, search=0.5, direct=0.2)


def test_a_trace_of_gui_replays_to_the_reward():
    for row in gui_rows(1, "traces", 8, side=112):
        info = row["extra_info"]
        meta = {"scene": info["scene"], "kind": info["kind"]}
        environment = Gui(side=112)
        (shown,) = environment.reset(Task("", "", (Message("user", "?"),), (), None, meta), 9)
        assert shown.content == row["prompt"][0]["content"]
        assert shown.images[0].data == row["images"][0]["bytes"]
        said = [turn["content"] for turn in row["prompt"] if turn["role"] == "assistant"]
        steps = [environment.step(answer) for answer in [*said, info["response"]]]
        assert [step.reward for step in steps] == [0.0] * len(said) + [1.0]
        pictures = [image.data for step in steps[:-1] for message in step.messages for image in message.images]
        assert [image["bytes"] for image in row["images"][1:]] == pictures
        assert json.loads(row["reward_model"]["ground_truth"]) == environment._screen.values()


def test_careless_traces_press_ok_at_once():
    rows = [*gui_rows(2, "traces", 24, side=112, kinds=("slider",), careless=0.5)]
    calls = [row["extra_info"]["calls"] for row in rows]
    assert {*calls} == {1, 2}
    pressed = [parse_calls(row["extra_info"]["response"])[0].arguments for row in rows]
    assert {(one["x"], one["y"]) for one in pressed} == {(740, 917)}
    assert [len(row["images"]) for row in rows] == calls


def test_the_same_arguments_give_the_same_files(tmp_path):
    rows = {"train": 3, "test": 2, "traces": 4}
    more = {"oracle": 2}
    for name in ("a", "b"):
        prepare_zoom(tmp_path / name / "zoom", rows | more, seed=2, side=112, tile=112, cells=3, direct=0.3)
        prepare_gui(tmp_path / name / "gui", rows, seed=2, side=112)
    for data in ("zoom", "gui"):
        manifests = [(tmp_path / name / data / "manifest.json").read_text() for name in ("a", "b")]
        assert manifests[0] == manifests[1]
        for split, count in rows.items():
            assert pq.read_table(tmp_path / "a" / data / f"{split}.parquet").num_rows == count


def test_the_commands_write_the_asked_splits_and_refuse_none(tmp_path, capsys):
    from foveate.cli.prepare_drawn import prepare_gui_command, prepare_zoom_command

    prepare_zoom_command(tmp_path / "zoom", train=2, test=0, traces=1, side=112, tile=112)
    prepare_gui_command(tmp_path / "gui", train=1, test=1, traces=0, side=112, kinds="slider,list")
    assert {path.name for path in (tmp_path / "zoom").iterdir()} == {"manifest.json", "traces.parquet", "train.parquet"}
    assert "2 train rows, 1 traces rows" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="are all 0"):
        prepare_zoom_command(tmp_path, train=0, test=0, traces=0)
    with pytest.raises(ConfigError, match="unknown kind 'knob'; allowed: toggle, slider, field, list"):
        prepare_gui_command(tmp_path, kinds="knob")
