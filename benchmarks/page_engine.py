"""The parts of docs/performance.md about answers: generation, turns, Qwen3.5, the server; and the start of commands."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from page_figures import NAMES, Result, median, middle_ratio, of_pairs, ratios, spread, table

ENGINE_WORKS = {
    "different-prompts": ("64 prompts at once: at least as fast as vLLM", 1.0),
    "image-groups": ("8 image prompts, 16 answers of 64: at least 1.5 times vLLM", 1.5),
    "image-groups-long": ("8 image prompts, 16 answers of 512: at least 1.5 times vLLM", 1.5),
}
"""The works of benchmarks/engine.py: the goal of each, and the ratio that meets it."""
WAYS = {"vllm": "", "vllm-eager": ", vLLM eager"}
FIRST_SECONDS = {"rl shapes_gspo": 7.0, "doctor": 2.5}
P99_RATIO, SERVED_SHARE = 3.0, 0.9


def goals(found: dict[str, Result]) -> Iterator[tuple[str, float, bool]]:
    """Goal, figure and whether it is met."""
    for one in found.get("generation", {}).get("prompts", ()):
        ratio = statistics.median(of_pairs(one["pairs"]))
        yield f"generation, n = 16, {one['prompt']}: at least 6 times transformers", ratio, ratio >= 6
    for work, (what, least) in ENGINE_WORKS.items():
        for way in ("vllm", "vllm-eager"):
            ratio = middle_ratio(found, f"engine-{work}", way)
            if ratio is not None:
                eager = ", eager" if way == "vllm-eager" else ""
                yield f"generation, {what}{eager}", ratio, ratio >= least
    servers = found.get("serve_load", {}).get("servers", {})
    if servers:
        ratio = servers["foveate"]["p99 ratio"]
        what = f"serve, 99 % of short requests beside streams: at most {P99_RATIO:g} times an idle server's"
        yield what, ratio, ratio <= P99_RATIO
    if "ratio" in servers:
        ratio = servers["ratio"]["tokens a second"][0]
        yield f"serve, many clients: at least {SERVED_SHARE:g} of vLLM's tokens", ratio, ratio >= SERVED_SHARE
    started = found.get("start", {}).get("commands", {})
    for command in (one for one in started if one in FIRST_SECONDS):
        seconds, most = median(started[command], "wall"), FIRST_SECONDS[command]
        what = "begins its first step" if command.startswith("rl") else "ends"
        yield f"`foveate {command}` {what} within {most:g} s", seconds, seconds <= most


def generation(found: dict[str, Result]) -> Iterator[str]:
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
            spread(of_pairs(one["pairs"])), str(len(one["pairs"])),
        ])  # fmt: skip
    yield (
        f"\n{result['samples']} answers of {result['new_tokens']} tokens to one prompt, "
        f"{result['vocabulary']:,} tokens in "
        "the vocabulary, one thread (`benchmarks/generation.py`). transformers gets as many copies of the prompt."
    )
    yield from table(
        ["prompt", "foveate s", "transformers s", "tokens per s", "transformers'", "ratio", "rounds"], rows
    )


def engine(found: dict[str, Result]) -> Iterator[str]:
    yield "## Generation against vLLM"
    measured = [found[f"engine-{work}"] for work in ENGINE_WORKS if f"engine-{work}" in found]
    if not measured:
        yield "\nNot measured."
        return
    yield (
        "\nOne thread, vLLM in one process, compiled, as it is by default, or eager. Different prompts: text, the tiny "
        "model of `prepare tiny`. Prompts with an image: groups as in RL, the model of the section before; vLLM gets "
        "the images themselves and keeps prompts in its prefix cache; both forget prompts and images before each step, "
        f"as when weights have changed (`benchmarks/engine.py`). {_compared(measured)}"
    )
    rows = []
    for one in measured:
        tokens = one["prompts"] * one["samples"] * one["answer_tokens"]
        what = f"{one['prompts']} prompts of {one['prompt_tokens']:,} tokens" + (" with an image" * one["images"])
        what += f"; answers: {one['samples']} x {one['answer_tokens']} tokens"
        for name, records in one["steps"].items():
            rows.append([
                what, NAMES[name], f"{median(records, 'cpu'):.2f}", f"{median(records, 'wall'):.2f}",
                f"{tokens / median(records, 'cpu'):,.0f}", spread(ratios(one["steps"], name), 2), str(len(records)),
            ])  # fmt: skip
    yield from table(
        ["work", "engine", "processor s", "wall s", "tokens per s", "times foveate's seconds", "rounds"], rows
    )
    wanted = {f"{work}{how}": (work, way) for work in ENGINE_WORKS for way, how in WAYS.items()}
    missing = [name for name, (work, way) in wanted.items() if middle_ratio(found, f"engine-{work}", way) is None]
    if missing:
        yield f"\nNot measured: {'; '.join(missing)}."


def _compared(measured: Sequence[Result]) -> str:
    differences = {one["work"]: one["largest_difference"] for one in measured}
    largest = max((one for one in differences.values() if one is not None), default=None)
    parts = []
    if largest is not None:
        parts.append(
            "Prompts have the same number of tokens, and greedy answers the same tokens or ones that are as likely: "
            f"log-probs differ by {largest:.0e} at most."
        )
    unknown = [work for work, difference in differences.items() if difference is None]
    if unknown:
        parts.append(f"Measured before answers were compared: {', '.join(unknown)}.")
    return " ".join(parts)


def turns(found: dict[str, Result]) -> Iterator[str]:
    yield "## Answers of several turns"
    if "turns" not in found:
        yield "\nNot measured."
        return
    sampling, update = found["turns"]["sampling"], found["turns"]["update"]
    yield (
        f"\n{sampling['turns']} turns, behind each of them an image that is only read ({sampling['seen_tokens']} "
        f"tokens); n = {sampling['answers']}, prompts of {sampling['prompt_tokens']:,} tokens, one thread. Sampling: "
        f"keys and values that are kept between turns, against each turn as a request of its own, "
        f"{sampling['sampled_tokens']:,} sampled tokens (`benchmarks/turns.py`). Update: {update['groups']} groups in "
        "a packed forest, against copies in plain transformers (`benchmarks/group_packing.py --turns`)."
    )
    both = {
        "sampling": (sampling["pairs"], "each turn as a request"),
        "update": ([*zip(*update["seconds"].values(), strict=True)], "copies"),
    }
    yield from table(
        ["what", "against", "foveate s", "the other's", "ratio", "rounds"],
        [_row(what, other, pairs) for what, (pairs, other) in both.items()],
    )


def _row(what: str, other: str, pairs: list[tuple[float, float]]) -> list[str]:
    ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return [what, other, f"{ours:.2f}", f"{theirs:.2f}", spread(of_pairs(pairs)), str(len(pairs))]


def gated_delta_net(found: dict[str, Result]) -> Iterator[str]:
    yield "## Qwen3.5"
    if "gated_delta_net" not in found:
        yield "\nNot measured."
        return
    result = found["gated_delta_net"]
    yield (
        f"\nA small random model, three of four layers Gated DeltaNet: {result['answers']} answers of "
        f"{result['answer_tokens']} tokens to a prompt of {result['prompt_tokens']:,}, against plain transformers on "
        "copies of the prompt, one thread (`benchmarks/gated_delta_net.py`)."
    )
    rows = []
    for name, kind in result["kinds"].items():
        ours, theirs = kind["mb"]
        rows.append([*_row(name, "copies", kind["pairs"]), f"{ours:,.0f}", f"{theirs:,.0f}"])
    head = ["what", "against", "foveate s", "the other's", "ratio", "rounds", "memory of a step, MB", "the other's"]
    yield from table(head, rows)


def serve(found: dict[str, Result]) -> Iterator[str]:
    yield "## The server under load"
    if "serve_load" not in found:
        yield "\nNot measured."
        return
    result = found["serve_load"]
    shape, servers = result["shape"], result["servers"]
    yield (
        f"\n`foveate serve` on one thread, the model of the section on transformers. Seconds of the clock of requests "
        f"of {shape['short']} tokens, one after the other, alone and beside {shape['streams']} streams of "
        f"{shape['long']:,}; tokens of {shape['clients']} clients that ask for {shape['tokens']} each. vLLM's server "
        "is compiled, as it is by default, and has processes beside the one that computes (`benchmarks/serve_load.py`)."
    )
    keys = ("idle: p50", "idle: p99", "beside streams: p50", "beside streams: p99", "p99 ratio")
    rows = [
        [NAMES[name], *(f"{one[key]:.3f}" for key in keys[:-1]), f"{one['p99 ratio']:.1f}",
         f"{one['tokens a second']:,.0f}", f"{one['tokens a processor second']:,.0f}"]
        for name, one in servers.items() if name != "ratio"
    ]  # fmt: skip
    head = [
        "server", "alone, 50 %", "99 %", "beside streams, 50 %", "99 %", "99 %, times alone", "tokens per s",
        "tokens per processor s",
    ]  # fmt: skip
    yield from table(head, rows)
    if "ratio" not in servers:
        yield "\nNot measured: vLLM's server."
        return
    clock, processor = (servers["ratio"][f"tokens a {what}"] for what in ("second", "processor second"))
    yield (
        f"\nOf vLLM's tokens per second foveate gives {clock[0]:.2f} ({clock[1]:.2f} to {clock[2]:.2f}), per second of "
        f"the processor {processor[0]:.2f} ({processor[1]:.2f} to {processor[2]:.2f}); {result['rounds']} rounds."
    )


def start(found: dict[str, Result]) -> Iterator[str]:
    yield "## How soon a command does its work"
    if "start" not in found:
        yield "\nNot measured."
        return
    yield (
        "\nFrom the command to its end, or to its first step: the engine is asked for answers (`benchmarks/start.py`). "
        "Medians, the smallest and the largest."
    )
    rows = []
    for command, records in found["start"]["commands"].items():
        what = "to its first step" if command.startswith("rl") else "to its end"
        spreads = (spread([record[key] for record in records], 2) for key in ("wall", "cpu"))
        rows.append([f"`foveate {command}`, {what}", *spreads, str(len(records))])
    yield from table(["command", "seconds of the clock", "of the processor", "rounds"], rows)
