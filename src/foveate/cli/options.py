"""Options that several verbs of the command line share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from annotated_types import Ge
from pydantic import ValidationError

from foveate import api
from foveate.config.recipe import read_value
from foveate.config.rollout import EnvironmentSettings
from foveate.config.runs import RLSettings, StageName, walk
from foveate.errors import ConfigError

if TYPE_CHECKING:
    from foveate.data.validate import ReadOptions

_SETTINGS = dict(walk(RLSettings))


def mirrored(path: str, *flags: str) -> Any:
    """The option for a setting, such as `data.workers`: its help and its least value are those of the setting."""
    field = _SETTINGS[path]
    least: Any = next((rule.ge for rule in field.metadata if isinstance(rule, Ge)), None)
    return typer.Option(*flags, min=least, help=(field.description or "").replace("null:", "by default:"))


def not_empty(value: str, parameter: typer.CallbackParam) -> str:
    """Refuse an option that an unset variable left empty."""
    if not value.strip():
        raise ConfigError(f"{parameter.opts[0]}: is empty; give a value, or leave it out")
    return value


def finite(value: float | None) -> float | None:
    """The check of options that are numbers: no comparison refuses one that is none."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, found {value}")
    return value


MOST_TOKENS, MOST_PIXELS = 1_048_576, 4096
"""Limits of options: tokens of a prompt or an answer, pixels of the side of a drawn image."""

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe, such as shapes_gspo.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ: optim.lr=1e-5 seed=3.")
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Continue with data, code, a model folder or settings that changed; what did is kept in changes.jsonl.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show the plan, the first prompt and what is trained of it, or a graded answer; write nothing.",
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        help="Upload the trained model to this repository of the Hugging Face Hub, a private one where it is new.",
    ),
]
BadRows = Annotated[Literal["error", "skip"] | None, mirrored("data.on_bad_row")]
ImageRoot = Annotated[Path | None, mirrored("data.image_root")]
Workers = Annotated[int | None, mirrored("data.workers")]
MaxImagePixels = Annotated[int, mirrored("data.max_image_pixels")]
MAX_IMAGE_PIXELS: int = _SETTINGS["data.max_image_pixels"].default
HoldOut = Annotated[float | None, mirrored("data.hold_out")]
Seed = Annotated[int, mirrored("seed")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="TARGET=COLUMN",
        help="A column of your own: prompt=question, images=image, answer=label, source==name; once for each.",
    ),
]
Sources = Annotated[list[Path], typer.Argument(help="Files of rows, or folders of a dataset (FOLDER@SPLIT).")]
EnvironmentOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Answers of several turns, with this environment: a name, an import path, or {name: ..., settings: ...}.",
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write to.")]


def environment_of(given: str | None) -> EnvironmentSettings | None:
    """The option `--environment`. Raises ConfigError for what are no settings of an environment."""
    if given is None:
        return None
    try:
        return EnvironmentSettings.model_validate(read_value(given, "--environment"))
    except ValidationError as error:
        [first, *_] = error.errors()
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--environment {given}: {place and f'{place}: '}{first['msg']}") from error


def columns_of(pairs: Sequence[str] | None) -> Mapping[str, str] | None:
    """`--column` options as a mapping, None without any. Raises ConfigError for one that is no TARGET=COLUMN,
    and for a target that is given twice."""
    mapping: dict[str, str] = {}
    for pair in pairs or ():
        target, equals, column = pair.partition("=")
        if not (target and equals and column):
            raise ConfigError(f"--column {pair}: must be TARGET=COLUMN, such as prompt=question")
        if target in mapping:
            raise ConfigError(f"--column {pair}: {target} is {mapping[target]} already; give each target once")
        mapping[target] = column
    return mapping or None


def reading_of(
    image_root: Path | None, on_bad_row: str | None, workers: int | None, columns: Sequence[str] | None = None
) -> ReadOptions:
    """How sources are read, from the options of a verb."""
    from foveate.data.validate import ReadOptions

    return ReadOptions(image_root, columns_of(columns), "skip" if on_bad_row == "skip" else "error", workers)


def recipe_of(
    stage: StageName,
    recipe: str,
    overrides: list[str] | None,
    on_bad_row: str | None,
    hold_out: float | None,
    column: list[str] | None,
) -> api.Recipe:
    """A recipe of this stage with its overrides, and with the options that stand for some."""
    columns = columns_of(column)
    given = {"on_bad_row": on_bad_row, "hold_out": hold_out, "columns": columns and json.dumps(columns)}
    options = [f"data.{name}={value}" for name, value in given.items() if value is not None]
    return api.from_recipe(recipe, *(overrides or ()), *options, stage=stage)
