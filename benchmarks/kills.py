"""Processes of runs, killed by SIGKILL at random moments, until N have been killed.

A supervisor as any cluster has one (systemd, Slurm, KubeRay) starts a node again that ended, and submits a run again
that ended with an error, each by the command that it was started with. Every run must finish with each group trained
once, in the order and with the weights, bit for bit, of a run that nobody disturbed. Kinds: a rank, the engine, the
driver, the raylet of either node. About a minute per kill on two busy cores.

--on says where: two nodes with a rank each and an engine, or this machine alone with one rank, two ranks, or one rank
that trains on answers of older weights, from an engine in a process of its own (async). The weights of that one depend
on when answers came, so that only groups and steps are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from two_nodes import Nodes, OneMachine, write_recipe

from foveate.log import read_metrics

KINDS = {  # what is in the command line
    "rank": ("ray::_Rank",),
    "engine": ("ray::_Engine",),
    "driver": (" main() rl ",),
    "raylet of the head": ("/raylet --", "--node_ip_address={0}"),
    "raylet of the other node": ("/raylet --", "--node_ip_address={1}"),
}

PLACES: dict[str, dict[str, Any]] = {
    "nodes": {"engines": 1},
    "one": {"nodes": 1},
    "two": {"nodes": 1, "gpus_per_node": 2},
    "async": {"nodes": 1, "engines": 1, "staleness": 1},
}
"""Settings of the recipe, by the place."""


def kill_one(nodes: Nodes | OneMachine, kind: str, choice: random.Random) -> bool:
    """Whether there was one to kill."""
    marks = [mark.format(*nodes.addresses) for mark in KINDS[kind]]
    found = [pid for pid, words in nodes.processes().items() if all(mark in words for mark in marks)]
    if not found:
        return False
    os.kill(choice.choice(sorted(found)), signal.SIGKILL)
    return True


def ids_of(run: Path) -> list[list[str]]:
    """The ids of the groups that each step trained."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    return [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in files]


def step_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def undisturbed(nodes: Nodes | OneMachine, recipe: Path, run: Path) -> None:
    if nodes.run(recipe, f"run={run}", log=run.with_suffix(".log")):
        sys.exit(run.with_suffix(".log").read_text())


def disturbed(
    nodes: Nodes | OneMachine, recipe: Path, run: Path, left: int, choice: random.Random, kinds: list[str],
    within: float,
) -> Counter[str]:  # fmt: skip
    """One run to its end, in which up to `left` processes are killed; how many of each kind were."""
    killed: Counter[str] = Counter()
    command = (recipe, f"run={run}")
    job = nodes.submit(*command, log=run.with_suffix(".log"))
    begin, starts, at, since = time.monotonic(), 1, None, time.time()
    metrics = run / "metrics.jsonl"
    while job.poll() != 0:
        if time.monotonic() - begin > 1800:
            sys.exit(f"{run.name} does not end\n{run.with_suffix('.log').read_text()[-4000:]}")
        nodes.keep()
        if job.poll() is not None:
            job, starts = nodes.submit(*command, log=run.with_suffix(".log")), starts + 1
        if at is None and metrics.exists() and metrics.stat().st_mtime > since:  # it has begun, or resumed
            at = time.monotonic() + choice.uniform(0, within)
        if killed.total() < left and at is not None and time.monotonic() > at:
            kind = choice.choice(kinds)
            if kill_one(nodes, kind, choice):
                killed[kind] += 1
                print(f"{run.name}: killed {kind} at step {step_of(run)}", flush=True)
                at, since = None, time.time()
                time.sleep(3)
        time.sleep(0.5)
    print(f"{run.name}: finished after {time.monotonic() - begin:.0f} s, submitted {starts} times", flush=True)
    return killed


def differences(run: Path, whole: Path, is_async: bool) -> list[str]:
    """What is not as in the undisturbed run."""
    ids, every = ids_of(run), [one for step in ids_of(run) for one in step]
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    same = {
        "each group once an epoch": max(Counter(every).values()) - min(Counter(every).values()) <= 1,
        "the steps": steps == [*range(1, len(ids_of(whole)) + 1)],
    }
    if not is_async:
        same["the groups of each step"] = ids == ids_of(whole)
        same["the final weights"] = _weights(run) == _weights(whole)
    return [name for name, as_it_was in same.items() if not as_it_was]


def _weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--on", choices=PLACES, default="nodes")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), help="by default all that there are")
    parser.add_argument("--within", type=float, default=30, help="seconds in which a process is killed")
    parser.add_argument("--minutes", type=float, default=60, help="after which no further run begins")
    parser.add_argument("--namespaces", action="store_true", help="as in two_nodes.py")
    parser.add_argument("--folder", type=Path, help="where a later call finds the undisturbed run, if it has the steps")
    asked = parser.parse_args()
    there = {"nodes": sorted(KINDS), "one": ["driver"], "two": ["driver", "rank"], "async": ["driver", "engine"]}
    kinds, is_async = sorted(asked.kinds or there[asked.on]), asked.on == "async"
    place = Nodes(namespaces=asked.namespaces) if asked.on == "nodes" else OneMachine()
    choice, killed, wrong, begin = random.Random(asked.seed), Counter[str](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, place as nodes:
        folder: Path = asked.folder or Path(temporary)
        recipe, whole, number = folder / "recipe.yaml", folder / "whole", 0
        folder.mkdir(parents=True, exist_ok=True)
        if not (whole / "final").exists():
            write_recipe(folder, steps=asked.steps, retries=50, **PLACES[asked.on])
            undisturbed(nodes, recipe, whole)
        while killed.total() < asked.kills and time.monotonic() - begin < 60 * asked.minutes:
            number, left = number + 1, asked.kills - killed.total()
            run = folder / f"run-{asked.seed}-{number}"
            killed += disturbed(nodes, recipe, run, left, choice, kinds, asked.within)
            found = differences(run, whole, is_async)
            print(f"{run.name}: {'other: ' + ', '.join(found) if found else 'as the undisturbed run'}", flush=True)
            wrong += bool(found)
            shutil.rmtree(run)
    print(f"{killed.total()} kills {dict(killed)} in {number} runs, {wrong} of them not as the undisturbed one")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
