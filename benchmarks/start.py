"""What passes before a command does its work: `foveate doctor` to its end, alone and with a model; `foveate rl
shapes_gspo` to its first step.

    python benchmarks/start.py [--pairs 3] [--json]

Each command runs in a process of its own, as from a shell, in a folder with the data of the demo. The first step begins
when the engine is first asked for answers; the evaluation before it is left out. Seconds of the clock, which mean
something on an idle core, and of the processor; the first round fills the machine's caches of files and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers.toy_sizes import sized

HERE = Path(__file__).resolve().parent
FOVEATE = [sys.executable, "-c", "from foveate.cli.app import main; main()"]
SCENES, TEST_SCENES, PROMPTS = sized((4000, 512, 32), toy=(8, 2, 2))
FIRST_STEP = [
    "rl", "shapes_gspo", f"rollout.engine={HERE}/first_step.py:FirstStep", "train.steps=1", "eval.every=0",
    "train.save_every=0", f"train.prompts_per_step={PROMPTS}",
]  # fmt: skip


def first_step(folder: Path, number: int) -> dict[str, float]:
    """Seconds from the command to its first step."""
    moment, began = folder / f"moment-{number}", time.monotonic()
    run_command([*FIRST_STEP, f"run=run-{number}"], folder, {"FOVEATE_BENCHMARK_MOMENT": str(moment)})
    found = json.loads(moment.read_text())
    return {"wall": found["wall"] - began, "cpu": found["cpu"]}


def to_its_end(words: Sequence[str], folder: Path, _: int) -> dict[str, float]:
    """Seconds from a command to its end."""
    began, before = time.monotonic(), os.times()
    run_command(words, folder, {})
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": time.monotonic() - began, "cpu": used}


def run_command(words: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    more = {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*FOVEATE, *words], cwd=folder, env={**os.environ, **more}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"foveate {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


COMMANDS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "doctor": partial(to_its_end, ["doctor"]),
    "doctor demo": partial(to_its_end, ["doctor", "demo"]),
    "rl shapes_gspo": first_step,
}


def run(pairs: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = ["--train", str(SCENES), "--test", str(TEST_SCENES), "--seed", "1"]
        run_command(["prepare", "shapes", "runs/demo-data", *drawn], folder, {})
        for number in range(pairs + 1):
            for command, measure in COMMANDS.items():
                record = measure(folder, number)
                if number:
                    found[command].append(record)
    return {"commands": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="measured rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args()
    found = run(options.pairs)
    if options.json:
        print(json.dumps(found))
        return
    for name, records in found["commands"].items():
        wall, cpu = (statistics.median(record[key] for record in records) for key in ("wall", "cpu"))
        print(f"foveate {name}: {wall:.2f} s, {cpu:.2f} s of the processor")


if __name__ == "__main__":
    main()
