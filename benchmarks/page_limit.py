"""The parts of docs/performance.md about how time and memory grow, and how far from the machine's limit they are."""

from __future__ import annotations

from collections.abc import Iterator

from page_figures import Result, median, table, updates


def scaling(found: dict[str, Result]) -> Iterator[str]:
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


def limit(found: dict[str, Result]) -> Iterator[str]:
    yield "## How far from the machine's limit"
    if "limit" not in found:
        yield "\nNot measured."
        return
    result = found["limit"]
    wide, shape = result["wide_update"], result["wide"]
    fastest, own = result["matrix_flops"], result["torch_matrix_flops"]
    yield (
        f"\nMeasured, one thread: {fastest / 1e9:.0f} GFLOP/s in a float32 product of matrices by oneDNN, as "
        f"foveate's, {own / 1e9:.0f} in PyTorch's own, "
        f"{result['memory_bytes'] / 1e9:.1f} GB/s read from memory. Counted as `foveate plan` counts: "
        f"products of matrices "
        "and attention, forward once and backward twice that; what is computed again does not count."
    )
    rows = [[
        f"width {shape['width']:,}, n = {shape['n']}, P = {shape['P']:,}, R = {shape['R']}",
        f"{wide['flops'] / 1e9:,.0f}",
        f"{wide['seconds']:.2f}", f"{wide['share']:.2f} ({wide['lowest']:.2f} to {wide['highest']:.2f})",
        f"{wide['share'] * fastest / own:.2f}", "",
    ]]  # fmt: skip
    for one in updates(found, "update"):
        counts, seconds = result["works"][one["work"]], median(one["steps"]["foveate"], "cpu")
        rows.append([
            one["work"], f"{counts['shared'] / 1e9:,.0f}", f"{seconds:.2f}",
            *(f"{counts['shared'] / seconds / speed:.2f}" for speed in (fastest, own)),
            f"{counts['copies'] / counts['shared']:.1f}",
        ])  # fmt: skip
    shares = "share of the fastest matrix speed", "of PyTorch's"
    head = ["update", "GFLOP", "processor s", *shares, "GFLOP of copies, as a multiple"]
    yield from table(head, rows)
    if "step" in found:
        sampling, seconds = result["sampling"], median(found["step"]["steps"]["foveate"], "generate")
        least = sampling["prefill_flops"] / fastest + max(
            sampling["decode_seconds"], sampling["decode_flops"] / fastest
        )
        yield (
            f"\nSampling in the whole step: {sampling['prefill_flops'] / 1e9:.0f} GFLOP for prompts and images, "
            f"{sampling['decode_flops'] / 1e9:.0f} GFLOP and {sampling['decode_bytes'] / 1e9:.2f} GB "
            f"for the answers: at "
            f"least {least:.2f} s by this machine's speeds; measured {seconds:.2f} s."
        )


def h100(found: dict[str, Result]) -> Iterator[str]:
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
