"""A step of sampling recorded once and replayed, with CUDA graphs: one launch in the place of some two thousand, which
take a processor longer to ask for than a GPU to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models.policy import Policy

Step = Callable[[Tensor, Tensor], Tensor]
"""Token ids and positions (B,) -> hidden states (B, D)."""
Record = Callable[[Step, Tensor, Tensor], Step]
"""A step, and what it is first given -> the step as it was recorded with that: the same on whatever tensors hold by
then."""


def recorder(policy: Policy) -> Record | None:
    """The recorder of a policy's steps; None on CPUs, and where a step cannot be recorded."""
    return record if policy.device.type == "cuda" and is_recordable(policy.model) else None


def is_recordable(model: Any) -> bool:
    """Whether a step is the same operations whatever it computes: not of mixtures, whose experts wait for what the
    router says, and not with rotations that depend on the longest position. Nor with dropout: while one thread records,
    CUDA gives no random numbers to another, which may be training."""
    rotations = str(model.config.get_text_config().rope_parameters)  # of each kind of layers, in some models
    return not (
        any(name.endswith(".experts") for name, _ in model.named_modules())
        or any(kind in rotations for kind in ("dynamic", "longrope"))
        or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    )


def record(step: Step, last_B: Tensor, position_B: Tensor) -> Step:
    """`step` as a CUDA graph. It is run before, so that what is made at its first call is not made while recording."""
    given = last_B.clone(), position_B.clone()
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(*given)
        graph.capture_begin(capture_error_mode="thread_local")  # another thread may be training
        try:
            hidden = step(*given)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(aside)

    def replay(last_B: Tensor, position_B: Tensor) -> Tensor:
        for place, new in zip(given, (last_B, position_B), strict=True):
            place.copy_(new)
        graph.replay()
        return hidden

    return replay
