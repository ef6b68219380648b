"""Runs a server's command line, and ends it with all its processes when the pipe from its starter breaks.

A script of its own (`foveate.rollout.server.process`), so that a starter that is killed leaves no server behind. A byte
on the pipe asks the server to end. The exit code is that of the server.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress


def run_guarded() -> int:
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def send(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            send(signal.SIGTERM)
        send(signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = server.wait()
    send(signal.SIGKILL)  # what it has started and left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(run_guarded())
