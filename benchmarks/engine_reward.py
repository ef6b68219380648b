"""Reward on the shapes by the engine that generates, with the demo's recipe: the same rise from every engine.

    python benchmarks/engine_reward.py run ENGINE [--program PATH] [--steps 30] [--seeds 0 1 2] [--model demo]
    python benchmarks/engine_reward.py table

ENGINE is native, vllm or sglang; `--model` a folder in place of the shipped start, such as one that
`foveate convert FOLDER OTHER --to chat` made. A run that was interrupted goes on when it is asked for again; a finished
one adds a row to benchmarks/results/engine-reward.jsonl. `table` shows the mean rewards of every five steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from staleness import settings_of

from foveate.data.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.train.rl import run_rl

FOUND = Path(__file__).parent / "results" / "engine-reward.jsonl"


def run(engine: str, program: str | None, model: str, steps: int, seed: int, out: Path) -> dict[str, Any]:
    changes: dict[str, Any] = {"seed": seed, "train.steps": steps, "train.save_every": 5, "model.path": model}
    changes |= {"train.keep_checkpoints": 1, "eval.every": 0, "algorithm": "gspo"}
    if engine != "native":
        settings: dict[str, Any] = {"program": program or engine}
        settings |= {"memory_mb": 256} if engine == "vllm" else {"memory_fraction": 0.1, "cache_tokens": 65536}
        changes |= {"rollout.engine": engine, "rollout.engine_settings": json.dumps(settings)}
    layout = "hf" if model == "demo" else "chat"
    if not (out / "data").exists():
        prepare_shapes(out / "data", {"train": 2000, "test": 320})
    folder = out / f"{engine}-{layout}-{seed}"
    rows = read_metrics(run_rl(settings_of(folder, out / "data", 0, **changes)).metrics)
    return {
        "engine": engine,
        "layout": layout,
        "seed": seed,
        "reward": [round(row["reward/mean"], 4) for row in rows],
        "seconds_per_step": statistics.median(row["seconds/step"] for row in rows),
        "logprob_difference_max": max(row["engine_logprob_difference_max"] for row in rows),
    }


def table() -> None:
    for line in FOUND.read_text().splitlines():
        row = json.loads(line)
        reward = row["reward"]
        fives = " | ".join(f"{statistics.mean(reward[i : i + 5]):.3f}" for i in range(0, len(reward), 5))
        difference = f"{row['logprob_difference_max']:.0e}"
        print(f"| {row['engine']}, {row['layout']} | {row['seed']} | {fives} | {difference} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("table")
    running = parts.add_parser("run")
    running.add_argument("engine", choices=["native", "vllm", "sglang"])
    running.add_argument("--program")
    running.add_argument("--model", default="demo")
    running.add_argument("--steps", type=int, default=30)
    running.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    running.add_argument("--out", type=Path, default=Path("runs/engine-reward"))
    chosen = parser.parse_args()
    if chosen.part == "table":
        table()
        return
    for seed in chosen.seeds:
        found = run(chosen.engine, chosen.program, chosen.model, chosen.steps, seed, chosen.out)
        with FOUND.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
