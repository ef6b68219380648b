"""Code from outside the package takes part in a run by its path alone, one of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import HERE, make_data, rl_settings

from foveate.config.recipe import load_recipe, to_yaml
from foveate.config.runs import RLSettings
from foveate.log import read_metrics
from foveate.train.rl import run_rl

OUTSIDE = """
from dataclasses import replace

from foveate.algorithms.table import Algorithm
from foveate.algorithms.policy_losses import gspo
from foveate.records import Score
from foveate.rollout.native.engine import NativeEngine


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


def test_a_path_may_also_be_that_of_a_module(tmp_path, tiny_folder):
    settings = rl_settings(
        tmp_path / "run", tiny_folder, make_data(tmp_path / "data"), reward={"name": "toy:text_length"}
    )
    assert Path(HERE).stem == "toy"
    assert read_metrics(run_rl(settings).metrics)[0]["reward/characters"] > 0
