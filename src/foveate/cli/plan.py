"""`foveate plan` and `foveate import-verl`: before a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def plan_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    gpus: Annotated[str, typer.Option(help="Machines x GPUs x kind: 8xH100-80, 2x8xH100-80.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ: optim.lr=1e-5 seed=3.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Mean prompt, image tokens included.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, help="Mean answer.")] = None,
    tiles: Annotated[int | None, typer.Option(min=0, help="Mean image tiles of a prompt.")] = None,
) -> None:
    """Memory, time and GPU hours of a recipe before anything starts, from the shapes of its model."""
    from foveate.log import print_result
    from foveate.plan.advice import plan
    from foveate.plan.hardware import parse_machines
    from foveate.plan.report import report
    from foveate.plan.workload import read_settings, workload_of

    machines = parse_machines(gpus)
    settings = read_settings(recipe, overrides or [])
    print_result(report(plan(workload_of(settings, prompt_tokens, answer_tokens, tiles), machines)))


def import_verl_command(
    script: Annotated[Path, typer.Argument(help="A verl launch script; its variables may come from the environment.")],
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the training data: a recipe counts steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Recipe to write; without it, print it.")] = None,
) -> None:
    """Turn a verl launch script into a recipe, and say what became of each of its settings."""
    from foveate.files import atomic_write_text
    from foveate.log import print_result
    from foveate.tools.import_verl import import_script

    imported = import_script(script, os.environ, rows)
    if out is None:
        print_result(imported.recipe)
    else:
        atomic_write_text(out, imported.recipe)
    print_result(imported.account)
