"""The cluster seam: workers on one or more ranks, called by the name of a method."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from foveate.cluster.commands import bind_to_loopback, has_token, keep_priority, use_token
from foveate.cluster.local import LocalWorkers
from foveate.config.cluster import ClusterSettings
from foveate.parallel.balance import balance
from foveate.registry import resolve

T = TypeVar("T")
REMOTE = {
    "ray": "foveate.cluster.ray:RayWorkers",
    "engines": "foveate.cluster.ray:RayHosts",
    "job": "foveate.cluster.ray:follow_job",
    "stop": "foveate.cluster.ray:stop_job",
}
"""What needs ray, which is imported only where it is asked for."""

STARTUP_TIMEOUT_S = 120.0
"""Seconds in which the machines of a run have to be there when it starts."""


class WorkerGroup(Protocol):
    """Workers, one per rank. `row`: how many neighbouring ranks share each row of tokens, and so their arguments."""

    size: int
    row: int

    def call(self, method: str, per_rank_arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run `method` on every rank with its own arguments; results in the order of ranks."""
        ...


@contextmanager
def start_workers(cluster: ClusterSettings, build: Callable[[], Any], *, again: bool = False) -> Iterator[WorkerGroup]:
    """The workers of a run, each made by `build` in its own place: in this process where there is one rank. `again`:
    after a loss, when machines may need until `cluster.timeout` to come back."""
    if cluster.ranks == 1:
        yield LocalWorkers(build())
        return
    with ray_backend(cluster, "ray")(cluster, build, startup_timeout(cluster, again)) as workers:
        yield workers


def ray_backend(cluster: ClusterSettings, name: str) -> Any:
    """An entry of REMOTE, for a run on `cluster`."""
    keep_priority()
    if cluster.nodes == 1 and "RAY_ADDRESS" not in os.environ:
        bind_to_loopback()
    elif has_token():
        use_token()
    return resolve(REMOTE, name, "cluster")


def startup_timeout(cluster: ClusterSettings, again: bool) -> float:
    """Seconds in which the machines of a run have to be there."""
    return max(STARTUP_TIMEOUT_S, cluster.timeout) if again else STARTUP_TIMEOUT_S


def broadcast(workers: WorkerGroup, method: str, *arguments: Any) -> list[Any]:
    """The same call on every rank."""
    return workers.call(method, [arguments] * workers.size)


def scatter(
    workers: WorkerGroup, method: str, items: Sequence[T], costs: Sequence[float], *rest: Any, row: int | None = None
) -> Iterator[tuple[list[int], Any]]:
    """Call `method` with `items` dealt out by their costs, and with `rest`. Yields, for each share, the indices of its
    items and the result. `row` neighbouring ranks get the same share (None: those that share a row of tokens)."""
    row = workers.row if row is None else row
    shares = balance(costs, workers.size // row)
    arguments = [([items[i] for i in share], *rest) for share in shares]
    results = workers.call(method, [own for own in arguments for _ in range(row)])
    yield from zip(shares, results[::row], strict=True)


def scatter_gather(
    workers: WorkerGroup, method: str, items: Sequence[T], costs: Sequence[float], *rest: Any, row: int | None = None
) -> list[Any]:
    """`scatter` where a result has one entry per item: the entries in the order of the items."""
    found = {
        i: one
        for share, own in scatter(workers, method, items, costs, *rest, row=row)
        for i, one in zip(share, own, strict=True)
    }
    return [found[i] for i in range(len(items))]
