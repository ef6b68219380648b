"""The part of docs/performance.md about one GPU, from `benchmarks/results/gpu.jsonl` (benchmarks/gpu.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NAMES = {"update": "foveate, update", "trl": "TRL, update", "generate": "foveate, answers"}
NAMES |= {"transformers": "transformers, answers"}
TEXT = """
Random weights of the published size {size}, {gpu}, PyTorch {torch}, weights in float32 and products in bfloat16
(`cluster.dtype: bfloat16`), rows of 16,384 tokens; answers in bfloat16. TRL computes the same update (its own loss,
sdpa, bfloat16 by autocast, 8 answers at a time); transformers' `generate` gets a copy of the prompt per answer, 64 rows
at a time. Losses agree to 1e-3, norms of gradients to 3e-3. Medians of one to three steps; rows with different numbers
were measured on different machines of this kind.
grounding-short: 16 x (P 1,088, 4 tiles of 256 tokens; 16 x R 64); reasoning: 4 x (P 512, 1 tile;
8 x R 1,024).
"""


def gpu_section(results: Path, table: Any) -> Iterator[str]:
    yield "## On one GPU"
    path = results / "gpu.jsonl"
    if not path.exists():
        yield "\nNot measured."
        return
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    yield TEXT.rstrip().format(**rows[0]) + "\n"
    head = ["what", "work", "seconds", "answer tokens per s", "peak GiB", "share of the data sheet", "machine"]
    yield from table(head, [_cells(row) for row in rows])
    yield from _said(rows)


def _cells(row: Row) -> Sequence[str]:
    settings = ", ".join(f"{name}={str(value).lower()}" for name, value in row["set"].items())
    note = f"({row['note']})" if "note" in row else ""
    what = " ".join(filter(None, [NAMES[row["part"]], f"`{settings}`" if settings else "", note]))
    share = row.get("share_of_data_sheet")
    return (
        what, row["work"], f"{row['seconds']:.2f}", f"{row['answer_tokens_per_second']:,.0f}", f"{row['peak_gib']:.0f}",
        f"{share:.2f}" if share else "", str(row["machine"]),
    )  # fmt: skip


def _said(rows: Sequence[Row]) -> Iterator[str]:
    """What the fastest of ours is of the peers', work by work."""
    for ours, theirs in (("update", "trl"), ("generate", "transformers")):
        for peer in (row for row in rows if row["part"] == theirs):
            own = [row["seconds"] for row in rows if row["part"] == ours and row["work"] == peer["work"]]
            if own:
                yield (
                    f"\n{NAMES[theirs]}, {peer['work']}: {peer['seconds'] / min(own):.1f} times foveate's seconds at "
                    f"their best."
                )
