"""Hints for rows that a model never solves, as data: the question of such a row carries the hint that the row holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foveate.data.answers import RIGHT, CorrectnessRule
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.filter import accuracy_by_id, require_shared_ids
from foveate.datasets.prepared import Prepared, infer_schema, publish, rollout_hashes, task_row
from foveate.errors import require
from foveate.records import Task

_MARK = "{hint}"
_TAG = re.compile("<(image|video)>")


@dataclass(frozen=True, slots=True)
class HintRule:
    """Which rows get a hint, and how. field: of extra_info, with the hint; at_most: the largest share of right answers
    of a row that gets it; form: what joins the last question, on a line of its own, with {hint} filled in."""

    field: str = "hint"
    at_most: float = 0.0
    form: str = "Hint: {hint}"

    def __post_init__(self) -> None:
        require(_MARK in self.form, f"setting form: {self.form!r} must contain {_MARK}, the place of the hint")

    def hinted(self, task: Task) -> Task:
        """The task with its hint behind the last question; `<image>` in a hint is a word and no mark."""
        place = max(i for i, message in enumerate(task.messages) if message.role == "user")
        asked = task.messages[place]
        hint = _TAG.sub(r"\1", self.form.replace(_MARK, str(task.meta[self.field]).strip()))
        messages = list(task.messages)
        messages[place] = replace(asked, content=f"{asked.content}\n{hint}")
        return replace(task, messages=tuple(messages))


def prepare_hints(
    sources: Sequence[Path],
    out: Path,
    rule: HintRule,
    *,
    rollouts: Sequence[Path],
    correctness_rule: CorrectnessRule = RIGHT,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """All rows as train.parquet with a manifest, those with a hint that `rollouts` never solve with it in the question
    and extra_info.hinted 1. Rows without answers stay as they are. Keye-VL-1.5 (arXiv 2509.01563) trains on such rows,
    whose groups would else have equal rewards. Raises DataError for bad rows, ids that are not unique, and if no row
    gets a hint."""
    table, found = reading(sources)
    accuracy = accuracy_by_id(rollouts, correctness_rule)
    require_shared_ids(table, accuracy)
    counts = {"rows with a hint": 0, "unsolved rows without a hint": 0}
    chosen: set[str] = set()
    for task in table:
        known = accuracy.get(task.id)
        if known is None or known["accuracy"] > rule.at_most:
            continue
        has_hint = bool(str(task.meta.get(rule.field, "")).strip())
        counts["rows with a hint" if has_hint else "unsolved rows without a hint"] += 1
        if has_hint:
            chosen.add(task.id)
    unsolved = sum(counts.values())
    require(bool(chosen), f"{table.names}: no hint in extra_info.{rule.field} of {unsolved} rows that are never solved")
    schema = infer_schema(_rows(table, rule, chosen, images=False))
    return publish(
        out,
        {"train": _rows(table, rule, chosen)},
        schema,
        total=len(table),
        sources=table.files,
        settings={"hints": asdict(rule), "right": asdict(correctness_rule), "rollouts": rollout_hashes(rollouts)},
        problems=found.problems,
        counts=counts,
        notes=found.lines(),
    )


def _rows(table: TaskTable, rule: HintRule, chosen: set[str], images: bool = True) -> Iterator[dict[str, Any]]:
    for task in table:
        is_hinted = task.id in chosen
        yield task_row(rule.hinted(task) if is_hinted else task, images=images, hinted=int(is_hinted))
