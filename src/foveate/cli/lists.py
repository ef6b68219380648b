"""The verbs that say what there is to choose from: settings, recipes, rewards, environments and algorithms."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate import api
from foveate.config.runs import StageName
from foveate.log import print_result

OneName = Annotated[str | None, typer.Argument(help="One of them, by its name.")]


def settings_command(
    group: Annotated[str | None, typer.Argument(help="A group or a setting, such as train or train.steps.")] = None,
    stage: Annotated[StageName, typer.Option(help="Whose settings.")] = "rl",
    markdown: Annotated[bool, typer.Option("--markdown", help="All stages, as docs/settings.md.")] = False,
) -> None:
    """Every setting, with its values, its default and what it does."""
    print_result(api.settings_page() if markdown else _lines(api.settings_list(stage, group)))


def recipes_command(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe, to show it as it stands.")] = None,
) -> None:
    """The shipped recipes, or the text of one."""
    found = api.recipes_list(name)
    print_result(found if isinstance(found, str) else _lines(found))


def rewards_command(name: OneName = None) -> None:
    """The known rewards with their settings; your own is named path/to/file.py:function."""
    print_result(_lines(api.rewards_list(name)))


def environments_command(name: OneName = None) -> None:
    """The known environments and tools with their settings; your own is named path/to/file.py:Class."""
    print_result(_lines(api.environments_list(name)))


def algorithms_command(name: OneName = None) -> None:
    """The known algorithms, and the advantages and losses that they are made of."""
    print_result(_lines(api.algorithms_list(name)))


def _lines(choices: list[api.ListEntry]) -> str:
    return "\n".join(map(str, choices))
