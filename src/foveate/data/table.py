"""Datasets on disk: the field's parquet schema written atomically, and tasks read row by row on demand.

The schema: data_source, prompt [{role, content}], images [{bytes, path}], ability, reward_model {style, ground_truth},
extra_info {...}. Rows of other forms are recognised by their columns (`recognise.COLUMNS`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foveate.config.data import MAX_PIXELS
from foveate.data.folders import SUFFIXES, expand, open_source, suffix_of
from foveate.data.hub import dataset_files, is_hub_name
from foveate.data.images import ImageOptions
from foveate.data.parsers import Parser, RecognisedRows
from foveate.data.recognise import SCHEMA_FIELDS
from foveate.data.rows import Parsed, Place, Problem
from foveate.data.sources import BLOCK_ROWS, Raw, RowGroups, Source
from foveate.data.statistics import Statistics
from foveate.errors import DataError, one_line
from foveate.files import atomic_path
from foveate.records import Task

BOX = pa.list_(pa.float64())
# A row group is read as a whole, and each takes memory as long as its file is open: small ones make access to shuffled
# rows fast, few ones keep a file of a million rows small.
GROUP_ROWS = 512
GROUP_BYTES = 2**20  # of embedded images
CACHE_BYTES = 64 * 2**20
FIRST_ROWS = 200  # of a file, which are looked at when it is opened, where that is needed


# ------------------------------------------------------------------------------------------------------------ write


def row_schema(ground_truth: pa.DataType, extra_info: Mapping[str, pa.DataType], *, videos: bool = False) -> pa.Schema:
    """The schema of parquet files with this type of `reward_model.ground_truth`, these fields and a column `videos`."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("images", pa.list_(image)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", ground_truth)])),
            ("extra_info", pa.struct(list(extra_info.items()))),
            *([("videos", pa.list_(image))] if videos else []),
        ]
    )


def write_rows(
    path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, *, advance: Callable[[int], None] = lambda _: None
) -> int:
    """Write rows of the parquet schema and return how many there were; `advance` is told of each group of rows.

    `rows` is consumed group by group, so it may be larger than memory. Images and videos are paths, bytes or {bytes,
    path}. The file appears under its name only when it is complete: after an error, a kill or a full disk an older file
    of that name is still there, whole. The same rows give the same bytes. Raises DataError for a row that does not fit
    `schema`, and DiskError where the file cannot be written.
    """
    count = 0
    _require_children(path, schema)
    with atomic_path(path) as temporary, _writer(path, temporary, schema) as writer:
        for group in _groups(rows):
            writer.write_table(_table(path, group, count, schema))
            count += len(group)
            advance(len(group))
    return count


def _writer(path: Path, temporary: Path, schema: pa.Schema) -> pq.ParquetWriter:
    try:
        return pq.ParquetWriter(temporary, schema, compression="zstd", write_statistics=False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, UnicodeEncodeError) as error:
        what = f"a column that parquet cannot hold ({one_line(error)}); leave it out, or write it as text"
        raise DataError(f"{path}: {what}") from error


def _require_children(path: Path, schema: pa.Schema) -> None:
    """Parquet has no mapping without a key, which empty ones in all rows would need."""
    kinds = [(field.name, field.type) for field in schema]
    for name, kind in kinds:  # grows
        if pa.types.is_struct(kind):
            if kind.num_fields == 0:
                raise DataError(f"{path}, field {name}: is an empty mapping in every row; leave it out")
            kinds += [(f"{name}.{field.name}", field.type) for field in kind]
        elif pa.types.is_list(kind):
            kinds.append((name, kind.value_type))


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(_embedded(image) for image in (*row["images"], *row.get("videos", ())))
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _embedded(image: Any) -> int:
    data = image.get("bytes") if isinstance(image, Mapping) else image
    return len(data) if isinstance(data, bytes) else 0


def _table(path: Path, group: list[dict[str, Any]], first: int, schema: pa.Schema) -> pa.Table:
    fields, media = set(schema.names), {"images", "videos"} & set(schema.names)  # rows of images need no videos
    extra = {field.name for field in schema.field("extra_info").type}
    for offset, row in enumerate(group):
        if (own := set(row) | media) != fields or not set(row["extra_info"]) <= extra:
            odd = sorted((own ^ fields) | (set(row.get("extra_info", ())) - extra))
            raise DataError(f"{path}, row {first + offset}: fields {', '.join(odd)} do not fit the schema of the file")
    ready = [{**row, **{name: [_image_entry(one) for one in row.get(name, ())] for name in media}} for row in group]
    try:
        return pa.Table.from_pylist(ready, schema=schema)
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        UnicodeEncodeError,
        OverflowError,
    ) as error:
        raise DataError(f"{path}, rows {first}..{first + len(group) - 1}: {one_line(error)}") from error


def _image_entry(image: Any) -> dict[str, Any]:
    if isinstance(image, Mapping):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": str(image)}


