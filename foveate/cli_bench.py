"""`foveate bench`: the comparison with other trainers, which lives beside the package in a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from foveate.errors import ConfigError

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "bench.py"


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...",
            help="update, threads, memory, step, generation, engine, scaling, limit or page; without any, all of them.",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Measured rounds of each comparison.")] = 3,
    work: Annotated[
        list[str] | None, typer.Option(help="Shapes of the update, such as grounding-short; by default all.")
    ] = None,
) -> None:
    """Measure against TRL, verl, transformers and vLLM, and write docs/performance.md. Over an hour in all."""
    if not SCRIPT.exists():
        raise ConfigError(f"bench: no {SCRIPT}; run it in a checkout of the sources, installed by `pip install -e .`")
    works = ["--works", *work] if work else []
    done = subprocess.run([sys.executable, str(SCRIPT), *(parts or []), "--pairs", str(pairs), *works], check=False)
    raise typer.Exit(done.returncode)
