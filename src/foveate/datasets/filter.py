"""Prepare from what is prepared: rows kept by difficulty and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.data.answers import RIGHT, CorrectnessRule, ScoredAnswer, answers_by_id
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, publish_tables, rollout_hashes, rows_by_id, shown_counts
from foveate.errors import DataError, require
from foveate.records import Task


@dataclass(frozen=True, slots=True)
class Limits:
    """Which rows stay. accuracy: the share of right answers, both ends included (MMPR-Tiny: 0.2 to 0.8); answers: the
    fewest answers that tell it; gap: pass@N less pass@1 (`gap_of`), both ends included; prompt_tokens: the longest
    prompt, images included; short_side, long_side: the fewest pixels of the shorter and the most of the longer side of
    every image. None leaves a measure out."""

    accuracy: tuple[float, float] | None = None
    answers: int = 1
    prompt_tokens: int | None = None
    short_side: int | None = None
    long_side: int | None = None
    gap: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, bounds in (("accuracy", self.accuracy), ("gap", self.gap)):
            low, high = bounds or (0.0, 1.0)
            require(0 <= low <= high <= 1, f"setting {name}: must be two growing numbers in 0..1, not {low}, {high}")

    @property
    def needs_answers(self) -> bool:
        """Whether the answers of a model tell which rows stay."""
        return self.accuracy is not None or self.gap is not None


def gap_of(accuracy: float) -> float:
    """Pass@N less pass@1 of a row, where N is the number of its answers: what there is to gain by answering as well
    every time as the best of N. 0 for a row that is never right, or always (LLaVA-OneVision-1.5-RL, arXiv
    2509.23661)."""
    return 1.0 - accuracy if accuracy > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TaskSizes:
    """The measure of a task: prompt tokens (0 without `length`), the shortest and the longest side of its images."""

    length: Callable[[Task], int] | None

    def __call__(self, task: Task) -> tuple[int, int | None, int | None]:
        sides = [side for image in task.images for side in (image.width, image.height)]
        tokens = self.length(task) if self.length is not None else 0
        return tokens, min(sides, default=None), max(sides, default=None)


def prepare_filter(
    sources: Sequence[Path],
    out: Path,
    limits: Limits,
    *,
    name: str = "train",
    rollouts: Sequence[Path] = (),
    correctness_rule: CorrectnessRule = RIGHT,
    length: Callable[[Task], int] | None = None,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """The rows within `limits` as NAME.parquet with a manifest, in the order of the sources.

    length: the number of prompt tokens of a task (`Encoder.length`), for limits.prompt_tokens. rollouts: see
    `answers_by_id`, for limits.accuracy and limits.gap; rows without answers are left out. Then extra_info.accuracy and
    extra_info.answers are added, which a curriculum can go by. Raises DataError for limits that nothing can measure,
    bad rows, ids that are not unique, and if no row is left.
    """
    require(Path(name).name == name, f"setting name: {name!r} is no name of a file")
    require(not limits.needs_answers or bool(rollouts), "a limit on accuracy or gap needs the rollouts of a model")
    require(limits.prompt_tokens is None or length is not None, "a limit on prompt tokens needs a model folder")
    table, found = reading(sources, measure=TaskSizes(length))
    counts = {"rows read": len(table)}
    kept = _by_size(found.measures, limits, counts)
    accuracy: dict[str, dict[str, Any]] = {}
    if limits.needs_answers:
        accuracy = accuracy_by_id(rollouts, correctness_rule)
        require_shared_ids(table, accuracy)
        kept = _by_accuracy(table, kept, accuracy, limits, counts)
    require(bool(kept), f"{table.names}: no row is within the limits ({shown_counts(counts)})")
    return publish_tables(
        {name: table.select(kept)},
        out,
        problems=found.problems,
        settings={
            "limits": asdict(limits),
            **({"columns": dict(reading.columns)} if reading.columns else {}),
            **({"right": asdict(correctness_rule), "rollouts": rollout_hashes(rollouts)} if rollouts else {}),
        },
        counts=counts,
        notes=found.lines(),
        extra=(lambda task_id: accuracy[task_id]) if accuracy else None,
    )


def _by_size(measures: Sequence[Any], limits: Limits, counts: dict[str, int]) -> list[int]:
    kept = []
    refused = dict.fromkeys(("prompt too long", "image too small", "image too large"), 0)
    for index, (tokens, shortest, longest) in enumerate(measures):
        if limits.prompt_tokens is not None and tokens > limits.prompt_tokens:
            refused["prompt too long"] += 1
        elif limits.short_side is not None and shortest is not None and shortest < limits.short_side:
            refused["image too small"] += 1
        elif limits.long_side is not None and longest is not None and longest > limits.long_side:
            refused["image too large"] += 1
        else:
            kept.append(index)
    counts.update({reason: count for reason, count in refused.items() if count})
    return kept


def accuracy_by_id(rollouts: Sequence[Path], correctness_rule: CorrectnessRule) -> dict[str, dict[str, Any]]:
    """`accuracy_of` the answers to each row that has graded ones, by its id."""
    found = answers_by_id(rollouts)
    return {key: accuracy_of(answers, correctness_rule) for key, answers in found.items() if answers}


def require_shared_ids(table: TaskTable, answered: Mapping[str, Any]) -> None:
    """Raise DataError where no row has an answer: rows and answers are of different files, or their ids changed."""
    ids = rows_by_id(table)
    if answered and not ids.keys() & answered.keys():
        raise DataError(
            f"{table.names}: no row has an answer in the rollouts; both name rows by id, here such as "
            f"{next(iter(ids))}, there {next(iter(answered))}; rows without an id are named by their file: give the "
            "file of the run, or rows with a column id"
        )


def accuracy_of(answers: Sequence[ScoredAnswer], correctness_rule: CorrectnessRule) -> dict[str, Any]:
    """The share of right answers of a row, and how many there are."""
    return {"accuracy": sum(map(correctness_rule, answers)) / len(answers), "answers": len(answers)}


def _by_accuracy(
    table: TaskTable,
    rows: Sequence[int],
    accuracy: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    counts: dict[str, int],
) -> list[int]:
    low, high = limits.accuracy or (0.0, 1.0)
    least, most = limits.gap or (0.0, 1.0)
    part = table.select(rows)
    reasons = {"without enough answers": 0, "too hard": 0, "too easy": 0}
    reasons |= {"too small a gap": 0, "too large a gap": 0} if limits.gap else {}
    kept = []
    for task_id, position in rows_by_id(part).items():
        known = accuracy.get(task_id)
        if known is None or known["answers"] < limits.answers:
            reasons["without enough answers"] += 1
        elif known["accuracy"] < low:
            reasons["too hard"] += 1
        elif known["accuracy"] > high:
            reasons["too easy"] += 1
        elif gap_of(known["accuracy"]) < least:
            reasons["too small a gap"] += 1
        elif gap_of(known["accuracy"]) > most:
            reasons["too large a gap"] += 1
        else:
            kept.append(rows[position])
    counts.update(reasons)
    return kept
