"""`foveate data`: look at data, and check them, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.evaluate import EvalRewardSettings, settings_given
from foveate.cli.options import MAX_IMAGE_PIXELS, Columns, ImageRoot, MaxImagePixels, Sources, Workers, columns_of
from foveate.errors import ConfigError, DataError, counted

data = typer.Typer(help="Look at data and check them.", no_args_is_help=True)


@data.command("show")
def show_command(
    sources: Sources,
    first: Annotated[int, typer.Option(min=0, help="Row to begin with.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the images and boxes.")] = None,
    column: Columns = None,
    image_root: ImageRoot = None,
) -> None:
    """Print rows as a person reads them: question, images, answer."""
    from foveate.data.table import open_tasks
    from foveate.log import print_result
    from foveate.report.show import row_text, write_page

    table = open_tasks(sources, image_root=image_root, columns=columns_of(column))
    if first >= len(table):
        raise DataError(f"--first {first}: {table.names} has {counted(len(table), 'row')}, from 0 on")
    for line in table.described():
        print_result(f"{line} (other columns: --column TARGET=COLUMN)" if column is None else line)
    shown = range(first, min(first + rows, len(table)))
    for index in shown:
        print_result(row_text(table, index))
    print_result(f"rows {first}..{shown[-1]} of {len(table)}")
    if html is not None:
        write_page(html, table, shown)
        print_result(f"{html}: {counted(len(shown), 'row')} with their images")


@data.command("check")
def check_command(
    sources: Sources,
    reward: Annotated[str | None, typer.Option(help="Reward whose ground truth is demanded: grounding.")] = None,
    reward_setting: EvalRewardSettings = None,
    model: Annotated[str | None, typer.Option(help="Model folder whose prompts are counted, or demo.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt, images included.")] = 8192,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles of an image.")] = None,
    max_image_pixels: MaxImagePixels = MAX_IMAGE_PIXELS,
    every: Annotated[
        bool, typer.Option("--every", help="A line for each row, also where rows have the same problem.")
    ] = False,
    column: Columns = None,
    image_root: ImageRoot = None,
    workers: Workers = None,
) -> None:
    """List the problems of the rows, by file, row and field, each with the number of rows that have it, and the rows in
    numbers. The exit code is 1 if there is
    a problem. Of several sources it is told which rows and images they share."""
    from foveate.data.demos import check_answered
    from foveate.data.statistics import shared_lines
    from foveate.data.table import open_tasks
    from foveate.data.validate import RowInspection, grouped, inspect_rows
    from foveate.log import print_result, progress
    from foveate.models.checkpoint.inspect import load_encoder
    from foveate.rewards.build import truth_check
    from foveate.rewards.combine import LOOKED_AT, frame_doubts

    encoder = load_encoder(model, max_tiles=max_tiles, max_prompt_tokens=max_prompt_tokens) if model else None
    if reward_setting and not reward:
        raise ConfigError("--reward-setting: needs --reward, the reward whose setting it is")
    check = truth_check(reward, settings_given(reward_setting)) if reward else check_answered
    table = open_tasks(sources, image_root=image_root, columns=columns_of(column), max_image_pixels=max_image_pixels)
    for line in table.described():
        print_result(line)
    inspection = RowInspection(check, length=encoder.checked_length if encoder is not None else None)
    with progress("checking rows", len(table)) as advance:
        found = inspect_rows(table, inspection, workers=workers, progress=lambda *_: advance(1))
    for line in map(str, found.problems) if every else grouped(found.problems):
        print_result(line)
    doubts = frame_doubts(check, table.select(found.kept).with_statistics(found.statistics).of_each_source(LOOKED_AT))
    for line in [*(f"warning: {one}" for one in [*found.warning_lines(), *doubts]), *found.lines()]:
        print_result(line)
    path_of = table.select(found.kept).path_of
    parts = {
        str(source): found.statistics.select((path_of == number).nonzero()[0]) for number, source in enumerate(sources)
    }
    for line in shared_lines(parts):
        print_result(line)
    if found.problems:
        bad = len(table) - len(found.kept)
        raise DataError(f"{counted(len(found.problems), 'problem')} in {bad:,} of {counted(len(table), 'row')}")
    told = len(found.warnings) + len(doubts)
    warnings = f", {counted(told, 'warning')}" if told else ""
    print_result(f"{counted(len(table), 'row')}, no problem{warnings}")


@data.command("overlap")
def overlap_command(
    sources: Sources,
    against: Annotated[list[Path], typer.Option(help="File or folder of an evaluation set; several times.")],
    column: Columns = None,
    image_root: ImageRoot = None,
) -> None:
    """List the rows whose image or question stands in an evaluation set, too, by the content of both. The exit code is
    1 if there is one."""
    from foveate.data.overlap import EvaluationSet, overlaps
    from foveate.data.table import open_tasks
    from foveate.log import print_result, progress

    columns = columns_of(column)
    train = open_tasks(sources, image_root=image_root, columns=columns)
    held_out = open_tasks(against, image_root=image_root, columns=columns)
    with progress("reading the evaluation sets", len(held_out)) as advance:
        known = EvaluationSet.of(held_out, advance)
    with progress("comparing rows", len(train)) as advance:
        found = overlaps(train, known, advance)
    for one in found:
        print_result(f"{one.where}: shares its {one.shared}")
    both = sum(one.image and one.question for one in found)
    if found:
        raise DataError(
            f"{len(found):,} of {counted(len(train), 'row')} stand in {held_out.names}, too: "
            f"{sum(one.image for one in found):,} by image, {sum(one.question for one in found):,} by question, "
            f"{both:,} by both"
        )
    print_result(f"{counted(len(train), 'row')}, none of them in {held_out.names}")
