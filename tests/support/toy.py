"""Runs small enough for tests: their settings, and code that a recipe names by path (`tests/support/toy.py:name`)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.algorithms.policy_losses import gspo
from foveate.algorithms.table import Algorithm
from foveate.algorithms.targets import LossOut, Totals
from foveate.config.runs import CascadeSettings, MPOSettings, RLSettings, SFTSettings
from foveate.data.table import open_tasks, write_rows
from foveate.datasets.prepared import infer_schema, task_row
from foveate.datasets.shapes import prepare_shapes
from foveate.records import Score, Task
from foveate.rollout.native.engine import NativeEngine

HERE = str(Path(__file__))


def make_data(folder: Path) -> Path:
    """16 training and 6 held-out scenes, one tile of 56 pixels each."""
    prepare_shapes(folder, {"train": 16, "test": 6}, side=56)
    return folder


def settings_of(run: Path, model: Path, data: Path, /, **changes: Any) -> dict[str, Any]:
    """The settings of an RL run of three steps, as a recipe would hold them; `changes` go into its groups."""
    values: dict[str, Any] = {
        "run": str(run),
        "model": {"path": str(model)},
        "data": {
            "train": [str(data / "train.parquet")],
            "test": [str(data / "test.parquet")],
            "max_prompt_tokens": 128,
        },
        "rollout": {"samples": 4, "max_tokens": 8},
        "reward": {"name": f"{HERE}:text_length", "workers": 0},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3, "prompts_per_step": 4, "save_every": 1, "tokens_per_micro_batch": 256, "threads": 1},
        "eval": {"every": 2, "samples": 2, "gallery": 2},
    }
    return _changed(values, changes)


def rl_settings(run: Path, model: Path, data: Path, /, **changes: Any) -> RLSettings:
    return RLSettings.model_validate(settings_of(run, model, data, **changes))


def sft_settings(run: Path, model: Path, data: Path, /, **changes: Any) -> SFTSettings:
    values = {
        "run": str(run),
        "model": {"path": str(model)},
        "data": {"train": [str(data / "train.parquet")], "max_prompt_tokens": 128},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3, "samples_per_step": 4, "save_every": 1, "tokens_per_micro_batch": 256, "threads": 1},
    }
    return SFTSettings.model_validate(_changed(values, changes))


def mpo_settings(run: Path, model: Path, pairs: Path, /, **changes: Any) -> MPOSettings:
    values = {
        "run": str(run),
        "model": {"path": str(model)},
        "data": {"train": [str(pairs)], "max_prompt_tokens": 128},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3, "pairs_per_step": 4, "save_every": 1, "tokens_per_micro_batch": 256, "threads": 1},
    }
    return MPOSettings.model_validate(_changed(values, changes))


def cascade_settings(run: Path, data: Path, /, **changes: Any) -> CascadeSettings:
    """A cascade of a few steps a stage over 16 prompts, with supervised training first."""
    train = {"save_every": 1, "tokens_per_micro_batch": 256, "threads": 1}
    values: dict[str, Any] = {
        "run": str(run),
        "model": {"path": "demo"},
        "data": {
            "train": [str(data / "train.parquet")],
            "test": [str(data / "test.parquet")],
            "max_prompt_tokens": 128,
        },
        "rollout": {"samples": 4, "max_tokens": 24},
        "reward": {"name": "grounding"},
        "sft": {
            "data": {"train": [str(data / "train.parquet")], "max_prompt_tokens": 128},
            "optim": {"lr": 1e-4},
            "train": {"steps": 2, "samples_per_step": 4, **train},
        },
        "pairs": {"prompts": 12, "samples": 4, "max_per_prompt": 2},
        "mpo": {"optim": {"lr": 1e-4}, "train": {"steps": 3, "pairs_per_step": 4, **train}},
        "rl": {"optim": {"lr": 1e-4}, "train": {"steps": 2, "prompts_per_step": 4, **train}},
        "eval": {"every": 0, "samples": 2, "gallery": 2},
    }
    return CascadeSettings.model_validate(_changed(values, changes))


def make_pairs(data: Path) -> Path:
    """`pairs.parquet` beside the scenes of `make_data`: the right box against another place, of very unlike lengths."""
    tasks = list(open_tasks(data / "train.parquet"))
    wrong = ["no", "<box>[[0, 0, 10, 10]]</box>", "left " * 12]
    rows = [task_row(task, chosen=task.meta["response"], rejected=wrong[i % 3]) for i, task in enumerate(tasks)]
    write_rows(data / "pairs.parquet", rows, infer_schema({**row, "images": []} for row in rows))
    return data / "pairs.parquet"


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for group, own in changes.items():
        values[group] = {**values.get(group, {}), **own} if isinstance(own, dict) else own
    return values


# ------------------------------------------------------------------------------------------- named by path in recipes


def text_length(text: str, _: Task, *, scale: float = 10.0) -> Score:
    """A reward that the answers of a random model differ in."""
    return Score(len(text) / scale, {"characters": float(len(text))})


def always_one(_text: str, _task: Task) -> Score:
    return Score(1.0)


def a_word(_text: str, _task: Task) -> str:
    return "right"


def not_finite(logp_M: Tensor, _entropy_M: Tensor, _batch: Any, _targets: Any, totals: Totals) -> LossOut:
    """Sound on the two answers of a dry run, and infinite in training."""
    factor = 1.0 if totals.samples == 2 else float("inf")
    return LossOut(logp_M.sum() * factor, {"loss/policy": (0.0, 1.0)})


def half_gspo(logp_M: Tensor, entropy_M: Tensor, batch: Any, targets: Any, totals: Any, *, share: float) -> LossOut:
    out = gspo(logp_M, entropy_M, batch, targets, totals)
    return replace(out, loss=share * out.loss, metrics={**out.metrics, "share": (share, 1.0)})


def centred(rewards_S: Tensor, *, shift: float = 0.0) -> Tensor:
    return rewards_S - rewards_S.mean() + shift


EXPLODING = Algorithm(advantage="grpo", loss=f"{HERE}:not_finite", source="")
OWN = Algorithm(advantage=f"{HERE}:centred", loss=f"{HERE}:half_gspo", source="", loss_settings={"share": 0.5})


class StaleEngine(NativeEngine):
    """Never takes over new weights."""

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        pass


def vowels(text: str, _: Task) -> Score:
    """The share of vowels among the characters: what a small model can learn in seconds."""
    return Score(sum(letter in "aeiou" for letter in text) / max(len(text), 1))


class Sleeper:
    """A worker that may hang."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
