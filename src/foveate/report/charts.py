"""Which metrics share a line chart of the report. The page draws the charts itself, from their values.

Any metric is shown. Those that the catalogue knows share a titled chart, the others get one each under their own name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MAX_POINTS = 1000
SCALE_APART = 12.0

Point = tuple[int, float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: (step, value) by ascending step; None breaks the line, at a step without a finite value."""

    label: str
    points: tuple[Point, ...]
    place: int | None = None
    """Its colour, where that is not its place among the lines of its chart."""

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points if value is not None]

    @property
    def last(self) -> Point:
        """The last point that has a value."""
        return next(point for point in reversed(self.points) if point[1] is not None)


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines that share axes. `unit` "%" shows fractions as percent; `smooth` lays the moving average over long lines;
    `dots` marks every point."""

    title: str
    hint: str
    series: tuple[Series, ...]
    unit: str = ""
    smooth: bool = True
    dots: bool = False
    by_step: bool = True

    @property
    def digits(self) -> int:
        """Significant digits that resolve a thousandth of the axis: ratios near 1 differ in the fifth."""
        values = [value for one in self.series for value in one.values]
        span, largest = max(values) - min(values), max(map(abs, values))
        return max(4, math.ceil(math.log10(largest / span)) + 3) if span else 4

    @property
    def legend(self) -> list[tuple[str, str]]:
        """(label, last value) of each line; without the value where the axis is not the training step."""
        shown = [format_value(one.last[1] or 0.0, self.unit, self.digits) for one in self.series]
        values = shown if self.by_step else [""] * len(shown)
        return [(one.label, value) for one, value in zip(self.series, values, strict=True)]

    @property
    def places(self) -> list[int]:
        """The colour of each line."""
        return [number if one.place is None else one.place for number, one in enumerate(self.series)]

    def data(self) -> dict[str, Any]:
        """The chart for the script of the page, as JSON: lines of very many steps thinned, numbers of eight digits."""
        lines = [
            {
                "label": one.label,
                "place": place,
                "points": [
                    (step, None if value is None else float(f"{value:.8g}"))
                    for step, value in thin_out(one.points, MAX_POINTS)
                ],
            }
            for place, one in zip(self.places, self.series, strict=True)
        ]
        settings = {"unit": self.unit, "digits": self.digits, "smooth": self.smooth, "dots": self.dots}
        return {"title": self.title, **settings, "series": lines}


@dataclass(frozen=True, slots=True)
class Topic:
    """A row of the catalogue: metrics whose name `pattern` matches share a chart."""

    title: str
    pattern: str
    hint: str
    unit: str = ""
    smooth: bool = True


CATALOGUE = (
    Topic("Reward", r"^reward/mean$", "mean over the answers of a step: what the policy is trained on"),
    Topic("Loss: training and held-out", r"^(loss/total|eval/loss)$", "of the step's rows, and of all held-out rows"),
    Topic(
        "Accuracy of pairs", r"^(reward/preferred|eval/accuracy)$", "share in which the chosen answer gained more", "%"
    ),
    Topic(
        "Image tokens that are seen",
        r"^(eval|vico)/image_tokens$|^source/.*/image_tokens$",
        "share, where tiles may be compressed: of the training, of held-out rows, and of their sources",
        "%",
    ),
    Topic("Held-out turns and looks", r"^eval/(turns|tool)/", "turns and calls of tools per answer, and their overlap"),
    Topic("Held-out accuracy by source", r"^eval/source/", "of the greedy answers", "%"),
    Topic("Held-out figures", r"^eval/", "as logged at each evaluation"),
    Topic("Accuracy while training", r"^reward/(accuracy|hit|parsed)$", "share of the sampled answers", "%"),
    Topic("Answers not graded", r"^reward/failed$", "the grader raised an error"),
    Topic("KL divergence", r"^(loss|reward)/.*kl", "nats"),
    Topic("Reward by source", r"^source/.*/reward$", "mean over the answers of a step"),
    Topic("Parts of the reward", r"^reward/", "and its spread"),
    Topic("Truncated answers", r"^answer/(truncated|timed_out)", "share that reached the token or time limit", "%"),
    Topic("Answer length", r"^answer/length|^source/.*/length$", "tokens per answer"),
    Topic("Turns and tools", r"^(turns|tool)/", "per answer; and the overlap of looks with their place"),
    Topic("Entropy", r"^loss/entropy", "nats per token: near 0 the policy stops exploring"),
    Topic("Clip fraction", r"^loss/clip", "share of the ratios outside the trust region", "%"),
    Topic("Importance ratio", r"^loss/ratio", "new over old policy, per answer or token"),
    Topic("Off-policy correction", r"^engine/correction", "weights of trainer over engine"),
    Topic("Trainer versus engine", r"^engine/", "difference of log-probs, nats: large means a bug"),
    Topic("Gradient norm", r"/grad_norm", "before clipping"),
    Topic("Learning rate", r"/lr", "", smooth=False),
    Topic("Critic", r"^critic/", "expected against actual returns"),
    Topic("Loss", r"^loss/", "of a policy update the level says little"),
    Topic(
        "Groups without a signal", r"^rollout/groups_without_advantage", "all answers scored alike: nothing to train on"
    ),
    Topic("Staleness", r"^rollout/staleness", "updates between sampling and training"),
    Topic("Skipped updates", r"^optim/update_skipped", "gradients that were not finite"),
    Topic("Tokens per second", r"^time/.*tokens_per_second", "by phase", "tokens/s"),
    Topic("Time per step", r"^time/", "by phase", "s"),
)
"""Which metrics share a chart: the first pattern that is found in the name."""


def chart_metrics(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[tuple[str, str, str]]]:
    """Charts of all metrics that moved, and (name, last step, last value) of all metrics.

    A row is one training step: `{"step": 3, "reward/mean": 0.4, ...}`, values numbers or None.
    """
    series = collect(rows)
    moving = [one for one in series if len(set(one.values)) > 1]
    charts = []
    for topic in CATALOGUE:
        mine = [one for one in moving if _topic_of(one.label) is topic]
        for part, together in enumerate(_of_like_scale(mine)):
            title = topic.title if part == 0 else f"{topic.title}: {together[0].label}"
            charts.append(Chart(title, topic.hint, tuple(together), topic.unit, topic.smooth))
    charts += [Chart(one.label, "", (one,)) for one in moving if _topic_of(one.label) is None]
    table = [(one.label, str(one.last[0]), format_value(one.last[1] or 0.0)) for one in series if one.values]
    table += [(one.label, "–", "never a finite number") for one in series if not one.values]
    return charts, table


def collect(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """One series per metric, in the order of first appearance. A step that lacks the name did not measure it, and the
    line runs on; a value that is None or not finite breaks it."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float | None):
                finite = None if value is None or not math.isfinite(value) else float(value)
                points.setdefault(name, []).append((row["step"], finite))
    return [Series(name, tuple(own)) for name, own in points.items()]


