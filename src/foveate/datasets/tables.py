"""Prepare a dataset of any origin: its splits, or all of its rows with a share held out, in the parquet schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.parsers import Parser
from foveate.data.rows import Problem
from foveate.data.sources import expand
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.grounding_sets import hold_out
from foveate.datasets.prepared import Prepared, infer_schema, publish, task_row
from foveate.records import require


def prepare_rows(
    sources: Sequence[Path],
    out: Path,
    *,
    parser: Parser | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    reading: ReadOptions = AS_IS,
    settings: Mapping[str, Any] | None = None,
) -> Prepared:
    """Rows of any parquet, JSONL or Arrow files as train.parquet, test.parquet and manifest.json.

    parser: what reads the rows, if not the schema or `reading.columns`. test_fraction: the share of rows that is held
    out at random by `seed`; 0 holds out none. Pictures are named by absolute path, or embedded where they were. The
    same sources, options and seed give the same bytes. Raises DataError for bad rows (unless they are skipped) and for
    ground truths of different types.
    """
    require(0.0 <= test_fraction <= 1.0, f"setting test_fraction: must be within 0..1, not {test_fraction}")
    table, found = reading(sources, parser=parser)
    splits = hold_out(range(len(table)), test_fraction, np.random.default_rng(seed), "row")
    said = {"columns": dict(reading.columns)} if reading.columns else {}
    return publish_tables(
        {name: table.select(rows) for name, rows in splits.items()},
        out,
        problems=found.problems,
        settings={**said, **(settings or {}), "test_fraction": test_fraction, "seed": seed},
    )


def prepare_splits(
    source: Path,
    out: Path,
    parser: Parser,
    split_of: Callable[[Path], str],
    *,
    settings: Mapping[str, Any],
    reading: ReadOptions,
) -> Prepared:
    """The files of a dataset as one parquet file per split; `split_of` names the split of a file."""
    members: dict[str, list[Path]] = {}
    for file in expand(source):
        members.setdefault(split_of(file), []).append(file)
    tables: dict[str, TaskTable] = {}
    problems: list[Problem] = []
    for name, files in members.items():
        tables[name], found = reading(files, parser=parser)
        problems += found.problems
    return publish_tables(tables, out, problems=problems, settings=settings)


def publish_tables(
    tables: Mapping[str, TaskTable],
    out: Path,
    *,
    problems: Sequence[Problem],
    settings: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    extra: Callable[[str], Mapping[str, Any]] | None = None,
) -> Prepared:
    """Write each table as NAME.parquet, all with one schema that fits their rows. extra: from the id of a task to what
    joins its `extra_info`."""
    schema = infer_schema(row for name, table in tables.items() for row in _rows(table, name, extra, pictures=False))
    files = {name: _rows(table, name, extra) for name, table in tables.items()}
    sources = dict.fromkeys(path for table in tables.values() for path in table.files)
    return publish(
        out, files, schema, total=sum(map(len, tables.values())), sources=list(sources), settings=settings,
        problems=problems, counts=counts,
    )  # fmt: skip


def _rows(
    table: TaskTable, split: str, extra: Callable[[str], Mapping[str, Any]] | None, pictures: bool = True
) -> Iterator[dict[str, Any]]:
    for position, task in enumerate(table):
        more = extra(task.id) if extra is not None else {}
        yield task_row(task, pictures=pictures, split=split, index=position, **more)
