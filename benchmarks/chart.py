"""A bar chart as SVG, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LABEL, BAR, GAP, TOP = 760, 250, 16, 12, 44
COLOURS = {"foveate": "#1b6ca8", "TRL": "#e08e2b", "verl": "#7a5195", "transformers": "#c0504d", "vLLM": "#4f8a4f"}


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
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" aria-label="{escape(title)}">',
            "<style>text{font:13px sans-serif;fill:#222}.value{font-size:12px}.title{font-weight:bold}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="{LABEL}" y="24" class="title">{escape(title)}</text>',
            *body,
            "</svg>",
            "",
        ]
    )
