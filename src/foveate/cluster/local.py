"""The cluster of one process: a group with a single worker, called directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

W = TypeVar("W")
R = TypeVar("R")
P = ParamSpec("P")


class LocalWorkers(Generic[W]):
    """A worker group of one rank in this process (`foveate.cluster.base.WorkerGroup`)."""

    size = row = 1

    def __init__(self, worker: W) -> None:
        self._worker = worker

    def call(self, method: Callable[..., R], per_rank_arguments: Sequence[tuple[Any, ...]]) -> list[R]:
        """As `WorkerGroup.call`."""
        assert len(per_rank_arguments) == self.size
        return [method(self._worker, *arguments) for arguments in per_rank_arguments]
