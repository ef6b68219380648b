"""A plan: memory and time of a recipe, the largest micro-batch, what to change where it does not fit, and whether the
sharding really builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from foveate.config.cluster import ClusterSettings
from foveate.errors import ConfigError
from foveate.parallel.fsdp import LogProbs, mesh_of, shard
from foveate.plan.hardware import Machines
from foveate.plan.memory import Memory, memory_of
from foveate.plan.time import Seconds, seconds_of
from foveate.plan.trace import traced_policy
from foveate.plan.workload import Workload
from foveate.train.optim import check_optimizer

_TRACED = 1 << 15
"""Tokens of the longest row that is traced for more than a micro-batch; the line goes on from there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`machines` are all of them, the `trainers` those of the ranks. `largest`: tokens per device that still fit, 0 if
    none do. `better`: the fastest neighbouring settings that fit, None if these fit or none do. `rank_share`: the
    largest part of the weights on a rank over the mean."""

    work: Workload
    machines: Machines
    trainers: Machines
    memory: Memory
    seconds: Seconds
    largest: int
    better: Workload | None
    rank_share: float

    @property
    def gpu_hours(self) -> float:
        return self.seconds.step * self.work.steps * self.machines.count / 3600


def plan(work: Workload, machines: Machines) -> Plan:
    """The plan of a recipe on `machines`, which stand in the place of those that it names."""
    work = replace(work, cluster=on_machines(work.cluster, machines))
    check_optimizer(work.optim, work.cluster)
    trainers = replace(machines, nodes=work.cluster.nodes, per_node=work.cluster.gpus_per_node)
    memory = memory_of(work)
    better = None if memory.fits(machines) else next(_better(work, trainers), None)
    return Plan(
        work, machines, trainers, memory, seconds_of(work, trainers, memory), _largest(work, machines, memory), better,
        built_share(work),
    )  # fmt: skip


def on_machines(cluster: ClusterSettings, machines: Machines) -> ClusterSettings:
    """The settings on these machines: engines in processes of their own keep their GPUs, ranks get the others. Raises
    ConfigError where these are not equally many on each machine."""
    if cluster.gpus == machines.count and cluster.engines:
        return cluster
    rest = machines.count - cluster.engines * cluster.engine_tensor_parallel
    per_node = rest // machines.nodes
    if rest <= 0 or rest % machines.nodes:
        raise ConfigError(
            f"--gpus {machines.nodes}x{machines.per_node}x{machines.name}: cluster.engines={cluster.engines} with "
            f"cluster.engine_tensor_parallel={cluster.engine_tensor_parallel} leaves {rest} GPUs to train on, which "
            f"must be at least 1 and equally many on each of {machines.nodes} machines"
        )
    values = {**cluster.model_dump(), "nodes": machines.nodes, "gpus_per_node": per_node}
    row = values["sequence_parallel"]
    values["sequence_parallel"] = next(n for n in range(row, 0, -1) if per_node % n == 0)
    return ClusterSettings.model_validate(values)


def _largest(work: Workload, machines: Machines, memory: Memory) -> int:
    """On the line through the memory of this micro-batch and of one half as long. Where more fit than this one, on the
    line to the memory of that length: a longer one computes its logits in more chunks, not in larger ones."""
    half = max(2, work.budget // 2)
    found = _on_the_line(work.budget, memory.training, half, memory_of(replace(work, budget=half)).training, machines)
    if found <= work.budget:
        return found
    at = min(found, max(_TRACED, 2 * work.budget))
    further = memory_of(replace(work, budget=at)).training
    return _on_the_line(at, further, work.budget, memory.training, machines)


def _on_the_line(tokens: int, bytes_: float, fewer: int, less: float, machines: Machines) -> int:
    slope = (bytes_ - less) / max(1, tokens - fewer)
    room = machines.usable - bytes_
    if slope <= 0:
        return tokens if room >= 0 else 0
    return max(0, int(tokens + room / slope))


def _better(work: Workload, machines: Machines) -> Iterator[Workload]:
    """Settings that fit, the fastest first. A micro-batch keeps the length that its longest row needs, and engines in
    processes of their own their GPUs."""
    per_node = machines.per_node
    split = [n for n in (1, 2, 4, 8, 16) if per_node % n == 0]
    answering = work.cluster.engines * work.cluster.engine_tensor_parallel
    joined = [n for n in (1, 2, 4, 8, 16) if n >= work.cluster.engine_tensor_parallel and answering % n == 0]
    joined = joined if answering else [1]
    shards = ("full", "hybrid") if machines.nodes > 1 else ("full",)
    found = []
    row = work.budget * work.cluster.sequence_parallel
    for shard_over, again, offload, parts, tensor in product(shards, (False, True), (False, True), split, joined):
        changed = {
            "shard": shard_over, "offload": offload, "sequence_parallel": parts, "engine_tensor_parallel": tensor,
            "engines": answering // tensor,
        }  # fmt: skip
        cluster = ClusterSettings.model_validate({**work.cluster.model_dump(), **changed})
        other = replace(work, cluster=cluster, checkpointing=again, budget=-(-row // parts))
        memory = memory_of(other)
        if memory.fits(machines):
            found.append((seconds_of(other, machines, memory).step, len(found), other))
    yield from (other for *_, other in sorted(found, key=lambda item: item[:2]))


def built_share(work: Workload) -> float:
    """Builds the sharded model for all ranks on the meta device, over a process group that only counts. Returns the
    weights of the first rank over the mean; above 1 where something does not divide evenly."""
    if work.cluster.ranks == 1:
        return 1.0
    policy = traced_policy(work.config, work.dtype, "auto")
    dist.init_process_group("fake", rank=0, world_size=work.cluster.ranks, store=FakeStore())
    try:
        shard(LogProbs(policy), mesh_of(work.cluster, "cpu"), work.cluster, checkpointing=work.checkpointing)
        weights: list[Any] = [*policy.model.parameters()]
        own = sum(weight.to_local().numel() for weight in weights)
        return own * work.cluster.shards / sum(weight.numel() for weight in weights)
    finally:
        dist.destroy_process_group()
