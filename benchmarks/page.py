"""docs/performance.md and its chart from the files in benchmarks/results: only what was measured, and where."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from chart import bars
from page_gpu import gpu_section
from work import WORKS

Result = dict[str, Any]
_WRAP: Any = {"break_long_words": False, "break_on_hyphens": False}
NAMES = {"foveate": "foveate", "trl": "TRL", "verl": "verl", "vllm": "vLLM", "transformers": "transformers"}


def write_page(results: Path, docs: Path) -> None:
    """Write `performance.md` and `performance.svg` into `docs`."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    found = {name: result for name, result in read.items() if "load" in result}  # others are pages' of their own
    sections = [INTRODUCTION.format(conditions=conditions(found)), *_goals(found)]
    for section in (_update, _threads, _memory, _step, _generation, _engine, _scaling, _limit, _h100):
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
        f"{one['torch']}, no GPU except in its own section. Other "
        f"programs ran on the machine: the load at the end of a measurement was {loads[0]:g} to {loads[-1]:g}."
    )


# --------------------------------------------------------------------------------------------------------- figures


def ratios(steps: dict[str, list[Result]], name: str, key: str = "cpu") -> list[float]:
    """What a system took in each round, as multiples of foveate's."""
    return [theirs[key] / ours[key] for theirs, ours in zip(steps[name], steps["foveate"], strict=True)]


def spread(values: Sequence[float]) -> str:
    """`13.8 (13.2 to 14.4)`, or one value alone."""
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def median(records: Sequence[Result], key: str) -> float:
    return statistics.median(record[key] for record in records)


def peak_mb(records: Sequence[Result]) -> float:
    return max(record["peak_mb"] for record in records)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]


def _updates(found: dict[str, Result], kind: str) -> Iterator[Result]:
    yield from (found[f"{kind}-{work}"] for work in WORKS if f"{kind}-{work}" in found)


def chart_rows(found: dict[str, Result]) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """What the chart shows: a group of bars for each measured thing."""
    for result in _updates(found, "update"):
        steps = result["steps"]
        yield f"update, {result['work']}", [(NAMES[n], statistics.median(ratios(steps, n))) for n in steps]
    if "step" in found:
        steps = found["step"]["steps"]
        yield "whole GRPO step", [(NAMES[n], statistics.median(ratios(steps, n))) for n in steps]
    for one in found.get("generation", {}).get("prompts", ()):
        values = [theirs / ours for ours, theirs in one["pairs"]]
        yield f"generation, {one['prompt']}", [("foveate", 1.0), ("transformers", statistics.median(values))]
    if "engine" in found:
        steps = found["engine"]["steps"]
        yield "generation, 64 prompts", [(NAMES[n], statistics.median(ratios(steps, n))) for n in steps]


# -------------------------------------------------------------------------------------------------------- sections


def _goals(found: dict[str, Result]) -> Iterator[str]:
    """Goal, figure and whether it is met, of what was measured."""
    rows: list[list[str]] = []

    def goal(what: str, found_value: float, met: bool) -> None:
        rows.append([what, f"{found_value:.2f}", "yes" if met else "**no**"])

    for work, least in (
        ("grounding-short", 10.0), ("grounding-reasoning", 4.0), ("reasoning", 1.5), ("text", 1.0)
    ):  # fmt: skip
        for kind, many in (("update", "one thread"), ("threads", "two threads")):
            for name in ("trl", "verl"):
                if f"{kind}-{work}" in found:
                    ratio = statistics.median(ratios(found[f"{kind}-{work}"]["steps"], name))
                    goal(f"update, {work}, {many}: at least {least:g} times {NAMES[name]}", ratio, ratio >= least)
    if "step" in found:
        ratio = statistics.median(ratios(found["step"]["steps"], "trl"))
        goal("whole GRPO step: at least 8 times TRL", ratio, ratio >= 8)
    for one in found.get("generation", {}).get("prompts", ()):
        ratio = statistics.median([theirs / ours for ours, theirs in one["pairs"]])
        goal(f"generation, n = 16, {one['prompt']}: at least 3 times transformers", ratio, ratio >= 3)
    if "engine" in found:
        ratio = statistics.median(ratios(found["engine"]["steps"], "vllm"))
        goal("generation, 64 prompts at once: at least as fast as vLLM", ratio, ratio >= 1)
    if "memory" in found:
        steps = found["memory"]["steps"]
        share = peak_mb(steps["foveate"]) / peak_mb(steps["trl"])
        goal("memory of the update, vocabulary 151,936: at most a third of TRL's", share, share <= 1 / 3)
    if "limit" in found:
        share = found["limit"]["wide_update"]["share"]
        goal("update at width 1,024: at least half of the measured matrix speed", share, share >= 0.5)
    yield "\n".join(["## The goals", *table(["goal", "measured", "met"], rows)])


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
    for result in _updates(found, kind):
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


