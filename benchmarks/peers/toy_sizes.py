"""Sizes of the benchmarks: those that are measured, or toy ones, at which tests run every script."""

from __future__ import annotations

import os
from typing import TypeVar

Sizes = TypeVar("Sizes")


def is_toy() -> bool:
    """Here and in every process that a script starts. Peers that are not installed are then left out."""
    return bool(os.environ.get("FOVEATE_BENCHMARK_TOY"))


def sized(full: Sizes, toy: Sizes) -> Sizes:
    """One of the two."""
    return toy if is_toy() else full
