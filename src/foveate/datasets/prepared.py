"""The part that all preparations share: rows of the schema made from tasks, whole files with their manifest, splits."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from foveate.data.answers import answer_files
from foveate.data.folders import expand_splits
from foveate.data.parsers import Parser
from foveate.data.rows import Problem
from foveate.data.statistics import Statistics, shared_lines
from foveate.data.table import TaskTable, row_schema, write_rows
from foveate.data.validate import AS_IS, ReadOptions
from foveate.errors import DataError, one_line, printable, require
from foveate.files import atomic_write_text, sha256
from foveate.log import progress
from foveate.records import Image, Task

MANIFEST = "manifest.json"
_INFERRED_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Prepared:
    """The result of a preparation: rows by file (without its suffix), the problems of the rows that were left out,
    further counts for the summary, and lines about what was read."""

    folder: Path
    rows: dict[str, int]
    problems: tuple[Problem, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Lines for a person: what was read and its numbers, rows by file, what was counted, and how much was left
        out."""
        lines = list(self.notes)
        lines += [f"{self.folder}: " + ", ".join(f"{count} {name} rows" for name, count in self.rows.items())]
        lines += [f"  {name}: {count}" for name, count in self.counts.items()]
        left_out = len({problem.where for problem in self.problems})
        return lines + ([f"  left out: {left_out} rows, listed in {self.folder / MANIFEST}"] if left_out else [])


def publish(
    out: Path,
    files: Mapping[str, Iterable[dict[str, Any]]],
    schema: pa.Schema,
    *,
    total: int,
    sources: Sequence[Path],
    settings: Mapping[str, Any],
    problems: Sequence[Problem],
    counts: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    repeated: bool = False,
) -> Prepared:
    """Write `NAME.parquet` for each of `files`, `total` rows in all, and last `manifest.json` with settings, counts and
    SHA-256 of sources and files. What an earlier preparation wrote into the folder is removed first, so that a folder
    without a manifest is unfinished. Each file appears whole; the same rows give the same bytes. An id that stands in
    another row already gets a number, over all files, or with `repeated`, where rows stand in several files on purpose,
    within each. notes: lines for the summary. Raises DataError where a source would be removed or replaced, and for a
    manifest of somebody else."""
    earlier = _earlier(out)
    ours = {(out / name).resolve() for name in (*earlier, *(f"{name}.parquet" for name in files))}
    for path in sources:
        if path.resolve() in ours:
            raise DataError(f"{path}: is read, and would be replaced; write to another folder with --out")
    for name in earlier:
        (out / name).unlink(missing_ok=True)
    ids = UniqueIds()
    with progress(f"writing {out}", total) as advance:
        written: dict[str, int] = {}
        for name, rows in files.items():
            ids = UniqueIds(renamed=ids.renamed) if repeated else ids
            written[name] = write_rows(out / f"{name}.parquet", ids(rows), schema, advance=advance)
    counts = {**(counts or {}), **({"ids that got a number": ids.renamed} if ids.renamed else {})}
    manifest = {
        "sources": {str(path): sha256(path) for path in sources},
        **settings,
        "rows": written,
        **({"counts": dict(counts)} if counts else {}),
        "skipped": [str(problem) for problem in problems],
        "sha256": {f"{name}.parquet": sha256(out / f"{name}.parquet") for name in written},
    }
    atomic_write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return Prepared(out, written, tuple(problems), counts, tuple(notes))


@dataclass(slots=True)
class UniqueIds:
    """Gives a number to the id of a row that an earlier one has: `a`, `a-2`, `a-3`."""

    seen: set[str] = field(default_factory=set)
    renamed: int = 0

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            given = row["extra_info"]["id"]
            name, number = given, 1
            while name in self.seen:
                number += 1
                name = f"{given}-{number}"
            self.seen.add(name)
            self.renamed += name != given
            yield row if name == given else {**row, "extra_info": {**row["extra_info"], "id": name}}


