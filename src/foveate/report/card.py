"""The card of a trained model: `README.md` of its folder, in the form of the Hugging Face Hub.

It is made of the files of the run, and the same run gives the same card. Paths of this machine do not reach it: of a
file it has the name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from foveate.config.recipe import flatten, read_values, values_to_yaml
from foveate.data.folders import SUFFIXES, suffix_of
from foveate.data.hub import is_hub_name
from foveate.evaluate.predictions import mean
from foveate.files import atomic_write_text, inside, read_inside
from foveate.report.facts import CASCADE_STAGES, stage_of
from foveate.report.page import Run, read_run
from foveate.report.summary import compare_evaluations, format_difference, format_figure

PARTS = 5
"""The parts of a run whose means stand in the table of its curve."""
CURVES = ("reward/mean", "loss/loss", "answer/length")
_STAGES = {
    "cascade": "preference optimisation, then online reinforcement learning (Cascade RL)",
    "rl": "online reinforcement learning",
    "mpo": "preference optimisation",
    "sft": "supervised fine-tuning",
    "vico": "visual consistency learning (ViCO)",
    "vir": "training of its resolution router (ViR)",
}
NOTABLE = (
    "optim.name", "optim.lr", "optim.schedule", "train.steps", "train.prompts_per_step", "train.samples_per_step",
    "train.pairs_per_step", "rollout.samples", "rollout.max_tokens", "rollout.temperature", "model.trainable",
    "model.lora.rank", "model.quantization", "model.dtype", "seed",
)  # fmt: skip
"""The settings that a card names; those of the algorithm, the loss and the reward join them where they are set."""
_CHOICES, _LIMITS = ("algorithm", "loss", "reward"), ("workers", "time_limit", "memory_limit")


def write_card(run_folder: Path, model_folder: Path, task: str) -> Path:
    """Write the card of a run's model into its folder, in place of that of the model it was made from, whose licence it
    keeps. task: that of the model, as the Hub calls it. Raises DataError for a folder that is no run."""
    path = model_folder / "README.md"
    former = read_inside(path, model_folder).decode("utf-8", "replace") if path.is_file() else ""
    settings = read_values(inside(run_folder / "config.yaml", run_folder))
    atomic_write_text(path, card(read_run(run_folder), settings, _front_matter(former), task))
    return path


def card(run: Run, settings: Mapping[str, Any], former: Mapping[str, str], task: str) -> str:
    """The text of the card. settings: those of the run; former: licence and base of the model that it began from;
    task: that of the model, as the Hub calls it."""
    model, data = settings["model"]["path"], settings["data"]
    stage = stage_of(settings) or "sft"
    base = str(model).partition("@")[0] if _on_hub(model) else former.get("base_model", "")
    sources = [*data["train"], *(data.get("test") or ())]
    method = (settings["rl"] if stage == "cascade" else settings).get("algorithm") or settings.get("loss") or {}
    front = {
        **({"base_model": base} if base else {}),
        **({"license": former["license"]} if "license" in former else {}),
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["foveate", stage, *([method["name"]] if "name" in method else [])],
        **({"datasets": names} if (names := sorted({_repo(one) for one in sources if _on_hub(one)})) else {}),
    }
    licence = f", licence {former['license']}" if "license" in former else ""
    facts = [
        ("base model", f"{base or _name(model)}{licence}"),
        ("trained by", _STAGES[stage]),
        ("training data", ", ".join(map(_name, data["train"]))),
        ("held-out data", ", ".join(map(_name, data.get("test") or ())) or "none"),
        *((name, _value(value)) for name, value in _notable(settings)),
        *((name, str(run.versions[name])) for name in ("foveate", "torch", "transformers") if name in run.versions),
    ]
    parts = [
        f"---\n{values_to_yaml(front)}---",
        f"# {_cell(run.name)}",
        f"{_cell(base or _name(model))} after {_STAGES[stage]} with foveate.",
        _table(("", ""), facts),
        *_curve(run.metrics),
        *_evaluation(run),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(text: str) -> dict[str, str]:
    """Licence and base model of the card that a model came with; other keys, and values that are no plain word, are
    left out."""
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    return dict(re.findall(r"^(license|base_model): *['\"]?([\w./-]+)['\"]?\s*$", head, re.MULTILINE))


def _on_hub(name: str) -> bool:
    """Whether a source is a name of the hub, as where rows are read."""
    return suffix_of(Path(name)) not in SUFFIXES and is_hub_name(name)


def _repo(name: str) -> str:
    return re.split("[:@]", name)[0]


def _name(path: str) -> str:
    """A name of the hub, or the last part of a path: folders of this machine are nobody's business. Files of rows are
    named alike, so the folder that they lie in stands in front."""
    return path if _on_hub(path) else "/".join(Path(path).parts[-2:]).lstrip("/")


def _notable(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings to name, in order: of a cascade those of each stage."""
    stages = {f"{name}.": settings[name] for name in CASCADE_STAGES if settings.get(name)}
    for prefix, own in {"": settings, **stages}.items():
        for choice in _CHOICES:
            given = {name: value for name, value in (own.get(choice) or {}).items() if name not in _LIMITS}
            yield from ((f"{prefix}{choice}.{k}", v) for k, v in flatten(given).items() if v not in (None, {}, [], ""))
        flat = flatten(own)
        yield from ((prefix + name, flat[name]) for name in NOTABLE if flat.get(name) is not None)


def _value(value: Any) -> str:
    if isinstance(value, str) and "/" in value and not _on_hub(value):
        return _name(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _curve(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The means of the main metrics over parts of the run."""
    names = [name for name in CURVES if any(name in row for row in metrics)]
    if not names:
        return []
    bounds = [round(part * len(metrics) / PARTS) for part in range(PARTS + 1)]
    rows = []
    for begin, end in pairwise(bounds):
        own = metrics[begin:end]
        if own:
            values = (mean(row.get(name) for row in own) for name in names)
            rows.append((f"{own[0]['step']} to {own[-1]['step']}", *(format_figure(value, False) for value in values)))
    return ["## While training", "Means over the steps.", _table(("steps", *names), rows)]


def _evaluation(run: Run) -> list[str]:
    comparison = compare_evaluations(run.evaluations)
    if comparison is None:
        return []
    rows = [
        (
            change.label,
            str(change.rows),
            format_figure(change.before, change.percent),
            format_figure(change.after, change.percent),
            format_difference(change.difference, change.percent),
        )
        for change in comparison.overall
    ]
    header = ("held-out questions", "rows", comparison.before_name, comparison.after_name or "after", "difference")
    return ["## Evaluation", " ".join(comparison.sentences), _table(header, rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text that neither ends its cell nor its line, nor is markup."""
    return re.sub(r"([|<>\[\]`*])", r"\\\1", " ".join(str(text).split()))
