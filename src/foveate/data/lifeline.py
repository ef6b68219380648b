"""Worker processes that end with the process that owns them, however that ends and whatever they are doing.

A worker of a fork server is no child of its owner, and what it grades or decodes may never return to Python. So the
system itself ends it: it sends a signal when the pipe to the owner breaks.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection


def lifeline() -> tuple[Connection, Connection]:
    """The end of a pipe for workers, and the one that their owner keeps."""
    return multiprocessing.Pipe(duplex=False)


def end_with(owner: Connection) -> None:
    """End this process, and all that it starts, when the other end of a `lifeline` is closed. Signals that a terminal
    or a supervisor sends to all processes of a run are left to its owner."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setpgrp()
    own = os.open(f"/dev/fd/{owner.fileno()}", os.O_RDONLY)  # opened anew: workers that share one share its signal
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC)
    if owner.poll():  # it was closed before it could tell
        os._exit(1)
