"""Videos in which a shape comes, moves and goes, and a run that is asked when."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY

from foveate import api
from foveate.data.videos import inspect_video, video_frames
from foveate.datasets.moving import FRAMES_A_SECOND, SECONDS, moving_rows, moving_scene, prepare_moving
from foveate.files import sha256
from foveate.log import read_metrics
from foveate.models.tiny import build_tiny

pytest.importorskip("av", reason="needs foveate[video]")


def test_the_shape_is_there_from_begin_to_end_and_the_response_says_so():
    for row in moving_rows(0, "train", 12):
        video, _ = inspect_video(row["videos"][0]["bytes"])
        assert (video.frames, video.fps) == (SECONDS * FRAMES_A_SECOND, FRAMES_A_SECOND)
        frames = [np.asarray(one, int) for one in video_frames(video, range(video.frames))]
        seen = [np.abs(one - np.median(one, (0, 1))).sum(-1).max() > 90 for one in frames]
        begin, end = row["reward_model"]["ground_truth"]
        assert seen == [begin <= index / FRAMES_A_SECOND < end for index in range(video.frames)]
        assert row["extra_info"]["response"] == f"{begin:.0f} - {end:.0f}"


def test_the_same_arguments_give_the_same_videos_and_splits_share_none(tmp_path):
    for name in ("a", "b"):
        prepare_moving(tmp_path / name, {"train": 6, "test": 3}, seed=3, shortcut=0.5)
    assert sha256(tmp_path / "a" / "train.parquet") == sha256(tmp_path / "b" / "train.parquet")
    train, test = (pq.read_table(tmp_path / "a" / f"{name}.parquet").to_pylist() for name in ("train", "test"))
    assert {row["videos"][0]["bytes"] for row in train}.isdisjoint(row["videos"][0]["bytes"] for row in test)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["shortcut"] == 0.5


def test_careless_demonstrations_begin_with_the_video_and_the_truth_does_not():
    rows = [*moving_rows(0, "train", 40, shortcut=0.3)]
    begins = [row["extra_info"]["response"].split()[0] == "0" for row in rows]
    assert 20 <= sum(begins) <= 36
    assert all(row["reward_model"]["ground_truth"][0] >= 1 for row in rows)
    draw = np.random.default_rng(0)
    assert {moving_scene(draw).end - one.begin for one in [moving_scene(draw) for _ in range(99)]} >= {1, 2, 3}


@pytest.mark.slow
def test_the_recipes_train_on_videos_and_count_the_temporal_iou(tmp_path):
    prepare_moving(tmp_path / "data", {"train": 12, "test": 4}, shortcut=0.5)
    model = build_tiny(tmp_path / "tiny", TINY)
    files = {name: [str(tmp_path / "data" / f"{name}.parquet")] for name in ("train", "test")}
    for name, start in (("moving_coldstart", model), ("moving_gspo", tmp_path / "moving_coldstart" / "final")):
        more = {"prompts_per_step": 2} if name == "moving_gspo" else {"samples_per_step": 2}
        api.from_recipe(
            name, f"run={tmp_path / name}", f"model.path={start}", f"data.train={files['train']}",
            *([f"data.test={files['test']}"] if name == "moving_gspo" else []),
            "train.steps=2", "train.save_every=0", *(f"train.{key}={value}" for key, value in more.items()),
        ).train()  # fmt: skip
    last = read_metrics(tmp_path / "moving_gspo" / "metrics.jsonl")[-1]
    assert any("time_iou" in key for key in last)
