"""Everything that docs/performance.md says, measured: `make bench`.

    python benchmarks/bench.py [PART ...] [--pairs 3]

Parts: update, threads, memory, step, generation, engine, scaling, limit; without any, all of them, and the page is
written. `page` only writes it again. Peers get environments of their own on first use (benchmarks/peers/install.sh;
FOVEATE_PEERS says where, else build/peers; FOVEATE_VLLM names the folder of an environment with vLLM). Each measured
thing is one file under benchmarks/results, so that a part can be repeated alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from compare import PEERS, Steps, System, compare, python_of
from work import WORKS

RESULTS = Path(__file__).parent / "results"
LARGE_VOCABULARY = 151_936
VOCABULARY = 4096


def store(name: str, values: dict[str, Any]) -> None:
    """One file with what was measured and where."""
    conditions = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "machine": _processor(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**values, **conditions}, indent=1) + "\n")
    print(f"measured {name}", flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def update(options: argparse.Namespace) -> None:
    """The update of every work in foveate, TRL and verl, one thread."""
    for work in options.works:
        steps = compare(work, ["foveate", "trl", "verl"], options.pairs, 1, VOCABULARY)
        store(f"update-{work}", {"work": work, "threads": 1, "vocabulary": VOCABULARY, "steps": steps})


def threads(options: argparse.Namespace) -> None:
    """The same with two threads."""
    for work in options.works:
        steps = compare(work, ["foveate", "trl", "verl"], options.pairs, 2, VOCABULARY)
        store(f"threads-{work}", {"work": work, "threads": 2, "vocabulary": VOCABULARY, "steps": steps})


def memory(_: argparse.Namespace) -> None:
    """Peak memory with the vocabulary of Qwen3."""
    work = "grounding-short"
    steps = compare(work, ["foveate", "trl"], 1, 1, LARGE_VOCABULARY)
    store("memory", {"work": work, "threads": 1, "vocabulary": LARGE_VOCABULARY, "steps": steps})


def step(options: argparse.Namespace) -> None:
    """The whole GRPO step against TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(PEERS / "foveate_rl.py"), "make", folder, str(VOCABULARY)], check=True)
        with (
            System("foveate", sys.executable, "foveate_rl.py", ["run", folder, "1"], 1) as ours,
            System("trl", python_of("trl"), "trl_rl.py", ["run", folder, "1"], 1) as theirs,
        ):
            steps: Steps = {"foveate": [], "trl": []}
            for pair in range(options.pairs + 1):
                for system in (ours, theirs) if pair % 2 else (theirs, ours):
                    record = system.ask("step")
                    if pair:
                        steps[system.name].append(record)
    store("step", {"threads": 1, "vocabulary": VOCABULARY, "steps": steps})


def _script(name: str) -> Callable[[argparse.Namespace], None]:
    """A part in a process and file of its own, which prints one JSON object as its last line."""

    def run(options: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), "--json", "--pairs", str(options.pairs)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        store(name, json.loads(done.stdout.splitlines()[-1]))

    return run


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "update": update,
    "threads": threads,
    "memory": memory,
    "step": step,
    **{name: _script(name) for name in ("generation", "engine", "scaling", "limit")},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, page; without any, all")
    parser.add_argument("--pairs", type=int, default=3, help="measured rounds")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[name for name in WORKS if name != "check"])
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in (*PARTS, "page")]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)} and page")
    for part in options.parts or PARTS:
        if part != "page":
            PARTS[part](options)
    from page import write_page

    write_page(RESULTS, Path(__file__).parent.parent / "docs")


if __name__ == "__main__":
    main()
