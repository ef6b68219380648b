"""A run with a vLLM server that is killed by SIGKILL at random moments while it generates.

    python benchmarks/engine_kills.py --program ENV/bin/vllm [--kills 10] [--steps 12]

The run must finish by itself, and train in each step the groups, once each and in the order, of a run that nobody
disturbs. A moment: some time, drawn at random, after the server says that it is answering requests; at most two in a
step, because a run ends at the third without a finished group between. Half a minute a kill, most of it the server's
start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from foveate.datasets.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import Score, Task

SIZE = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, ffn=96)
FOVEATE = [sys.executable, "-c", "from foveate.cli.app import main; main()"]


def text_length(text: str, _: Task) -> Score:
    """A reward that a model of random weights learns in seconds."""
    return Score(len(text) / 10)


def write_recipe(folder: Path, steps: int) -> Path:
    prepare_shapes(folder / "data", {"train": 64, "test": 4}, side=56)
    build_tiny(folder / "model", SIZE)
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "data" / "train.parquet")], "max_prompt_tokens": 128},
        "rollout": {"samples": 4, "max_tokens": 200},
        "reward": {"name": f"{Path(__file__).resolve()}:text_length", "workers": 0},
        "optim": {"lr": 1e-3},
        "train": {"steps": steps, "prompts_per_step": 8, "save_every": 0, "threads": 1},
        "eval": {"every": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return folder / "recipe.yaml"


def servers() -> dict[int, int]:
    """The processes of vLLM servers that this benchmark started, and the port of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            ours = b"FOVEATE_ENGINE_KILLS=1" in path.with_name("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours and b"serve" in words and b"sh" not in words[0]:
            found[int(path.parent.name)] = int(words[words.index(b"--port") + 1])
    return found


def answering(port: int) -> bool:
    """Whether a server has requests under way."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            text = answer.read().decode()
    except OSError:
        return False
    running = re.findall(r"^vllm:num_requests_running\{.*?\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, running)) > 0


def kill_one(choice: random.Random) -> bool:
    """Kill a server that answers requests, a random while after that is seen. False where none does."""
    for pid, port in servers().items():
        if answering(port):
            time.sleep(choice.uniform(0, 2))
            if answering(port):
                os.kill(pid, signal.SIGKILL)
                return True
    return False


def start(recipe: Path, run: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [*FOVEATE, "rl", str(recipe), f"run={run}", *settings]
    with run.with_suffix(".log").open("wb") as log:
        environment = {**os.environ, "FOVEATE_ENGINE_KILLS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def ids_of(run: Path) -> list[list[str]]:
    """The ids of the groups that each step trained."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    return [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    choice, killed, begin = random.Random(chosen.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder, chosen.steps)
        whole, run = folder / "whole", folder / "run"
        if start(recipe, whole).wait():
            sys.exit(whole.with_suffix(".log").read_text())
        settings = {"program": chosen.program, "memory_mb": 64, "longest": 512, "bucket_mb": 1}
        job = start(recipe, run, "rollout.engine=vllm", f"rollout.engine_settings={json.dumps(settings)}")
        metrics, next_kill = run / "metrics.jsonl", choice.uniform(0, 4)
        seen = time.monotonic()
        while job.poll() is None:
            step = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            due = len(killed) < chosen.kills and time.monotonic() - seen > next_kill
            if due and killed.count(step + 1) < 2 and kill_one(choice):
                killed.append(step + 1)
                seen, next_kill = time.monotonic(), choice.uniform(0, 4)
                print(f"{seen - begin:.0f} s: killed the server in step {step + 1}", flush=True)
            time.sleep(0.02)
        if job.returncode:
            sys.exit(run.with_suffix(".log").read_text()[-6000:])
        found = {
            "the steps": [record["step"] for record in read_metrics(metrics)] == [*range(1, chosen.steps + 1)],
            "the groups of each step, once each and in order": ids_of(run) == ids_of(whole),
        }
        restarts = run.with_suffix(".log").read_text().count("starting it again")
        largest = max(record["engine/logprob_difference_max"] for record in read_metrics(metrics))
    wrong = [what for what, holds in found.items() if not holds]
    print(
        f"{len(killed)} kills, in steps {killed}; {restarts} starts again; {time.monotonic() - begin:.0f} s; log-probs"
    )
    print(
        f"differ from the trainer's by {largest:.1e} at most; {'wrong: ' + ', '.join(wrong) if wrong else 'all held'}"
    )
    sys.exit(bool(wrong) or len(killed) < chosen.kills)


if __name__ == "__main__":
    main()
