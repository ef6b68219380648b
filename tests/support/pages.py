"""Report pages and terminal summaries, read for tests."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from foveate.report.page import terminal_summary


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def charts(self) -> dict[str, list[tuple[str, list[list[float | None]]]]]:
        """The lines of each chart, (label, points), by its title."""
        [content] = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', self.source, re.DOTALL)
        return {c["title"]: [(one["label"], one["points"]) for one in c["series"]] for c in json.loads(content)}

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rendered(folder: Path) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_summary(folder))
    return console.export_text()
