"""Prompts of a Flash model as its router wants them: the route is computed once, and stands in the slots then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from foveate.encoding.encode import Encoder
from foveate.encoding.routes import routed
from foveate.errors import ConfigError
from foveate.models.flash import route_of
from foveate.models.forward import evaluating
from foveate.models.policy import Policy
from foveate.records import Prompt

Tiles = Literal["routed", "whole", "compressed"]
"""Which tiles of a prompt are compressed: those that the router chooses, none, or all."""


def routed_prompts(policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts with images as they were encoded, with the tiles compressed that the router of the policy chooses."""
    family = policy.family
    assert family.sides is not None
    assert family.router_thresholds is not None
    found = []
    for prompt in prompts:
        assert prompt.pixels is not None
        with evaluating(policy.model):
            chosen = iter(route_of(policy.model, prompt.pixels, family.router_thresholds))
        found.append(routed(prompt, [[next(chosen) for _ in range(slot.tiles)] for slot in prompt.slots], family.sides))
    return found


def with_router(encoder: Encoder, policy: Policy, tiles: Tiles = "routed") -> Encoder:
    """An encoder whose prompts are routed by a policy, whose weights stay as they are, or have all of their tiles
    `whole` or `compressed`; itself for one without router. Observations within an answer have all their tokens. Raises
    ConfigError for `tiles` that such a model does not have."""
    sides = policy.family.sides
    if sides is None and tiles != "routed":
        raise ConfigError(f"--tiles {tiles}: {policy.family.name} at {policy.folder} compresses none; leave it out")
    if sides is None or tiles == "whole":
        return encoder
    return replace(
        encoder, route=partial(routed_prompts, policy) if tiles == "routed" else partial(_compressed_prompts, sides)
    )


def _compressed_prompts(sides: tuple[int, int], prompts: Sequence[Prompt]) -> list[Prompt]:
    return [routed(prompt, [[True] * slot.tiles for slot in prompt.slots], sides) for prompt in prompts]
