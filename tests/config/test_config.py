from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from foveate.config.recipe import read_recipe
from foveate.config.runs import CascadeSettings, MPOSettings, RLSettings, SFTSettings, is_group, walk


def rl(**changes: Any) -> RLSettings:
    values: dict[str, Any] = {
        "run": "runs/a",
        "model": {"path": "demo"},
        "data": {"train": ["a.parquet"], "test": ["b.parquet"]},
        "optim": {"lr": 1e-6},
        "train": {"steps": 10},
    }
    for group, own in changes.items():
        values[group] = {**values.get(group, {}), **own} if isinstance(own, dict) else own
    return RLSettings.model_validate(values)


def sft(**changes: Any) -> SFTSettings:
    values: dict[str, Any] = {
        "run": "runs/a",
        "model": {"path": "demo"},
        "data": {"train": ["a.parquet"]},
        "optim": {"lr": 1e-5},
        "train": {"steps": 10} | changes.pop("train", {}),
    }
    return SFTSettings.model_validate(values | changes)


def refusal(build: Any, **changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        build(**changes)
    [problem] = caught.value.errors()
    assert "\n" not in problem["msg"]
    return problem["msg"]


def test_settings_stay_few():
    leaves = [path for path, field in walk(RLSettings) if not is_group(field)]
    assert len(leaves) <= 102
    assert len([path for path, field in walk(CascadeSettings) if not is_group(field)]) <= 130
    assert "rollout.samples" in leaves


def test_every_stage_of_a_cascade_logs_to_its_trackers():
    settings = read_recipe("shapes_cascade", ["log.to=[tensorboard]"], "cascade")
    assert {settings.stage(name, "demo", ("pairs.parquet",)).log.to for name in ("mpo", "rl")} == {("tensorboard",)}


@pytest.mark.parametrize("cls", [RLSettings, SFTSettings, MPOSettings, CascadeSettings])
def test_every_setting_is_described(cls):
    for path, field in walk(cls):
        assert is_group(field) or (field.description and field.description.endswith(".")), path


def test_a_name_alone_stands_for_the_choice_with_its_defaults():
    settings = rl(algorithm="dapo", reward="grounding")
    assert settings.algorithm.name == "dapo"
    assert settings.algorithm.loss == {}
    assert settings.reward.name == "grounding"


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        rl().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_two_settings_do_not_share_their_mappings():
    rl().algorithm.loss["x"] = 1
    assert rl().algorithm.loss == {}


@pytest.mark.parametrize("bad", [{"seed": "1"}, {"seed": True}, {"optim": {"lr": float("nan")}}, {"model": "demo"}])
def test_types_are_taken_literally(bad):
    with pytest.raises(ValidationError):
        rl(**bad)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": {"prompts_per_step": 12, "updates_per_step": 5}},
            "train.updates_per_step is 5 but must divide train.prompts_per_step=12; use one of 1, 2, 3, 4, 6, 12",
        ),
        ({"rollout": {"samples": 1}}, "rollout.samples is 1, but algorithm gspo compares answers"),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature is 0, which gives equal answers"),
        ({"optim": {"warmup_steps": 11}}, "optim.warmup_steps is 11, more than train.steps=10"),
        ({"data": {"test": []}, "eval": {"every": 20}}, "eval.every is 20, but data.test is empty"),
        ({"eval": {"prompts": 4}}, "eval.gallery is 16, more than eval.prompts=4"),
        ({"model": {"trainable": ["vision", "vision"]}}, "model.trainable names a part twice"),
        (
            {"train": {"tokens_per_micro_batch": 8447}},
            "train.tokens_per_micro_batch is 8447, less than one longest prompt and answer: "
            "data.max_prompt_tokens=8192 + rollout.max_tokens=256; use 8448 or more",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_with_advice(changes, said):
    assert refusal(rl, **changes).startswith(said)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"prompts_per_step": 12, "updates_per_step": 12}},
        {"rollout": {"samples": 2}},
        {"algorithm": "remax", "rollout": {"samples": 1}},
        {"algorithm": "mine.py:row", "rollout": {"samples": 1}},
        {"optim": {"warmup_steps": 10}},
        {"data": {"test": []}, "eval": {"every": 0}},
        {"eval": {"prompts": 16}},
        {"train": {"tokens_per_micro_batch": 8448}},
    ],
)
def test_settings_at_the_border_are_accepted(changes):
    rl(**changes)


def test_sft_checks_its_own_settings_together():
    assert refusal(sft, train={"tokens_per_micro_batch": 8191}).startswith("train.tokens_per_micro_batch is 8191, less")
    assert refusal(sft, optim={"lr": 1.0, "warmup_steps": 11}).startswith("optim.warmup_steps is 11")
    assert refusal(sft, data={"train": ["a.parquet"], "rlcs": {}}).startswith("data.rlcs chooses prompts by what their")


def test_prompts_are_chosen_by_success_only_where_it_is_known_in_time():
    ahead = {"rollout": {"staleness": 1}, "algorithm": {"correction": {"mode": "token-truncate"}}}
    said = refusal(rl, data={"rlcs": {}}, **ahead)
    assert said.startswith("data.rlcs chooses prompts by what the step before scored, but rollout.staleness=1")
    assert refusal(rl, data={"shares": {"a": 0.0}}).startswith("data.shares are all 0")
    assert rl(data={"shares": {"a": 0.5, "b": 1}, "rlcs": {"floor": 0.2}}).data.rlcs.smoothing == 0.5
    assert sft(train={"weighting": "square"}).train.weighting == "square"


def test_reading_settings_imports_neither_torch_nor_transformers():
    code = (
        "import sys, foveate.config.runs, foveate.config.recipe, foveate.registry, foveate.log, foveate.run_folder\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
