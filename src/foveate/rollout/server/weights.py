"""Weights from the trainer to the workers of a server: buckets of whole tensors, broadcast, each with a checksum.

The trainer is rank 0 of a small process group of its own, apart from any that trains. Gloo carries it between CPUs,
NCCL between GPUs. The other end is in the server: `foveate.rollout.vllm.plugin`, or SGLang's own.
"""

from __future__ import annotations

import pickle
import threading
from base64 import b64encode
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.multiprocessing.reductions import reduce_tensor

from foveate.models.lora import adapted_layers, merged_state
from foveate.models.quantize import quantized_layers
from foveate.rollout.server.adapters import SeparateAdapters

TRANSFER_S = 600.0
"""Patience of both ends of a transfer, in seconds; a server that dies breaks it off at once."""
ALIGNMENT = 16
"""Tensors start at multiples of it, so that every dtype can be viewed in place."""
_MEETING = timedelta(seconds=120)
"""Patience while a group forms: a worker that dies just then is waited for."""
TRANSFER_S = 600.0
"""Patience of both ends of a transfer of weights, in seconds; a server that dies breaks it off at once."""
TRAILER = 16
"""Bytes behind the tensors of a bucket: the sum of all before as 64-bit integers, and the number of the bucket."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together: (name, tensor, offset in bytes), and the size of the whole in bytes."""

    tensors: tuple[tuple[str, Tensor, int], ...]
    size: int

    @property
    def alone(self) -> bool:
        """Whether it is one tensor and nothing else: it travels from where it is, its trailer in a message of its own.
        Receivers tell by the same rule."""
        tensor = self.tensors[0][1]
        return len(self.tensors) == 1 and tensor.numel() * tensor.element_size() == self.size


def served_weights(model: nn.Module, adapters: SeparateAdapters | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights that a server needs of a model at each publish: its parameters, adapters merged into them and
    quantised ones in full, a tied head once, as the embedding; or those that change, beside adapters that are not
    merged. Nothing is computed before the first is asked for."""
    if adapters is not None:
        yield from _state(model, adapters.layers, adapters.changing.__contains__)
    elif not adapted_layers(model) and not quantized_layers(model):
        yield from model.named_parameters()
    else:
        yield from _state(model)


def frozen_weights(model: nn.Module, adapters: SeparateAdapters) -> Iterator[tuple[str, Tensor]]:
    """The weights that a server needs once, beside those of `served_weights`."""
    yield from _state(model, adapters.layers, lambda name: name not in adapters.changing)


def _state(model: nn.Module, apart: Container[str] = (), only: Callable[[str], bool] | None = None) -> Any:
    names = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return ((name, one) for name, one in merged_state(model, apart=apart, only=only).items() if name not in again)


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
def pack_bucket(flat: Tensor, bucket: Bucket, number: int) -> Tensor:
    """Write a bucket and its trailer into `flat`, uint8 (size + TRAILER,) on the device of the tensors."""
    end = 0
    for _, tensor, offset in bucket.tensors:
        size = tensor.numel() * tensor.element_size()
        flat[end:offset] = 0
        end = offset + size
        flat[offset:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    flat[end:-TRAILER] = 0
    flat[-TRAILER:] = trailer(flat[:-TRAILER], number)
    return flat


def trailer(data: Tensor, number: int) -> Tensor:
    """The trailer behind the bytes of a bucket, uint8 (TRAILER,). The sum wraps around; any single changed bit changes
    it."""
    words = torch.empty(2, dtype=torch.int64, device=data.device)
    words[0], words[1] = data.view(torch.int64).sum(), number
    return words.view(torch.uint8)


@torch.no_grad()
def messages(buckets: Sequence[Bucket], device: torch.device) -> Iterator[Tensor]:
    """The tensors to broadcast, in order, made when they are asked for. Two buffers serve all buckets that are packed:
    a message may be under way while the next is made, and not longer."""
    packed = [bucket.size + TRAILER for bucket in buckets if not bucket.alone]
    buffers = [torch.empty(max(packed), dtype=torch.uint8, device=device) for _ in packed[:2]]
    for number, bucket in enumerate(buckets):
        if bucket.alone:
            data = bucket.tensors[0][1].to(device).contiguous().reshape(-1).view(torch.uint8)
            yield data
            yield trailer(data, number)
        else:
            buffers.reverse()
            yield pack_bucket(buffers[0][: bucket.size + TRAILER], bucket, number)


@torch.no_grad()
def handles(buckets: Sequence[Bucket], device: torch.device) -> Iterator[tuple[Bucket, str]]:
    """Each bucket with what another process finds it by on the same GPU, as base64 (CUDA IPC). It has been read when
    the next one is asked for: all are packed into the same memory."""
    room = torch.empty(max(bucket.size for bucket in buckets) + TRAILER, dtype=torch.uint8, device=device)
    for number, bucket in enumerate(buckets):
        packed = pack_bucket(room[: bucket.size + TRAILER], bucket, number)
        torch.cuda.synchronize(device)
        yield bucket, b64encode(pickle.dumps(reduce_tensor(packed)[1])).decode()


class Sender:
    """Rank 0 of a group with the workers of one server. Workers find it at `host` and `port`.

    Weights travel from `device`: by NCCL from a GPU, by gloo from host memory, also to servers on GPUs
    (`foveate.rollout.server.launch.sent_from`).
    """

    def __init__(self, host: str, world_size: int, device: torch.device, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self.device, self._group = device, None
        self.host, self.port, self.world_size = host, self._store.port, world_size
        self.backend = "nccl" if device.type == "cuda" else "gloo"

    def connect(self, *prefixes: str) -> None:
        """Returns when every worker has joined, by a store with these prefixes, the outermost last."""
        store: Any = self._store
        for prefix in prefixes:
            store = PrefixStore(prefix, store)
        group: Any
        if self.backend == "nccl":
            from torch.distributed import ProcessGroupNCCL

            group = ProcessGroupNCCL(store, 0, self.world_size, ProcessGroupNCCL.Options())
        else:
            group = ProcessGroupGloo(store, 0, self.world_size, _MEETING)
            group._set_default_timeout(self._timeout)
        self._group = group

    def close(self) -> None:
        """Leave the group."""
        self._group = None

    def send(self, buckets: Sequence[Bucket]) -> None:
        """Broadcast every bucket with its trailer; the next one is filled while one is under way."""
        self.broadcast(messages(buckets, self.device))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Send every tensor, contiguous ones, in order. The next is asked for while one is under way, and the one after
        that when it has gone."""
        assert self._group is not None, "connect comes first"
        under_way: tuple[Any, Tensor] | None = None
        for tensor in tensors:
            work = self._group.broadcast(tensor, 0)
            if under_way is not None:
                under_way[0].wait()
            under_way = work, tensor
        if under_way is not None:
            under_way[0].wait()


class WeightsFile:
    """The weights of one version in a folder with a single file, written once for all servers; all of them, and those
    that change beside adapters, in a folder each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._versions, self._lock = folder, dict[int, int](), threading.Lock()

    def write(self, version: int, weights: Collection[tuple[str, Tensor]]) -> Path:
        """The folder; `weights` go by the names that the servers know."""
        folder = self._folder / str(len(weights))
        with self._lock:
            if self._versions.get(len(weights)) != version:
                folder.mkdir(parents=True, exist_ok=True)
                new = folder / "new"
                save_file({name: tensor.detach().contiguous() for name, tensor in weights}, new)
                new.replace(folder / "model.safetensors")
                self._versions[len(weights)] = version
        return folder
