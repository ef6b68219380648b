"""The place of a process among those that train one model together."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from foveate.config.cluster import ClusterSettings
from foveate.parallel.fsdp import mesh_of


@dataclass(frozen=True, slots=True)
class Ranks:
    """mesh: over which weights are cut and copied; sequence: the ranks that share each row with this one, if any;
    saving: all ranks, by a group of its own, so that a checkpoint is written while they train."""

    cluster: ClusterSettings
    mesh: DeviceMesh
    sequence: dist.ProcessGroup | None
    saving: dist.ProcessGroup

    @classmethod
    def of(cls, cluster: ClusterSettings) -> Ranks:
        """Called on every rank, in a process group that is as large as the cluster."""
        assert dist.get_world_size() == cluster.ranks
        sequence = None
        if cluster.sequence_parallel > 1:
            shape = (cluster.ranks // cluster.sequence_parallel, cluster.sequence_parallel)
            rows = init_device_mesh(cluster.kind, shape, mesh_dim_names=("data", "sequence"))
            sequence = rows["sequence"].get_group()
        saving = dist.new_group(backend="gloo", timeout=timedelta(seconds=cluster.timeout))
        assert isinstance(saving, dist.ProcessGroup)
        return cls(cluster, mesh_of(cluster, cluster.kind), sequence, saving)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The values of all ranks, on every rank."""
        values: list[Any] = [None] * self.cluster.ranks
        dist.all_gather_object(values, value, group)
        return values

    def most(self, count: int) -> int:
        """The largest count of any rank."""
        tensor = torch.tensor(count, device=self.cluster.kind)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)
