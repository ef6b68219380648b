"""GPUs by their data sheets, and the share of it that training gets. Other hardware is one more row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from foveate.errors import ConfigError
from foveate.registry import suggestion

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory in GiB; flops: dense bfloat16 per second; the rest in bytes per second: its own memory, to the next GPU of
    the machine (one direction), to another machine, to host memory."""

    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float


GPUS = {
    "A100-40": Gpu(40, 312e12, 1.56e12, 300e9, 25e9, 25e9),
    "A100-80": Gpu(80, 312e12, 2.04e12, 300e9, 25e9, 25e9),
    "H20-96": Gpu(96, 148e12, 4.0e12, 450e9, 50e9, 50e9),
    "H100-80": Gpu(80, 989e12, 3.35e12, 450e9, 50e9, 50e9),
    "H200-141": Gpu(141, 989e12, 4.8e12, 450e9, 50e9, 50e9),
    "B200-180": Gpu(180, 2250e12, 8.0e12, 900e9, 50e9, 50e9),
    "MI300X-192": Gpu(192, 1307e12, 5.3e12, 448e9, 50e9, 50e9),
    "L40S-48": Gpu(48, 362e12, 0.864e12, 25e9, 12.5e9, 25e9),
    "RTX4090-24": Gpu(24, 165e12, 1.01e12, 25e9, 3e9, 25e9),
}

FLOPS_SHARE, BANDWIDTH_SHARE, USABLE = 0.4, 0.6, 0.94
"""Assumed shares of the data sheet: arithmetic in training, any bandwidth, and memory that the allocator can fill."""
HOST_BANDWIDTH, HOST_MEMORY = 25e9, 256 * GIB
"""Assumed for each GPU: bytes per second at which the host's processor updates weights, and host memory."""


@dataclass(frozen=True, slots=True)
class Machines:
    """`nodes` machines of `per_node` GPUs."""

    nodes: int
    per_node: int
    name: str
    gpu: Gpu

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @property
    def usable(self) -> float:
        """Bytes of one GPU that can be filled."""
        return self.gpu.memory * GIB * USABLE

    def reach(self, ranks: int) -> float:
        """Bytes per second between `ranks` neighbouring GPUs."""
        return BANDWIDTH_SHARE * (self.gpu.link if ranks <= self.per_node else self.gpu.network)


def parse_machines(text: str) -> Machines:
    """`H100-80`, `8xH100-80` or `2x8xH100-80` (machines x GPUs x kind). Raises ConfigError that lists what is known."""
    *counts, name = re.split(r"x(?=[0-9]|[A-Za-z])", text) if re.match(r"[0-9]+x", text) else [text]
    if len(counts) > 2 or not all(re.fullmatch(r"0*[1-9][0-9]{0,4}", count) for count in counts):
        raise ConfigError(
            f"--gpus {text}: must be GPU, 8xGPU or 2x8xGPU (machines x GPUs x kind, at most 99,999), such as 8xH100-80"
        )
    if name not in GPUS:
        known = ", ".join(GPUS)
        raise ConfigError(
            f"--gpus {text}: unknown GPU {name!r}{suggestion(name, list(GPUS), then='known')} are {known}"
        )
    nodes, per_node = ([1, 1, *map(int, counts)])[-2:]
    return Machines(nodes, per_node, name, GPUS[name])
