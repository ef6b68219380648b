"""Line charts for the report: which metrics share one, and their geometry as plain numbers for the template's SVG.

Any metric is shown. Those that the catalogue knows share a titled chart, the others get one each under their own name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 440, 216
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 26
MAX_POINTS = 480
SMOOTH_FROM = 24
SCALE_APART = 12.0
FEW_POINTS = 12

Point = tuple[int, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: (step, value) by ascending step, and the steps at which there was no finite value."""

    label: str
    points: tuple[Point, ...]
    gaps: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Topic:
    """A row of the catalogue: metrics whose name `pattern` matches share a chart."""

    title: str
    pattern: str
    hint: str
    unit: str = ""
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """A series in the SVG: the measured path (thin where `smooth` lies over it), single dots, the last value."""

    label: str
    path: str
    smooth: str
    dots: tuple[tuple[float, float], ...]
    last: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything the template needs to draw, and `data` for the read-out under the pointer."""

    title: str
    hint: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str
    window: int
    data: Mapping[str, Any] = field(default_factory=dict)


CATALOGUE = (
    Topic("Held-out figures", r"^eval/", "as logged at each evaluation"),
    Topic("Accuracy while training", r"accuracy|(^|/)(hit|parsed)$", "share of the sampled answers", "%"),
    Topic("Answers not graded", r"(^|/)failed$", "the grader raised an error"),
    Topic("Reward", r"^rewards?(/|$)", "what the policy is trained on, and its parts"),
    Topic("Truncated answers", r"truncated", "share that reached the token limit", "%"),
    Topic("Answer length", r"length", "tokens per answer"),
    Topic("Entropy", r"entropy", "nats per token: near 0 the policy stops exploring"),
    Topic("Clip fraction", r"clip", "share of the ratios outside the trust region", "%"),
    Topic("Importance ratio", r"ratio", "new over old policy, per answer or token"),
    Topic("Off-policy correction", r"^engine/correction", "weights of trainer over engine"),
    Topic("Trainer versus engine", r"^engine/", "difference of log-probs, nats: large means a bug"),
    Topic("KL divergence", r"(^|[/_])kl([/_]|$)", "nats"),
    Topic("Loss", r"loss|nll", "of a policy update the level says little"),
    Topic("Gradient norm", r"grad", "before clipping"),
    Topic("Learning rate", r"(^|[/_])(lr|learning_rate)([/_]|$)", "", smooth=False),
    Topic("Groups without a signal", r"without_advantage", "all answers scored alike: nothing to learn from"),
    Topic("Skipped updates", r"skip|non_?finite", "gradients that were not finite"),
    Topic("Tokens per second", r"tokens?_per_s|throughput|speed", "by phase", "tokens/s"),
    Topic("Time per step", r"(^|/)time|seconds", "by phase", "s"),
    Topic("Memory", r"memory|(^|/)mem|_gi?b$|rss", ""),
)
"""Which metrics share a chart: the first pattern that is found in the name."""


# --------------------------------------------------------------------------------------------------- what to show


def chart_metrics(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[Chart, ...], tuple[tuple[str, str], ...]]:
    """Charts of all metrics that moved, and (name, value) of those that never did or that were never finite.

    A row is one training step: `{"step": 3, "reward/mean": 0.4, ...}`, values numbers or None.
    """
    series = collect(rows)
    steady = [(one.label, format_value(one.points[0][1])) for one in series if _is_constant(one)]
    empty = {name for row in rows for name, value in row.items() if value is None} - {one.label for one in series}
    steady += [(name, "never a finite number") for name in sorted(empty)]
    moving = [one for one in series if not _is_constant(one)]
    charts = []
    for topic in CATALOGUE:
        mine = [one for one in moving if _topic_of(one.label) is topic]
        for part, together in enumerate(_of_like_scale(mine)):
            title = topic.title if part == 0 else f"{topic.title}: {together[0].label}"
            charts.append(make_chart(title, topic.hint, together, topic.unit, topic.smooth))
    charts += [make_chart(one.label, "", [one]) for one in moving if _topic_of(one.label) is None]
    return tuple(charts), tuple(steady)


def collect(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """One series per metric, in the order of first appearance. A value that is None or not finite is a gap; a step
    that lacks the name did not measure it, and the line runs on."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    found = []
    for name in names:
        points = tuple((row["step"], float(row[name])) for row in rows if _is_finite(row.get(name)))
        if points:
            gaps = frozenset(row["step"] for row in rows if name in row and not _is_finite(row[name]))
            found.append(Series(name, points, gaps))
    return found


def _topic_of(name: str) -> Topic | None:
    return next((topic for topic in CATALOGUE if re.search(topic.pattern, name)), None)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_constant(series: Series) -> bool:
    return len({value for _, value in series.points}) == 1


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
    return max(abs(value) for _, value in series.points)


# ------------------------------------------------------------------------------------------------------- geometry


