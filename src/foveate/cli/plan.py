"""`foveate plan` and `foveate import-verl`: before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate import api
from foveate.cli.options import Overrides
from foveate.errors import ConfigError
from foveate.log import print_result


def plan_command(
    recipe: Annotated[str | None, typer.Argument(help="Recipe file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    gpus: Annotated[str | None, typer.Option(help="Machines x GPUs x kind: 8xH100-80, 2x8xH100-80.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Mean prompt, image tokens included.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=1, help="Mean answer.")] = None,
    tiles: Annotated[int | None, typer.Option(min=0, help="Mean image tiles of a prompt.")] = None,
    compressed: Annotated[
        float | None, typer.Option(min=0, max=1, help="RL of a Flash model: mean share of compressed tiles.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="The smallest GPU for every published model, whole, LoRA and QLoRA.")
    ] = False,
) -> None:
    """Memory, time and GPU hours of a recipe before anything starts, from the shapes of its model; with --table, the
    GPU that each published model needs."""
    if table:
        if recipe is not None or gpus is not None:
            raise ConfigError("--table is of all published models and of single GPUs; leave out the recipe and --gpus")
        for line in api.plan_table():
            print_result(line)
        return
    if recipe is None or gpus is None:
        raise ConfigError("a recipe and --gpus are needed, as in foveate plan internvl3_5_8b_gspo --gpus 2x8xH100-80")
    settings = api.from_recipe(recipe, *(overrides or ())).settings
    means = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "tiles": tiles}
    print_result(api.plan_report(api.plan(settings, gpus, **means, compressed=compressed)))


def import_verl_command(
    script: Annotated[
        Path, typer.Argument(help="A launch script of verl or EasyR1; its variables come from the environment.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its arguments; behind -- if they start with -.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the training data: a recipe counts steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Recipe to write; without it, print it.")] = None,
    verl: Annotated[
        str | None, typer.Option(help="Version of verl, whose defaults are filled in, such as 0.7.")
    ] = None,
    launch: Annotated[int, typer.Option(min=1, help="Which launch, in a script with several.")] = 1,
    run: Annotated[
        bool, typer.Option("--run", help="EXECUTE the script in bash, with its launchers replaced.")
    ] = False,
) -> None:
    """Turn a launch script of verl or EasyR1 into a recipe, and say what became of each of its settings."""
    imported = api.import_verl(script, rows, out=out, arguments=arguments or (), version=verl, launch=launch, run=run)
    if out is None:
        print_result(imported.recipe)
    print_result(imported.account)
