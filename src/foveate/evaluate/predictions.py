"""The files that an evaluation leaves, and the figures that are made of them.

    evals/step_000020.jsonl          a `ScoredRow` per held-out row
    evals/step_000020.summary.json   its summary (`summarise`)
    predictions.jsonl                in the folder of `foveate eval`: the rows of every model
    gallery.json                     the ids of the rows that the report shows
    gallery/<id>.jpg                 their images, made small (see `draw.save_thumbnail`)
    observed/<digest>.jpg            images that answers have observed, likewise

Files are replaced whole, so that a reader never meets half of one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.answers import ScoredAnswer, ScoredRow, read_answers, write_answers
from foveate.errors import DataError
from foveate.files import MOST_ROWS, atomic_write_text, inside

MODELS = "predictions.jsonl"
RESAMPLES, MOST_DIGITS = 1000, 15
_CHUNK = 100
BOX_SIZES = ((0.01, "under 1 %"), (0.05, "1 to 5 %"), (0.2, "5 to 20 %"), (math.inf, "over 20 %"))
"""Shares of the image below which the true box lies."""
EXPRESSION_LENGTHS = ((2, "1 to 2"), (5, "3 to 5"), (9, "6 to 9"), (math.inf, "10 or more"))
"""Words up to which an expression goes."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All rows answered by the weights after `step` optimizer steps, or by model `label`, then the `step`-th."""

    step: int
    predictions: tuple[ScoredRow, ...]
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or f"step {self.step}"


# ------------------------------------------------------------------------------------------------------- figures


