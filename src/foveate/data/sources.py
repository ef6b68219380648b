"""Files of rows, read by index: the protocol, parquet, and the Arrow files that `datasets` saves.

A source is plain to pickle: worker processes open the files again.
"""

from __future__ import annotations

import ast
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from foveate.errors import DataError, one_line

BLOCK_ROWS = 64
MOST_CHARACTERS = 2**20
"""Of a list or mapping in a cell of text."""

MOST_ROWS = 2**30
SANE_ROWS, SANE_RATIO = 2**22, 200
"""A file of more rows than that, and than so many times its bytes, is refused: it holds none."""
_DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, SystemError)
"""The errors of pyarrow for a file that is damaged."""

Raw = dict[str, Any] | DataError
"""The fields of a row, or why it cannot be read."""


class Source(Protocol):
    """The rows of one file."""

    path: Path
    names: list[str] | None
    """Its columns; None for JSON, where every row may have others."""

    def __len__(self) -> int: ...

    def block(self, first: int, count: int) -> Iterator[Raw]:
        """`count` rows from row `first` on; they must exist."""
        ...

    def line(self, row: int) -> int | None:  # noqa: ARG002 - parquet and Arrow have no lines
        """The line of a row in a text file, from 1; None for other files."""
        return None

    def only(self, columns: Sequence[str]) -> None:
        """Read no other columns from now on, where the format can save that."""

    def values(self, path: Sequence[str]) -> list[Any]:
        """One value of every row: column, then fields of it; None where a row lacks it."""
        ...


def dig(value: Any, path: Sequence[str]) -> Any:
    """A field of a field of a value; None where there is none."""
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def read_literal(text: str) -> Any:
    """The list or mapping that a text is, written as JSON or Python; None for any other text."""
    if text.strip()[:1] not in ("[", "{") or len(text) > MOST_CHARACTERS:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: a list as a key
            continue
        return found if isinstance(found, list | dict) else None
    return None


# ---------------------------------------------------------------------------------------------------------- parquet


class RowGroups:
    """The parquet row groups read last, up to a number of bytes, over all files of a table."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held = 0
        self.tables: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.budget,)

    def read(self, path: Path, file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        key = (path, group)
        if key not in self.tables:
            try:
                table = file.read_row_group(group, columns=columns, use_threads=False)
            except _DAMAGED as error:
                raise DataError(f"row group {group} cannot be read ({one_line(error)})") from error
            self.tables[key] = table
            self.held += table.nbytes
            while len(self.tables) > 1 and self.held > self.budget:
                self.held -= self.tables.popitem(last=False)[1].nbytes
        self.tables.move_to_end(key)
        return self.tables[key]


class ParquetRows(Source):
    """The rows of a parquet file."""

    def __init__(self, path: Path, cache: RowGroups, columns: Sequence[str] | None = None) -> None:
        self.path, self.cache = path, cache
        try:
            self.file = pq.ParquetFile(path)
            self.names: list[str] | None = self.file.schema_arrow.names
            metadata = self.file.metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except _DAMAGED as error:
            raise DataError(f"{path}: cannot be read as parquet ({one_line(error)})") from error
        if min(counts, default=0) < 0 or sum(counts) > MOST_ROWS:
            raise DataError(f"{path}: cannot be read as parquet (it says that it has {sum(counts)} rows)")
        if sum(counts) > max(SANE_ROWS, SANE_RATIO * path.stat().st_size):
            size = path.stat().st_size
            raise DataError(f"{path}: {sum(counts):,} rows in {size:,} bytes; rows of nothing are not read")
        self.columns = list(self.file.schema_arrow.names if columns is None else columns)
        self.ends = list(accumulate(counts))

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetRows, (self.path, self.cache, self.columns)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def only(self, columns: Sequence[str]) -> None:
        assert self.names is not None
        self.columns = [name for name in self.names if name in columns]

    def block(self, first: int, count: int) -> Iterator[Raw]:
        end = first + count
        while first < end:
            group = bisect_right(self.ends, first)
            start = self.ends[group - 1] if group else 0
            take = min(end, self.ends[group], first + BLOCK_ROWS) - first
            try:
                table = self._whole(self.cache.read(self.path, self.file, group, self.columns), group)
                yield from _raw_rows(table.slice(first - start, take))
            except DataError as error:
                yield from [error] * take
            first += take

    def _whole(self, table: pa.Table, group: int) -> pa.Table:
        said = self.ends[group] - (self.ends[group - 1] if group else 0)
        if table.num_rows != said:
            raise DataError(f"row group {group} has {table.num_rows} rows where the file says {said}")
        return table

    def values(self, path: Sequence[str]) -> list[Any]:
        assert self.names is not None
        if path[0] not in self.names:
            return [None] * len(self)
        found: list[Any] = []
        for group in range(len(self.ends)):
            try:
                table = self.file.read_row_group(group, columns=[".".join(path)], use_threads=False)
                if table.num_columns == 0:  # the struct has no such field
                    return [None] * len(self)
                column = _checked(self._whole(table, group)).column(0)
                found.extend(dig(value, path[1:]) for value in column.to_pylist())
            except _DAMAGED as error:
                raise DataError(f"{self.path}: row group {group} cannot be read ({one_line(error)})") from error
        return found


# ------------------------------------------------------------------------------------------------------------ arrow


class ArrowRows(Source):
    """The rows of an Arrow file in the stream or the file format, mapped into memory and not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.table = _mapped(path)
            self.names: list[str] | None = self.table.column_names
        except _DAMAGED as error:
            raise DataError(f"{path}: cannot be read as Arrow ({one_line(error)})") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowRows, (self.path,)

    def __len__(self) -> int:
        return self.table.num_rows

    def only(self, columns: Sequence[str]) -> None:
        self.table = self.table.select([name for name in self.table.column_names if name in columns])

    def block(self, first: int, count: int) -> Iterator[Raw]:
        for begin in range(first, first + count, BLOCK_ROWS):
            yield from _raw_rows(self.table.slice(begin, min(BLOCK_ROWS, first + count - begin)))

    def values(self, path: Sequence[str]) -> list[Any]:
        if path[0] not in self.table.column_names:
            return [None] * len(self)
        try:
            return [dig(value, path[1:]) for value in _checked(self.table.select([path[0]])).column(0).to_pylist()]
        except _DAMAGED as error:
            raise DataError(f"{self.path}: field {'.'.join(path)} cannot be read ({one_line(error)})") from error


def _raw_rows(table: pa.Table) -> list[Raw]:
    """The rows of a small table; of a damaged one those that can be read, and of each other one why not."""
    try:
        return _checked(table).to_pylist()
    except _DAMAGED as error:
        if table.num_rows == 1:
            return [DataError(f"is damaged ({one_line(error)})")]
    return [row for index in range(table.num_rows) for row in _raw_rows(table.slice(index, 1))]


def _checked(table: pa.Table) -> pa.Table:
    """The table itself. Raises ArrowInvalid where an offset leads out of its buffer, which would end the process when
    the value is taken, and where text is no UTF-8."""
    table.validate(full=True)
    return table


def _mapped(path: Path) -> pa.Table:
    file = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(file).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(file).read_all()
