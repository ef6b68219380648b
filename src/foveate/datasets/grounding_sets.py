"""Which rows of a grounding dataset are taken: held-out pictures, shares of files, hard negatives with easy positives.

Pure functions of what is known of the rows, and of a generator.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveate.records import DataError, require

SplitBy = Literal["image", "row"]

REFCOCO_SPLITS = (
    "refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB",
    "refcocog_val", "refcocog_test",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Buckets:
    """Ranges of IoU and the share of the positives that each gives: range i goes from edges[i] up to the next edge, the
    last one to 1. The last range gives what the shares of the others leave."""

    edges: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    shares: tuple[float, ...] = (0.15, 0.20, 0.20, 0.20)

    def __post_init__(self) -> None:
        shown = f"buckets with edges {list(self.edges)} and shares {list(self.shares)}"
        require(
            len(self.edges) == len(self.shares) + 1,
            f"{shown}: give one edge more than shares; the last range takes the rest",
        )
        require(list(self.edges) == sorted(set(self.edges)), f"{shown}: the edges must grow")
        require(min(self.edges) >= 0 and max(self.edges) < 1, f"{shown}: the edges must be within 0..1")
        require(min(self.shares, default=0) >= 0 and sum(self.shares) <= 1, f"{shown}: the shares must add up to 0..1")

    def targets(self, total: int) -> list[int]:
        """How many of `total` positives each range should give."""
        wanted = [int(total * share) for share in self.shares]
        return [*wanted, total - sum(wanted)]


@dataclass(frozen=True, slots=True)
class HardSet:
    """The hard set: rows that the model misses and a larger one does not, and as many that the model finds.

    iou_key, teacher_iou_key: fields of the rows with the IoU of the model's and of the larger model's answer.
    """

    iou_key: str
    teacher_iou_key: str = "241b_model_iou"
    buckets: Buckets = Buckets()


def take_hard(
    iou: Sequence[float], teacher_iou: Sequence[float], buckets: Buckets, rng: np.random.Generator
) -> tuple[list[int], dict[str, int]]:
    """The rows of the hard set in random order, and the counts for the summary.

    All negatives (model below 0.5, teacher above 0.5) are kept; of the positives (in one of the buckets) each bucket
    gives its share of as many, or all it has: what one lacks is not taken from another.
    """
    model, teacher = np.asarray(iou), np.asarray(teacher_iou)
    negatives = np.flatnonzero((model < 0.5) & (teacher > 0.5))
    taken = [negatives]
    counts = {"hard negatives": len(negatives)}
    ends = [*buckets.edges[1:], np.inf]
    for low, high, wanted in zip(buckets.edges, ends, buckets.targets(len(negatives)), strict=True):
        inside = np.flatnonzero((model >= low) & (model < high))
        chosen = rng.choice(inside, min(wanted, len(inside)), replace=False) if len(inside) else inside
        taken.append(chosen)
        counts[f"positives with IoU from {low:g} (wanted {wanted}, there are {len(inside)})"] = len(chosen)
    rows = np.concatenate(taken)
    require(len(negatives) > 0, "the hard set is empty: no row has a model IoU below 0.5 and a teacher IoU above 0.5")
    return rng.permutation(rows).tolist(), counts


def hold_out(keys: Sequence[Hashable], fraction: float, rng: np.random.Generator, what: str) -> dict[str, list[int]]:
    """Row indices by split, train and test, in order: rows with the same key stay together. `what` says in the error
    what a key stands for ("image"). Fractions 0 and 1 leave one split. Raises DataError if a split would be empty."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    count = round(fraction * len(groups))
    if 0.0 < fraction < 1.0:
        count = min(max(count, 1), len(groups) - 1)
        if count == 0:
            raise DataError(f"one {what} cannot be split into train and test; set test_fraction to 0 or 1")
    drawn = set(rng.permutation(len(groups))[:count].tolist())
    splits: dict[str, list[int]] = {"train": [], "test": []}
    for position, indices in enumerate(groups.values()):
        splits["test" if position in drawn else "train"].extend(indices)
    return {name: sorted(indices) for name, indices in splits.items() if indices}


def take_share(count: int, fraction: float, seed: int) -> list[int]:
    """At least one of `count` rows, `fraction` of them (rounded down), at random, in random order."""
    return np.random.default_rng(seed).permutation(count)[: max(1, int(fraction * count))].tolist()
