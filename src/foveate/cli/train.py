"""The verbs that train: `foveate demo`, `sft`, `mpo`, `rl` and `cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import OnBadRow, Overrides, with_bad_rows


def demo(
    seed: Annotated[int, typer.Option(help="Seed of the training run; the scenes stay the same.")] = 0,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/demo or runs/cascade.")] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Learn from pairs of answers before GSPO.")] = False,
    overrides: Overrides = None,
) -> None:
    """Teach a small InternVL to ground by GSPO on this machine, in minutes, and write a report with pictures."""
    from foveate.tools.demo import run_demo, run_demo_cascade

    teach = run_demo_cascade if cascade else run_demo
    teach(run or Path("runs/cascade" if cascade else "runs/demo"), seed, overrides or [])


def sft(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (shapes_coldstart).")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Supervised fine-tuning on rows with extra_info.response. The same run folder again continues it."""
    from foveate.config.recipe import load_recipe
    from foveate.config.runs import SFTSettings
    from foveate.train.finish import finish
    from foveate.train.sft import run_sft

    finish(run_sft(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), SFTSettings)))


def mpo(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Preference optimisation (MPO, DPO, IPO, BCO) on rows with extra_info.chosen and extra_info.rejected. The same run
    folder again continues it."""
    from foveate.config.recipe import load_recipe
    from foveate.config.runs import MPOSettings
    from foveate.train.finish import finish
    from foveate.train.mpo import run_mpo

    finish(run_mpo(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), MPOSettings)))


def rl(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (shapes_gspo).")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Online reinforcement learning. The same run folder again continues an interrupted run."""
    from foveate.config.recipe import load_recipe
    from foveate.config.runs import RLSettings
    from foveate.train.finish import finish
    from foveate.train.rl import run_rl

    finish(run_rl(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), RLSettings)))


def cascade(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (shapes_cascade).")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """All stages of Cascade RL: cold start where set, pairs of the model's own answers, MPO, online RL, and a report
    that compares them. The same run folder again continues it."""
    from foveate.config.recipe import load_recipe
    from foveate.config.runs import CascadeSettings
    from foveate.train.cascade import finish_cascade, run_cascade

    finish_cascade(run_cascade(load_recipe(recipe, with_bad_rows(overrides, on_bad_row), CascadeSettings)))
