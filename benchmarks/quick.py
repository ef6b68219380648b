"""A short measure of what may become slower by accident, beside the figures that landed last: `make bench-quick`.

    python benchmarks/quick.py [--store] [--works grounding-short ...]

About two minutes of one core. Figures compare across machines because each is divided by what the machine can do in
the same minute: updates are shares of the speed of a product of matrices, sampling and starting are seconds over the
seconds of one product of 2048 x 2048 matrices. All seconds are processor time. `--store` writes
benchmarks/results/quick.json. Nothing here decides: a ratio outside of 0.8 to 1.25 is worth a look.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from compare import running
from generation import SIZE, VOCABULARY, image_prompt, native, seconds, text_prompt
from limit import SIDE, matrix_speed, works
from two_nodes import write_recipe

from foveate.models.policy import load_policy
from foveate.models.tiny import build_tiny

STORED = Path(__file__).parent / "results" / "quick.json"
UPDATES = ("grounding-short", "reasoning", "text")
STARTS = {
    "start: foveate --help": ["--help"],
    "start: foveate doctor": ["doctor"],
    "start: foveate rl, one tiny step": ["rl", "recipe.yaml"],
}
COMMAND = [sys.executable, "-c", "from foveate.cli.app import main; main()"]
PRODUCT = 2 * SIDE**3
"""Operations of the product that seconds are divided by."""


def update_shares(names: Sequence[str], repeats: int) -> dict[str, float]:
    """The share of the matrix speed that the update of each work reaches; the speed is measured beside each step."""
    flops, found = works(), {}
    for name in names:
        with running(name, ["foveate"], 1, 4096) as (system,):
            system.ask("step")
            shares = []
            for _ in range(repeats):
                speed = matrix_speed(1)
                shares.append(flops[name]["shared"] / system.ask("step")["cpu"] / speed)
        found[f"update: {name}, share of the matrix speed"] = median(shares)
    return found


def sampling_products(repeats: int) -> dict[str, float]:
    """Products that fit into the seconds of 16 answers of 64 tokens to one prompt."""
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(str(build_tiny(Path(folder), SIZE, padded_vocabulary=VOCABULARY)))
        policy = replace(policy, family=replace(policy.family, stop_ids=(VOCABULARY,)))
        runs = {"image": native(policy, image_prompt(policy)), "text": native(policy, text_prompt(policy))}
        return {f"generation: {name} prompt, in products": _in_products(run, repeats) for name, run in runs.items()}


def _in_products(run: Callable[[], int], repeats: int) -> float:
    run()
    return median(seconds(run) * matrix_speed(1) / PRODUCT for _ in range(repeats))


def start_products(starts: dict[str, list[str]]) -> dict[str, float]:
    """The same of commands, from their start to their end, in a folder with a tiny model and its recipe."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_recipe(Path(folder), steps=1, retries=0, nodes=1)
        for name, words in starts.items():
            before = _children()
            subprocess.run([*COMMAND, *words], cwd=folder, check=True, capture_output=True)
            found[f"{name}, in products"] = (_children() - before) * matrix_speed(1) / PRODUCT
    return found


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: dict[str, float], landed: dict[str, float]) -> list[str]:
    """Lines of a Markdown table; above 1 is better than what landed."""
    lines = ["| figure | now | landed | better by |", "|---|---|---|---|"]
    for name, value in found.items():
        before = landed.get(name)
        ratio = "" if before is None else f"{value / before if 'share' in name else before / value:.2f}"
        lines.append(f"| {name} | {value:.3g} | {'' if before is None else f'{before:.3g}'} | {ratio} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="measured steps of each (default 2)")
    parser.add_argument("--works", nargs="*", default=list(UPDATES), help=f"updates; by default {', '.join(UPDATES)}")
    parser.add_argument("--store", action="store_true", help="as the figures that landed last")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = start_products(STARTS) | sampling_products(options.repeats) | update_shares(options.works, options.repeats)
    landed = json.loads(STORED.read_text()) if STORED.exists() else {}
    print(*table(found, landed), sep="\n")
    if options.store:
        STORED.write_text(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