def _generation(found: dict[str, Result]) -> Iterator[str]:
    yield "## Generation against transformers"
    if "generation" not in found:
        yield "\nNot measured."
        return
    result = found["generation"]
    rows = []
    for one in result["prompts"]:
        ours, theirs = ([pair[i] for pair in one["pairs"]] for i in (0, 1))
        tokens = result["samples"] * result["new_tokens"]
        rows.append([
            f"{one['prompt']}, {one['prompt_tokens']:,} tokens", f"{statistics.median(ours):.2f}",
            f"{statistics.median(theirs):.2f}", f"{tokens / statistics.median(ours):,.0f}",
            f"{tokens / statistics.median(theirs):,.0f}",
            spread([b / a for a, b in one["pairs"]]), str(len(one["pairs"])),
        ])  # fmt: skip
    yield (
        f"\n{result['samples']} answers of {result['new_tokens']} tokens to one prompt, "
        f"{result['vocabulary']:,} tokens in "
        "the vocabulary, one thread (`benchmarks/generation.py`). transformers gets as many copies of the prompt."
    )
    yield from table(
        ["prompt", "foveate s", "transformers s", "tokens per s", "transformers'", "ratio", "rounds"], rows
    )


def _engine(found: dict[str, Result]) -> Iterator[str]:
    yield "## Generation against vLLM"
    if "engine" not in found:
        yield "\nNot measured."
        return
    result = found["engine"]
    steps, tokens = result["steps"], result["prompts"] * result["answer_tokens"]
    how = "eager" if result["eager"] else "compiled, as it is by default"
    yield (
        f"\n{result['prompts']} different prompts of {result['prompt_tokens']} tokens at once, one answer of "
        f"{result['answer_tokens']} tokens each, the tiny model of `prepare tiny`, one thread; vLLM in "
        f"one process, {how}."
    )
    rows = [
        [NAMES[n], f"{median(r, 'cpu'):.2f}", f"{median(r, 'wall'):.2f}", f"{tokens / median(r, 'cpu'):,.0f}",
         spread(ratios(steps, n)), str(len(r))]
        for n, r in steps.items()
    ]  # fmt: skip
    yield from table(["engine", "processor s", "wall s", "tokens per s", "times foveate's seconds", "rounds"], rows)


def _scaling(found: dict[str, Result]) -> Iterator[str]:
    yield "## How time and memory grow"
    if "scaling" not in found:
        yield "\nNot measured."
        return
    result = found["scaling"]
    base = ", ".join(f"{name} = {value:,}" for name, value in result["base"].items())
    yield f"\nForward and backward of one group of text; where nothing else is said, {base}. x^k is the fitted power."
    rows = []
    for name, points in result["curves"].items():
        fitted, with_memory = result["exponents"][name], points[0]["mb"] is not None
        rows.append([
            name, ", ".join(f"{point['at']:,}" for point in points),
            ", ".join(f"{point['seconds']:.2f}" for point in points), f"{fitted['seconds']:.2f}",
            ", ".join(f"{point['mb']:,.0f}" for point in points) if with_memory else "not measured",
            f"{fitted['mb']:.2f}" if with_memory else "",
        ])  # fmt: skip
    yield from table(["over", "at", "processor s", "k of time", "memory, MB", "k of memory"], rows)
    answer, prompt = result["answer_token_seconds"], result["prompt_token_seconds"]
    own = result["base"]["R"] * answer
    yield (
        f"\nOne more answer takes {1000 * own:.1f} ms, {1e6 * answer:.0f} microseconds for each of its "
        f"tokens. A token more "
        f"in the prompt takes {1e6 * prompt:.0f} microseconds, once, whatever n is: were the prompt "
        f"computed again for each "
        f"answer, one more answer would take {1000 * (own + result['base']['P'] * prompt):.0f} ms."
    )
    yield (
        "\nMemory is beside weights and gradients, each point in a process of its own. A fitted power below 1 is a "
        "constant and a line: of n, the prompt that is computed once."
    )


