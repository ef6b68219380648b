"""`foveate prepare` for pictures that are drawn: scenes of shapes, digits to zoom in on, screens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foveate.cli.options import MOST_PIXELS, finite
from foveate.cli.prepare import NewFolder, prepare
from foveate.errors import ConfigError


@prepare.command("shapes")
def prepare_shapes_command(
    out: NewFolder,
    train: Annotated[int, typer.Option(min=0, help="Training rows.")] = 4000,
    test: Annotated[int, typer.Option(min=0, help="Held-out rows; they share no scene with the training rows.")] = 512,
    kinds: Annotated[str, typer.Option(help="Kinds of expression, with commas: pair, attribute, relation.")] = "pair",
    side: Annotated[int, typer.Option(min=48, max=MOST_PIXELS, help="Side of the square images, in pixels.")] = 100,
    shortcut: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=finite,
            help="Share of right demonstrations for pairs; the rest name the larger object.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Scenes of coloured shapes with referring expressions."""
    from foveate.datasets.shapes import KINDS, prepare_shapes
    from foveate.log import progress

    chosen = _known_kinds(kinds, KINDS)
    rows = asked_rows(train=train, test=test)
    with progress("drawing scenes", sum(rows.values())) as advance:
        prepare_shapes(out, rows, seed=seed, kinds=chosen, side=side, shortcut=shortcut, advance=advance)
    print_rows(out, rows)


TrainRows = Annotated[int, typer.Option(min=0, help="Rows of tasks to train on.")]
TestRows = Annotated[int, typer.Option(min=0, help="Rows of tasks that are held out; they share no picture.")]
TraceRows = Annotated[int, typer.Option(min=0, help="Conversations to imitate, about other pictures.")]
DrawnSide = Annotated[int, typer.Option(min=112, max=2_048, help="Side of the square pictures, in pixels.")]


@prepare.command("zoom")
def prepare_zoom_command(
    out: NewFolder,
    train: TrainRows = 4000,
    test: TestRows = 512,
    traces: TraceRows = 0,
    oracle: Annotated[int, typer.Option(min=0, help="Rows of test with the right look in their prompts.")] = 0,
    side: DrawnSide = 448,
    cells: Annotated[
        int, typer.Option(min=2, max=8, help="Cells of a picture along each side: four have plates, or one.")
    ] = 4,
    tile: Annotated[int, typer.Option(min=28, max=2_048, help="The setting tile of zoom in the traces.")] = 448,
    read: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of traces with a large mark, read at once.")
    ] = 0.4,
    search: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of traces that find the place themselves.")
    ] = 0.2,
    direct: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of traces that answer small marks at once.")
    ] = 0.0,
    loose: Annotated[
        float, typer.Option(min=0, callback=finite, help="Longer sides of boxes that traces find, up to this share.")
    ] = 0.0,
    marks: Annotated[Literal["digit", "pattern"], typer.Option(help="What is asked for.")] = "digit",
    large: Annotated[
        float,
        typer.Option(min=0, max=1, callback=finite, help="Share of tasks with one large mark, read without zoom."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Scenes with a digit too small to read at once, for the tool zoom."""
    from foveate.datasets.zoom import prepare_zoom
    from foveate.log import progress

    rows = asked_rows(train=train, test=test, traces=traces, oracle=oracle)
    how: dict[str, Any] = {"marks": marks, "side": side, "cells": cells, "large": large, "tile": tile}
    how |= {"read": read, "search": search, "direct": direct, "loose": loose}
    with progress("drawing scenes", sum(rows.values())) as advance:
        prepare_zoom(out, rows, seed=seed, **how, advance=advance)
    print_rows(out, rows)


@prepare.command("gui")
def prepare_gui_command(
    out: NewFolder,
    train: TrainRows = 4000,
    test: TestRows = 512,
    traces: TraceRows = 0,
    side: DrawnSide = 448,
    kinds: Annotated[str, typer.Option(help="Kinds of task, with commas.")] = "toggle,slider,field,list",
    careless: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of traces that press OK at once.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the screens.")] = 0,
) -> None:
    """Drawn screens with a task each, for the environment gui."""
    from foveate.datasets.gui import prepare_gui
    from foveate.environments.screen import WIDGET_KINDS, WidgetKind
    from foveate.log import progress

    asked = _known_kinds(kinds, WIDGET_KINDS)
    rows = asked_rows(train=train, test=test, traces=traces)
    with progress("drawing screens", sum(rows.values())) as advance:
        chosen: list[WidgetKind] = [kind for kind in WIDGET_KINDS if kind in asked]
        prepare_gui(out, rows, seed=seed, side=side, kinds=chosen, careless=careless, advance=advance)
    print_rows(out, rows)


@prepare.command("details")
def prepare_details_command(
    out: NewFolder,
    train: Annotated[int, typer.Option(min=0, help="Training rows.")] = 20_000,
    test: Annotated[int, typer.Option(min=0, help="Held-out rows; they share no picture.")] = 1_000,
    fine: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Share of pictures with four small objects.")
    ] = 0.4,
    side: Annotated[int, typer.Option(min=56, max=2_048, help="Side of the pictures: two tiles of the model.")] = 112,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures.")] = 0,
) -> None:
    """Pictures with one big object, or four small ones that few image tokens lose, for vico and vir."""
    from foveate.datasets.details import prepare_details
    from foveate.log import progress

    rows = asked_rows(train=train, test=test)
    with progress("drawing pictures", sum(rows.values())) as advance:
        prepare_details(out, rows, seed=seed, fine=fine, side=side, advance=advance)
    print_rows(out, rows)


@prepare.command("moving")
def prepare_moving_command(
    out: NewFolder,
    train: Annotated[int, typer.Option(min=0, help="Training rows.")] = 4000,
    test: Annotated[int, typer.Option(min=0, help="Held-out rows; they share no video.")] = 512,
    side: Annotated[int, typer.Option(min=48, max=2_048, help="Side of the square frames, in pixels; even.")] = 56,
    shortcut: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=finite, help="Share of right demonstrations; the rest begin with the video."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the videos.")] = 0,
) -> None:
    """Videos of eight seconds in which a shape comes, moves and goes: when it is there is asked."""
    from foveate.datasets.moving import prepare_moving
    from foveate.log import progress

    rows = asked_rows(train=train, test=test)
    with progress("drawing videos", sum(rows.values())) as advance:
        prepare_moving(out, rows, seed=seed, side=side, shortcut=shortcut, advance=advance)
    print_rows(out, rows)


def _known_kinds(kinds: str, known: Sequence[str]) -> tuple[str, ...]:
    """The kinds that --kinds names. Raises ConfigError for an unknown kind."""
    chosen = tuple(kinds.split(","))
    unknown = [kind for kind in chosen if kind not in known]
    if unknown:
        raise ConfigError(f"--kinds: unknown kind {unknown[0]!r}; allowed: {', '.join(known)}")
    return chosen


def asked_rows(**rows: int) -> dict[str, int]:
    """The splits of which rows are asked for."""
    found = {split: count for split, count in rows.items() if count}
    if not found:
        options = " and ".join(f"--{split}" for split in rows)
        raise ConfigError(f"{options} are {'both' if len(rows) == 2 else 'all'} 0; ask for at least one row")
    return found


def print_rows(out: Path, rows: dict[str, int]) -> None:
    from foveate.log import print_result

    print_result(f"{out}: " + ", ".join(f"{count:,} {split} rows" for split, count in rows.items()))
