"""The report's table of models: every figure of `summary.json` side by side, and accuracy over the thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from foveate.report.charts import Chart, Series
from foveate.report.summary import format_difference, format_figure

_percent = partial(format_figure, percent=True)


@dataclass(frozen=True, slots=True)
class WayLine:
    """A way to use several answers to a question, such as majority@8: how often it is right, the interval of that, and
    the paired difference to the majority with its interval, as texts."""

    name: str
    value: str
    interval: str
    over_majority: str


@dataclass(frozen=True, slots=True)
class ModelTable:
    """Column names, lines of (label, values), a chart where answers are boxes, and of each model the ways to use
    several answers to a question."""

    names: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    chart: Chart | None
    ways: tuple[tuple[WayLine, ...], ...]


def model_table(summary: Mapping[str, Any]) -> ModelTable | None:
    """None for a folder that is no evaluation of `foveate eval`."""
    models: Mapping[str, Mapping[str, Any]] = summary.get("models") or {}
    if not models:
        return None
    columns = [dict(_flat(one)) for one in models.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    lines = tuple((label, tuple(column.get(label, "–") for column in columns)) for label in labels)
    series = tuple(
        Series(name, tuple((round(100 * float(t)), value) for t, value in one["accuracy_at"].items()))
        for name, one in models.items()
        if "accuracy_at" in one
    )
    title, hint = "Accuracy by threshold", "IoU in percent"
    chart = Chart(title, hint, series, "%", smooth=False, dots=True, by_step=False) if series else None
    return ModelTable(tuple(models), lines, chart, tuple(map(_ways, models.values())))


def _flat(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of one model as (label, text), in the order of the page."""
    lines = [("rows", str(one["rows"]))]
    for name, label in (("accuracy", "accuracy"), ("mean_iou", "mean IoU")):
        if name in one:
            lines.append((label, _with_interval(one[name])))
    if "score_interval" in one:
        low, high = one["score_interval"] or (None, None)
        lines.append(("mean score", "–" if low is None else f"{one['score']:.3f} [{low:.3f}, {high:.3f}]"))
    if "not_graded" in one:
        lines.append(("answers not graded", str(one["not_graded"])))
    if "with_box" in one:
        lines.append(("answers with a box", _percent(one["with_box"])))
    sampled = one.get("sampled", {})
    told = partial(format_figure, percent="score_interval" not in one)
    ways = one.get("parallel", {})
    lines += [(name, told(value)) for name, value in sampled.items() if name != "n" and name not in ways]
    lines += [(way.name, f"{way.value} {way.interval}, {way.over_majority}") for way in _ways(one)]
    splits = one.get("splits")
    if splits:
        lines += [(name, _percent(value)) for name, value in splits["accuracy"].items()]
        lines.append(("mean of the 8 splits", _percent(splits["mean_of_8"])))
    if "tokens_per_row" in one:
        lines += [("rows without an answer", str(one["missing"])), ("truncated answers", _percent(one["truncated"]))]
        lines.append(("tokens per row", "–" if one["tokens_per_row"] is None else f"{one['tokens_per_row']:.1f}"))
        lines.append(("seconds per row", f"{one['seconds'] / max(1, one['rows']):.2f}"))
    return lines


def _ways(one: Mapping[str, Any]) -> tuple[WayLine, ...]:
    percent = "score_interval" not in one
    told, more = partial(format_figure, percent=percent), partial(format_difference, percent=percent)
    found = []
    for name, way in one.get("parallel", {}).items():
        low, high = (told(value).removesuffix(" %") for value in way["interval"])
        difference = f"{more(way['over_majority']['value'])} [{', '.join(map(more, way['over_majority']['interval']))}]"
        over = "–" if name.startswith("majority") else difference
        found.append(WayLine(name, told(way["value"]), f"[{low}, {high}]", over))
    return tuple(found)


def _with_interval(figure: Mapping[str, Any]) -> str:
    interval = figure["interval"]
    if figure["value"] is None or interval is None:
        return "–"
    return f"{_percent(figure['value'])} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
