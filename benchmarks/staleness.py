"""What `rollout.staleness` saves, and what it costs in reward.

python benchmarks/staleness.py time [--seconds 1.0] [--steps 8]
python benchmarks/staleness.py curves [--steps 60] [--seeds 0 1 2] [--staleness 0 1 2] [--out runs/staleness]

`time`: a run whose engine sleeps for a while in every round, and whose update sleeps as long, so that it can be
measured on one core: seconds of a step by staleness. `curves`: GSPO on the shapes from the shipped cold start, the mean
reward of every ten steps, and the accuracy on held-out scenes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.algorithms import Algorithm
from foveate.algorithms.advantages import grpo
from foveate.config import RLSettings
from foveate.data.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.recipe import load_recipe
from foveate.records import Completion, SamplingParams
from foveate.rollout.base import Request
from foveate.rollout.native import NativeEngine
from foveate.train.rl import run_rl

HERE = Path(__file__)
SECONDS = "FOVEATE_BENCHMARK_SECONDS"


class SleepingEngine(NativeEngine):
    """Takes a while for every round, without computing."""

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        time.sleep(float(os.environ[SECONDS]))
        yield from super().stream(requests, sampling)


def sleeping_grpo(rewards_S: Tensor, group_S: Tensor) -> Tensor:
    """Advantages of GRPO, after a while: the time of an update."""
    time.sleep(float(os.environ[SECONDS]))
    return grpo(rewards_S, group_S)


SLEEPING = Algorithm(advantage=f"{HERE}:sleeping_grpo", loss="gspo", source="")


def settings_of(folder: Path, data: Path, staleness: int, algorithm: str = "gspo", **changes: Any) -> RLSettings:
    """The demo's recipe with a staleness; `changes` are settings by their dotted names."""
    values = {"run": folder, "data.train": f"[{data}/train.parquet]", "data.test": f"[{data}/test.parquet]"}
    values["rollout.staleness"] = staleness
    values["algorithm"] = f"{{name: '{algorithm}', correction: {{mode: token-truncate}}}}"
    values |= changes
    recipe = HERE.parent.parent / "foveate" / "recipes" / "shapes_gspo.yaml"
    return load_recipe(recipe, [f"{name}={value}" for name, value in values.items()], RLSettings)


def measure_time(seconds: float, steps: int) -> None:
    os.environ[SECONDS] = str(seconds)
    small = {
        "rollout.engine": f"{HERE}:SleepingEngine", "algorithm": f"{HERE}:SLEEPING", "train.steps": steps,
        "train.prompts_per_step": 2, "rollout.samples": 4, "eval.every": 0, "optim.warmup_steps": 0,
        "train.save_every": 0,
    }  # fmt: skip
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare_shapes(Path(name), {"train": 64, "test": 8})
        for staleness in (0, 1, 2):
            run = run_rl(settings_of(Path(name) / str(staleness), Path(name), staleness, **small))
            found[staleness] = statistics.median(row["seconds/step"] for row in read_metrics(run.metrics)[1:])
            saved = 1 - found[staleness] / found[0]
            print(f"staleness {staleness}: {found[staleness]:.3f} s a step, {saved:.0%} saved", flush=True)


def measure_curves(steps: int, seeds: Sequence[int], staleness: Sequence[int], out: Path) -> None:
    data = out / "data"
    if not data.exists():
        prepare_shapes(data, {"train": 2000, "test": 320})
    for seed in seeds:
        for k in staleness:
            changes = {"seed": seed, "train.steps": steps, "train.save_every": 0}
            changes |= {"eval.every": steps, "eval.samples": 1}
            begin = time.perf_counter()
            run = run_rl(settings_of(out / f"staleness-{k}-seed-{seed}", data, k, **changes))
            rows = read_metrics(run.metrics)
            reward = [row["reward/mean"] for row in rows]
            tenths = [statistics.mean(reward[i : i + 10]) for i in range(0, steps, 10)]
            step_s = statistics.median(row["seconds/step"] for row in rows)
            print(
                f"staleness {k}, seed {seed}: reward by tens of steps {' '.join(f'{x:.3f}' for x in tenths)}; held out "
                f"{rows[-1]['eval/greedy_accuracy']:.3f}; {step_s:.2f} s a step, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    timing = parts.add_parser("time")
    timing.add_argument("--seconds", type=float, default=1.0)
    timing.add_argument("--steps", type=int, default=8)
    curves = parts.add_parser("curves")
    curves.add_argument("--steps", type=int, default=60)
    curves.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    curves.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    curves.add_argument("--out", type=Path, default=Path("runs/staleness"))
    chosen = parser.parse_args()
    if chosen.part == "time":
        measure_time(chosen.seconds, chosen.steps)
    else:
        measure_curves(chosen.steps, chosen.seeds, chosen.staleness, chosen.out)


if __name__ == "__main__":
    sys.exit(main())
