"""Every row of a table looked at before anything else is done with it, in worker processes where there are many."""

from __future__ import annotations

import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from foveate.config.data import MAX_PIXELS
from foveate.data.parsers import Parser
from foveate.data.recognise import SCHEMA_FIELDS
from foveate.data.rows import Problem, fault_of
from foveate.data.statistics import FactsCollector, RowFacts, Statistics, dropped_line, row_facts
from foveate.data.table import TaskTable, open_tasks
from foveate.errors import DataError, counted, require
from foveate.log import progress as progress_bar
from foveate.processes import end_with, lifeline, worker_context
from foveate.records import Task

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]
Check = Callable[[Task], Sequence[tuple[str, str]]]
"""The faults of a task, as (field, what is wrong)."""
Measure = Callable[[Task], Any]
Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""

CHUNK_ROWS = 256
ROWS_PER_WORKER = 4000  # below this a process of its own takes longer to start than to work
MAX_WORKERS = 8
LISTED = 20


@dataclass(frozen=True, slots=True)
class RowResult:
    """The findings on one row: problems, warnings, and of a good row its numbers and its measure."""

    problems: list[Problem]
    warnings: list[Problem]
    facts: RowFacts | None
    measure: Any


@dataclass(frozen=True, slots=True)
class RowInspection:
    """The work on each row: its check, a measure taken of every row that is good, and what counts the tokens of its
    prompt (None: its characters count), whose DataError is a fault of the row, too."""

    check: Check | None = None
    measure: Measure | None = None
    length: Callable[[Task], int] | None = None

    def __call__(self, table: TaskTable, index: int, count: int) -> Iterator[RowResult]:
        for task, found in table.inspect_range(index, count):
            warnings = [problem for problem in found if problem.warning]
            problems = [problem for problem in found if not problem.warning]
            facts = None
            if task is not None:
                faults = list(self.check(task)) if self.check is not None else []
                try:
                    facts = row_facts(task, self.length)
                except DataError as error:
                    faults.append(fault_of(error, task.where))
                problems = [Problem(task.where, field, what) for field, what in faults]
            if task is None or problems:
                yield RowResult(problems, warnings, None, None)
            else:
                yield RowResult([], warnings, facts, self.measure(task) if self.measure is not None else None)


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """The result over all rows: the indices of the good ones, all problems in order, the measure of each good one, the
    first warning of each kind with the number of rows that it is about, and the good rows in numbers."""

    kept: list[int]
    problems: list[Problem]
    measures: list[Any]
    warnings: dict[Problem, int]
    statistics: Statistics
    total: int

    def warning_lines(self) -> list[str]:
        """The warnings, a line for each kind."""
        return [
            f"{problem}" + (f" (and in {counted(count - 1, 'more row')})" if count > 1 else "")
            for problem, count in self.warnings.items()
        ]

    def stand_in(self, table: TaskTable) -> str:
        """The mapping that takes from another column what the first bad row lacks; empty where there is none."""
        if not self.problems:
            return ""
        index = next(i for i, kept in zip_longest(range(self.total), self.kept) if i != kept)
        return table.stand_in(index, self.problems[0].field.split(" ")[0])

    def lines(self) -> list[str]:
        """The rows in numbers, for a person."""
        return [dropped_line(self.problems, self.total), *self.statistics.lines()]


def inspect_rows(
    table: TaskTable, inspection: RowInspection, *, workers: int | None = None, progress: Progress | None = None
) -> ValidationReport:
    """Look at every row, headers of images included.

    workers: processes; None for one per core and 4,000 rows, at most 8. With one, the rows are looked at in this
    process, and so are they if `inspection` cannot be pickled (a check from a file of the user). Raises DataError if a
    worker is killed from outside.
    """
    kept, problems, measures = [], [], []
    first: dict[tuple[str, str], Problem] = {}
    warnings: Counter[Problem] = Counter()
    facts = FactsCollector()
    for index, result in enumerate(_results(table, inspection, _worker_count(table, inspection, workers))):
        problems.extend(result.problems)
        for warning in result.warnings:
            warnings[first.setdefault((warning.field, warning.what), warning)] += 1
        if result.facts is not None:
            kept.append(index)
            measures.append(result.measure)
            facts.add(result.facts)
        if progress is not None:
            progress(index + 1, len(table))
    unit = "characters" if inspection.length is None else "tokens"
    return ValidationReport(kept, problems, measures, dict(warnings), facts.statistics(unit), len(table))


def validate(
    table: TaskTable,
    *,
    on_bad_row: OnBadRow = "error",
    check: Check | None = None,
    workers: int | None = None,
) -> tuple[list[int], list[Problem]]:
    """Look at every row and return the indices of the good ones and all problems.

    check: further demands on a task, such as `rewards.boxes.check_box`. workers: as for `inspect_rows`. With "error"
    any problem raises one DataError: the first problem, and how many more there are; the first 20 are logged. With
    "skip" bad rows are left out; that no row is left raises DataError too.
    """
    found = inspect_rows(table, RowInspection(check), workers=workers)
    raise_on_bad_rows(table, found, on_bad_row)
    for line in found.warning_lines():
        logger.warning("%s", line)
    return found.kept, found.problems


