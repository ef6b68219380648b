"""Prompts whose tiles have fewer tokens: by a route, which says for each tile whether it is compressed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from foveate.records import ImageSlot, Prompt


def seen_share(prompts: Iterable[Prompt], sides: tuple[int, int] | None) -> float | None:
    """The share of their image tokens that routed prompts have; None without an image, or for a model without routes
    (`sides` None)."""
    slots = [slot for prompt in prompts for slot in prompt.slots]
    if sides is None or not slots:
        return None
    return sum(slot.count for slot in slots) / sum(slot.tiles * sides[0] ** 2 for slot in slots)


def routed(prompt: Prompt, routes: Sequence[Sequence[bool]], sides: tuple[int, int]) -> Prompt:
    """A prompt whose images have, by the route of each, fewer tokens for the tiles that are compressed. `sides`: tokens
    along a side of a tile, and of one that is compressed; they are recorded in the slots. `engine_ids` have one
    placeholder for each image and stay as they are."""
    ids: list[int] = []
    slots: list[ImageSlot] = []
    begin = 0
    for slot, route in zip(prompt.slots, routes, strict=True):
        assert len(route) == slot.tiles, f"{len(route)} routes for {slot.tiles} tiles"
        assert slot.sides == (sides[0],) * slot.tiles, "the prompt is routed already"
        ids += prompt.token_ids[begin : slot.position]
        chosen = tuple(sides[bool(is_compressed)] for is_compressed in route)
        count = sum(side**2 for side in chosen)
        slots.append(replace(slot, position=len(ids), count=count, sides=chosen))
        ids += prompt.token_ids[slot.position : slot.position + count]
        begin = slot.position + slot.count
    ids += prompt.token_ids[begin:]
    return replace(prompt, token_ids=tuple(ids), slots=tuple(slots))