def make_chart(
    title: str, hint: str, series: Sequence[Series], unit: str = "", smooth: bool = True, dots: bool = False
) -> Chart:
    """Lay out one chart in a box of `WIDTH` x `HEIGHT` user units. `unit` "%" shows fractions as percent."""
    shown = [Series(one.label, thin_out(one.points, MAX_POINTS), one.gaps) for one in series]
    steps = [step for one in shown for step, _ in one.points]
    values = [value for one in shown for _, value in one.points]
    y_values = nice_ticks(*_value_range(values), 4)
    low, high = min(*values, y_values[0]), max(*values, y_values[-1])
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    # Ratios near 1 differ in the fifth digit: resolve a thousandth of the axis.
    digits = max(4, math.ceil(math.log10(max(abs(low), abs(high)) / (high - low))) + 3)
    longest = max(len(one.points) for one in series)
    window = longest // 12 | 1 if smooth and longest >= SMOOTH_FROM else 0
    lines = []
    for original, one in zip(series, shown, strict=True):
        averaged = thin_out(moving_average(original.points, window), MAX_POINTS) if window else ()
        lines.append(
            Line(
                label=one.label,
                path=_path(one.points, one.gaps, x, y),
                smooth=_path(averaged, one.gaps, x, y),
                dots=tuple((x(step), y(value)) for step, value in one.points)
                if dots or len(one.points) <= FEW_POINTS
                else (),
                last=format_value(one.points[-1][1], unit, digits),
            )
        )
    return Chart(
        title=title,
        hint=hint,
        lines=tuple(lines),
        x_ticks=tuple((x(tick), f"{tick:g}") for tick in _step_ticks(first, last)),
        y_ticks=tuple((y(tick), format_tick(tick, y_values, unit)) for tick in y_values),
        description=_describe(title, series, unit),
        window=window,
        data={
            "unit": unit,
            "digits": digits,
            "x": [LEFT, WIDTH - RIGHT, first, last],
            "y": [HEIGHT - BOTTOM, TOP, low, high],
            "series": [{"label": one.label, "points": one.points} for one in shown],
        },
    )


def _path(points: Sequence[Point], gaps: frozenset[int], x: Any, y: Any) -> str:
    """SVG path data; the pen is lifted over steps without a value."""
    missing = sorted(gaps)
    parts = []
    for position, (step, value) in enumerate(points):
        while missing and position and missing[0] <= points[position - 1][0]:
            missing.pop(0)
        lifted = position == 0 or bool(missing and missing[0] < step)
        parts.append(f"{'M' if lifted else 'L'}{x(step):g} {y(value):g}")
    return "".join(parts)


def thin_out(points: Sequence[Point], limit: int) -> tuple[Point, ...]:
    """At most `limit` of the points: both ends, and the lowest and highest of each stretch, so that spikes remain."""
    if len(points) <= limit:
        return tuple(points)
    stretches = limit // 2 - 1
    bounds = [round(index * len(points) / stretches) for index in range(stretches + 1)]
    kept = {points[0], points[-1]}
    for start, end in pairwise(bounds):
        stretch = points[start:end]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return tuple(sorted(kept))


def moving_average(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """The mean over `window` (odd) neighbouring points, centred; at the ends over those that there are."""
    half = window // 2
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    averaged = []
    for position, (step, _) in enumerate(points):
        start, end = max(0, position - half), min(len(points), position + half + 1)
        averaged.append((step, (sums[end] - sums[start]) / (end - start)))
    return tuple(averaged)


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten that enclose low to high in about `wanted` steps."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(start, end + 1)]


def _step_ticks(first: int, last: int) -> list[float]:
    if first == last:
        return [float(first)]
    step = max(1.0, nice_ticks(0, last - first, 5)[1])
    return [tick * step for tick in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _value_range(values: Iterable[float]) -> tuple[float, float]:
    """The span of the y axis: from zero where the values come near it, and never empty."""
    low, high = min(values), max(values)
    if 0 < low < 0.6 * high:
        low = 0.0
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if low < high else (low, low + 1.0)


def _describe(title: str, series: Sequence[Series], unit: str) -> str:
    """The chart in words, for those who cannot see it."""
    ways = [
        f"{one.label} from {format_value(one.points[0][1], unit)} at step {one.points[0][0]} "
        f"to {format_value(one.points[-1][1], unit)} at step {one.points[-1][0]}"
        for one in series
    ]
    return f"{title}: {'; '.join(ways)}. Left and right arrow keys read single steps."


# -------------------------------------------------------------------------------------------------------- numbers


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


def format_tick(value: float, ticks: Sequence[float], unit: str) -> str:
    """The same for an axis: as few characters as the distance of the ticks allows."""
    top = max(abs(tick) for tick in ticks)
    if unit == "%":
        return f"{100 * value:g} %"
    if value == 0:
        return "0"
    if top < 1e-3 or top >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if top >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"
