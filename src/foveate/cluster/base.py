"""The cluster seam: workers on one or more ranks, and calls of their methods.

A call names the method itself, such as `Worker.update_policy`, so that a type checker sees its arguments and result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Concatenate, Protocol, TypeVar

from foveate.cluster.commands import bind_to_loopback, has_token, keep_priority, use_token
from foveate.cluster.local import LocalWorkers, P, R, W
from foveate.config.cluster import ClusterSettings
from foveate.parallel.balance import balance
from foveate.registry import resolve

W_co = TypeVar("W_co", covariant=True)
T = TypeVar("T")
REMOTE = {
    "ray": "foveate.cluster.ray:RayWorkers",
    "engines": "foveate.cluster.ray:RayEngineProcesses",
    "job": "foveate.cluster.ray:follow_job",
    "stop": "foveate.cluster.ray:stop_job",
}
"""What needs ray, which is imported only where it is asked for."""

STARTUP_TIMEOUT_S = 120.0
"""Seconds in which the machines of a run have to be there when it starts."""


class WorkerGroup(Protocol[W_co]):
    """Workers, one per rank. `row`: how many neighbouring ranks share each row of tokens, and so their arguments."""

    @property
    def size(self) -> int: ...

    @property
    def row(self) -> int: ...

    def call(
        self, method: Callable[Concatenate[W_co, ...], R], per_rank_arguments: Sequence[tuple[Any, ...]]
    ) -> list[R]:
        """Run `method`, an unbound function, on every rank with its own arguments; results in the order of ranks."""
        ...


@contextmanager
def start_workers(cluster: ClusterSettings, build: Callable[[], W], *, again: bool = False) -> Iterator[WorkerGroup[W]]:
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


def broadcast(
    workers: WorkerGroup[W], method: Callable[Concatenate[W, P], R], *arguments: P.args, **keywords: P.kwargs
) -> list[R]:
    """The same call on every rank."""
    return workers.call(_with_keywords(method, keywords), [arguments] * workers.size)


def scatter(
    workers: WorkerGroup[W],
    method: Callable[Concatenate[W, Sequence[T], P], R],
    items: Sequence[T],
    costs: Sequence[float],
    *rest: P.args,
    **keywords: P.kwargs,
) -> Iterator[tuple[list[int], R]]:
    """Call `method` with `items`, balanced by their costs over the ranks, and with `rest`. Yields, for each share, the
    indices of its items and the result. Ranks that share a row of tokens get the same share."""
    row = workers.row
    shares = balance(costs, workers.size // row)
    arguments = [([items[i] for i in share], *rest) for share in shares]
    results = workers.call(_with_keywords(method, keywords), [own for own in arguments for _ in range(row)])
    yield from zip(shares, results[::row], strict=True)


def scatter_gather(
    workers: WorkerGroup[W],
    method: Callable[Concatenate[W, Sequence[T], P], Sequence[R]],
    items: Sequence[T],
    costs: Sequence[float],
    *rest: P.args,
    **keywords: P.kwargs,
) -> list[R]:
    """`scatter` where a result has one entry per item: the entries in the order of the items."""
    found = {
        i: one
        for share, own in scatter(workers, method, items, costs, *rest, **keywords)
        for i, one in zip(share, own, strict=True)
    }
    return [found[i] for i in range(len(items))]


def _with_keywords(method: Callable[..., R], keywords: dict[str, Any]) -> Callable[..., R]:
    return partial(method, **keywords) if keywords else method
