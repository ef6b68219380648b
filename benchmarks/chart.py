"""Bar charts and curves as SVG, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, LABEL, BAR, GAP, TOP = 760, 250, 16, 12, 44
COLOURS = {"foveate": "#1b6ca8", "TRL": "#e08e2b", "verl": "#7a5195", "transformers": "#c0504d", "vLLM": "#4f8a4f"}
COLOURS["vLLM, eager"] = "#8fbf8f"


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Groups of horizontal bars on one scale from 0, each bar with its name and its value."""
    largest = max((value for _, rows in groups for _, value in rows), default=1.0)
    scale = (WIDTH - LABEL - 110) / largest
    body, y = [], TOP
    for name, rows in groups:
        middle = y + len(rows) * BAR / 2 + 4
        body.append(f'<text x="{LABEL - 10}" y="{middle:.0f}" text-anchor="end">{escape(name)}</text>')
        for system, value in rows:
            width = max(1.0, value * scale)
            colour = COLOURS.get(system, "#888888")
            body.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            label = f"{escape(system)} {value:.1f}"
            body.append(f'<text x="{LABEL + width + 6:.0f}" y="{y + BAR - 5}" class="value">{label}</text>')
            y += BAR
        y += GAP
    height = y + 8
    return "\n".join([*_head(title, height, LABEL), *body, "</svg>", ""])


def _head(title: str, height: float, left: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        "<style>text{font:13px sans-serif;fill:#222}.value{font-size:12px}.title{font-weight:bold}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="24" class="title">{escape(title)}</text>',
    ]


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """Curves of (x, y) by name on common axes, y from 0."""
    height, left, right, bottom = 360, 70, 130, 50
    right_x = max((x for points in series.values() for x, _ in points), default=1.0)
    top_y = 1.1 * max((y for points in series.values() for _, y in points), default=1.0)

    def place(x: float, y: float) -> str:
        across = left + (WIDTH - left - right) * x / right_x
        return f"{across:.1f},{height - bottom - (height - bottom - TOP) * y / top_y:.1f}"

    body = []
    for part in range(5):
        x, y = right_x * part / 4, top_y * part / 4
        at_x, at_y = place(x, 0).split(","), place(0, y).split(",")
        body.append(f'<text x="{at_x[0]}" y="{height - bottom + 18}" text-anchor="middle">{x:.4g}</text>')
        body.append(f'<text x="{left - 8}" y="{float(at_y[1]) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
        body.append(f'<line x1="{left}" x2="{WIDTH - right}" y1="{at_y[1]}" y2="{at_y[1]}" stroke="#dddddd"/>')
    for number, (name, points) in enumerate(series.items()):
        colour = list(COLOURS.values())[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        end = place(*points[-1]).split(",")
        body.append(
            f'<text x="{WIDTH - right + 6}" y="{float(end[1]) + 4:.1f}" style="fill:{colour}">{escape(name)}</text>'
        )
    middle = (left + WIDTH - right) // 2
    body.append(f'<text x="{middle}" y="{height - 10}" text-anchor="middle">{escape(x_name)}</text>')
    body.append(f'<text x="{left - 8}" y="{TOP - 12}" text-anchor="end">{escape(y_name)}</text>')
    return "\n".join([*_head(title, height, left), *body, "</svg>", ""])
