"""The cluster of one process: a group with a single worker, called directly."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any


class LocalWorkers:
    """A worker group of one rank in this process (`foveate.cluster.base.WorkerGroup`)."""

    size = row = 1

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def call(self, method: str, per_rank_arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run `method` on every rank with its own arguments; results in the order of ranks. A dotted
        name is a method of what the worker holds, such as `engine.generate`."""
        assert len(per_rank_arguments) == self.size
        return [attrgetter(method)(self._worker)(*arguments) for arguments in per_rank_arguments]
