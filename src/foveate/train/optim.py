"""The table of optimizers, the learning-rate schedule, and one careful optimizer step.

A row of the table is an `OptimizerSpec`: one file with a function that builds a `torch.optim.Optimizer`, and the state
with which it begins. Everything else (checkpoints, plans, learning rates) follows from these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from foveate.config.cluster import ClusterSettings
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.models.policy import Policy, parameters_by_part
from foveate.registry import bind, resolve

OPTIMIZERS: dict[str, str] = {
    "adamw": "foveate.train.optim:ADAMW",
    "adamw8bit": "foveate.train.adamw8bit:ADAMW8BIT",
    "muon": "foveate.train.muon:MUON",
}


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer, as the rest of foveate knows it.

    build: `(parameters by name, OptimSettings, *, settings) -> torch.optim.Optimizer`. Parameter groups may have rules
    of their own, among them `lr_scale`, a factor on the learning rate.
    first_state: `(optimizer, group, parameter) -> state` of a parameter before its first gradient. Its tensors are what
    a checkpoint holds and what a plan counts.
    needs: a package that must be installed. sharded: whether the step is right for weights that are sharded over ranks.
    portable: whether a checkpoint may be resumed on another number of ranks.
    """

    build: Callable[..., torch.optim.Optimizer]
    first_state: Callable[[Any, dict[str, Any], Tensor], dict[str, Any]]
    needs: str = ""
    sharded: bool = True
    portable: bool = True


def optimizer_spec(optim: OptimSettings) -> OptimizerSpec:
    """The row of the table, or the object at the import path. Raises ConfigError for none, and for what it lacks."""
    spec = resolve(OPTIMIZERS, optim.name, "optimizer")
    if not isinstance(spec, OptimizerSpec):
        raise ConfigError(f"optimizer {optim.name} is a {type(spec).__name__}, not a foveate.train.optim.OptimizerSpec")
    if spec.needs and find_spec(spec.needs) is None:
        raise ConfigError(
            f"optim.name={optim.name} needs {spec.needs}, which is not installed; run pip install {spec.needs}, or"
            " choose another optimizer"
        )
    return spec


def check_optimizer(optim: OptimSettings, cluster: ClusterSettings) -> None:
    """Raise ConfigError for an optimizer that is not there, its settings, or ranks that it cannot be sharded over."""
    spec = optimizer_spec(optim)
    _bound(spec, optim)
    if cluster.ranks > 1 and not spec.sharded:
        raise ConfigError(
            f"optim.name={optim.name} cannot train weights that are sharded over {cluster.ranks} ranks; use one rank,"
            " or choose adamw"
        )


def build_optimizer(model: nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of the parameters that train, each with its first state. Its groups count the `updates` taken."""
    spec = optimizer_spec(optim)
    optimizer = _bound(spec, optim)({name: p for name, p in model.named_parameters() if p.requires_grad}, optim)
    for group in optimizer.param_groups:
        group["updates"] = 0
        for parameter in group["params"]:
            optimizer.state[parameter] = spec.first_state(optimizer, group, parameter)
    return optimizer


def _bound(spec: OptimizerSpec, optim: OptimSettings) -> Callable[..., torch.optim.Optimizer]:
    return bind(spec.build, optim.settings, f"optimizer {optim.name}")


def state_bytes(model: nn.Module, optim: OptimSettings) -> int:
    """Bytes of the optimizer's state for a model, which may be on the meta device; counters are not counted."""
    states = build_optimizer(model, optim).state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim)


# ------------------------------------------------------------------------------------------------------------ AdamW


def decay_groups(parameters: Iterable[Tensor], optim: OptimSettings) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; biases, norms and other vectors do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def implementation(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """The kernels of torch's AdamW: on a GPU `foreach` would make temporaries of all parameters."""
    devices = {p.device.type for p in parameters}
    return {"fused": True} if devices == {"cuda"} else {"foreach": True}


def adamw(
    named: Mapping[str, Tensor],
    optim: OptimSettings,
    *,
    eps: Annotated[float, Field(ge=1e-20, allow_inf_nan=False)] = 1e-8,
) -> torch.optim.AdamW:
    """torch's AdamW."""
    groups = decay_groups(named.values(), optim)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=eps, **implementation(named.values()))


def adamw_state(_optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """No step taken, and both moments 0."""
    step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


ADAMW = OptimizerSpec(adamw, adamw_state)


# ------------------------------------------------------------------------------------------------------------ a step


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The learning rate of step `step` of 1 .. `steps`: a linear rise over the warm-up steps, then the schedule."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps - 1) / max(1, steps - settings.warmup_steps)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.lr * share[settings.schedule]


@dataclass(slots=True)
class LossScale:
    """The factor on a loss before its backward pass in float16, whose gradients underflow (arXiv 1710.03740): halved
    after a step with gradients that are not finite, doubled after `patience` steps without."""

    value: float = 2.0**16
    good: int = 0
    patience: int = 2000

    def update(self, taken: bool) -> None:
        self.good = self.good + 1 if taken else 0
        if not taken:
            self.value /= 2
        elif self.good == self.patience:
            self.value, self.good = self.value * 2, 0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step have learning rate `lr`, times the `lr_scale` of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def apply_gradients(
    optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, scale: float = 1.0
) -> tuple[float, bool]:
    """Clip the global gradient norm, step with learning rate `lr`, and clear the gradients. `scale`: the factor on the
    loss.

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
        set_lr(optimizer, lr)
        optimizer.step()
        for group in optimizer.param_groups:
            group["updates"] = group.get("updates", 0) + 1
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def forget_unseen(policy: Policy, sides: frozenset[int]) -> None:
    """Clear what is 0 because nothing went through it: dummy images in a step in which no rank had a real one, and
    projectors without a tile. As in one process, the optimizer leaves alone what was not used, where a gradient of zero
    would go on with the momentum of before. sides: of the tiles of the whole step (`PackedGroup.tile_sides`)."""
    if not sides:
        parts = parameters_by_part(policy)
        unseen = [p for part in parts.keys() - {"language", "head"} for p in parts[part].values()]
    else:
        modules = map(policy.model.get_submodule, policy.family.unseen(sides))
        unseen = [parameter for module in modules for parameter in module.parameters()]
    for parameter in unseen:
        parameter.grad = None
