"""What an evaluation leaves in a run folder: one record per held-out row, their summary, and the rows with pictures.

    evals/step_000020.jsonl          one JSON object per row: the fields of `Prediction`
    evals/step_000020.summary.json   what `summarise` makes of them
    predictions.jsonl                in the folder of `foveate eval`: the rows of every model, each with its `model`
    gallery.json                     the ids of the rows that the report shows
    gallery/<id>.jpg                 their pictures, made small (see `draw.save_thumbnail`)

Files are replaced whole, so that a reader never meets half of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from foveate.files import atomic_write_text
from foveate.records import DataError

MODELS = "predictions.jsonl"
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in thousandths of the picture's width and height, whatever its shape."""


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One answer drawn at a temperature. `iou` and `hit` are None for a task whose answer is not a box; `rank` is what
    best-of-N goes by, the score of a critic or the mean log-prob, where there is one."""

    text: str
    score: float
    iou: float | None = None
    hit: bool | None = None
    rank: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model said to one held-out row: one answer (`text`, `box`, `score`, `iou`, `hit`), and `sampled`.

    The one is greedy; with `way` "sampled" nothing was decoded greedily, and it is the first of `sampled`. `pieces`
    are its tokens with their log-probs where they were kept.

    `answer` is the ground truth: the true box (`Box`) of a grounding row, otherwise any JSON value. `box` is None where
    no box could be read from the text. `iou` is 0 for such an answer, and None only where the task has no true box;
    `hit` is None where right and wrong are not defined, and then `score` stands in for it. `width` and `height` are
    the pixels of the picture as shown, 0 for a task without one. `tags` group rows in the report (`relation: left`).
    """

    id: str
    source: str
    question: str
    answer: Any
    width: int
    height: int
    text: str
    box: Box | None
    score: float
    iou: float | None
    hit: bool | None
    tags: Mapping[str, str]
    sampled: tuple[SampledAnswer, ...]
    way: str = "greedy"
    pieces: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All predictions of the weights after `step` optimizer steps, or of model `label`, then the `step`-th."""

    step: int
    predictions: tuple[Prediction, ...]
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or f"step {self.step}"


# ------------------------------------------------------------------------------------------------------- summary


def summarise(predictions: Sequence[Prediction], step: int) -> dict[str, Any]:
    """The means of one evaluation, as `evals/step_*.summary.json` holds them.

    Accuracy is the mean of `hit`, with `score` in its place for rows whose `hit` is None; `mean_iou` is over the rows
    that have a true box, and None without any. A sampled figure is the mean over rows of the mean over the answers
    sampled for the row (an estimate of the accuracy at that temperature), and None when nothing was sampled.
    """
    tag_names = sorted({name for prediction in predictions for name in prediction.tags})
    greedy = [row for row in predictions if row.way == "greedy"]
    return {
        "step": step,
        "rows": len(predictions),
        "greedy": {
            "accuracy": mean(correctness(row) for row in greedy),
            "mean_iou": mean(row.iou for row in greedy if row.iou is not None),
            "score": mean(row.score for row in greedy),
        },
        "sampled": {
            "samples": max((len(row.sampled) for row in predictions), default=0),
            "accuracy": mean(_sampled_means(predictions, correctness)),
            "mean_iou": mean(_sampled_means(predictions, lambda answer: answer.iou)),
            "score": mean(_sampled_means(predictions, lambda answer: answer.score)),
        },
        "by_tag": {name: _by_value(predictions, name) for name in tag_names},
    }


def correctness(answer: Prediction | SampledAnswer) -> float:
    """1 for a hit, 0 for a miss, the score where neither is defined."""
    return answer.score if answer.hit is None else float(answer.hit)


def row_value(row: Prediction) -> float:
    """How right a row is: its greedy answer, or the mean of its sampled ones where there is no greedy one."""
    if row.way == "greedy" or not row.sampled:
        return correctness(row)
    return sum(map(correctness, row.sampled)) / len(row.sampled)


def mean(values: Iterable[float]) -> float | None:
    """The arithmetic mean, None of nothing."""
    collected = list(values)
    return sum(collected) / len(collected) if collected else None


def _sampled_means(predictions: Sequence[Prediction], value: Any) -> list[float]:
    """The mean of `value` over the sampled answers of each row, for the rows where it is defined."""
    per_row = (mean(figure for answer in row.sampled if (figure := value(answer)) is not None) for row in predictions)
    return [row_mean for row_mean in per_row if row_mean is not None]


def _by_value(predictions: Sequence[Prediction], tag: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Prediction]] = {}
    for row in predictions:
        if tag in row.tags:
            groups.setdefault(row.tags[tag], []).append(row)
    return {
        value: {
            "rows": len(rows),
            "greedy_accuracy": mean(correctness(row) for row in rows if row.way == "greedy"),
            "sampled_accuracy": mean(_sampled_means(rows, correctness)),
        }
        for value, rows in sorted(groups.items())
    }


# --------------------------------------------------------------------------------------------------------- files


def predictions_path(run_folder: Path, step: int) -> Path:
    return run_folder / "evals" / f"step_{step:06d}.jsonl"


def thumbnail_path(run_folder: Path, row_id: str) -> Path:
    """Where the small picture of a row lies. Characters that a file name cannot hold are written as %XX."""
    return run_folder / "gallery" / f"{quote(row_id, safe=' ')}.jpg"


def write_evaluation(run_folder: Path, step: int, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Write the rows and their summary, each atomically, and return the summary."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in predictions]
    path = predictions_path(run_folder, step)
    atomic_write_text(path, "".join(lines))
    summary = summarise(predictions, step)
    atomic_write_text(path.with_suffix(".summary.json"), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def write_models(folder: Path, models: Sequence[Evaluation]) -> None:
    """Write the rows of every model into the `predictions.jsonl` of an evaluation outside of a run."""
    lines = [
        json.dumps({"model": one.label, **asdict(row)}, ensure_ascii=False) + "\n"
        for one in models
        for row in one.predictions
    ]
    atomic_write_text(folder / MODELS, "".join(lines))


def _read_models(path: Path) -> tuple[Evaluation, ...]:
    models: dict[str, list[Prediction]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = _json_row(line, f"{path}, row {number}")
            label = str(row.pop("model", "")) if isinstance(row, dict) else ""
            models.setdefault(label, []).append(_prediction(row, f"{path}, row {number}"))
    return tuple(Evaluation(place, tuple(rows), label) for place, (label, rows) in enumerate(models.items()))


def read_evaluations(run_folder: Path) -> tuple[Evaluation, ...]:
    """All evaluations of a run by ascending step, or all models of an evaluation; none when there is none yet."""
    if (run_folder / MODELS).exists():
        return _read_models(run_folder / MODELS)
    found = []
    for path in (run_folder / "evals").glob("step_*.jsonl"):
        digits = path.stem.removeprefix("step_")
        if not digits.isdecimal():
            raise DataError(
                f"{path}: the name does not end in a step; allowed is step_<number>.jsonl; rename or move it"
            )
        found.append(Evaluation(int(digits), read_predictions(path)))
    return tuple(sorted(found, key=lambda evaluation: evaluation.step))


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """The rows of one `evals/step_*.jsonl`. Raises DataError that names file, row and field."""
    with path.open(encoding="utf-8") as lines:
        places = ((line, f"{path}, row {number}") for number, line in enumerate(lines, start=1))
        return tuple(_prediction(_json_row(line, where), where) for line, where in places)


def _json_row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); delete the file and run `foveate eval` again") from error


def _prediction(row: Any, where: str) -> Prediction:
    _check_fields(row, Prediction, where)
    for answer in row["sampled"]:
        _check_fields(answer, SampledAnswer, f"{where}, field sampled")
    box = None if row["box"] is None else tuple(row["box"])
    sampled = tuple(SampledAnswer(**answer) for answer in row["sampled"])
    pieces = tuple((text, logprob) for text, logprob in row.get("pieces", ()))
    return Prediction(**row | {"box": box, "sampled": sampled, "pieces": pieces})


def _check_fields(row: Any, record: type, where: str) -> None:
    names = {field.name for field in fields(record)}
    needed = {field.name for field in fields(record) if field.default is MISSING}
    if not isinstance(row, dict) or not needed <= set(row) <= names:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: has {found}, but a prediction has {sorted(names)}; run `foveate eval` again")


def write_gallery(run_folder: Path, ids: Sequence[str]) -> None:
    """Name the rows that the report shows, in this order. Their pictures belong at `thumbnail_path`."""
    atomic_write_text(run_folder / "gallery.json", json.dumps(list(ids), ensure_ascii=False) + "\n")


def write_skipped(run_folder: Path, messages: Sequence[str]) -> None:
    """Keep the one-line messages of the rows that were skipped as bad, one per line in `skipped.txt`."""
    atomic_write_text(run_folder / "skipped.txt", "".join(f"{message}\n" for message in messages))
