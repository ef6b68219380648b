"""Options that several verbs of the command line share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foveate.errors import ConfigError

if TYPE_CHECKING:
    from foveate.data.validate import ReadOptions

OnBadRow = Annotated[
    Literal["error", "skip"] | None,
    typer.Option(help="Stop at rows that cannot be used, or leave them out and list them."),
]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that relative image paths start from.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="TARGET=COLUMN",
        help="A column of your own: prompt=question, images=image, answer=label, source==name; once for each.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes that check rows; by default one per core where there are many.")
]
Sources = Annotated[list[Path], typer.Argument(help="Parquet, JSONL or Arrow files, or folders of a dataset.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ: optim.lr=1e-5 seed=3.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]


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


def with_bad_rows(overrides: list[str] | None, on_bad_row: str | None) -> list[str]:
    """The overrides of a recipe, `--on-bad-row` among them."""
    return [*(overrides or []), *([f"data.on_bad_row={on_bad_row}"] if on_bad_row else [])]
