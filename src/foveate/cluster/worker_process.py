"""A process of a cluster that holds a worker."""

from __future__ import annotations

import os
import pickle
import sys
import traceback

import torch

from foveate.cluster.local import LocalWorkers
from foveate.log import setup_logging


class WorkerProcess:
    """What is asked of such a process, but for the calls of its worker."""

    def __init__(self, folder: str, kind: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths of a recipe mean the same everywhere
        setup_logging()
        if kind == "cpu":
            torch.set_num_threads(1)

    def make(self, build: bytes) -> None:
        """Make the worker."""
        self._workers = LocalWorkers(pickle.loads(build)())

    def process(self) -> int:
        return os.getpid()

    def stacks(self) -> str:
        """What every thread of this process is doing."""
        frames = sys._current_frames().values()
        return "\n".join("".join(traceback.format_stack(frame)[-6:]) for frame in frames)
