"""Every named algorithm raises its reward, in a run of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from toy import HERE, make_data, rl_settings, sft_settings

from foveate.algorithms.table import ALGORITHMS as TABLE
from foveate.log import read_metrics
from foveate.models.tiny import build_tiny
from foveate.train.rl import run_rl
from foveate.train.sft import run_sft

CRITIC = {"lr": 3e-3, "warmup_steps": 2}
STEPS, EDGE = 40, 6
ALGORITHMS = [name for name, row in TABLE.items() if not row.needs_teacher]
"""Those that learn from rewards; test_distillation.py has the other."""


def algorithm_of(name: str) -> dict[str, Any]:
    """The algorithm as a recipe names it, with what it cannot do without."""
    return {"name": name, **({"critic": CRITIC} if name == "ppo" else {})}


def rewards_of(folder: Path, model: Path, data: Path, name: str, seed: int = 0) -> tuple[float, float]:
    """The mean reward of the first and of the last steps of a run."""
    settings = rl_settings(
        folder,
        model,
        data,
        seed=seed,
        algorithm=algorithm_of(name),
        reward={"name": f"{HERE}:vowels"},
        rollout={"samples": 8, "max_tokens": 6},
        optim={"lr": 2e-3},
        train={"steps": STEPS, "prompts_per_step": 8, "save_every": 0, "tokens_per_micro_batch": 4096},
        eval={"every": 0},
    )
    rewards = [record["reward/mean"] for record in read_metrics(run_rl(settings).metrics)]
    return sum(rewards[:EDGE]) / EDGE, sum(rewards[-EDGE:]) / EDGE


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A random model without rows beyond its vocabulary. Those are never sampled, yet they take probability, and
    advantages that are mostly negative, as ReMax's, push it there (docs/log.md has the measurement)."""
    return build_tiny(tmp_path_factory.mktemp("fresh"), TINY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_raises_its_reward(tmp_path, fresh, name):
    before, after = rewards_of(tmp_path / "run", fresh, make_data(tmp_path / "data"), name)
    assert after > before + 0.05


CONSTANT = 0.2  # what the best answer that does not look at the question earns


def sums(folder: Path, split: str, copies: int, right: float) -> Path:
    """Sums of 0, 1 and 2 as text. All five results come equally often, so that no single answer earns more than
    `CONSTANT`; the demonstrations are right as often as said, and otherwise any result."""
    rng = np.random.default_rng(0)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    rows = []
    for a, b in pairs * copies:
        for _ in range(6 // sum(c + d == a + b for c, d in pairs)):
            shown = a + b if rng.random() < right else int(rng.integers(5))
            rows.append(
                {
                    "data_source": "sums",
                    "prompt": [{"role": "user", "content": f"{a}+{b}"}],
                    "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                    "extra_info": {"response": f"\\boxed{{{shown}}}"},
                }
            )
    file = folder / f"{split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_sums_in_a_box_are_learned_from_text_alone_with_the_math_reward(tmp_path, fresh):
    """The start has seen sums of which many are wrong; GSPO sees only whether its own are right."""
    demos, tasks = sums(tmp_path, "demos", 10, right=0.4), sums(tmp_path, "tasks", 1, right=1.0)
    start = run_sft(
        sft_settings(
            tmp_path / "sft",
            fresh,
            tmp_path,
            data={"train": [str(demos)]},
            optim={"lr": 3e-3},
            train={"steps": 200, "samples_per_step": 60, "tokens_per_micro_batch": 4096, "save_every": 0},
        )
    )
    settings = rl_settings(
        tmp_path / "run",
        start.final,
        tmp_path,
        data={"train": [str(tasks)], "test": []},
        algorithm="gspo",
        reward={"name": "math", "workers": 2},
        rollout={"samples": 8, "max_tokens": 12},
        optim={"lr": 5e-4},
        train={"steps": 30, "prompts_per_step": 30, "tokens_per_micro_batch": 8192, "save_every": 0},
        eval={"every": 0},
    )
    rewards = [record["reward/mean"] for record in read_metrics(run_rl(settings).metrics)]
    before, after = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert after > before + 0.15
    assert after > CONSTANT + 0.2
