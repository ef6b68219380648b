"""Worker processes: they start without the script of their owner, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _without_main():
            return ForkServerProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]


class _Context(ForkServerContext):
    Process = _Process  # pyright: ignore[reportAssignmentType]


def worker_context(preload: Sequence[str]) -> ForkServerContext:
    """A multiprocessing context whose processes come from a fork server that has imported the modules `preload`.

    They do not import the caller's `__main__`, so that a script needs no `if __name__ == "__main__":`. What they are
    sent must not be defined there, unless it is sent by value (`foveate.registry.pickled`)."""
    context = _Context()
    context.set_forkserver_preload([*preload])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def lifeline() -> tuple[Connection, Connection]:
    """The end of a pipe for workers, and the one that their owner keeps."""
    return multiprocessing.Pipe(duplex=False)


def end_with(owner: Connection) -> None:
    """End this process, and all that it starts, when the other end of a `lifeline` is closed. Signals that a terminal
    or a supervisor sends to all processes of a run are left to its owner.

    A worker of a fork server is no child of its owner, and what it grades or decodes may never return to Python. So the
    system itself ends it: it sends a signal when the pipe to the owner breaks."""
    import fcntl

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setpgrp()
    own = os.open(f"/dev/fd/{owner.fileno()}", os.O_RDONLY)  # opened anew: workers that share one share its signal
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC)
    if owner.poll():  # it was closed before it could tell
        os._exit(1)
