"""Muon for the matrices of blocks, AdamW for embeddings, head, norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from foveate.config.train import OptimSettings
from foveate.parallel.fsdp import full_tensor
from foveate.registry import Positive
from foveate.train.optim import OptimizerSpec, adamw_state, decay_groups, implementation


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, but for the groups with a `momentum`, whose matrices take the step of torch's Muon."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            if "momentum" in group:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._step_of_matrix(weight, group)
                        weight.grad = None  # AdamW leaves it alone
        super().step()

    def _step_of_matrix(self, weight: Tensor, group: dict[str, Any]) -> None:
        """If the matrix is sharded over ranks, each of them computes the step of the whole, and keeps its shard: an
        orthogonal update depends on all of the matrix."""
        momentum = self.state[weight]["momentum_buffer"]
        assert weight.grad is not None
        whole, whole_momentum = nn.Parameter(full_tensor(weight)), full_tensor(momentum)
        whole.grad = full_tensor(weight.grad)
        muon = torch.optim.Muon([{"params": [whole], **{name: group[name] for name in _OF_MUON}}])
        muon.state[whole]["momentum_buffer"] = whole_momentum
        muon.step()
        for shard, tensor in ((weight, whole.detach()), (momentum, whole_momentum)):
            if isinstance(shard, DTensor):
                placed = distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)
                shard.to_local().copy_(placed.to_local())


_OF_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")


def muon(
    named: Mapping[str, Tensor],
    optim: OptimSettings,
    *,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    nesterov: bool = True,
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5,
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    lr_scale: Positive = 1.0,
) -> torch.optim.Optimizer:
    """torch's Muon (Jordan 2024; arXiv 2502.16982), with AdamW beside it.

    momentum, nesterov: of the gradient; ns_steps: Newton-Schulz iterations that make it orthogonal; adjust_lr: how the
    size of a matrix scales its step, by default so that the learning rate and weight decay of AdamW serve it as well;
    lr_scale: its learning rate over `optim.lr`.
    """
    matrices = {name: p for name, p in named.items() if p.ndim == 2 and is_in_block(name)}
    groups = decay_groups([p for name, p in named.items() if name not in matrices], optim)
    if matrices:
        rules = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr}
        decay = {"weight_decay": optim.weight_decay, "lr_scale": lr_scale}
        groups.insert(0, {"params": [*matrices.values()], **decay, **rules})
    return MuonWithAdamW(groups, lr=optim.lr, betas=optim.betas, **implementation(named.values()))


def is_in_block(name: str) -> bool:
    """Whether a parameter lies in one of a list of modules, as those of blocks do (`layers.3.mlp.up_proj.weight`)."""
    return any(part.isdigit() for part in name.split("."))


def muon_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The momentum of a matrix, with the counter that AdamW looks for when it loads a state; else AdamW's state."""
    if "momentum" in group:
        return {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
    return adamw_state(optimizer, group, parameter)


MUON = OptimizerSpec(muon, muon_state)