def _earlier(out: Path) -> list[str]:
    """The names of what an earlier preparation wrote, its manifest first."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return []
    try:
        return [MANIFEST, *(Path(name).name for name in json.loads(manifest.read_bytes())["sha256"])]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{manifest}: not a manifest of foveate; choose another folder, or remove it") from None


# -------------------------------------------------------------------------------------------------------------- rows


def task_row(task: Task, *, images: bool = True, **extra: Any) -> dict[str, Any]:
    """A task as a row of the schema, with `videos` where it has some. Images and videos in files are named by absolute
    path, others are embedded, and with `images` false left out (for the types of the other fields); `extra` joins
    `extra_info`, over what is there."""
    meta = {name: value for name, value in task.meta.items() if name != "ability"}
    return {
        "data_source": task.source,
        "prompt": [{"role": message.role, "content": message.content} for message in task.messages],
        "images": [image_value(image) for image in task.images] if images else [],
        "ability": task.meta.get("ability"),
        "reward_model": {"style": "rule", "ground_truth": task.answer},
        "extra_info": {**meta, "id": task.id, **extra},
        **({"videos": [image_value(video) for video in task.videos] if images else []} if task.videos else {}),
    }


def image_value(image: Image) -> str | bytes:
    """An image or a video as a row has it: its absolute path, or its bytes."""
    if image.path is not None:
        return str(image.path.resolve())
    assert image.data is not None, "an image has a path or bytes"
    return image.data


def infer_schema(rows: Iterable[dict[str, Any]]) -> pa.Schema:
    """The parquet schema that fits all rows: the types of the ground truth and of extra_info are found by looking, and
    whether there are videos. Raises DataError where rows differ in the type of a field."""
    rows = iter(rows)
    found: list[pa.Schema] = []
    first, videos = 0, False
    while some := list(islice(rows, _INFERRED_ROWS)):
        where = f"rows {first}..{first + len(some) - 1}"
        found.append(_types(some, where))
        try:
            found = [pa.unify_schemas(found, promote_options="permissive")]
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(_of_different_types(where, "a field", error)) from error
        first += len(some)
        videos |= any("videos" in row for row in some)
    types = {field.name: field.type for field in found[0]} if found else {}
    truth = types.pop("answer", pa.null())
    extra = {name.removeprefix("extra."): _or_text(kind) for name, kind in sorted(types.items())}
    return row_schema(_or_text(truth), extra, videos=videos)


def _or_text(kind: pa.DataType) -> pa.DataType:
    """A column of nothing but nulls needs some type."""
    return pa.string() if kind == pa.null() else kind


def _types(rows: Sequence[dict[str, Any]], where: str) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row["extra_info"])
    columns = {f"extra.{name}": [row["extra_info"].get(name) for row in rows] for name in names}
    columns["answer"] = [row["reward_model"]["ground_truth"] for row in rows]
    for name in columns:
        if (shown := printable(name)) != name:
            raise DataError(f"{where}, extra_info: a field is called {shown[6:66]!r}, which is no text; rename it")
    return pa.schema([(name, _type(name, values, where)) for name, values in columns.items()])


def _type(name: str, values: list[Any], where: str) -> pa.DataType:
    field = "reward_model.ground_truth" if name == "answer" else name.replace("extra.", "extra_info.", 1)
    try:
        return pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeEncodeError) as error:
        raise DataError(_of_different_types(where, f"field {field}", error)) from error
    except OverflowError as error:
        raise DataError(f"{where}, field {field}: a whole number of more than 64 bits; write it as text") from error


def _of_different_types(where: str, field: str, error: Exception) -> str:
    return (
        f"{where}, {field}: values of different types, which parquet cannot hold ({one_line(error)}); "
        "write them all as text, or all as numbers"
    )


# ----------------------------------------------------------------------------------- files of tasks as they are


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
    """Rows of any files (`folders.SUFFIXES`) as train.parquet, test.parquet and manifest.json.

    parser: what reads the rows, if they are not recognised by their columns and `reading.columns`. test_fraction: the
    share of rows that is held out at random by `seed`; 0 holds out none. Images are named by absolute path, or embedded
    where they were. The same sources, options and seed give the same bytes. Raises DataError for bad rows (unless they
    are skipped) and for ground truths of different types.
    """
    require(0.0 <= test_fraction <= 1.0, f"setting test_fraction: must be within 0..1, not {test_fraction}")
    table, found = reading(sources, parser=parser)
    splits = hold_out(range(len(table)), test_fraction, np.random.default_rng(seed), "row")
    said = {"columns": dict(reading.columns)} if reading.columns else {}
    return publish_tables(
        {name: table.select(rows) for name, rows in splits.items()},
        out,
        problems=found.problems,
        notes=[*found.lines(), *shared_splits(found.statistics, splits)],
        settings={**said, **(settings or {}), "test_fraction": test_fraction, "seed": seed},
    )


def prepare_splits(
    source: Path,
    out: Path,
    parser: Parser,
    *,
    settings: Mapping[str, Any],
    reading: ReadOptions,
) -> Prepared:
    """The files of a dataset as one parquet file per split."""
    tables: dict[str, TaskTable] = {}
    problems: list[Problem] = []
    parts: dict[str, Statistics] = {}
    notes: list[str] = []
    for split, files in expand_splits(source).items():
        name = split or "train"
        tables[name], found = reading(files, parser=parser)
        problems += found.problems
        parts[name] = found.statistics
        notes += [f"{name} {line}" for line in found.lines()]
    return publish_tables(tables, out, problems=problems, settings=settings, notes=[*notes, *shared_lines(parts)])


def shared_splits(statistics: Statistics, splits: Mapping[str, Sequence[int]]) -> list[str]:
    """Rows and images that splits of a table have in common, a line for each pair."""
    return shared_lines({name: statistics.select(rows) for name, rows in splits.items()})


def publish_tables(
    tables: Mapping[str, TaskTable],
    out: Path,
    *,
    problems: Sequence[Problem],
    settings: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    extra: Callable[[str], Mapping[str, Any]] | None = None,
) -> Prepared:
    """Write each table as NAME.parquet, all with one schema that fits their rows. extra: from the id of a task to what
    joins its `extra_info`."""
    schema = infer_schema(row for name, table in tables.items() for row in _rows(table, name, extra, images=False))
    files = {name: _rows(table, name, extra) for name, table in tables.items()}
    sources = dict.fromkeys(path for table in tables.values() for path in table.files)
    return publish(
        out, files, schema, total=sum(map(len, tables.values())), sources=list(sources), settings=settings,
        problems=problems, counts=counts, notes=notes,
    )  # fmt: skip


def _rows(
    table: TaskTable, split: str, extra: Callable[[str], Mapping[str, Any]] | None, images: bool = True
) -> Iterator[dict[str, Any]]:
    for position, task in enumerate(table):
        more = extra(task.id) if extra is not None else {}
        yield task_row(task, images=images, split=split, index=position, **more)


def hold_out(keys: Sequence[Hashable], fraction: float, rng: np.random.Generator, what: str) -> dict[str, list[int]]:
    """Row indices by split, train and test, in order: rows with the same key stay together. `what` says in the error
    what a key stands for ("image"). Fractions 0 and 1 leave one split. Raises DataError if a split would be empty."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    count = round(fraction * len(groups))
    if 0.0 < fraction < 1.0:
        count = min(max(count, 1), len(groups) - 1)
        if count == 0:
            raise DataError(f"one {what} cannot be split into train and test; set test_fraction to 0 or 1")
    drawn = set(rng.permutation(len(groups))[:count].tolist())
    splits: dict[str, list[int]] = {"train": [], "test": []}
    for position, indices in enumerate(groups.values()):
        splits["test" if position in drawn else "train"].extend(indices)
    return {name: sorted(indices) for name, indices in splits.items() if indices}


def shown_counts(counts: Mapping[str, int]) -> str:
    """Counts for a message."""
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def rollout_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file of rollouts that paths, files or folders, stand for."""
    return {str(file): sha256(file) for path in paths for file in answer_files(path)}


def rows_by_id(table: TaskTable) -> dict[str, int]:
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
