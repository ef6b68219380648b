"""Weights on their way from the ranks that train to engines in other processes: packets of whole tensors, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from foveate.errors import DataError
from foveate.models.lora import plain_name
from foveate.models.policy import DTYPES
from foveate.parallel.fsdp import full_tensor
from foveate.rollout.server.adapters import SeparateAdapters, all_adapters
from foveate.rollout.server.launch import dtype_name
from foveate.rollout.server.weights import frozen_weights, plan_buckets, served_weights

PACKET = 256 << 20
"""Bytes of a packet, unless a single tensor is larger."""
PacketForm = Literal["merged", "separate", "changing"]
"""Weights with adapters merged into them, or beside them; or of the latter, what training changes."""


@dataclass(frozen=True, slots=True)
class Packet:
    """Tensors as (name, dtype, shape, offset) in `data`, uint8 (bytes,), which travels without being copied."""

    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    data: np.ndarray

    def unpacked(self) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, offset in self.tensors:
            size = DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
            yield name, torch.tensor(self.data[offset : offset + size]).view(DTYPES[dtype]).view(shape)


class Outgoing:
    """Hands out the weights of a model. Ranks over which it is cut do so together, and only one that `keeps` gets
    packets."""

    def __init__(self, model: nn.Module, *, keeps: bool = True, limit: int = PACKET) -> None:
        self._model, self._keeps, self._limit = model, keeps, limit
        self._packets: Iterator[Packet | None] = iter(())

    def packet(self, first: bool, form: PacketForm = "separate") -> Packet | None:
        """The next one, the `first` again where asked; None behind the last, and always where nothing is kept."""
        if first:
            self._packets = self._all(form)
        return next(self._packets, None)

    @torch.no_grad()
    def _all(self, form: PacketForm) -> Iterator[Packet | None]:
        adapters = None if form == "merged" else all_adapters(self._model)
        frozen = frozen_weights(self._model, adapters) if adapters is not None and form == "separate" else ()
        for bucket in plan_buckets(chain(frozen, served_weights(self._model, adapters)), self._limit):
            data = torch.empty(bucket.size if self._keeps else 0, dtype=torch.uint8)
            for _, tensor, offset in bucket.tensors:
                gathered, end = full_tensor(tensor), offset + tensor.numel() * tensor.element_size()
                if self._keeps:
                    data[offset:end].view(tensor.dtype).view(tensor.shape).copy_(gathered)
            places = ((name, dtype_name(tensor), tuple(tensor.shape), at) for name, tensor, at in bucket.tensors)
            yield Packet(tuple(places), data.numpy()) if self._keeps else None


class Incoming:
    """Copies packets into a model, whose tensors keep their places; with `adapters`, the first packets hold all, the
    others what changes."""

    def __init__(self, model: nn.Module, adapters: SeparateAdapters | None = None) -> None:
        self._there = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
        self._expected = {plain_name(name) for name, _ in model.named_parameters()}
        self._changing = self._expected if adapters is None else adapters.changing
        self._taken: set[str] = set()

    @torch.no_grad()
    def take(self, packet: Packet) -> None:
        """Raises DataError where the model has no such tensor."""
        for name, tensor in packet.unpacked():
            there = self._there.get(name)
            if there is None or there.shape != tensor.shape:
                wanted = "none of that name" if there is None else f"{tuple(there.shape)}"
                raise DataError(
                    f"published weights: {name} has shape {tuple(tensor.shape)}, the engine's model {wanted}"
                )
            there.copy_(tensor)
            self._taken.add(name)

    def finish(self) -> None:
        """Raises DataError where a parameter has not come since the last time."""
        missing = sorted(self._expected - self._taken)
        self._taken, self._expected = set(), self._changing
        if missing:
            raise DataError(f"published weights lack {missing[0]}, and {len(missing) - 1} more")
