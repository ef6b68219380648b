"""`report.html`: what a run did, as one page that opens from disk, with no server and no network.

Everything it holds comes from the files of a run folder, whichever of them exist, so that a run can be looked at while
it goes on and after a crash. Text of models and data reaches the page only through the template's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.config.recipe import read_values
from foveate.errors import ConfigError, DataError, one_line
from foveate.evaluate.predictions import Evaluation, read_evaluations, summarise
from foveate.files import atomic_write_text, inside, read_inside, strict_json
from foveate.log import read_metrics
from foveate.report.charts import Chart, Series, chart_metrics
from foveate.report.facts import metric_sentences, metric_tiles, run_facts
from foveate.report.gallery import Card, gallery_cards, shorten
from foveate.report.models import ModelTable, WayLine, model_table
from foveate.report.stages import FILE, Stage, compare_stages, read_stages, stages_table
from foveate.report.summary import Change, Comparison, compare_evaluations, format_difference, format_figure

INPUTS = (
    "config.yaml", "versions.json", "metrics.jsonl", "evals", "predictions.jsonl", "gallery.json", "summary.json",
    "notes.txt", "skipped.txt", "warnings.jsonl", FILE,
)  # fmt: skip


_LARGEST = 1e300
_FIGURES = ("accuracy", "mean_iou", "score")
"""The figures of an evaluation that a run logs."""


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run folder, read; what does not exist is empty."""

    folder: Path
    config: str
    versions: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    gallery: tuple[str, ...]
    notes: str
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    summary: Mapping[str, Any]
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        steps = [row["step"] for row in self.metrics[-1:]] + [one.step for one in self.evaluations[-1:]]
        return max(steps, default=0)

    def moment(self, step: int) -> str:
        """The name of a step on the page: by the stage that ended there, where the run has stages, or by the model."""
        label = next((one.label for one in self.evaluations if one.step == step), "")
        return label or next((stage.name for stage in self.stages if stage.step == step), f"step {step}")

    @property
    def pictured(self) -> tuple[Evaluation, ...]:
        """The evaluations whose answers the gallery shows: those at the ends of stages, else all."""
        ends = {stage.step for stage in self.stages}
        return tuple(one for one in self.evaluations if not ends or one.step in ends)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path; an old one is replaced.

    Raises DataError when the folder holds nothing to report, or when a file in it is not what its name says.
    """
    path = run_folder / "report.html"
    atomic_write_text(path, render_report(run_folder))
    return path


def template_environment() -> jinja2.Environment:
    """The templates of this folder: text is escaped, and a name that stands for nothing is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("foveate.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_report(run_folder: Path) -> str:
    """The page. Raises as `write_report`."""
    from foveate.rewards.boxes import HIT_IOU

    run = read_run(run_folder)
    environment = template_environment()
    environment.filters |= {"difference": format_difference, "figure": format_figure, "shorten": shorten}
    environment.filters["scores"] = _scores
    script = environment.get_template("report.js.j2").render()
    curves, values = chart_metrics(rows_with_start(run))
    cards = gallery_cards(run.folder, run.gallery, run.pictured)
    comparison = compare_evaluations(run.evaluations)
    models = _models(run)
    accuracy = accuracy_chart(run.evaluations, comparison) if comparison else None
    tiles = metric_tiles(run.metrics)
    # The reward or the loss, by the catalogue's order; without a result all curves stand together.
    heroes = curves[:1] if run.metrics and (comparison or tiles) else []
    curves = curves[len(heroes) :]
    beside = accuracy or (models.chart if models else None)
    if accuracy is not None and heroes:
        heroes, beside = [*heroes, accuracy], None
    if comparison is None:
        beside = None
    charts = [*heroes, *curves]
    charts += [
        chart for chart in (beside, models.chart if models else None) if chart is not None and chart not in charts
    ]
    by_model = bool(run.evaluations and run.evaluations[0].label)
    config = run_settings(run)
    return environment.get_template("report.html.j2").render(
        run=run,
        comparison=comparison,
        stages=compare_stages(run.stages, run.evaluations),
        sentences=comparison.sentences if comparison else metric_sentences(tiles, run.last_step),
        facts=run_facts(config, run.metrics),
        tiles=tiles,
        heroes=heroes,
        beside=beside,
        marks=[(stage.step, stage.name) for stage in run.stages[1:]],
        charts=charts,
        chart_data=[chart.data() for chart in charts],
        curves=curves,
        values=values,
        cards=cards,
        by_model=by_model,
        table_name="Before and after" if not by_model else "Side by side" if len(run.evaluations) > 1 else "Breakdown",
        models=models,
        gallery_steps=[frame.step for frame in cards[0].frames] if cards else [],
        hit_iou=HIT_IOU,
        hit_score=None if comparison is None or comparison.percent else _hit_score(cards),
        pictured=any(card.picture for card in cards),
        has_boxes=any(card.true_box and card.row.shown.iou is not None for card in cards),
        has_places=any(card.true_box and card.row.shown.iou is None for card in cards),
        has_looks=any(frame.looks for card in cards for frame in card.frames),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _models(run: Run) -> ModelTable | None:
    try:
        return model_table(run.summary)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        path = run.folder / "summary.json"
        raise DataError(f"{path}: no summary of `foveate eval` ({one_line(error)}); write it again") from error


def rows_with_start(run: Run) -> list[Mapping[str, Any]]:
    """The metrics of the steps, and before them the evaluation before the first step of a run of RL, which is no line
    of its metrics."""
    rows = [*run.metrics]
    measured = {name for row in rows for name in row if name.startswith("eval/")}
    start = next((one for one in run.evaluations if one.step == 0 and one.predictions and not one.label), None)
    if start is None or not measured or (rows and rows[0]["step"] == 0):
        return rows
    found = summarise(start.predictions, 0)
    names = {f"eval/{way}_{name}": found[way].get(name) for way in ("greedy", "sampled") for name in _FIGURES}
    own = {name: value for name, value in names.items() if name in measured and value is not None}
    return [{"step": 0, **own}, *rows]


def _scores(card: Card) -> list[float | None]:
    """The score of the shown answer at each step, which the page compares with the least score of a hit."""
    return [None if frame.row is None else frame.row.shown.score for frame in card.frames]


def _hit_score(cards: Sequence[Card]) -> float:
    """The score from which an answer is a hit before a reader says another one: 0.5, or of scores beyond 0 to 1 the
    median."""
    scores = [score for card in cards for score in _scores(card) if score is not None]
    return 0.5 if all(0 <= score <= 1 for score in scores) else round(statistics.median(scores), 3)


def run_settings(run: Run) -> Mapping[str, Any]:
    """The settings that the run was started with; none where its config.yaml is not what a run writes."""
    try:
        return read_values(inside(run.folder / "config.yaml", run.folder)) if run.config else {}
    except ConfigError:
        return {}


def accuracy_chart(evaluations: Sequence[Evaluation], comparison: Comparison) -> Chart | None:
    """The held-out accuracy over the steps, greedy and sampled; None before the second evaluation."""
    if comparison.after_step is None or evaluations[0].label:
        return None
    summaries = [summarise(one.predictions, one.step) for one in evaluations if one.predictions]
    series, name = [], "accuracy" if comparison.percent else "score"
    for way in ("greedy", "sampled"):
        points = tuple((one["step"], one[way][name]) for one in summaries if one[way][name] is not None)
        if points:
            series.append(Series(way, points))
    unit = "%" if comparison.percent else ""
    title = f"Held-out {comparison.measure}"
    return Chart(title, "by training step", tuple(series), unit, smooth=False, dots=True)


def terminal_summary(run_folder: Path) -> RenderableType:
    """The result in words, and the table of before and after. Raises as `write_report`."""
    run = read_run(run_folder)
    comparison = compare_evaluations(run.evaluations)
    if comparison is None:
        said = metric_sentences(metric_tiles(run.metrics), run.last_step)
        return Text(f"{run.name}: {' '.join(said)} No evaluation on held-out questions.")
    stages = compare_stages(run.stages, run.evaluations)
    if stages is not None:
        return Group(Text(" ".join(comparison.sentences), style="bold"), stages_table(stages))
    table = Table(title=None, header_style="bold", pad_edge=False)
    table.add_column("held-out questions", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column(comparison.before_name, justify="right")
    if comparison.after_step is not None:
        table.add_column(comparison.after_name, justify="right")
        table.add_column("difference", justify="right")
    add_row = partial(_add_change, table, with_after=comparison.after_step is not None)
    for change in comparison.overall:
        add_row(change, change.label)
    if comparison.by_score is not None:
        table.add_section()
        for change in comparison.by_score.greedy:
            add_row(change, f"score: {change.label} (greedy)")
    for tags in comparison.by_tag:
        table.add_section()
        for change in tags.greedy:
            add_row(change, f"{tags.tag}: {change.label} (greedy)")
    models = _models(run)
    several = zip(models.names, models.ways, strict=True) if models is not None else ()
    more = [_ways_table(name, ways) for name, ways in several if ways]
    return Group(Text(" ".join(comparison.sentences), style="bold"), table, *more)


def _ways_table(model: str, ways: Sequence[WayLine]) -> Table:
    """The ways to use several answers to a question, side by side."""
    table = Table(title=None, header_style="bold", pad_edge=False)
    table.add_column(model, overflow="fold")
    for name in ("right", "95 % interval", "over majority"):
        table.add_column(name, justify="right")
    for way in ways:
        table.add_row(way.name, way.value, way.interval, way.over_majority)
    return table


def _add_change(table: Table, change: Change, label: str, with_after: bool) -> None:
    cells = [Text(label), Text(str(change.rows)), Text(format_figure(change.before, change.percent))]
    if with_after:
        style = "" if not change.difference else "green" if change.difference > 0 else "yellow"
        cells.append(Text(format_figure(change.after, change.percent)))
        cells.append(Text(format_difference(change.difference, change.percent), style=style))
    table.add_row(*cells)


# -------------------------------------------------------------------------------------------------------- reading


def read_run(run_folder: Path) -> Run:
    """Everything that the run has written so far. Raises DataError for a folder without any of it, or a broken file."""
    if not any((run_folder / name).exists() for name in INPUTS):
        state = "it holds none of the files of a run" if run_folder.is_dir() else "there is no such folder"
        raise DataError(
            f"{run_folder} is not a run folder: {state} ({', '.join(INPUTS)}); name the folder that `foveate rl` wrote"
        )
    return Run(
        folder=run_folder,
        config=_text(run_folder / "config.yaml", run_folder),
        versions=_json(run_folder / "versions.json", {}),
        metrics=tuple(_metrics(run_folder)),
        evaluations=read_evaluations(run_folder),
        gallery=tuple(_gallery(run_folder)),
        notes=_text(run_folder / "notes.txt", run_folder),
        skipped=tuple(_text(run_folder / "skipped.txt", run_folder).splitlines()),
        warnings=tuple(_warnings(run_folder)),
        summary=_json(run_folder / "summary.json", {}),
        stages=read_stages(run_folder),
    )


def _metrics(run_folder: Path) -> Iterator[Mapping[str, Any]]:
    """The numbers of each step; None for one that is no number, or too large for sums of it."""
    path = run_folder / "metrics.jsonl"
    for number, row in enumerate(read_metrics(path, run_folder) if path.exists() else (), start=1):
        known = {name: value for name, value in row.items() if isinstance(value, int | float | None)}
        wrong = [name for name, value in row.items() if isinstance(value, dict | list) and name != "nonfinite"]
        if wrong:
            raise DataError(f"{path}:{number}: {wrong[0][:60]!r} is no number; delete this line to continue")
        yield {name: None if value is not None and abs(value) > _LARGEST else value for name, value in known.items()}


def _gallery(run_folder: Path) -> Iterator[str]:
    """The ids of the rows that the report shows, each once."""
    path = run_folder / "gallery.json"
    ids = _json(path, [])
    if any(not isinstance(one, str) for one in ids):
        raise DataError(f"{path}: must be a list of the ids of rows; delete the file, or let the run write it again")
    yield from dict.fromkeys(ids)


def _warnings(run_folder: Path) -> Iterator[str]:
    """The warnings of a run; those of all stages of a cascade."""
    for path in sorted((run_folder / "warnings.jsonl", *run_folder.glob("*/warnings.jsonl"))):
        stage = "" if path.parent == run_folder else f"{path.parent.name}, "
        for number, told in enumerate(read_metrics(path, run_folder) if path.exists() else (), start=1):
            if not isinstance(told.get("text"), str):
                raise DataError(f"{path}:{number}: has no text; delete this line to continue")
            yield f"{stage}step {told['step']}: {told['text']}"


def _text(path: Path, folder: Path) -> str:
    return read_inside(path, folder).decode("utf-8", "replace") if path.exists() else ""


def _json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        content = strict_json(read_inside(path, path.parent))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); delete the file, or let the run write it again") from error
    if not isinstance(content, type(default)):
        kind = "an object" if isinstance(default, dict) else "a list"
        raise DataError(f"{path}: holds {type(content).__name__}, but must hold {kind}; let the run write it again")
    return content
