"""Weights from the trainer to the workers of a server: buckets of whole tensors, broadcast, each with a checksum.

The trainer is rank 0 of a small process group of its own, apart from any that trains. Gloo carries it between CPUs,
NCCL between GPUs. The other end is in the server: `foveate.rollout.vllm_plugin`, or SGLang's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from foveate.model.lora import merged_state

ALIGNMENT = 16
"""Tensors start at multiples of it, so that every dtype can be viewed in place."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together: (name, tensor, offset in bytes), and the size of the whole in bytes."""

    tensors: tuple[tuple[str, Tensor, int], ...]
    size: int


def served_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a server needs of a model: its parameters, adapters merged into them. Nothing is computed before the first
    is asked for."""
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    yield from merged_state(model).items() if adapted else model.named_parameters()


def plan_buckets(weights: Iterable[tuple[str, Tensor]], limit: int) -> list[Bucket]:
    """Tensors in order, as many to a bucket as fit `limit` bytes; a larger one is a bucket of its own."""
    buckets: list[Bucket] = []
    members: list[tuple[str, Tensor, int]] = []
    size = 0
    for name, tensor in weights:
        needed = -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        if members and size + needed > limit:
            buckets.append(Bucket(tuple(members), size))
            members, size = [], 0
        members.append((name, tensor, size))
        size += needed
    return [*buckets, Bucket(tuple(members), size)] if members else buckets


@torch.no_grad()
def filled(bucket: Bucket) -> Tensor:
    """The bytes of a bucket, uint8 (size,), on the device of its tensors."""
    flat = torch.zeros(bucket.size, dtype=torch.uint8, device=bucket.tensors[0][1].device)
    for _, tensor, offset in bucket.tensors:
        size = tensor.numel() * tensor.element_size()
        flat[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return flat


def checksum(flat: Tensor) -> int:
    """The sum of the bytes as 64-bit integers, which wraps around: any single changed bit changes it."""
    return int(flat.view(torch.int64).sum())


class Sender:
    """Rank 0 of a group with the workers of one server. Workers find it at `host` and `port`."""

    def __init__(self, host: str, world_size: int, device: torch.device, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._device, self._group = device, None
        self.host, self.port, self.world_size = host, self._store.port, world_size

    def connect(self, *prefixes: str) -> None:
        """Returns when every worker has joined, by a store with these prefixes, the outermost last."""
        store: Any = self._store
        for prefix in prefixes:
            store = PrefixStore(prefix, store)
        group: Any
        if self._device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            group = ProcessGroupNCCL(store, 0, self.world_size, ProcessGroupNCCL.Options())
        else:
            group = ProcessGroupGloo(store, 0, self.world_size, self._timeout)
        self._group = group

    def close(self) -> None:
        """Leave the group."""
        self._group = None

    def send(self, buckets: Sequence[Bucket]) -> None:
        """Broadcast every bucket; the next one is filled while one is under way."""
        for flat in self._overlapped(filled(bucket) for bucket in buckets):
            del flat

    def send_each(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensor by tensor, for receivers that take no buckets."""
        for _ in self._overlapped(tensor.detach().contiguous() for tensor in tensors):
            pass

    def _overlapped(self, tensors: Iterator[Tensor]) -> Iterator[Tensor]:
        assert self._group is not None, "connect comes first"
        under_way: tuple[Any, Tensor] | None = None
        for tensor in tensors:
            work = self._group.broadcast(tensor, 0)
            if under_way is not None:
                under_way[0].wait()
                yield under_way[1]
            under_way = work, tensor
        if under_way is not None:
            under_way[0].wait()
            yield under_way[1]
