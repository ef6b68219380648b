"""`foveate serve` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def served(*arguments, **environment):
    """`foveate serve` as a process of its own: (address, key, process)."""
    code = "from foveate.cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        key = process.stdout.readline().removeprefix("API key: ").strip()
        address = process.stdout.readline().rpartition(" at ")[2].strip()
        yield address, key, process
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
