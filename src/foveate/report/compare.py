"""Several runs on one page: the settings in which they differ, and a line for each in every chart."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from foveate.config.recipe import flatten
from foveate.errors import ConfigError
from foveate.files import atomic_write_text
from foveate.registry import shown_names
from foveate.report.charts import overlay
from foveate.report.facts import metric_tiles
from foveate.report.page import Run, read_run, rows_with_start, run_settings, template_environment

MOST_RUNS, MOST_CHARACTERS = 8, 80
"""Runs on a page, which has as many colours, and characters that are shown of a setting."""


def write_comparison(folders: Sequence[Path], page: Path) -> Path:
    """Write the page of several runs. Raises DataError as `write_report`, ConfigError for too many runs, and for runs
    without metrics."""
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs are too many for one page; name {MOST_RUNS} at most")
    runs = dict(zip(_names(folders), map(read_run, folders), strict=True))
    for name, run in runs.items():
        if not run.metrics:
            raise ConfigError(f"{name}: has no metrics.jsonl, and so no curves to lay over others; leave it out")
    environment = template_environment()
    script = environment.get_template("report.js.j2").render()
    charts = overlay({name: rows_with_start(run) for name, run in runs.items()})
    tiles = {name: {tile.label: tile for tile in metric_tiles(run.metrics)} for name, run in runs.items()}
    labels = dict.fromkeys(label for own in tiles.values() for label in own)
    results = [(label, [own[label].after if label in own else "–" for own in tiles.values()]) for label in labels]
    html = environment.get_template("compare.html.j2").render(
        names=list(runs),
        steps=[run.last_step for run in runs.values()],
        results=results,
        differences=differences(list(runs.values())),
        charts=charts,
        chart_data=[chart.data() for chart in charts],
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    atomic_write_text(page, html)
    return page


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, with the value of each run."""
    settings = [flatten(run_settings(run)) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one if name != "run")
    rows = [(name, [_shown(one, name) for one in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "–"
    value = settings[name]
    text = shown_names(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of folders; of those with the same name as they were given, numbered where that is the same, too."""
    short = [folder.resolve().name for folder in folders]
    names = [str(f) if short.count(name) > 1 else name for f, name in zip(folders, short, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]
