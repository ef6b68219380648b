"""The launch of a script as bash itself passes it: the script is executed, with the launchers replaced.

This runs every other command of the script: it may write and delete files, download, and stop processes, as the script
does. Only the programs of LAUNCHERS do nothing but record their arguments.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from foveate.errors import DataError
from foveate.tools.import_verl.bash.values import without_marks
from foveate.tools.import_verl.launch import Argument, Launch, launches_of

LAUNCHERS = (
    "python", "python3", "python3.10", "python3.11", "python3.12", "torchrun", "ray", "uv", "srun", "sbatch",
    "accelerate", "deepspeed", "nsys", "docker", "ssh", "pip", "pip3", "sleep",
)  # fmt: skip
_TIME_LIMIT_S = 120
_SHIM = """#!/bin/sh
case "$1 $2" in "-c "*"import torch_npu"*) exit 1 ;; esac
{ printf '%s\\0' {name} "$@"; pwd | tr '\\n' '\\0'; printf '\\1\\0'; } >> {log}/$$
"""


def record_launch(script: Path, environment: Mapping[str, str], arguments: Sequence[str], number: int) -> Launch:
    """Execute a script and take the `number`-th launch of verl that it makes. Raises DataError where it makes none."""
    if not script.is_file():
        raise DataError(f"{script}: is no file that could be run")
    with tempfile.TemporaryDirectory() as folder:
        log, programs = Path(folder, "log"), Path(folder, "programs")
        log.mkdir()
        programs.mkdir()
        for name in LAUNCHERS:
            shim = programs / name
            shim.write_text(_SHIM.replace("{name}", name).replace("{log}", f"'{log}'"), encoding="utf-8")
            shim.chmod(0o700)
        path = f"{programs}{os.pathsep}{environment.get('PATH', os.defpath)}"
        try:
            ended = subprocess.run(
                ["bash", str(script), *arguments],
                env={**environment, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                timeout=_TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{script}: ran for more than {_TIME_LIMIT_S} seconds without its launchers") from None
        records = sorted(log.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        text = b"".join(path.read_bytes() for path in records).decode("utf-8", errors="replace")
    calls = [record.split("\0")[:-1] for record in without_marks(text).split("\1\0")[:-1]]
    found = launches_of([call[:-1] for call in calls])
    if not 1 <= number <= len(found):
        raise DataError(f"{script}: ended with status {ended.returncode} and {len(found)} launches of verl")
    place, program, rest = found[number - 1]
    notes = (f"the script was run, and its launchers replaced: {', '.join(LAUNCHERS)}",)
    return Launch(program, tuple(Argument(word, "") for word in rest), 0, calls[place][-1], notes)
