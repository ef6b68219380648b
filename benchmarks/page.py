"""docs/performance.md and its chart from the files in benchmarks/results: only what was measured, and where."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import page_engine
import page_limit
from chart import bars
from page_figures import NAMES, Result, median, middle_ratio, of_pairs, peak_mb, ratios, spread, table, updates
from page_gpu import gpu_section
from work import WORKS

_WRAP: Any = {"break_long_words": False, "break_on_hyphens": False}


def read_results(results: Path) -> dict[str, Result]:
    """What was measured, by the names of the files."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    return {name: result for name, result in read.items() if "load" in result}  # others are pages' of their own


def write_page(results: Path, docs: Path) -> None:
    """Write `performance.md` and `performance.svg` into `docs`. Each folder in `results` is another machine's; the page
    shows its goals."""
    found = read_results(results)
    sections = [INTRODUCTION.format(conditions=conditions(found)), "## The goals", *_goals(found)]
    for there in (read_results(path) for path in sorted(results.iterdir()) if path.is_dir()):
        if there:
            machine = next(iter(there.values()))["machine"]
            sections += [f"## The goals on another processor: {machine}", conditions(there), *_goals(there)]
    answers = (page_engine.generation, page_engine.engine, page_engine.turns, page_engine.gated_delta_net)
    others = (page_engine.serve, page_engine.start, page_limit.scaling, page_limit.limit, page_limit.h100)
    for section in (_update, _threads, _memory, _step, _real_step, *answers, *others):
        sections.append("\n".join(section(found)))
    sections.insert(-1, "\n".join(gpu_section(results, table)))
    page = "\n\n".join(part.rstrip() for part in sections) + "\n"
    lines = [line if line.startswith(("|", "!")) else fill(line, 120, **_WRAP) for line in page.split("\n")]
    (docs / "performance.md").write_text("\n".join(lines), encoding="utf-8")
    (docs / "performance.svg").write_text(bars("Processor seconds, times foveate's", list(chart_rows(found))))


INTRODUCTION = """# Performance

Written by `make bench` from `benchmarks/results`; every number was measured, except those of the last
section.

{conditions}

Each system runs in a process and an environment of its own and computes one step at a time, in turn, while the
others wait; every other round reverses the order. The first step of each warms up and is not timed.
**Nothing is timed on CPUs unless losses and gradient norms agree to 1e-4**; a test holds the gradient of every
parameter to TRL's and verl's. Seconds are processor time, which
other programs on the machine disturb least; wall seconds are given, too. A ratio is the median over pairs of
neighbouring steps, with the smallest and the largest. Peers:
TRL 1.16.0 (`GRPOTrainer`'s own loss), verl 0.9.1 (`train_batch` of its FSDP engine, on one rank), transformers
5.19.0 (`generate`), vLLM 0.32.0 on the CPU. All in float32, except in the section on a GPU. The model has the
proportions of InternVL3.5-1B: vision 192 wide, 4 layers; text 256 wide, 4 layers.

![Processor seconds of each system, as multiples of foveate's](performance.svg)"""


def conditions(found: dict[str, Result]) -> str:
    """Machine, versions, dates and load in one sentence."""
    if not found:
        return "Nothing has been measured."
    one = next(iter(found.values()))
    dates = sorted({result["date"] for result in found.values()})
    loads = sorted(result["load"] for result in found.values())
    return (
        f"Measured {' and '.join(dates)} on {one['cores']} cores ({one['machine']}), PyTorch "
        f"{one['torch']}, no GPU unless said otherwise. Other "
        f"programs ran on the machine: the load at the end of a measurement was {loads[0]:g} to {loads[-1]:g}."
    )


