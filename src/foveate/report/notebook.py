"""Curves and pictures of a run as pieces of HTML, for notebooks: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from foveate.errors import ConfigError, DataError
from foveate.files import atomic_write_text
from foveate.registry import suggestion
from foveate.report.charts import Series, collect, format_value, thin_out
from foveate.report.gallery import gallery_cards
from foveate.report.page import read_run, template_environment

USUAL = ("reward/mean", "eval/greedy_accuracy", "eval/greedy_score", "loss/total", "eval/loss", "eval/accuracy")
WIDTH, HEIGHT = 560.0, 180.0
_POINTS, _SMOOTH_FROM = 300, 24


@dataclass(frozen=True, slots=True)
class Picture:
    """A piece of HTML that a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> None:
        """Write it as a page of its own."""
        atomic_write_text(Path(path), f'<!doctype html>\n<meta charset="utf-8">\n{self.html}\n')


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot within `WIDTH` x `HEIGHT`: `pieces` are the points of a polyline each, which a value that is
    not finite interrupts; `average` is the moving average over a long line, "" over a short one."""

    label: str
    pieces: tuple[str, ...]
    average: str
    lowest: str
    highest: str
    last: str
    steps: tuple[int, int]


def plot(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Picture:
    """The curves of these metrics, by default of the `USUAL` ones that were measured. Raises ConfigError for one that
    was not."""
    known = {one.label: one for one in collect(rows) if one.values}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"no metric {name!r}{suggestion(name, known, then='measured')}: {', '.join(sorted(known))}"
            )
    usual = [name for name in USUAL if name in known]
    if "eval/greedy_accuracy" in usual and "eval/greedy_score" in usual:
        usual.remove("eval/greedy_score")
    chosen = names or usual or [*known][:1]
    return _render(curves=[_curve(known[name]) for name in chosen], cards=(), width=WIDTH, height=HEIGHT)


def gallery(folder: Path, count: int) -> Picture:
    """Held-out images with the answers of the last evaluation. Raises DataError where there was none."""
    run = read_run(folder)
    if not run.evaluations:
        raise DataError(f"{folder}: no evaluation yet, so that there is nothing to show; give eval_data (data.test)")
    return _render(curves=(), cards=gallery_cards(folder, run.gallery[:count], run.evaluations[-1:]))


def _curve(series: Series) -> Curve:
    low, high = min(series.values), max(series.values)
    first, last = series.points[0][0], series.points[-1][0]
    across, up = WIDTH / max(last - first, 1), HEIGHT / ((high - low) or 1.0)

    def place(step: int, value: float) -> str:
        return f"{(step - first) * across:.1f},{HEIGHT - (value - low) * up:.1f}"

    pieces: list[list[str]] = [[]]
    for step, value in thin_out(series.points, _POINTS):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(place(step, value))
    lines = tuple(" ".join(piece) for piece in pieces if piece)
    average = " ".join(place(step, value) for step, value in _moving_average(series))
    lowest, highest, latest = (format_value(value) for value in (low, high, series.last[1] or 0.0))
    return Curve(series.label, lines, average, lowest, highest, latest, (first, last))


def _moving_average(series: Series) -> list[tuple[int, float]]:
    """(step, mean of the values around it), as the report smooths: over a twelfth of the line; none of a short one."""
    points = [(step, value) for step, value in series.points if value is not None]
    if len(points) < _SMOOTH_FROM:
        return []
    half = len(points) // 24
    parts = [points[max(0, place - half) : place + half + 1] for place in range(len(points))]
    means = [(step, fmean(value for _, value in part)) for (step, _), part in zip(points, parts, strict=True)]
    return [(step, value) for step, value in thin_out(means, _POINTS) if value is not None]


def _render(**values: Any) -> Picture:
    return Picture(template_environment().get_template("notebook.html.j2").render(**values))