def raise_on_bad_rows(table: TaskTable, found: ValidationReport, on_bad_row: OnBadRow) -> None:
    """Raise DataError for bad rows that may not be skipped, and if no good row is left."""
    require(on_bad_row in ("error", "skip"), f"setting on_bad_row: must be error or skip, not {on_bad_row!r}")
    problems = found.problems
    mapping = found.stand_in(table)
    if problems and (missing := _missing_column(table, problems, mapping)):
        raise DataError(missing)
    if problems and on_bad_row == "error":
        lines = grouped(problems)
        more = f"; and {counted(len(lines) - 1, 'more problem')}" if len(lines) > 1 else ""
        for line in lines[:LISTED] if more else []:
            logger.error("%s", line)
        hint = "fix the data (`foveate data check` lists all problems), or leave such rows out with --on-bad-row skip"
        remedy = f"take it from another column: --column {mapping}; " if mapping else ""
        raise DataError(f"{lines[0]}{more} ({remedy}{hint})")
    if not found.kept:
        said = f"{table.names}: none of the {len(table)} rows can be used; the first problem: {problems[0]}"
        raise DataError(said + (f"; take it from another column: --column {mapping}" if mapping else ""))


def _missing_column(table: TaskTable, problems: Sequence[Problem], mapping: str) -> str:
    """One line for a role of which no row has a value, and which therefore all rows lack; else nothing. `mapping` may
    say which column can stand in for it."""
    rows = Counter(problem.field for problem in problems)
    for role in ("answer", "response", "chosen", "rejected"):
        field = SCHEMA_FIELDS[role]
        if rows[field] >= len(table) and not any(value is not None for value in table.values(field)):
            what = next(problem for problem in problems if problem.field == field).what
            need = what.partition("; ")[2] or what
            column = mapping.partition("=")[2] if mapping.startswith(f"{role}=") else "COLUMN"
            return (
                f"{table.names}: no column holds the {role} ({need}); the columns are {', '.join(table.columns)}; name "
                f"the one that does: --column {role}={column} (in a recipe data.columns: {{{role}: {column}}})"
            )
    return ""


def grouped(problems: Sequence[Problem]) -> list[str]:
    """Problems as lines, one for those that are the same in several rows."""
    counts = Counter((problem.field, problem.what) for problem in problems)
    first = {(problem.field, problem.what): problem for problem in reversed(problems)}
    ordered = sorted(first.items(), key=lambda item: problems.index(item[1]))
    return [
        f"{one}" + (f" (and in {counted(n - 1, 'more row')})" if (n := counts[key]) > 1 else "") for key, one in ordered
    ]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are opened and every row of them checked: see `table.open_tasks`, `inspect_rows` and `validate`.
    Calling it reads."""

    image_root: Path | None = None
    columns: Mapping[str, str] | None = None
    on_bad_row: OnBadRow = "error"
    workers: int | None = None
    max_image_pixels: int = MAX_PIXELS

    def __call__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        parser: Parser | None = None,
        check: Check | None = None,
        measure: Measure | None = None,
    ) -> tuple[TaskTable, ValidationReport]:
        """The table of the good rows, and what was found, its measures being those of the rows of the table."""
        table = open_tasks(
            paths,
            image_root=self.image_root,
            columns=self.columns,
            parser=parser,
            max_image_pixels=self.max_image_pixels,
        )
        with progress_bar(f"checking {table.names:.60}", len(table)) as advance:
            inspection = RowInspection(check, measure)
            found = inspect_rows(table, inspection, workers=self.workers, progress=lambda *_: advance(1))
        raise_on_bad_rows(table, found, self.on_bad_row)
        for line in table.described():
            logger.info("%s", line)
        for line in found.warning_lines():
            logger.warning("%s", line)
        return table.select(found.kept).with_statistics(found.statistics), found


AS_IS = ReadOptions()
"""Sources in the usual form, without bad rows."""


# ---------------------------------------------------------------------------------------------------------- workers


def _worker_count(table: TaskTable, inspection: RowInspection, workers: int | None) -> int:
    if workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS, len(table) // ROWS_PER_WORKER)
    if workers > 1:
        try:
            pickle.dumps(inspection)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            logger.info("the rows are checked in one process, since the check cannot be sent to others (%s)", error)
            return 1
    return max(1, workers)


def _results(table: TaskTable, inspection: RowInspection, workers: int) -> Iterator[RowResult]:
    if workers == 1:
        yield from inspection(table, 0, len(table))
        return
    owner, _kept = lifeline()
    with ProcessPoolExecutor(workers, worker_context([__name__]), _begin, (owner, table, inspection)) as pool:
        try:
            for results in pool.map(_look_at, range(0, len(table), CHUNK_ROWS)):
                yield from results
        except BrokenProcessPool as error:
            raise DataError(
                f"{table.names}: a process that checked rows was killed (out of memory?); use fewer with data.workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_WORK: list[tuple[TaskTable, RowInspection]] = []
"""In a worker process: the table and the inspection that it was started for."""


def _begin(owner: Connection, table: TaskTable, inspection: RowInspection) -> None:
    end_with(owner)
    _WORK[:] = [(table, inspection)]


def _look_at(first: int) -> list[RowResult]:
    table, inspection = _WORK[0]
    return list(inspection(table, first, CHUNK_ROWS))
