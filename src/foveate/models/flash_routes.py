"""Prompts of a Flash model as its router wants them: the route is computed once, and stands in the slots then."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from foveate.encoding.encode import Encoder
from foveate.encoding.routes import routed
from foveate.models.flash import route_of
from foveate.models.forward import evaluating
from foveate.models.policy import Policy
from foveate.records import Prompt


def routed_prompt(policy: Policy, prompt: Prompt) -> Prompt:
    """A prompt with images as it was encoded, with the tiles compressed that the router of the policy chooses."""
    family = policy.family
    assert family.sides is not None
    assert family.router_thresholds is not None
    assert prompt.pixels is not None
    with evaluating(policy.model):
        chosen = iter(route_of(policy.model, prompt.pixels, family.router_thresholds))
    return routed(prompt, [[next(chosen) for _ in range(slot.tiles)] for slot in prompt.slots], family.sides)


def with_router(encoder: Encoder, policy: Policy) -> Encoder:
    """An encoder whose prompts are routed by a policy, whose weights stay as they are; itself for one without router.
    Observations within an answer have all their tokens."""
    return encoder if policy.family.sides is None else replace(encoder, route=partial(routed_prompt, policy))
