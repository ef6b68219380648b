"""A thousand small steps of online RL: memory, open files and threads of the run at step 200 and at the end.

    python benchmarks/soak_train.py [--steps 1000] [--early 200]

Steps generate, grade in two worker processes, update, write their rollouts, and save every 50.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak_serve import state_of
from two_nodes import FOVEATE, write_recipe

SETTINGS = ("reward.workers=2", "train.save_every=50", "train.keep_checkpoints=2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--early", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, states, begin = Path(name), {}, time.monotonic()
        recipe = write_recipe(folder, steps=asked.steps, retries=0, nodes=1)
        with open(folder / "log", "w") as log:
            run = subprocess.Popen([*FOVEATE, "rl", str(recipe), *SETTINGS], stdout=log, stderr=log)
        metrics = folder / "run" / "metrics.jsonl"
        while run.poll() is None:
            step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            is_due = step // asked.early > max(states, default=0) // asked.early or step == asked.steps
            if step and is_due and step not in states:
                states[step] = state_of(run.pid)
                print(f"step {step}: {states[step]}, {time.monotonic() - begin:.0f} s", flush=True)
            time.sleep(0.02)
        if run.returncode:
            sys.exit((folder / "log").read_text()[-4000:])


if __name__ == "__main__":
    main()
