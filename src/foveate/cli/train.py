"""The verbs that train: `foveate demo`, `sft`, `mpo`, `rl`, `cascade`, `vico` and `vir`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate import api
from foveate.cli.evaluate import print_report
from foveate.cli.options import (
    AcceptChanges,
    BadRows,
    Columns,
    DryRun,
    HoldOut,
    Overrides,
    PushToHub,
    Recipe,
    recipe_of,
)
from foveate.log import print_result


def demo_command(
    seed: Annotated[int, typer.Option(help="Seed of the training run; the scenes stay the same.")] = 0,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/demo, cascade or demo-tools.")
    ] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Preference optimisation on pairs before GSPO.")] = False,
    tools: Annotated[bool, typer.Option("--tools", help="Learn to zoom in on what is too small to see.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a small InternVL to ground by GSPO on this machine, in minutes, and write a report with pictures."""
    folder = run or Path("runs/cascade" if cascade else "runs/demo-tools" if tools else "runs/demo")
    _print_run(api.demo(folder, *(overrides or ()), seed=seed, cascade=cascade, tools=tools))


def sft_command(
    recipe: Recipe, overrides: Overrides = None, column: Columns = None, on_bad_row: BadRows = None,
    hold_out: HoldOut = None, accept_changes: AcceptChanges = False, dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
) -> None:  # fmt: skip
    """Supervised fine-tuning on rows with extra_info.response. The same run folder again continues it."""
    _train(recipe_of("sft", recipe, overrides, on_bad_row, hold_out, column), accept_changes, dry_run, push_to_hub)


def mpo_command(
    recipe: Recipe, overrides: Overrides = None, column: Columns = None, on_bad_row: BadRows = None,
    hold_out: HoldOut = None, accept_changes: AcceptChanges = False, dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
) -> None:  # fmt: skip
    """Preference optimisation (MPO, DPO, IPO, BCO) on rows with extra_info.chosen and extra_info.rejected. The same run
    folder again continues it."""
    _train(recipe_of("mpo", recipe, overrides, on_bad_row, hold_out, column), accept_changes, dry_run, push_to_hub)


def vico_command(
    recipe: Recipe, overrides: Overrides = None, column: Columns = None, on_bad_row: BadRows = None,
    hold_out: HoldOut = None, accept_changes: AcceptChanges = False, dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
) -> None:  # fmt: skip
    """Visual consistency learning of a Flash model on rows with extra_info.response: the same answers from fewer image
    tokens. The same run folder again continues it."""
    _train(recipe_of("vico", recipe, overrides, on_bad_row, hold_out, column), accept_changes, dry_run, push_to_hub)


def vir_command(
    recipe: Recipe, overrides: Overrides = None, column: Columns = None, on_bad_row: BadRows = None,
    hold_out: HoldOut = None, accept_changes: AcceptChanges = False, dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
) -> None:  # fmt: skip
    """Train the router of a Flash model, and nothing else, on rows with extra_info.response. The same run folder again
    continues it."""
    _train(recipe_of("vir", recipe, overrides, on_bad_row, hold_out, column), accept_changes, dry_run, push_to_hub)


def rl_command(
    recipe: Recipe, overrides: Overrides = None, column: Columns = None, on_bad_row: BadRows = None,
    hold_out: HoldOut = None, accept_changes: AcceptChanges = False, dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
) -> None:  # fmt: skip
    """Online reinforcement learning. The same run folder again continues an interrupted run."""
    _train(recipe_of("rl", recipe, overrides, on_bad_row, hold_out, column), accept_changes, dry_run, push_to_hub)


def cascade_command(
    recipe: Recipe, overrides: Overrides = None, column: Columns = None, on_bad_row: BadRows = None,
    hold_out: HoldOut = None, accept_changes: AcceptChanges = False, dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
) -> None:  # fmt: skip
    """All stages of Cascade RL: cold start where set, pairs of the model's own answers, MPO, online RL, and a report
    that compares them. The same run folder again continues it."""
    _train(recipe_of("cascade", recipe, overrides, on_bad_row, hold_out, column), accept_changes, dry_run, push_to_hub)


def _train(recipe: api.Recipe, accept_changes: bool, dry_run: bool, push_to_hub: str | None) -> None:
    if dry_run:
        print_result(recipe.dry_run(accept_changes=accept_changes))
        return
    if push_to_hub is not None:
        api.prepare_upload(push_to_hub)
    run = recipe.train(accept_changes=accept_changes)
    _print_run(run)
    if push_to_hub is not None:
        print_result(f"Uploaded: {run.push_to_hub(push_to_hub)}")


def _print_run(run: api.Run) -> None:
    """Print the result of a finished run, and where its report and its model are."""
    print_report(run.path, run.report)
    print_result(f"Model: {run.model}")
