"""AdamW, its learning-rate schedule, and one careful optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from foveate.config.train import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that train. Matrices decay; biases, norms and other vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    on_gpu = all(p.device.type == "cuda" for p in trained)  # there `foreach` would make temporaries of all parameters
    how = {"fused": True} if on_gpu and trained else {"foreach": True}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, **how
    )


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The learning rate of step `step` of 1 .. `steps`: a linear rise over the warm-up steps, then the schedule."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps - 1) / max(1, steps - settings.warmup_steps)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.lr * share[settings.schedule]


@dataclass(slots=True)
class LossScale:
    """What a loss is multiplied by before its backward pass in float16, whose gradients underflow (arXiv 1710.03740):
    half as much after a step with gradients that are not finite, twice as much after `patience` steps without."""

    value: float = 2.0**16
    good: int = 0
    patience: int = 2000

    def update(self, taken: bool) -> None:
        self.good = self.good + 1 if taken else 0
        if not taken:
            self.value /= 2
        elif self.good == self.patience:
            self.value, self.good = self.value * 2, 0


def apply_gradients(
    optimizer: torch.optim.AdamW, lr: float, max_grad_norm: float, scale: float = 1.0
) -> tuple[float, bool]:
    """Clip the global gradient norm, step with learning rate `lr`, and clear the gradients. `scale`: what the loss was
    multiplied by.

    Returns the norm before clipping and whether the step was taken: gradients that are not finite are thrown away, and
    the optimizer's state stays as it was.
    """
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    if scale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)
    total = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    finite = math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