def mean(values: Iterable[float | None]) -> float | None:
    """The arithmetic mean of the values that are not None; None of nothing."""
    collected = [value for value in values if value is not None]
    return sum(collected) / len(collected) if collected else None


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean: the percentile bootstrap (Efron 1979, "Bootstrap methods: another look
    at the jackknife") over `RESAMPLES` draws of as many values with replacement. None of nothing.

    Over the rows of an evaluation it covers the choice of the questions, not of the training seed nor, beyond its
    mean, of the sampled answers. The values may be differences of pairs, for two evaluations of the same rows."""
    if not values:
        return None
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    draws = [array[rng.integers(0, len(array), (_CHUNK, len(array)))].mean(1) for _ in range(RESAMPLES // _CHUNK)]
    low, high = np.quantile(np.concatenate(draws), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two evaluations on the rows that both hold: the mean difference of how right they are with its interval, and the
    ids of the rows that got better and worse."""

    rows: int
    difference: float
    interval: tuple[float, float]
    better: tuple[str, ...]
    worse: tuple[str, ...]
    only_in_one: int

    @property
    def unchanged(self) -> int:
        return self.rows - len(self.better) - len(self.worse)

    @property
    def is_noise(self) -> bool:
        low, high = self.interval
        return low <= 0 <= high


def paired(before: Sequence[ScoredRow], after: Sequence[ScoredRow], seed: int = 0) -> Paired | None:
    """The comparison of two evaluations row by row; None where they have no row in common."""
    old = {row.id: row.value for row in before}
    changes = {row.id: row.value - old[row.id] for row in after if row.id in old}
    interval = bootstrap(list(changes.values()), seed)
    if interval is None:
        return None
    return Paired(
        rows=len(changes),
        difference=sum(changes.values()) / len(changes),
        interval=interval,
        better=tuple(row_id for row_id, change in changes.items() if change > 0),
        worse=tuple(row_id for row_id, change in changes.items() if change < 0),
        only_in_one=len(before) + len(after) - 2 * len(changes),
    )


def summarise(rows: Sequence[ScoredRow], step: int) -> dict[str, Any]:
    """The means of one evaluation, as `evals/step_*.summary.json` holds them.

    Accuracy is the mean of the answers' `correctness`, and None where right and wrong are not defined (`is_decided`):
    then the score alone counts. `mean_iou` is over the rows that have a true box, and None without any. An answer that
    is not graded counts as wrong in the accuracy and is left out of the score; where there are such answers,
    `not_graded` counts them. A sampled figure is the mean over rows of the mean over the answers
    sampled for the row (an estimate of the accuracy at that temperature), and None when nothing was sampled.
    """
    tags = sorted({name for row in rows for name in row.tags})
    figures = {**_FIGURES, "accuracy": _FIGURES["accuracy"] if is_decided(rows) else lambda _: None}
    return {
        "step": step,
        "rows": len(rows),
        **lost_grades(rows),
        **seen_image_tokens(rows),
        "greedy": {name: mean(map(_greedy(value), rows)) for name, value in figures.items()},
        "sampled": {
            "samples": max((len(row.sampled) for row in rows), default=0),
            **{name: mean(map(_sampled(value), rows)) for name, value in figures.items()},
        },
        "by_tag": {name: _by_value(rows, name) for name in tags},
    }


def is_decided(rows: Sequence[ScoredRow]) -> bool:
    """Whether answers are right or wrong, by a part `hit` or `accuracy` of the scores; else there are scores alone."""
    return any(row.shown.right is not None for row in rows)


def measure_of(rows: Sequence[ScoredRow]) -> str:
    """The figure by which evaluations of such rows are compared: accuracy, or score."""
    return "accuracy" if is_decided(rows) else "score"


def lost_grades(rows: Sequence[ScoredRow]) -> dict[str, int]:
    """How many answers could not be graded, where there are any."""
    count = sum(not answer.graded for row in rows for answer in row.answers)
    return {"not_graded": count} if count else {}


def seen_image_tokens(rows: Sequence[ScoredRow]) -> dict[str, float]:
    """The mean share of the image tokens that the model has seen, where it compresses tiles."""
    share = mean(row.image_tokens for row in rows)
    return {} if share is None else {"image_tokens": share}


Figure = Callable[[ScoredAnswer], float | None]
_FIGURES: dict[str, Figure] = {
    "accuracy": lambda answer: answer.correctness,
    "mean_iou": lambda answer: answer.iou,
    "score": lambda answer: answer.score,
}


def _greedy(value: Figure) -> Callable[[ScoredRow], float | None]:
    return lambda row: value(row.shown) if row.shown.greedy else None


def _sampled(value: Figure) -> Callable[[ScoredRow], float | None]:
    return lambda row: mean(map(value, row.sampled))


def _by_value(rows: Sequence[ScoredRow], tag: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[ScoredRow]] = {}
    for row in rows:
        if tag in row.tags:
            groups.setdefault(row.tags[tag], []).append(row)
    measure = measure_of(rows)
    figure = _FIGURES[measure]
    return {
        value: {
            "rows": len(group),
            f"greedy_{measure}": mean(map(_greedy(figure), group)),
            f"sampled_{measure}": mean(map(_sampled(figure), group)),
            **seen_image_tokens(group),
        }
        for value, group in sorted(groups.items())
    }


# --------------------------------------------------------------------------------------------------------- files


def predictions_path(run_folder: Path, step: int) -> Path:
    return run_folder / "evals" / f"step_{step:06d}.jsonl"


def thumbnail_path(run_folder: Path, row_id: str) -> Path:
    """The file of the small image of a row, named by a digest: an id may be any text of any length."""
    return run_folder / "gallery" / f"{sha256(row_id.encode('utf-8', 'replace')).hexdigest()[:32]}.jpg"


def observed_path(run_folder: Path, name: str) -> Path:
    """The file of the small image of something that an answer has observed, within the folder whatever the name."""
    return run_folder / "observed" / Path(name).name


def write_evaluation(run_folder: Path, step: int, rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Write the rows and their summary, each atomically, and return the summary."""
    path = predictions_path(run_folder, step)
    write_answers(path, rows)
    summary = summarise(rows, step)
    atomic_write_text(path.with_suffix(".summary.json"), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def write_models(folder: Path, models: Sequence[Evaluation]) -> None:
    """Write the rows of every model into the `predictions.jsonl` of an evaluation outside of a run."""
    write_answers(folder / MODELS, (replace(row, model=one.label) for one in models for row in one.predictions))


def read_evaluations(run_folder: Path) -> tuple[Evaluation, ...]:
    """All evaluations of a run by ascending step, or all models of an evaluation; none when there is none yet. Raises
    DataError that names file, row and field."""
    if (run_folder / MODELS).exists():
        models: dict[str, list[ScoredRow]] = {}
        for row in read_answers(inside(run_folder / MODELS, run_folder, MOST_ROWS), ScoredRow):
            models.setdefault(row.model, []).append(replace(row, model=""))
        return tuple(Evaluation(place, tuple(rows), label) for place, (label, rows) in enumerate(models.items()))
    found = []
    for path in (run_folder / "evals").glob("step_*.jsonl"):
        digits = path.stem.removeprefix("step_")
        if not digits.isdecimal() or len(digits) > MOST_DIGITS:
            raise DataError(
                f"{path}: the name does not end in a step; allowed is step_<number>.jsonl; rename or move it"
            )
        rows = tuple(read_answers(inside(path, run_folder, MOST_ROWS), ScoredRow))
        found.append(Evaluation(int(digits), rows))
    return tuple(sorted(found, key=lambda evaluation: evaluation.step))


def write_gallery(run_folder: Path, ids: Sequence[str]) -> None:
    """Name the rows that the report shows, in this order. Their images belong at `thumbnail_path`."""
    atomic_write_text(run_folder / "gallery.json", json.dumps(list(ids), ensure_ascii=False) + "\n")


def write_skipped(run_folder: Path, messages: Sequence[str]) -> None:
    """Keep the one-line messages of the rows that were skipped as bad, one per line in `skipped.txt`."""
    atomic_write_text(run_folder / "skipped.txt", "".join(f"{message}\n" for message in messages))
