"""The facts of a run, and its result in words and tiles where nothing was evaluated: from its settings and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import counted
from foveate.registry import shown_names
from foveate.report.charts import format_value

_Rows = Sequence[Mapping[str, Any]]

CASCADE_STAGES = ("sft", "mpo", "rl", "vico", "vir")
"""The groups of a cascade's recipe that train, in order."""
_RESULTS = (
    ("reward/mean", "Reward", ""),
    ("eval/loss", "Held-out loss", ""),
    ("eval/accuracy", "Held-out accuracy of pairs", "%"),
    ("eval/image_tokens", "Image tokens that are seen", "%"),
    ("loss/total", "Training loss", ""),
    ("reward/accuracy", "Accuracy while training", "%"),
    ("reward/hit", "Hits while training", "%"),
    ("reward/margin", "Reward margin of pairs", ""),
    ("answer/length", "Answer length", "tokens"),
)
"""The metrics of the headline and the tiles, the most telling first, each with its name on the page and its unit."""
MOST_TILES = 4
STAGE_NAMES = {
    "rl": "Online RL",
    "sft": "Supervised fine-tuning",
    "mpo": "Preference optimisation",
    "cascade": "Cascade",
    "vico": "Visual consistency",
    "vir": "Resolution router",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure of a run: its mean over the last tenth of the steps, and over the first."""

    label: str
    before: str
    after: str
    grew: bool
    steps: int


def stage_of(config: Mapping[str, Any]) -> str:
    """The stage of a run by the groups of its settings; "" without settings."""
    train = config.get("train") or {}
    if "compressed" in train or "quantile" in train:
        return "vico" if "compressed" in train else "vir"
    groups = {"cascade": "pairs", "rl": "rollout", "mpo": "loss", "sft": "train"}
    return next((stage for stage, group in groups.items() if group in config), "")


def run_facts(config: Mapping[str, Any], metrics: _Rows) -> list[tuple[str, str]]:
    """(name, value) of what a reader asks first: stage, model, data, steps, time and speed."""
    try:
        return [(name, value) for name, value in _facts(config, metrics) if value]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # not the config.yaml of a run
        return []


def _reward(reward: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Which rewards count: the function's, or the parts of a sum; the environment's own; or both."""
    weights, counts = (reward.get("settings") or {}).get("weights"), environment.get("reward", "function")
    named = shown_names(", ".join(weights) if weights else reward["name"]).rpartition("/")[2]
    own = f"that of environment {shown_names(environment.get('name', '')).rpartition('/')[2]}"
    return {"function": named, "environment": own}.get(counts, f"{named} and {own}")


def _facts(config: Mapping[str, Any], metrics: _Rows) -> Iterator[tuple[str, str]]:
    stage, data = stage_of(config), config.get("data") or {}
    chosen = config.get("algorithm") or config.get("loss") or {}
    if stage:
        yield "stage", ", ".join([STAGE_NAMES[stage], *([chosen["name"]] if chosen else [])])
        yield "model", str(config["model"]["path"]) + (", adapters" if config["model"].get("lora") else "")
        yield "training data", ", ".join(Path(name).name for name in data["train"])
        share = data.get("hold_out")
        held_out = ", ".join(Path(name).name for name in data.get("test") or ())
        yield "held out", f"{100 * share:g} % of them" if share else held_out
    if reward := config.get("reward"):
        yield "reward", _reward(reward, config.get("environment") or {})
    steps = [row for row in metrics if row["step"]]
    if train := config.get("train"):
        yield "steps", f"{steps[-1]['step'] if steps else 0} of {train['steps']}"
        yield "in a step", _step(config)
        yield "learning rate", f"{config['optim']['lr']:g}"
    elif stage == "cascade":
        stages = [name for name in CASCADE_STAGES if config.get(name)]
        every = {name: config[name]["train"]["steps"] for name in stages}
        counts = ", ".join(f"{count} {name}" for name, count in every.items())
        yield "steps", f"{steps[-1]['step'] if steps else 0} of {sum(every.values())}: {counts}"
    seconds = sum(row.get("time/step") or 0.0 for row in steps)
    yield "time of steps", _duration(seconds) if seconds else ""
    for name, label in (("generate", "generated"), ("update", "trained")):
        paces = [row[key] for row in steps if row.get(key := f"time/{name}_tokens_per_second")]
        yield f"tokens {label}", f"{statistics.median(paces):,.0f} per second" if paces else ""


def _step(config: Mapping[str, Any]) -> str:
    train, rollout = config["train"], config.get("rollout") or {}
    units = {"prompts_per_step": "prompts", "samples_per_step": "demonstrations", "pairs_per_step": "pairs"}
    said = next(f"{train[name]} {unit}" for name, unit in units.items() if name in train)
    return f"{said}, {rollout['samples']} answers each" if "samples" in rollout else said


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def metric_tiles(metrics: _Rows) -> list[Tile]:
    """The figures of a run that was not evaluated, the most telling first."""
    found = []
    for name, label, unit in _RESULTS:
        rows = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if rows:
            few = max(1, len(rows) // 10)
            before, after = (statistics.fmean(value for _, value in part) for part in (rows[:few], rows[-few:]))
            shown = format_value(before, unit, 3), format_value(after, unit, 3)
            found.append(Tile(label, *shown, after > before, rows[-1][0]))
    return found[:MOST_TILES]


def metric_sentences(tiles: Sequence[Tile], last_step: int) -> list[str]:
    """The headline of such a run."""
    if not tiles:
        return [f"{counted(last_step, 'step')} so far." if last_step else "No step has been taken yet."]
    return [f"{one.label} {_move(one)} over {counted(one.steps, 'step')}." for one in tiles[:2]]


def _move(tile: Tile) -> str:
    if tile.before == tile.after:
        return f"stayed at {tile.after}"
    return f"{'rose' if tile.grew else 'fell'} from {tile.before} to {tile.after}"
