"""The section "Measured" of README: the figures of docs/performance.md that most readers ask for."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from page_engine import ENGINE_WORKS
from page_figures import NAMES, Result, median, of_pairs, peak_mb, ratios
from work import WORKS

UPDATES = ("grounding-short", "grounding-reasoning", "reasoning", "text")
ENGINES = dict(zip(ENGINE_WORKS, ("64 prompts at once", "16 answers to each of 8 image prompts"), strict=False))
TEXT = """
The same work on one thread of an {machine}, in seconds of the processor. [docs/performance.md](docs/performance.md) has
the conditions, every spread, other processors, and what is slower than it should be; `make bench` measures all of it
again.
"""
HEAD = ("what", "foveate", "others", "times foveate's")


def section(found: dict[str, Result]) -> str:
    """The text below the heading."""
    rows = (HEAD, ["---"] * len(HEAD), *_rows(found))
    machines = sorted({result["machine"] for result in found.values()})
    return "\n".join([TEXT.format(machine=" or ".join(machines)), *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def write_section(found: dict[str, Result], readme: Path) -> None:
    """Put it in the place of what README says under "Measured"."""
    text = readme.read_text()
    parts = re.match(r"(.*\n## Measured\n)(.*?)(\n## .*)", text, re.DOTALL)
    if parts is None:
        raise SystemExit(f'{readme}: has no section "Measured" with another one behind it')
    readme.write_text(parts[1] + section(found) + parts[3])


def _rows(found: dict[str, Result]) -> Iterator[list[str]]:
    for name in UPDATES:
        if f"update-{name}" in found:
            work = WORKS[name]
            where = "a prompt with an image" if work.images else "a text prompt"
            what = f"update, {work.answers} answers of {work.answer:,} tokens to {where}"
            yield _row(what, found[f"update-{name}"])
    if "step" in found:
        yield _row("whole step of RL: sample, score, train", found["step"])
    for one in found.get("generation", {}).get("prompts", ()):
        samples, tokens = found["generation"]["samples"], found["generation"]["new_tokens"]
        what = f"{samples} answers of {tokens} tokens to one prompt ({one['prompt']})"
        ours, theirs = (f"{statistics.median(seconds):.2f} s" for seconds in zip(*one["pairs"], strict=True))
        yield [what, ours, f"transformers {theirs}", f"{statistics.median(of_pairs(one['pairs'])):.1f}"]
    for work, what in ENGINES.items():
        if f"engine-{work}" in found:
            yield _row(what, found[f"engine-{work}"])
    if "memory" in found:
        megabytes = {name: peak_mb(records) for name, records in found["memory"]["steps"].items()}
        ours = megabytes.pop("foveate")
        others = ", ".join(f"{NAMES[name]} {value:,.0f} MB" for name, value in megabytes.items())
        times = ", ".join(f"{value / ours:.1f}" for value in megabytes.values())
        yield ["memory of the first of these updates, vocabulary of Qwen3", f"{ours:,.0f} MB", others, times]


def _row(what: str, result: Result) -> list[str]:
    steps = result["steps"]
    seconds = {name: f"{median(records, 'cpu'):.2f} s" for name, records in steps.items()}
    others = [name for name in steps if name != "foveate"]
    times = ", ".join(f"{statistics.median(ratios(steps, name)):.1f}" for name in others)
    return [what, seconds["foveate"], ", ".join(f"{NAMES[name]} {seconds[name]}" for name in others), times]
