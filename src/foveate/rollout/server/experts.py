"""Which experts of a mixture the tokens of answers were computed with, as servers tell it.

For Rollout Routing Replay (R3), arXiv 2510.11370.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from foveate.errors import EngineError
from foveate.models.policy import Policy
from foveate.models.routing import router_layers
from foveate.records import Answer, Prompt
from foveate.rollout.native.tables import with_experts


def told_layers(policy: Policy, record_experts: bool) -> list[int]:
    """The layers whose experts are asked for, as `router_layers`; none where they are not recorded."""
    return router_layers(policy.model, "record_experts") if record_experts else []


def with_told_experts(
    prompt: Prompt, answers: Sequence[Answer], told: Sequence[np.ndarray | None]
) -> tuple[Answer, ...]:
    """Answers of one turn with the experts (P + L - 1, layers, experts per token) that a server tells of the prompt and
    of all tokens of the answer but the last; None of an answer that was aborted before its first token. All have the
    first one's of the prompt. Raises EngineError where a server tells of other tokens."""
    found, shared = [], None
    for answer, experts in zip(answers, told, strict=True):
        [segment] = answer.segments
        if not len(segment):
            found.append(answer)
            continue
        rows, wanted = 0 if experts is None else len(experts), len(prompt) + len(answer) - 1
        if experts is None or rows != wanted:
            raise EngineError(f"the server tells the experts of {rows} tokens, not of the {wanted} that it computed")
        own = np.full((len(answer), *experts.shape[1:]), -1, np.int16)
        own[:-1] = experts[len(prompt) :]
        shared = experts[: len(prompt)].astype(np.int16) if shared is None else shared
        found.append(replace(answer, segments=(replace(segment, routed_experts=own),), prompt_experts=shared))
    return tuple(found)


def begun_with(prompt: Prompt, before: Answer, more: Answer) -> Answer:
    """An answer so far, with the experts of what it has none of, as the turn behind it tells them, whose prompt
    (`foveate.rollout.server.turns.extended`) it is part of. A server chooses them anew for all of that prompt; those
    that a token was sampled with stay."""
    if more.prompt_experts is None:
        return before
    first, own = more.prompt_experts[: len(prompt)], more.prompt_experts[len(prompt) :]
    known = with_experts(before, torch.from_numpy(own))
    return replace(known, prompt_experts=first if before.prompt_experts is None else before.prompt_experts)
