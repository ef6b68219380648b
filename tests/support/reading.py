"""Tables of checked tasks for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.data.rows import Problem
from foveate.data.table import TaskTable
from foveate.data.validate import Check, OnBadRow, ReadOptions


def read_tasks(
    paths: Any,
    *,
    image_root: Path | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    check: Check | None = None,
) -> tuple[TaskTable, list[Problem]]:
    """The good rows, and the problems of the others."""
    table, found = ReadOptions(image_root, columns, on_bad_row)(paths, check=check)
    return table, found.problems
