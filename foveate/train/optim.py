"""AdamW, its learning-rate schedule, and one careful optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from foveate.config_parts import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that train. Matrices decay; biases, norms and other vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, foreach=True
    )


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The learning rate of step `step` of 1 .. `steps`: a linear rise over the warm-up steps, then the schedule."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps - 1) / max(1, steps - settings.warmup_steps)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.lr * share[settings.schedule]


def apply_gradients(optimizer: torch.optim.AdamW, lr: float, max_grad_norm: float) -> tuple[float, bool]:
    """Clip the global gradient norm, step with learning rate `lr`, and clear the gradients.

    Returns the norm before clipping and whether the step was taken: gradients that are not finite are thrown away, and
    the optimizer's state stays as it was.
    """
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    total = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    finite = math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