def overlay(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """A chart for each metric that moved, with a line for each run in which it did by its name, in the order of the
    catalogue."""
    lines: dict[str, list[Series]] = {}
    for place, (name, rows) in enumerate(runs.items()):
        for one in collect(rows):
            if len(set(one.values)) > 1:
                lines.setdefault(one.label, []).append(Series(name, one.points, place))
    order = [*CATALOGUE, None]
    names = sorted(lines, key=lambda name: order.index(_topic_of(name)))
    topics = {name: _topic_of(name) for name in names}
    return [
        Chart(
            name,
            topic.hint if topic else "",
            tuple(lines[name]),
            topic.unit if topic else "",
            not topic or topic.smooth,
        )
        for name, topic in topics.items()
    ]


def _topic_of(name: str) -> Topic | None:
    return next((topic for topic in CATALOGUE if re.search(topic.pattern, name)), None)


def _of_like_scale(series: Sequence[Series]) -> list[list[Series]]:
    """Split series that would flatten each other: largest magnitudes within a chart differ by `SCALE_APART` at most."""
    groups: list[list[Series]] = []
    for one in sorted(series, key=_magnitude, reverse=True):
        if groups and _magnitude(groups[-1][0]) <= SCALE_APART * _magnitude(one):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [sorted(group, key=series.index) for group in groups]


def _magnitude(series: Series) -> float:
    return max(map(abs, series.values))


def thin_out(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """At most `limit` of the points: both ends, and the lowest and highest of each stretch, so that spikes remain."""
    if len(points) <= limit:
        return points
    stretches = limit // 2 - 1
    bounds = [round(index * len(points) / stretches) for index in range(stretches + 1)]
    kept = {points[0], points[-1]}
    for start, end in pairwise(bounds):
        stretch = sorted(points[start:end], key=lambda point: -math.inf if point[1] is None else point[1])
        kept |= {stretch[0], stretch[-1]}  # a gap is the lowest of all, and stays
    return sorted(kept, key=lambda point: point[0])


def format_value(value: float, unit: str = "", digits: int = 4) -> str:
    """A number for people, with `digits` significant digits; fractions as percent when the unit is "%"."""
    if unit == "%":
        return f"{100 * value:.1f} %"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    else:
        text = f"{value:.{digits}g}"
    return f"{text} {unit}".rstrip()
