"""A process of a cluster that holds a worker."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import Any

import torch

from foveate.log import setup_logging


class WorkerProcess:
    """Makes the worker of this process, and tells how it is doing."""

    def __init__(self, folder: str, kind: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths of a recipe mean the same everywhere
        setup_logging()
        if kind == "cpu":
            torch.set_num_threads(1)

    def make(self, build: bytes) -> None:
        """Make the worker."""
        self.worker: Any = pickle.loads(build)()

    def process(self) -> int:
        return os.getpid()

    def stacks(self) -> str:
        """The stacks of all threads of this process."""
        frames = sys._current_frames().values()
        return "\n".join("".join(traceback.format_stack(frame)[-6:]) for frame in frames)
