"""Two nodes on this machine, started by the three commands of docs/cluster.md, on which a small model learns.

Without arguments, the nodes are two loopback addresses and the ports are those that the commands choose. With
--namespaces (root, Linux), each node is a network namespace with an address of its own, joined by one cable. One rank
trains on each node; with --engine, an engine of that kind answers in a process of its own on one of them. Prints where
they ran and the rewards of the run. About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from foveate.datasets.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import Score, Task

FOVEATE = [sys.executable, "-c", "from foveate.cli.app import main; main()"]
TINY = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, ffn=96)


def text_length(text: str, _: Task) -> Score:
    """A reward that a model of random weights learns in seconds."""
    return Score(len(text) / 10)


def write_recipe(
    folder: Path,
    *,
    steps: int,
    retries: int,
    engine: str = "native",
    program: str = "vllm",
    staleness: int = 0,
    **cluster: int,
) -> Path:
    """Data, model and recipe of a run of one rank on each of two nodes, or with other settings of the cluster."""
    prepare_shapes(folder / "data", {"train": 64, "test": 4}, side=56)
    build_tiny(folder / "model", TINY)
    several = {"nodes": 2, "timeout": 600, "retries": retries, **cluster}
    served = {} if engine == "native" else {"program": program, "memory_mb": 64}
    recipe = {
        "run": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "data" / "train.parquet")], "max_prompt_tokens": 128},
        "rollout": {
            "samples": 4,
            "max_tokens": 8,
            "engine": engine,
            "engine_settings": served,
            "check_every": 4,
            "staleness": staleness,
        },
        "algorithm": {"correction": {"mode": "token-truncate"} if staleness else None},
        "reward": {"name": f"{Path(__file__).resolve()}:text_length", "workers": 0},
        "optim": {"lr": 3e-3},
        "train": {"steps": steps, "prompts_per_step": 4, "save_every": 2, "tokens_per_micro_batch": 256, "threads": 1},
        "eval": {"every": 0},
        "cluster": {"device": "cpu", **({} if cluster == {"nodes": 1} else several)},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return folder / "recipe.yaml"


class Nodes:
    """The nodes as a context; each of its processes has `mark` in its environment. `keep` starts again what ended."""

    def __init__(self, *, namespaces: bool) -> None:
        own = secrets.token_hex(2)
        self.names = (f"fv-{own}-a", f"fv-{own}-b") if namespaces else ()
        self.addresses = ("10.77.0.1", "10.77.0.2") if namespaces else ("127.0.0.2", "127.0.0.3")
        self.mark = f"FOVEATE_TWO_NODES={own}"
        self._folder = tempfile.TemporaryDirectory(prefix="fv-", ignore_cleanup_errors=True)
        self._environment = {**os.environ, **dict([self.mark.split("=")]), "RAY_TMPDIR": self._folder.name}
        self._environment |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment |= {"RAY_raylet_start_wait_time_s": "240"}
        self._log = open(Path(self._folder.name) / "nodes.log", "w")  # noqa: SIM115
        self._nodes: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        if self.names:
            first, second = self.names
            for command in (
                f"netns add {first}", f"netns add {second}", f"link add {first} type veth peer name {second}",
                f"link set {first} netns {first}", f"link set {second} netns {second}",
            ):  # fmt: skip
                _ip(command)
            for name, address in zip(self.names, self.addresses, strict=True):
                for command in (f"addr add {address}/24 dev {name}", f"link set {name} up", "link set lo up"):
                    _ip(f"-n {name} {command}")
        self.keep()
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._nodes.values()):
            process.terminate()
            process.wait(60)
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for name in self.names:
            _ip(f"netns del {name}")
        self._log.close()
        self._folder.cleanup()

    def command(self, node: int, *words: str) -> list[str]:
        inside = ["ip", "netns", "exec", self.names[node]] if self.names else []
        return [*inside, *FOVEATE, *words]

    def keep(self) -> None:
        """Start the nodes that do not run."""
        for node, host in enumerate(self.addresses):
            if node in self._nodes and self._nodes[node].poll() is None:
                continue
            verb = ["up"] if node == 0 else ["join", f"{self.addresses[0]}:6379"]
            words = self.command(node, "cluster", *verb, "--host", host, "--block")
            self._nodes[node] = subprocess.Popen(
                words, env=self._environment, stdout=self._log, stderr=subprocess.STDOUT, text=True
            )
            if node == 0:
                time.sleep(5)

    def submit(self, recipe: Path, *overrides: str, log: Path) -> subprocess.Popen[str]:
        words = self.command(0, "submit", str(recipe), *overrides)
        with open(log, "a") as file:
            return subprocess.Popen(words, env=self._environment, stdout=file, stderr=subprocess.STDOUT, text=True)

    def run(self, recipe: Path, *overrides: str, log: Path) -> int:
        """The exit code of a run, which is submitted again while the head is not there yet."""
        for _ in range(20):
            before = log.stat().st_size if log.exists() else 0
            job = self.submit(recipe, *overrides, log=log)
            while job.poll() is None:
                self.keep()  # a node ends that wants to join before the head is there
                time.sleep(1)
            if not job.returncode or "no cluster answers" not in log.read_bytes()[before:].decode(errors="replace"):
                return job.returncode
            time.sleep(5)
        return 1

    def processes(self) -> dict[int, str]:
        """All processes of these nodes with their command lines."""
        return marked_processes(self.mark)


class OneMachine:
    """This machine without a cluster of its own, with the interface of `Nodes`: a run of several processes starts Ray
    for itself."""

    addresses = ("", "")

    def __init__(self) -> None:
        self.mark = f"FOVEATE_ONE_MACHINE={secrets.token_hex(2)}"
        self._environment = {**os.environ, **dict([self.mark.split("=")]), "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def keep(self) -> None:
        """Nothing here is started again but the run."""

    def submit(self, recipe: Path, *overrides: str, log: Path) -> subprocess.Popen[str]:
        with open(log, "a") as file:
            return subprocess.Popen(
                [*FOVEATE, "rl", str(recipe), *overrides], env=self._environment, stdout=file, stderr=file, text=True
            )

    def run(self, recipe: Path, *overrides: str, log: Path) -> int:
        """The exit code of a run."""
        return self.submit(recipe, *overrides, log=log).wait()

    def processes(self) -> dict[int, str]:
        """All processes of its runs with their command lines."""
        return marked_processes(self.mark)


def marked_processes(mark: str) -> dict[int, str]:
    """All processes with `mark` in their environment, with their command lines."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found[int(folder.name)] = " ".join(word.decode(errors="replace") for word in words)
        except OSError:  # has ended
            continue
    return {pid: words for pid, words in found.items() if words}


def _ip(words: str) -> None:
    subprocess.run(["ip", *shlex.split(words)], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--engine", choices=("native", "vllm"), help="with an engine beside the ranks")
    parser.add_argument("--program", default="vllm", help="the vllm command of its environment")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        engines = {"engines": 1, "engine": asked.engine, "program": asked.program} if asked.engine else {}
        recipe, log = write_recipe(Path(folder), steps=asked.steps, retries=0, **engines), Path(folder) / "log"
        with Nodes(namespaces=asked.namespaces) as nodes:
            code = nodes.run(recipe, log=log)
        said = [line for line in log.read_text().splitlines() if "ranks on" in line or "an engine on" in line]
        if code:
            sys.exit(log.read_text())
        records = read_metrics(Path(folder) / "run" / "metrics.jsonl")
        print(*said, sep="\n")
        for name in ("reward/mean", "engine/logprob_difference_max", "engine/check"):
            print(f"{name} by step:", " ".join(f"{record[name]:.2g}" for record in records if name in record))


if __name__ == "__main__":
    main()
