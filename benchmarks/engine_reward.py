"""Reward on the shapes by the engine that generates, with the demo's recipe: the same rise from every engine.

    python benchmarks/engine_reward.py run ENGINE [--program PATH] [--steps 30] [--seeds 0 1 2] [--toy] [--chat]
    python benchmarks/engine_reward.py table

ENGINE is native, vllm or sglang. `--toy`: a random model on the same scenes, whose reward is the share of vowels, eight
prompts with eight answers a step. `--chat`: the model in the GitHub layout. A run that was interrupted goes on when it
is asked for again; a finished one adds a row to benchmarks/results/engine-reward.jsonl. `table` shows the mean rewards
of every five steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from foveate.datasets.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.models.checkpoint.convert import convert
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import Score, Task
from foveate.train.rl import run_rl

HERE = Path(__file__).resolve()
DEMO = HERE.parent.parent / "src" / "foveate" / "assets" / "demo"
TOY = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, ffn=96)
FOUND = Path(__file__).parent / "results" / "engine-reward.jsonl"


def vowels(text: str, _: Task) -> Score:
    """The share of vowels among the letters."""
    letters = [letter for letter in text.lower() if letter.isalpha()]
    return Score(sum(letter in "aeiou" for letter in letters) / max(1, len(letters)))


def toy(out: Path) -> dict[str, Any]:
    """Settings of the toy."""
    if not (out / "toy").exists():
        build_tiny(out / "toy", TOY)
    small = {"model.path": out / "toy", "reward.name": f"{HERE}:vowels", "reward.settings": "{}", "optim.lr": 2e-3}
    return {**small, "rollout.max_tokens": 6, "train.prompts_per_step": 8, "optim.warmup_steps": 0}


def run(engine: str, program: str | None, chosen: argparse.Namespace, seed: int) -> dict[str, Any]:
    out: Path = chosen.out
    changes: dict[str, Any] = {"seed": seed, "train.steps": chosen.steps, "train.save_every": 5}
    changes |= {"train.keep_checkpoints": 1, "eval.every": 0, "algorithm": "gspo"}
    changes |= toy(out) if chosen.toy else {"model.path": DEMO}
    if chosen.chat:
        source, target = Path(changes["model.path"]), out / f"{Path(changes['model.path']).name}-chat"
        if not target.exists():
            convert(source, target, "chat")
        changes["model.path"] = target
    if engine != "native":
        settings: dict[str, Any] = {"program": program or engine}
        settings |= {"memory_mb": 256} if engine == "vllm" else {"memory_fraction": 0.1, "cache_tokens": 65536}
        changes |= {"rollout.engine": engine, "rollout.engine_settings": json.dumps(settings)}
    from staleness import settings_of  # graders import this file from elsewhere

    forest = "chat" if chosen.chat else "hf"
    if not (out / "data").exists():
        prepare_shapes(out / "data", {"train": 2000, "test": 320})
    folder = out / f"{'toy-' if chosen.toy else ''}{engine}-{forest}-{seed}"
    rows = read_metrics(run_rl(settings_of(folder, out / "data", 0, **changes)).metrics)
    return {
        "engine": engine,
        "toy": chosen.toy,
        "layout": forest,
        "seed": seed,
        "reward": [round(row["reward/mean"], 4) for row in rows],
        "seconds_per_step": statistics.median(row["time/step"] for row in rows),
        "logprob_difference_max": max(row["engine/logprob_difference_max"] for row in rows),
    }


def table() -> None:
    for line in FOUND.read_text().splitlines():
        row = json.loads(line)
        reward = row["reward"]
        fives = " | ".join(f"{statistics.mean(reward[i : i + 5]):.3f}" for i in range(0, len(reward), 5))
        difference = f"{row['logprob_difference_max']:.0e}"
        what = f"{row['engine']}, {row['layout']}{', toy' if row['toy'] else ''}"
        print(f"| {what} | {row['seed']} | {fives} | {difference} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("table")
    running = parts.add_parser("run")
    running.add_argument("engine", choices=["native", "vllm", "sglang"])
    running.add_argument("--program")
    running.add_argument("--toy", action="store_true")
    running.add_argument("--chat", action="store_true")
    running.add_argument("--steps", type=int, default=30)
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    running.add_argument("--out", type=Path, default=Path("runs/engine-reward"))
    chosen = parser.parse_args()
    if chosen.part == "table":
        table()
        return
    for seed in chosen.seeds:
        found = run(chosen.engine, chosen.program, chosen, seed)
        with FOUND.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
