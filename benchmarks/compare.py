"""foveate's update against TRL's and verl's, on identical work: same model, batch, loss, optimizer and machine.

    python benchmarks/compare.py [--works grounding-short text] [--pairs 3] [--threads 1] [--vocabulary 4096]

Each system runs in a process and an environment of its own (made on first use under build/peers) and is asked for one
step at a time, in turn, while the others wait. Their losses and gradient norms must agree to 1e-4 before anything is
timed. Ratios are of processor seconds, which neighbours on the machine disturb least; wall seconds are printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))

from work import WORKS  # noqa: E402

SYSTEMS = ("foveate", "trl", "verl")
TOLERANCE = 1e-4


class System:
    """A process that runs one step for each `step()`."""

    def __init__(self, name: str, python: str, model: Path, batch: Path, threads: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, str(PEERS / f"{name}_step.py"), "run", str(model), str(batch), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        self._read("ready")

    def step(self) -> dict[str, Any]:
        """Loss, gradient norm, wall and processor seconds and memory of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return json.loads(self._read("{"))

    def _read(self, start: str) -> str:
        """The next line that begins so; libraries print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        assert self._process.stderr is not None
        raise SystemExit(f"{self.name} ended:\n{self._process.stderr.read()[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def python_of(name: str) -> str:
    """The interpreter of a system's environment, which is made if it is not there."""
    if name == "foveate":
        return sys.executable
    folder = Path(os.environ.get("FOVEATE_PEERS", "build/peers")) / name
    subprocess.run([str(PEERS / "install.sh"), name, str(folder)], check=True)
    return str(folder / "bin" / "python")


def compare(
    work: str, systems: list[str], options: argparse.Namespace, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Steps of every system, taken in turn; the first of each warms up and is compared, not timed."""
    model, batch = folder / f"model-{work}", folder / f"{work}.pt"
    make = ["make", str(model), str(batch), work, str(options.vocabulary)]
    subprocess.run([sys.executable, str(PEERS / "foveate_step.py"), *make], check=True)
    running = [System(name, python_of(name), model, batch, options.threads) for name in systems]
    try:
        first = [system.step() for system in running]
        for system, record in zip(running, first, strict=True):
            for key in ("loss", "grad_norm"):
                if abs(record[key] - first[0][key]) > TOLERANCE * abs(first[0][key]):
                    raise SystemExit(f"{work}: {key} of {system.name} is {record[key]}, of foveate {first[0][key]}")
        steps: dict[str, list[dict[str, Any]]] = {system.name: [] for system in running}
        for _ in range(options.pairs):
            for system in running:
                steps[system.name].append(system.step())
        return steps
    finally:
        for system in running:
            system.__exit__()


def rows_of(work: str, steps: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of a Markdown table: medians, and the ratio to foveate with its spread."""
    lines = []
    for name, records in steps.items():
        ratios = [theirs["cpu"] / ours["cpu"] for theirs, ours in zip(records, steps["foveate"], strict=True)]
        cpu, wall = (statistics.median(record[key] for record in records) for key in ("cpu", "wall"))
        memory = max(record["peak_mb"] for record in records)
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        rate = WORKS[work].tokens / cpu
        lines.append(
            f"| {work} | {name} | {cpu:.2f} | {wall:.2f} | {rate:,.0f} | {memory:,.0f} | {spread} | "
            f"{records[0]['loss']:.6f} | {records[0]['grad_norm']:.5f} |"
        )
    return lines


HEAD = [
    "| work | system | processor s | wall s | trained tokens per processor s | memory of the step, MB "
    "| times foveate's | loss | gradient norm |",
    "|---|---|---|---|---|---|---|---|---|",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[name for name in WORKS if name != "check"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS[1:], default=list(SYSTEMS[1:]))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    print(*HEAD, sep="\n", flush=True)
    for work in options.works:
        with tempfile.TemporaryDirectory() as folder:
            steps = compare(work, ["foveate", *options.systems], options, Path(folder))
        print(*rows_of(work, steps), sep="\n", flush=True)


if __name__ == "__main__":
    main()
