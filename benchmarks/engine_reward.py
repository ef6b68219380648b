"""Reward on the shapes by the engine that generates, with the demo's recipe: the same curve from every engine.

    python benchmarks/engine_reward.py ENGINE [--program PATH] [--steps 40] [--seeds 0 1 2] [--model demo]
    python benchmarks/engine_reward.py table

ENGINE is native, vllm or sglang; `--model` a folder in place of the shipped start, such as one that
`foveate convert demo FOLDER --to chat` made. Each run adds a row to benchmarks/results/engine-reward.jsonl, `table`
shows the mean rewards of every ten steps side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from staleness import settings_of

from foveate.data.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.train.rl import run_rl

FOUND = Path(__file__).parent / "results" / "engine-reward.jsonl"


def run(engine: str, program: str | None, model: str, steps: int, seed: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"seed": seed, "train.steps": steps, "train.save_every": 0, "model.path": model}
    changes |= {"eval.every": steps, "eval.samples": 1, "algorithm": "gspo"}
    if engine != "native":
        settings: dict[str, Any] = {"program": program or engine, "bucket_mb": 8}
        settings |= {"memory_mb": 256} if engine == "vllm" else {"memory_fraction": 0.1, "cache_tokens": 65536}
        changes |= {"rollout.engine": engine, "rollout.engine_settings": json.dumps(settings)}
    with tempfile.TemporaryDirectory() as name:
        prepare_shapes(Path(name) / "data", {"train": 2000, "test": 320})
        begin = time.perf_counter()
        rows = read_metrics(run_rl(settings_of(Path(name) / "run", Path(name) / "data", 0, **changes)).metrics)
    difference = [row["engine_logprob_difference_max"] for row in rows]
    return {
        "engine": engine,
        "start": "demo" if model == "demo" else "github layout",
        "seed": seed,
        "reward": [round(row["reward/mean"], 4) for row in rows],
        "held_out": rows[-1]["eval/greedy_accuracy"],
        "seconds_per_step": statistics.median(row["seconds/step"] for row in rows),
        "logprob_difference_max": max(difference),
        "seconds": time.perf_counter() - begin,
    }


def table() -> None:
    for line in FOUND.read_text().splitlines():
        row = json.loads(line)
        reward = row["reward"]
        tens = " ".join(f"{statistics.mean(reward[i : i + 10]):.3f}" for i in range(0, len(reward), 10))
        print(
            f"| {row['engine']}, {row['start']} | {row['seed']} | {tens} | {row['held_out']:.3f} | "
            f"{row['logprob_difference_max']:.1e} | {row['seconds_per_step']:.2f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["native", "vllm", "sglang", "table"])
    parser.add_argument("--program")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    if chosen.engine == "table":
        table()
        return
    for seed in chosen.seeds:
        found = run(chosen.engine, chosen.program, chosen.model, chosen.steps, seed)
        with FOUND.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps({name: value for name, value in found.items() if name != "reward"}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
