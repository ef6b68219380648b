"""`foveate mpo` and `foveate cascade`: learning from pairs of answers, and all stages in one command."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli_options import OnBadRow, Overrides, with_bad_rows


def mpo(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Preference optimisation (MPO, DPO, IPO, BCO) on rows with extra_info.chosen and extra_info.rejected. The same run
    folder again continues it."""
    from foveate.config import MPOSettings
    from foveate.recipe import load_recipe
    from foveate.train.finish import finish
    from foveate.train.mpo import run_mpo

    finish(run_mpo(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), MPOSettings)))


def cascade(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (shapes_cascade).")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """All stages of Cascade RL: cold start where set, pairs of the model's own answers, MPO, online RL, and a report
    that compares them. The same run folder again continues it."""
    from foveate.config_stages import CascadeSettings
    from foveate.recipe import load_recipe
    from foveate.train.cascade import finish_cascade, run_cascade

    finish_cascade(run_cascade(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), CascadeSettings)))
