"""Code from outside the package takes part in a run by its path alone, one of each kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from toy import HERE, make_data, rl_settings

import foveate
from foveate.config.recipe import load_recipe, to_yaml
from foveate.config.runs import RLSettings
from foveate.log import read_metrics
from foveate.train.optim import OPTIMIZERS
from foveate.train.rl import run_rl

SOURCES = Path(foveate.__file__).parent

OUTSIDE = """
from dataclasses import replace

import torch

from foveate.algorithms.table import Algorithm
from foveate.algorithms.policy_losses import gspo
from foveate.records import Score
from foveate.rollout.native.engine import NativeEngine
from foveate.train.optim import OptimizerSpec


def vowels(text, task, *, weight: float = 1.0):
    return Score(weight * sum(letter in "aeiou" for letter in text), {"letters": float(len(text))})


def centred(rewards_S, *, shift: float = 0.0):
    return rewards_S - rewards_S.mean() + shift


def half(logp_M, entropy_M, batch, targets, totals, *, share: float):
    out = gspo(logp_M, entropy_M, batch, targets, totals)
    return replace(out, loss=share * out.loss, metrics={**out.metrics, "share": (share, 1.0)})


OWN = Algorithm(
    advantage=__file__ + ":centred", loss=__file__ + ":half", source="", loss_settings={"share": 0.5}
)


class Signing(NativeEngine):
    def stream(self, requests, sampling):
        for index, group in super().stream(requests, sampling):
            yield index, tuple(replace(answer, text=answer.text + "!") for answer in group)


def descent(named, optim, *, momentum: float):
    return torch.optim.SGD([*named.values()], lr=optim.lr, momentum=momentum)


SGD = OptimizerSpec(descent, lambda optimizer, group, weight: {"momentum_buffer": torch.zeros_like(weight)})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("outside")
    own = folder / "own.py"
    own.write_text(OUTSIDE)
    settings = rl_settings(
        folder / "run",
        tiny_folder,
        make_data(folder / "data"),
        reward={"name": f"{own}:vowels", "settings": {"weight": 2.0}},
        algorithm={"name": f"{own}:OWN", "loss": {"share": 0.25}, "advantage": {"shift": 0.5}},
        rollout={"engine": f"{own}:Signing", "samples": 4, "max_tokens": 8},
        optim={"lr": 1e-3, "name": f"{own}:SGD", "settings": {"momentum": 0.5}},
        train={"steps": 2},
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(settings))
    return run_rl(load_recipe(recipe, [], RLSettings))


def test_a_reward_of_ones_own_scores_the_answers(run):
    rows = [json.loads(line) for line in (run.rollouts / "step_000001.jsonl").read_text().splitlines()]
    answers = [answer for row in rows for answer in row["answers"]]
    assert all(answer["score"] == 2.0 * sum(letter in "aeiou" for letter in answer["text"]) for answer in answers)
    assert "reward/letters" in read_metrics(run.metrics)[0]


def test_an_engine_of_ones_own_answers(run):
    rows = [json.loads(line) for line in (run.rollouts / "step_000002.jsonl").read_text().splitlines()]
    assert all(answer["text"].endswith("!") for row in rows for answer in row["answers"])


def test_an_algorithm_of_ones_own_gives_advantages_and_loss(run):
    rows = [json.loads(line) for line in (run.rollouts / "step_000001.jsonl").read_text().splitlines()]
    advantages = [answer["advantage"] for row in rows for answer in row["answers"]]
    assert sum(advantages) / len(advantages) == pytest.approx(0.5, abs=1e-5)
    assert [record["share"] for record in read_metrics(run.metrics)] == [0.25, 0.25]


def test_an_optimizer_of_ones_own_trains_and_is_saved_with_its_state(run):
    reader = FileSystemReader(run.checkpoints / "latest")
    names = reader.read_metadata().state_dict_metadata
    assert any(name.endswith(".momentum_buffer") for name in names)
    assert not any(name.endswith(".exp_avg") for name in names)


def test_an_optimizer_takes_one_file_and_one_line_of_a_table():
    for name, path in OPTIMIZERS.items():
        places = [file for file in SOURCES.rglob("*.py") if re.search(rf"\b{name}\b", file.read_text())]
        own = SOURCES.parent / f"{path.partition(':')[0].replace('.', '/')}.py"
        allowed = {own, SOURCES / "train/optim.py", SOURCES / "config/train.py"}  # config: the description of a setting
        allowed |= {SOURCES / "plan/table.py"}  # what fits on a GPU with it
        allowed |= {SOURCES / "train/muon.py"} if name == "adamw" else set()  # AdamW steps beside Muon
        assert set(places) <= allowed, name


def test_a_path_may_also_be_that_of_a_module(tmp_path, tiny_folder):
    settings = rl_settings(
        tmp_path / "run", tiny_folder, make_data(tmp_path / "data"), reward={"name": "toy:text_length"}
    )
    assert Path(HERE).stem == "toy"
    assert read_metrics(run_rl(settings).metrics)[0]["reward/characters"] > 0
