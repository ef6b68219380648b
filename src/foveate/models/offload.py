"""Activations that rest in host memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from foveate.config.model import ModelSettings
from foveate.errors import ConfigError


def kept_activations(model: ModelSettings, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A function that makes the context of each forward pass that a backward pass follows. Raises ConfigError on a CPU,
    where nothing could be moved."""
    if model.offload_activations and device.type == "cpu":
        raise ConfigError(
            "model.offload_activations is true, but there is no GPU here, and activations of a CPU are in host memory: "
            "leave it out"
        )
    return HostActivations if model.offload_activations else nullcontext


class HostActivations(saved_tensors_hooks):
    """A context for a forward pass: what autograd keeps of it, parameters aside, is copied to pinned host memory, and
    back when the backward pass asks. With gradient checkpointing that is the input of each block.

    Tensors of a CPU stay where they are; those of the meta device are dropped and made anew, for plans."""

    def __init__(self) -> None:
        super().__init__(_to_host, _from_host)


def _to_host(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
    if isinstance(tensor, nn.Parameter) or tensor.device.type == "cpu":
        return tensor
    size, stride, dtype, device = tensor.size(), tensor.stride(), tensor.dtype, tensor.device
    if tensor.is_meta:
        return lambda: torch.empty_strided(size, stride, dtype=dtype, device=device)
    host = torch.empty(size, dtype=dtype, pin_memory=torch.cuda.is_available())
    host.copy_(tensor)
    return lambda: host.to(device, non_blocking=True)


def _from_host(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
