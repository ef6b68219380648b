from __future__ import annotations

import json

import pytest
from family_cases import build_family
from slow_cases import slow_but
from video_cases import write_video

from foveate import api
from foveate.api.of_run import options_of_run
from foveate.config.runs import RLSettings, SFTSettings
from foveate.data.answers import ScoredRow, read_answers
from foveate.log import read_metrics

pytest.importorskip("av", reason="needs foveate[video]")


@pytest.fixture
def data(tmp_path):
    """Rows that ask when something happens in a video, one with an image beside it and one with its frames in a
    list."""
    import PIL.Image

    PIL.Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", 30, sound=True)
    rows = [
        {"question": "When?", "video": "a.mp4"},
        {"question": "<image> When in <video>?", "image": "a.png", "video": "a.mp4"},
        {"question": "<video> When?", "video": [["a.png", "a.png"]]},
        {"question": "When?"},
    ]
    text = "\n".join(json.dumps({**row, "answer": [1, 2], "response": "1 - 2"}) for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    return str(tmp_path / "rows.jsonl")


def values(run, model, data, **more):
    return {
        "run": str(run),
        "model": {"path": str(model)},
        "data": {"train": [data], "test": [data], "video": {"frames": 4}},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "cluster": {"device": "cpu"},
        **more,
    }


@pytest.mark.parametrize("name", slow_but(["qwen3_vl"], ["internvl", "qwen2_5_vl", "qwen3_vl"]))
def test_rows_with_videos_are_answered_scored_and_learned(name, data, tiny_folder, tmp_path):
    model = tiny_folder if name == "internvl" else build_family(tmp_path / name, name)
    train = {"steps": 1, "prompts_per_step": 4, "threads": 1}
    rollout = {"samples": 2, "max_tokens": 6}
    (tmp_path / "varied.py").write_text("def varied(text, task):\n    return float(sum(map(ord, text)) % 7)\n")
    weights = {"temporal_iou": 1.0, f"{tmp_path / 'varied.py'}:varied": 1.0}
    reward = {"name": "weighted_sum", "settings": {"weights": weights}}
    more = {"reward": reward, "rollout": rollout, "train": train, "eval": {"every": 1, "gallery": 2}}
    run = api.Recipe(RLSettings.model_validate(values(tmp_path / "rl", model, data, **more))).train()
    [first, *_] = [one for one in read_metrics(tmp_path / "rl" / "metrics.jsonl") if one["step"]]
    assert any("time_iou" in key for key in first)
    assert first["engine/logprob_difference_max"] < 1e-3
    assert options_of_run(tmp_path / "rl")["video"].frames == 4
    [path] = (tmp_path / "rl" / "evals").glob("step_*1.jsonl")
    rows = list(read_answers(path, ScoredRow))
    assert [row.question for row in rows] == ["<video>\nWhen?", "<image> When in <video>?", rows[2].question, "When?"]
    sft = SFTSettings.model_validate(
        values(tmp_path / "sft", run.model, data, train={"steps": 1, "samples_per_step": 4, "threads": 1})
    )
    assert "first prompt" in api.Recipe(sft).dry_run()
    api.Recipe(sft).train()
    assert read_metrics(tmp_path / "sft" / "metrics.jsonl")[-1]["eval/loss"] > 0
