"""`foveate rl` from the first step to the report, tiny, on models of every family and on the GitHub format."""

from __future__ import annotations

import json

import PIL.Image
import pytest
import torch
from checkpoint_cases import write_chat_folder
from family_cases import QUICK, VISION_MODELS, build_family
from safetensors.torch import load_file
from slow_cases import slow_but
from toy import HERE, make_data, settings_of
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.log import read_metrics
from foveate.models.checkpoint.formats import detect_format
from foveate.models.policy import load_policy, parameters_by_part
from foveate.run_folder import RunFolder

NAMES = ("internvl-chat", *VISION_MODELS, "qwen3", "gpt_oss")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Rows without pictures."""
    folder = tmp_path_factory.mktemp("text")
    for split, count in (("train", 16), ("test", 6)):
        rows = [
            {"data_source": "sums", "prompt": [{"role": "user", "content": f"{i}+1"}],
             "reward_model": {"ground_truth": str(i + 1)}, "extra_info": {"id": str(i)}}
            for i in range(count)
        ]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_a_run_of_every_family_learns_and_gives_its_model_back_in_its_own_layout(name, pictures, questions, tmp_path):
    chat, sees = name == "internvl-chat", name not in ("qwen3", "gpt_oss")
    start = write_chat_folder(tmp_path / "m", "300M-qwen3") if chat else build_family(tmp_path / "m", name)
    parts = ["vision", "projector", "language"] if sees else ["language"]
    changes = {"model": {"path": str(start), "trainable": parts}, "train": {"steps": 2}}
    if not sees:
        changes["data"] = {split: [str(questions / f"{split}.jsonl")] for split in ("train", "test")}
    settings = settings_of(tmp_path / "run", start, pictures, **changes)
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))

    result = CliRunner().invoke(app, ["rl", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output + str(result.exception)
    run = RunFolder(tmp_path / "run")
    records = read_metrics(run.metrics)
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["optim/grad_norm"] > 0 and not record["optim/update_skipped"] for record in records)
    assert all(record["engine/logprob_difference_max"] < 1e-4 for record in records)
    assert "eval/greedy_score" in records[-1] or not sees
    assert run.report.is_file()
    assert detect_format(run.final) == detect_format(start)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, run.final))
    assert before.keys() == after.keys()
    assert all(after[key].shape == tensor.shape for key, tensor in before.items())
    policy = load_policy(str(start))
    changed = dict.fromkeys(policy.family.parts, 0)
    for part, parameters in parameters_by_part(load_policy(str(run.final))).items():
        old = dict(policy.model.named_parameters())
        changed[part] = sum(not torch.equal(old[key], tensor) for key, tensor in parameters.items())
    assert all(changed.values()), changed
    assert load_policy(str(run.final)).family == load_policy(str(start)).family


def mixed_rows(folder):
    """Rows of text alone, with one picture, with three, and with a video beside a picture."""

    def picture(name, width, height):
        PIL.Image.effect_noise((width, height), 90).convert("RGB").save(folder / f"{name}.png")
        return f"{name}.png"

    kinds = (
        {"prompt": "What is {}+1?"},
        {"prompt": "<image>\nWhat is {}?", "images": [picture("one", 90, 60)]},
        {"prompt": "{}: <image>, <image> or <image>?", "images": [picture(f"m{i}", 60 + 30 * i, 50) for i in range(3)]},
        {
            "prompt": "{}: <video>\nWhat happens beside <image>?",
            "videos": [[picture(f"v{i}", 80, 64) for i in range(3)]],
            "images": [picture("still", 200, 70)],
        },
    )
    rows = []
    for i in range(8):
        asked = [{"role": "user", "content": kinds[i % 4]["prompt"].format(i)}]
        truth = {"ground_truth": "x"}
        answer = {"id": str(i), "response": f"It is {i}."}
        rows.append({**kinds[i % 4], "data_source": "t", "prompt": asked, "reward_model": truth, "extra_info": answer})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("verb", ["sft", "rl"])
@pytest.mark.parametrize("name", ["internvl-chat", "qwen3_vl"])
def test_rows_of_text_of_pictures_and_of_a_video_are_learned_together(name, verb, tmp_path):
    chat = name == "internvl-chat"
    start = write_chat_folder(tmp_path / "m", "6B-qwen3_moe") if chat else build_family(tmp_path / "m", name)
    (tmp_path / "data").mkdir()
    settings = {
        "run": str(tmp_path / "run"),
        "model": {"path": str(start), "trainable": ["vision", "projector", "language"]},
        "data": {"train": [mixed_rows(tmp_path / "data")], "max_prompt_tokens": 256},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2, "threads": 1, "tokens_per_micro_batch": 512},
    }
    if verb == "rl":
        settings["rollout"] = {"samples": 4, "max_tokens": 8}
        settings["reward"] = {"name": f"{HERE}:text_length", "workers": 0}
        settings["train"]["prompts_per_step"] = 4
        settings["eval"] = {"every": 0}
    else:
        settings["train"]["samples_per_step"] = 4
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    result = CliRunner().invoke(app, [verb, str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output + str(result.exception)
    run = RunFolder(tmp_path / "run")
    records = read_metrics(run.metrics)
    assert all(record["optim/grad_norm"] > 0 and not record["optim/update_skipped"] for record in records)
    if verb == "rl":
        answered = "".join(file.read_text() for file in run.rollouts.glob("*.jsonl"))
        assert answered.count("Frame3: <image>") == 2 * 2  # in the messages and in the question of both rows
        assert answered.count("v2.png") == 2
    assert detect_format(run.final) == detect_format(start)
