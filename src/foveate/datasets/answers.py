"""What a model answered to the rows of a dataset, read back from the rollouts of a run or from an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.data.table import TaskTable
from foveate.records import FAILED, DataError

RIGHT_PARTS = ("accuracy", "hit")


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer with its score, the parts of the score, and whether it ended by itself ("stop")."""

    text: str
    score: float
    parts: Mapping[str, float]
    finished: bool


@dataclass(frozen=True, slots=True)
class CorrectnessRule:
    """What makes an answer right: the named part of its score (None: accuracy or hit where the reward has one, else the
    score itself) is at least `threshold`."""

    part: str | None = None
    threshold: float = 0.5

    def __call__(self, answer: ScoredAnswer) -> bool:
        if self.part is None:
            known = (answer.parts[name] for name in RIGHT_PARTS if name in answer.parts)
            return next(known, answer.score) >= self.threshold
        if self.part not in answer.parts:
            raise DataError(
                f"setting part: an answer has no part {self.part!r}; it has {', '.join(answer.parts) or 'none'}"
            )
        return answer.parts[self.part] >= self.threshold


RIGHT = CorrectnessRule()


def read_answers(paths: Sequence[Path]) -> dict[str, list[ScoredAnswer]]:
    """Answers by the id of their row, over all files; those that no grader could judge are left out.

    paths: rollouts (step_*.jsonl as `foveate rl` writes them), predictions of an evaluation, or folders: of a run, or
    with such files. Of a prediction with sampled answers these count, otherwise the greedy one does. Raises DataError
    naming file and line for what is neither, and if there is nothing.
    """
    found: dict[str, list[ScoredAnswer]] = {}
    for file in _files(paths):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    found.setdefault(str(record["id"]), []).extend(_answers(record))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise DataError(f"{file}, line {number}: no line of rollouts or predictions ({reason})") from error
    if not any(found.values()):
        raise DataError(f"{', '.join(map(str, paths))}: no graded answers in there")
    return found


def by_id(table: TaskTable) -> dict[str, int]:
    """The row of each id. Raises DataError for ids that stand for several rows."""
    rows: dict[str, int] = {}
    for index, task in enumerate(table):
        if task.id in rows:
            raise DataError(
                f"{task.where}: the id {task.id!r} is also that of {table[rows[task.id]].where}; answers are matched "
                "to rows by id, so give each row an extra_info.id of its own"
            )
        rows[task.id] = index
    return rows


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
            continue
        inside = next((path / name for name in ("rollouts", "evals") if (path / name).is_dir()), path)
        files = sorted(inside.glob("step_*.jsonl"))
        if not files:
            raise DataError(f"{path}: no rollouts there; give step_*.jsonl files or the folder of a run")
        yield from files


def _answers(record: Mapping[str, Any]) -> list[ScoredAnswer]:
    if "answers" in record:
        return [
            ScoredAnswer(str(a["text"]), float(a["score"]), a["parts"], a["finish"] == "stop")
            for a in record["answers"]
            if not a["note"].startswith(FAILED)
        ]
    drawn = record["sampled"] or [record]
    return [ScoredAnswer(str(a["text"]), float(a["score"]), _box_parts(a), True) for a in drawn]


def _box_parts(answer: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(answer[name]) for name in ("iou", "hit") if answer[name] is not None}