def chart_rows(found: dict[str, Result]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """What the chart shows: a group of bars for each measured thing."""
    for result in updates(found, "update"):
        steps = result["steps"]
        yield f"update, {result['work']}", [(NAMES[n], statistics.median(ratios(steps, n))) for n in steps]
    if "step" in found:
        steps = found["step"]["steps"]
        yield "whole GRPO step", [(NAMES[n], statistics.median(ratios(steps, n))) for n in steps]
    for one in found.get("generation", {}).get("prompts", ()):
        values = of_pairs(one["pairs"])
        yield f"generation, {one['prompt']}", [("foveate", 1.0), ("transformers", statistics.median(values))]
    for work in page_engine.ENGINE_WORKS:
        steps = found.get(f"engine-{work}", {}).get("steps", {})
        if steps:
            yield f"generation, {work}", [(NAMES[n], statistics.median(ratios(steps, n))) for n in steps]


# -------------------------------------------------------------------------------------------------------- sections


def _goals(found: dict[str, Result]) -> Iterator[str]:
    """Goal, figure and whether it is met, of what was measured: a table."""
    rows: list[list[str]] = []

    def goal(what: str, found_value: float, met: bool) -> None:
        rows.append([what, f"{found_value:.2f}", "yes" if met else "**no**"])

    for work, goals in (
        ("grounding-short", (15.0, 15.0)), ("grounding-reasoning", (4.0, 4.0)), ("reasoning", (2.1, 2.0)),
        ("text", (1.5, 1.35)),
    ):  # fmt: skip
        for kind, many in (("update", "one thread"), ("threads", "two threads")):
            for name, least in zip(("trl", "verl"), goals, strict=True):
                ratio = middle_ratio(found, f"{kind}-{work}", name)
                if ratio is not None:
                    goal(f"update, {work}, {many}: at least {least:g} times {NAMES[name]}", ratio, ratio >= least)
    ratio = middle_ratio(found, "step", "trl")
    if ratio is not None:
        goal("whole GRPO step: at least 8 times TRL", ratio, ratio >= 8)
    ratio = middle_ratio(found, "real_step", "trl")
    if ratio is not None:
        goal("whole GRPO step of SmolLM2-135M: at least 12 times TRL", ratio, ratio >= 12)
        share = found["real_step"]["share"]
        goal("whole GRPO step of SmolLM2-135M: share of the fastest matrix speed at least 0.65", share, share >= 0.65)
    for one in page_engine.goals(found):
        goal(*one)
    steps = found.get("memory", {}).get("steps", {})
    if "trl" in steps:
        share = peak_mb(steps["foveate"]) / peak_mb(steps["trl"])
        goal("memory of the update, vocabulary 151,936: at most a third of TRL's", share, share <= 1 / 3)
    if "limit" in found:
        share = found["limit"]["wide_update"]["share"]
        goal("update at width 1,024: at least half of the fastest matrix speed", share, share >= 0.5)
    yield "\n".join(table(["goal", "measured", "met"], rows)[1:])


def _update(found: dict[str, Result]) -> Iterator[str]:
    yield "## The update of one identical batch, one thread"
    yield from _update_tables(found, "update")
    yield ""
    yield (
        "P counts image tokens too, 16 for a tile. foveate packs the groups of a row; the peers take a "
        "group at a time, "
        "or as many answers as `micro` says, where a whole group would need too much memory. Memory is the peak of "
        "a step above what the process held before its first step: activations, gradients and AdamW's moments."
    )


def _threads(found: dict[str, Result]) -> Iterator[str]:
    yield "## The same with two threads"
    yield from _update_tables(found, "threads")


def _update_tables(found: dict[str, Result], kind: str) -> Iterator[str]:
    rows = []
    for result in updates(found, kind):
        work, steps = WORKS[result["work"]], result["steps"]
        shape = f"{work.groups} x (P {work.prompt:,}, {sum(work.images)} tiles; {work.answers} x R {work.answer:,})"
        shape += f", micro {work.micro}" if work.micro else ""
        for name, records in steps.items():
            seconds = median(records, "cpu")
            rows.append([
                result["work"], shape, NAMES[name], f"{seconds:.2f}", f"{median(records, 'wall'):.2f}",
                f"{work.tokens / seconds:,.0f}", f"{peak_mb(records):,.0f}", spread(ratios(steps, name)),
                str(len(records)),
            ])  # fmt: skip
    if not rows:
        yield "\nNot measured."
        return
    yield from table(
        [
            "work", "groups x shape", "system", "processor s", "wall s", "trained tokens per processor s",
            "memory of a step, MB", "times foveate's seconds", "rounds",
        ],
        rows,
    )  # fmt: skip
    missing = [work for work in WORKS if work != "check" and f"{kind}-{work}" not in found]
    if missing:
        yield f"\nNot measured: {', '.join(missing)}."


def _memory(found: dict[str, Result]) -> Iterator[str]:
    yield "## Memory with a large vocabulary"
    if "memory" not in found:
        yield "\nNot measured."
        return
    result = found["memory"]
    steps = result["steps"]
    rows = [
        [NAMES[name], f"{peak_mb(records):,.0f}", f"{peak_mb(records) / peak_mb(steps['foveate']):.1f}"]
        for name, records in steps.items()
    ]
    yield f"\n{result['work']} with {result['vocabulary']:,} tokens in the vocabulary:"
    yield from table(["system", "memory of a step, MB", "times foveate's"], rows)


def _step(found: dict[str, Result]) -> Iterator[str]:
    yield "## The whole GRPO step"
    if "step" not in found:
        yield "\nNot measured."
        return
    steps = found["step"]["steps"]
    rows = []
    for name, records in steps.items():
        tokens, seconds = records[0]["answer_tokens"], median(records, "cpu")
        rows.append([
            NAMES[name], f"{median(records, 'generate'):.2f}", f"{median(records, 'update'):.2f}", f"{seconds:.2f}",
            f"{median(records, 'wall'):.2f}", f"{tokens / median(records, 'generate'):,.0f}",
            f"{tokens / seconds:,.0f}",
            f"{peak_mb(records):,.0f}", spread(ratios(steps, name)), str(len(records)),
        ])  # fmt: skip
    prompt = steps["foveate"][0]["prompt_tokens"] // 2
    yield (
        f"\nTwo PNG images (60 tiles and a thumbnail, {prompt:,} prompt tokens), 16 answers of 64 "
        f"tokens to each: read, "
        "encode, generate, score, train. TRL runs its own `train()` with transformers' generate. Processor seconds:"
    )
    yield from table(
        [
            "system", "generation", "update and the rest", "whole step", "wall s", "generated tokens per s",
            "tokens per s of the step", "memory of a step, MB", "times foveate's seconds", "rounds",
        ],
        rows,
    )  # fmt: skip


def _real_step(found: dict[str, Result]) -> Iterator[str]:
    yield "## The whole GRPO step of a real model"
    if "real_step" not in found:
        yield "\nNot measured."
        return
    result = found["real_step"]
    steps = result["steps"]
    ours = steps["foveate"][0]
    yield (
        f"\nSmolLM2-135M-Instruct in float32, {ours['prompt_tokens']:,} tokens of prompts and "
        f"{ours['answer_tokens']:,} of answers, 8 to a prompt and at most 20 each, one thread, processor seconds. "
        f"Counted as below, sampling runs at "
        f"{result['sampling_share']:.2f}, the update at {result['update_share']:.2f} and the whole step at "
        f"{result['share']:.2f} of the fastest matrix speed, which is "
        f"{result['matrix_flops'] / result['torch_matrix_flops']:.2f} times that of PyTorch's own products."
    )
    rows = [
        [
            NAMES[name], f"{median(records, 'generate'):.1f}", f"{median(records, 'update'):.1f}",
            f"{median(records, 'cpu'):.1f}", f"{peak_mb(records):,.0f}", spread(ratios(steps, name)), str(len(records)),
        ]
        for name, records in steps.items()
    ]  # fmt: skip
    yield from table(
        [
            "system", "generation", "update and the rest", "whole step", "memory of a step, MB",
            "times foveate's seconds", "rounds",
        ],
        rows,
    )  # fmt: skip
