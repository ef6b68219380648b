"""Work dealt out to ranks by what it is estimated to cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.records import PackedGroup


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of the parts of a group in a forward pass, in tokens' worth of matrix products.

    pair: two tokens of which one sees the other, in all layers of the language model; entry: one entry of the pixels,
    a tile or a patch, in the vision tower."""

    pair: float
    entry: float

    @classmethod
    def of(cls, config: Any) -> Costs:
        """From transformers' configuration. A block of width D has about 12 D^2 weights, of which each takes 2 FLOPs a
        token, and its attention takes 4 D FLOPs a pair. Entries of towers with a `depth` are patches; others are tiles,
        which are as many tokens as they have patches."""
        text, vision = config.get_text_config(), config.to_dict().get("vision_config")
        language = text.num_hidden_layers * text.hidden_size**2
        entry = 0.0
        if vision:
            side = 1 if "depth" in vision else _first(vision["image_size"]) // _first(vision["patch_size"])
            layers, width = vision.get("depth") or vision["num_hidden_layers"], vision.get("embed_dim")
            entry = side**2 * layers * (width or vision["hidden_size"]) ** 2 / language
        return cls(1 / (6 * text.hidden_size), entry)

    def __call__(self, group: PackedGroup) -> float:
        """The prompt and its images count once; each answer sees the prompt and itself."""
        prompt = len(group.prompt)
        pairs = prompt**2 / 2 + sum(len(answer) * (prompt + len(answer) / 2) for answer in group.answers)
        slots = [*group.prompt.slots, *(s for answer in group.answers for part in answer.segments for s in part.slots)]
        entries = sum(slot.tiles for slot in slots)
        return group.tokens + self.pair * pairs + self.entry * entries


def _first(side: int | Sequence[int]) -> int:
    return side if isinstance(side, int) else side[0]


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of the work of each rank, in order: the dearest first, each to the rank that has least so far (LPT,
    whose busiest rank has at most 4/3 of the best possible; Graham 1969). The result depends on `costs` alone."""
    heap = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        shares[rank].append(index)
        heapq.heappush(heap, (load + costs[index], rank))
    return [sorted(share) for share in shares]