# ------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file of a table: its rows, the parser that was settled for it, which of the given paths it belongs to, and what
    it is called in the ids of rows without one."""

    source: Source
    parser: Parser
    path: int
    name: str

    def __len__(self) -> int:
        return len(self.source)


class TaskTable:
    """Tasks of one or several files by index, read when asked for. `len(table)`, `table[i]`.

    `table[i]` raises DataError with the first problem of that row; `inspect(i)` returns all of them. Made by
    `open_tasks` or `validate.ReadOptions`. A table can be pickled; the files are opened again where it arrives.
    """

    def __init__(
        self,
        files: Sequence[TableFile],
        images: ImageOptions,
        kept: np.ndarray,
        statistics: Statistics | None = None,
    ) -> None:
        self._files, self._images, self._kept = files, images, kept
        self.statistics = statistics
        """The rows in numbers, where all of them were looked at."""
        self._ends = np.cumsum([len(file) for file in files])

    @property
    def names(self) -> str:
        """The files of the table, for messages."""
        return ", ".join(map(str, self.files))

    @property
    def files(self) -> list[Path]:
        """The files of the table."""
        return [file.source.path for file in self._files]

    @property
    def paths(self) -> list[Path]:
        """The first file of each path that `open_tasks` was given."""
        first: dict[int, Path] = {}
        for file in self._files:
            first.setdefault(file.path, file.source.path)
        return [first[number] for number in sorted(first)]

    @property
    def columns(self) -> list[str]:
        """The columns of the files; of JSON those of the first row."""
        names: dict[str, None] = {}
        for file in self._files:
            first = file.source.names
            if first is None:
                first = next(
                    (list(row) for row in file.source.block(0, min(1, len(file))) if isinstance(row, dict)), []
                )
            names |= dict.fromkeys(map(str, first))
        return list(names)

    @property
    def path_of(self) -> np.ndarray:
        """For each row the index of its path among those that `open_tasks` was given, int64 (rows,)."""
        paths = np.array([file.path for file in self._files], dtype=np.int64)
        return paths[np.searchsorted(self._ends, self._kept, side="right")]

    def source_names(self) -> list[str]:
        """The `data_source` of every row."""
        if self.statistics is None:
            return [task.source for task in self]
        return [self.statistics.sources[number] for number in self.statistics.rows_R5[:, 0].tolist()]

    def described(self) -> list[str]:
        """The form of the rows, and what is read from where: a line for each file, and one for files that are alike."""
        lines: dict[str, list[str]] = {}
        for file in self._files:
            first = next((row for row in file.source.block(0, min(1, len(file))) if isinstance(row, dict)), None)
            for line in file.parser.described(first) if first is not None else ():
                lines.setdefault(line, []).append(file.source.path.name)
        return [f"{', '.join(names)}: {line}" for line, names in lines.items()]

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Task]:
        """Every task in order; rows that lie together are read together, which takes a fourth of the time of
        `table[i]`. Raises DataError as `table[i]` does."""
        for first in range(0, len(self), BLOCK_ROWS):
            for task, problems in self.inspect_range(first, BLOCK_ROWS):
                if task is None:
                    raise DataError(_first(problems))
                yield task

    def __getitem__(self, index: int) -> Task:
        task, problems = self.inspect(index)
        if task is None:
            raise DataError(_first(problems))
        return task

    def inspect(self, index: int) -> Parsed:
        """The task at `index` and what is told of it (warnings), or None and every problem of its row."""
        return next(self.inspect_range(range(len(self))[index], 1))

    def inspect_range(self, first: int, count: int) -> Iterator[Parsed]:
        """`inspect` for `count` rows from `first` on; rows that lie together in a file are read together."""
        rows = self._kept[first : first + count]
        numbers = np.searchsorted(self._ends, rows, side="right")
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(numbers) != 0)) + 1
        for run in np.split(np.arange(len(rows)), breaks):
            number = int(numbers[run[0]])
            begin = int(rows[run[0]] - (self._ends[number - 1] if number else 0))
            for offset, raw in enumerate(self._files[number].source.block(begin, len(run))):
                yield self._parsed(self._files[number], begin + offset, raw)

    def values(self, field: str) -> list[Any]:
        """One field of the schema (`extra_info.accuracy`) of every row, None where a row lacks it, without looking at
        anything else."""
        everything = [value for file in self._files for value in _values(file, field)]
        return [everything[row] for row in self._kept]

    def stand_in(self, index: int, field: str) -> str:
        """The mapping, as `TARGET=COLUMN`, that fills a field of the schema which the row at `index` lacks; empty if no
        other column can."""
        task = self.inspect(index)[0]
        if task is not None:
            value = task.answer if field == SCHEMA_FIELDS["answer"] else task.meta.get(field.split(".")[-1])
            if value is not None and value != "":
                return ""
        row = int(self._kept[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        raw = next(self._files[number].source.block(row - int(self._ends[number - 1] if number else 0), 1))
        parser = self._files[number].parser
        return parser.stand_in(raw, field) if isinstance(parser, RecognisedRows) and isinstance(raw, dict) else ""

    def select(self, indices: Sequence[int] | np.ndarray) -> TaskTable:
        """The same files with only these rows, in this order."""
        kept = self._kept[np.asarray(indices, dtype=np.int64)]
        numbers = None if self.statistics is None else self.statistics.select(indices)
        return TaskTable(self._files, self._images, kept, numbers)

    def with_statistics(self, statistics: Statistics) -> TaskTable:
        """The same rows with their numbers."""
        return TaskTable(self._files, self._images, self._kept, statistics)

    def first(self, count: int | None) -> TaskTable:
        """The first `count` rows, all where there are fewer or `count` is None."""
        return self.select(range(len(self) if count is None else min(count, len(self))))

    def of_each_source(self, count: int | None) -> TaskTable:
        """`count` rows, the first ones of each source by turns, in the order of the table; all as for `first`."""
        if count is None or count >= len(self):
            return self
        seen: Counter[str] = Counter()
        turns = []
        for row, name in enumerate(self.source_names()):
            seen[name] += 1
            turns.append((seen[name], row))
        return self.select(sorted(row for _, row in sorted(turns)[:count]))

    def _parsed(self, file: TableFile, row: int, raw: Raw) -> Parsed:
        place = _place(file.source, row, file.name, self._images)
        return (None, [Problem(str(place), "", str(raw))]) if isinstance(raw, DataError) else file.parser(raw, place)


def open_tasks(
    paths: str | Path | Sequence[str | Path],
    *,
    image_root: Path | None = None,
    columns: Mapping[str, str] | None = None,
    parser: Parser | None = None,
    max_image_pixels: int = MAX_PIXELS,
) -> TaskTable:
    """Open files of rows (`folders.SUFFIXES`) and folders of datasets as one table, with no more than a look at the
    first rows of each whose columns leave the form of its rows open.

    image_root: where relative image paths are looked up first; then the folder of the file, then the working directory.
    columns: what columns of other names are for, see `parsers.RecognisedRows`. parser: what else reads the rows.
    max_image_pixels: larger images are refused. Raises DataError for a file that is missing, unreadable or without a
    needed column, for a folder of several splits without `@SPLIT`, and if there are no rows at all.
    """
    parser = parser or RecognisedRows(columns or {})
    images = ImageOptions(image_root, max_image_pixels)
    cache = RowGroups(CACHE_BYTES)
    given = [paths] if isinstance(paths, str | Path) else paths
    found = [(file, number) for number, path in enumerate(given) for file in _files(path)]
    names = _short_names([file for file, _ in found])
    files = [
        TableFile(source, _settled(parser, source, name, images), number, name)
        for (file, number), name in zip(found, names, strict=True)
        for source in [open_source(file, cache)]
    ]
    rows = sum(map(len, files))
    if rows == 0:
        raise DataError(f"{', '.join(str(file) for file, _ in found) or 'no file given'}: the dataset has no rows")
    return TaskTable(files, images, np.arange(rows))


def _files(path: str | Path) -> list[Path]:
    """The files of a path, or of a name of the Hugging Face Hub."""
    is_file = suffix_of(Path(path)) in SUFFIXES
    return dataset_files(str(path)) if not is_file and is_hub_name(path) else expand(Path(path))


def _settled(parser: Parser, source: Source, name: str, images: ImageOptions) -> Parser:
    """The parser for one file, which reads no other columns of it from now on."""
    if len(source) == 0:
        return parser
    try:
        if source.names is not None:
            source.only(parser.columns(source.names))
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None
    if not parser.must_look(source.names):
        return parser
    first = [row for row in source.block(0, min(FIRST_ROWS, len(source))) if isinstance(row, dict)]
    return parser.settled(first, _place(source, 0, name, images))


def _place(source: Source, row: int, name: str, images: ImageOptions) -> Place:
    return Place(source.path, row, source.line(row), images.root, name, images.max_pixels)


def _first(problems: Sequence[Problem]) -> str:
    return str(next(problem for problem in problems if not problem.warning))


def _short_names(files: Sequence[Path]) -> list[str]:
    """The names of files without suffix; of files with the same name as much of their folders as tells them apart, and
    a number where one is given twice."""
    names = [file.name.removesuffix(suffix_of(file)) for file in files]
    parents = [file.absolute().parent for file in files]
    while len(set(names)) < len(names) and any(parent.name for parent in parents):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            f"{parent.name}/{name}" if name in twice and parent.name else name
            for name, parent in zip(names, parents, strict=True)
        ]
        parents = [parent.parent for parent in parents]
    return [f"{name}-{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def _values(file: TableFile, field: str) -> list[Any]:
    """The value of a field in every row: that of the first column which may hold it and is not null."""
    found: list[Any] = [None] * len(file)
    for path in file.parser.column_of(field):
        if any(value is None for value in found):
            more = file.source.values(path)
            found = [other if value is None else value for value, other in zip(found, more, strict=True)]
    return found
