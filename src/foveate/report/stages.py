"""Runs of several stages: what each of them reached, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.table import Table

from foveate.errors import DataError
from foveate.evaluate.predictions import Evaluation
from foveate.files import atomic_write_text, read_inside, strict_json
from foveate.report.summary import Comparison, compare_evaluations, format_difference, format_figure

FILE = "stages.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage by the step of the whole run at which it ended, and the seconds that it took, evaluations aside."""

    name: str
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StageRow:
    """One line of the comparison: a cell of text for each stage."""

    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stages:
    """The comparison of the stages that have been evaluated."""

    stages: tuple[Stage, ...]
    rows: tuple[StageRow, ...]


def write_stages(run_folder: Path, stages: Sequence[Stage]) -> None:
    atomic_write_text(run_folder / FILE, json.dumps([asdict(stage) for stage in stages], indent=2) + "\n")


def read_stages(run_folder: Path) -> tuple[Stage, ...]:
    """The stages of a run in order; none for a run that has no stages."""
    path = run_folder / FILE
    if not path.exists():
        return ()
    try:
        stages = tuple(Stage(**entry) for entry in strict_json(read_inside(path, run_folder)))
        if any((type(one.name), type(one.step)) != (str, int) or one.seconds < 0 for one in stages):
            raise ValueError("a name, a step or the seconds are of another type")
        return stages
    except DataError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: no list of stages ({error}); let the run write it again") from error


def compare_stages(stages: Sequence[Stage], evaluations: Sequence[Evaluation]) -> Stages | None:
    """All figures of the evaluations at the ends of the stages; None with fewer than two of them."""
    by_step = {one.step: one for one in evaluations if one.predictions}
    reached = [stage for stage in stages if stage.step in by_step]
    if len(reached) < 2:
        return None
    alone = [compare_evaluations([by_step[stage.step]]) for stage in reached]
    found = [one for one in alone if one is not None]
    labels = [change.label for change in found[0].overall]
    rows = [StageRow(label, tuple(_figure(one, label) for one in found)) for label in labels]
    for number, tags in enumerate(found[0].by_tag):
        for value in [change.label for change in tags.greedy]:
            cells = tuple(_tagged(one, number, value) for one in found)
            rows.append(StageRow(f"{tags.tag}: {value} (greedy)", cells))
    ends = [by_step[stage.step] for stage in reached]
    since_start = ["–", *(_difference(ends[0], one) for one in ends[1:])]
    rows.append(StageRow("against the start, points (95 % interval)", tuple(since_start)))
    if len(ends) > 2:
        since_last = ["–", *(_difference(before, one) for before, one in pairwise(ends))]
        rows.append(StageRow("against the stage before", tuple(since_last)))
    rows.append(StageRow("time of the stage", tuple(format_seconds(stage.seconds) for stage in reached)))
    return Stages(tuple(reached), tuple(rows))


def stages_table(stages: Stages) -> Table:
    """The comparison for a terminal."""
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("held-out questions", overflow="fold")
    for stage in stages.stages:
        table.add_column(stage.name, justify="right")
    for row in stages.rows:
        table.add_row(row.label, *row.cells)
    return table


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _figure(comparison: Comparison, label: str) -> str:
    change = next((change for change in comparison.overall if change.label == label), None)
    return "–" if change is None else format_figure(change.before, change.percent)


def _tagged(comparison: Comparison, number: int, value: str) -> str:
    tables = comparison.by_tag
    changes = tables[number].greedy if number < len(tables) else ()
    change = next((change for change in changes if change.label == value), None)
    return "–" if change is None else format_figure(change.before, change.percent)


def _difference(first: Evaluation, other: Evaluation) -> str:
    comparison = compare_evaluations([first, other])
    change = comparison.paired if comparison else None
    if comparison is None or change is None:
        return "–"
    value, low, high = (format_difference(one, comparison.percent) for one in (change.difference, *change.interval))
    return f"{value} ({low} to {high})"
