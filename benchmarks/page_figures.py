"""Small parts of docs/performance.md that all of its sections use."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from work import WORKS

Result = dict[str, Any]
NAMES = {
    "foveate": "foveate", "trl": "TRL", "verl": "verl", "vllm": "vLLM", "vllm-eager": "vLLM, eager",
    "transformers": "transformers",
}  # fmt: skip


def ratios(steps: dict[str, list[Result]], name: str, key: str = "cpu") -> list[float]:
    """What a system took in each round, as multiples of foveate's."""
    return [theirs[key] / ours[key] for theirs, ours in zip(steps[name], steps["foveate"], strict=True)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`13.8 (13.2 to 14.4)`, or one value alone."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def median(records: Sequence[Result], key: str) -> float:
    return statistics.median(record[key] for record in records)


def middle_ratio(found: dict[str, Result], result: str, name: str) -> float | None:
    """The median over rounds of what a system took, as multiples of foveate's; None where it was not measured."""
    steps = found.get(result, {}).get("steps", {})
    return statistics.median(ratios(steps, name)) if name in steps else None


def of_pairs(pairs: Sequence[Sequence[float]]) -> list[float]:
    """How many times as long the second of each pair took."""
    return [theirs / ours for ours, theirs in pairs]


def peak_mb(records: Sequence[Result]) -> float:
    return max(record["peak_mb"] for record in records)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]


def updates(found: dict[str, Result], kind: str) -> Iterator[Result]:
    yield from (found[f"{kind}-{work}"] for work in WORKS if f"{kind}-{work}" in found)