def _limit(found: dict[str, Result]) -> Iterator[str]:
    yield "## How far from the machine's limit"
    if "limit" not in found:
        yield "\nNot measured."
        return
    result = found["limit"]
    wide, shape = result["wide_update"], result["wide"]
    yield (
        f"\nMeasured, one thread: {result['matrix_flops'] / 1e9:.0f} GFLOP/s in a float32 product of matrices, "
        f"{result['memory_bytes'] / 1e9:.1f} GB/s read from memory. Counted as `foveate plan` counts: "
        f"products of matrices "
        "and attention, forward once and backward twice that; what is computed again does not count."
    )
    rows = [[
        f"width {shape['width']:,}, n = {shape['n']}, P = {shape['P']:,}, R = {shape['R']}",
        f"{wide['flops'] / 1e9:,.0f}",
        f"{wide['seconds']:.2f}", f"{wide['share']:.2f} ({wide['lowest']:.2f} to {wide['highest']:.2f})", "",
    ]]  # fmt: skip
    for one in _updates(found, "update"):
        counts, seconds = result["works"][one["work"]], median(one["steps"]["foveate"], "cpu")
        rows.append([
            one["work"], f"{counts['shared'] / 1e9:,.0f}", f"{seconds:.2f}",
            f"{counts['shared'] / seconds / result['matrix_flops']:.2f}", f"{counts['copies'] / counts['shared']:.1f}",
        ])  # fmt: skip
    head = ["update", "GFLOP", "processor s", "share of the matrix speed", "GFLOP of copies, as a multiple"]
    yield from table(head, rows)
    if "step" in found:
        sampling, seconds = result["sampling"], median(found["step"]["steps"]["foveate"], "generate")
        least = sampling["prefill_flops"] / result["matrix_flops"] + max(
            sampling["decode_seconds"], sampling["decode_flops"] / result["matrix_flops"]
        )
        yield (
            f"\nSampling in the whole step: {sampling['prefill_flops'] / 1e9:.0f} GFLOP for prompts and images, "
            f"{sampling['decode_flops'] / 1e9:.0f} GFLOP and {sampling['decode_bytes'] / 1e9:.2f} GB "
            f"for the answers: at "
            f"least {least:.2f} s by this machine's speeds; measured {seconds:.2f} s."
        )


def _h100(found: dict[str, Result]) -> Iterator[str]:
    yield "## An H100 on paper"
    if "limit" not in found:
        yield "\nNot computed."
        return
    result = found["limit"]
    shape = result["h100_shape"]
    yield (
        f"\n**Not measured.** The same counts, at the shares of the data sheet that `foveate plan` "
        f"assumes (40 % of 989 "
        f"TFLOP/s bfloat16, 60 % of 3.35 TB/s): {shape['groups']} groups of {shape['answers']} answers "
        f"of {shape['answer']} "
        f"tokens, prompts of {shape['prompt']:,} tokens with {shape['tiles']} tiles. Communication, memory limits and "
        "overheads are left out; copies stand for systems that compute the prompt for each answer. Seconds:"
    )
    head = ["size", "update", "with copies", "ratio", "prompts read", "tokens of the answers", "with copies"]
    rows = [
        [size, f"{one['update']:.2f}", f"{one['update_copies']:.2f}", f"{one['update_copies'] / one['update']:.1f}",
         f"{one['prefill']:.2f}", f"{one['decode']:.2f}", f"{one['decode_copies']:.2f}"]
        for size, one in result["h100"].items()
    ]  # fmt: skip
    yield from table(head, rows)
