"""What every preparation shares: rows of the schema made from tasks, files that appear whole, and their manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from foveate.data.rows import Problem
from foveate.data.table import row_schema, write_rows
from foveate.files import atomic_write_text
from foveate.log import progress
from foveate.records import DataError, Image, Task

MANIFEST = "manifest.json"
_INFERRED_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a preparation wrote: rows by file (without its suffix), the problems of the rows that were left out, and
    further counts for the summary."""

    folder: Path
    rows: dict[str, int]
    problems: tuple[Problem, ...]
    counts: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """Lines for a person: rows by file, what was counted, and how much was left out."""
        lines = [f"{self.folder}: " + ", ".join(f"{count} {name} rows" for name, count in self.rows.items())]
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
) -> Prepared:
    """Write `NAME.parquet` for each of `files`, `total` rows in all, and last `manifest.json` with settings, counts and
    SHA-256 of sources and files. What an earlier preparation wrote into the folder is removed first, so that a folder
    without a manifest is unfinished. Each file appears whole; the same rows give the same bytes. Raises DataError
    where a source would be removed or replaced, and for a manifest of somebody else."""
    earlier = _earlier(out)
    ours = {(out / name).resolve() for name in (*earlier, *(f"{name}.parquet" for name in files))}
    for path in sources:
        if path.resolve() in ours:
            raise DataError(f"{path}: is read, and would be replaced; write to another folder with --out")
    for name in earlier:
        (out / name).unlink(missing_ok=True)
    with progress(f"writing {out}", total) as advance:
        written = {
            name: write_rows(out / f"{name}.parquet", rows, schema, advance=advance) for name, rows in files.items()
        }
    manifest = {
        "sources": {str(path): sha256(path) for path in sources},
        **settings,
        "rows": written,
        **({"counts": dict(counts)} if counts else {}),
        "skipped": [str(problem) for problem in problems],
        "sha256": {f"{name}.parquet": sha256(out / f"{name}.parquet") for name in written},
    }
    atomic_write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return Prepared(out, written, tuple(problems), counts or {})


def _earlier(out: Path) -> list[str]:
    """The names of what an earlier preparation wrote, its manifest first."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return []
    try:
        return [MANIFEST, *(Path(name).name for name in json.loads(manifest.read_bytes())["sha256"])]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{manifest}: not a manifest of foveate; choose another folder, or remove it") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------- rows


def task_row(task: Task, *, pictures: bool = True, **extra: Any) -> dict[str, Any]:
    """A task as a row of the schema. Pictures in files are named by absolute path, others are embedded, and with
    `pictures` false left out (for the types of the other fields); `extra` joins `extra_info`, over what is there."""
    meta = {name: value for name, value in task.meta.items() if name != "ability"}
    return {
        "data_source": task.source,
        "prompt": [{"role": message.role, "content": message.content} for message in task.messages],
        "images": [image_value(image) for image in task.images] if pictures else [],
        "ability": task.meta.get("ability"),
        "reward_model": {"style": "rule", "ground_truth": task.answer},
        "extra_info": {**meta, "id": task.id, **extra},
    }


def image_value(image: Image) -> str | bytes:
    """What names or holds a picture in a row: its absolute path, or its bytes."""
    if image.path is not None:
        return str(image.path.resolve())
    assert image.data is not None, "an image has a path or bytes"
    return image.data


def infer_schema(rows: Iterable[dict[str, Any]]) -> pa.Schema:
    """The parquet schema that fits all rows: the types of the ground truth and of extra_info are found by looking.
    Raises DataError where rows differ in the type of a field."""
    rows = iter(rows)
    found: list[pa.Schema] = []
    first = 0
    while some := list(islice(rows, _INFERRED_ROWS)):
        where = f"rows {first}..{first + len(some) - 1}"
        found.append(_types(some, where))
        try:
            found = [pa.unify_schemas(found, promote_options="permissive")]
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(_of_different_types(where, "a field", error)) from error
        first += len(some)
    types = {field.name: field.type for field in found[0]} if found else {}
    truth = types.pop("answer", pa.null())
    extra = {name.removeprefix("extra."): _or_text(kind) for name, kind in sorted(types.items())}
    return row_schema(_or_text(truth), extra)


def _or_text(kind: pa.DataType) -> pa.DataType:
    """A column of nothing but nulls needs some type."""
    return pa.string() if kind == pa.null() else kind


def _types(rows: Sequence[dict[str, Any]], where: str) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row["extra_info"])
    columns = {f"extra.{name}": [row["extra_info"].get(name) for row in rows] for name in names}
    columns["answer"] = [row["reward_model"]["ground_truth"] for row in rows]
    return pa.schema([(name, _type(name, values, where)) for name, values in columns.items()])


def _type(name: str, values: list[Any], where: str) -> pa.DataType:
    field = "reward_model.ground_truth" if name == "answer" else name.replace("extra.", "extra_info.", 1)
    try:
        return pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(_of_different_types(where, f"field {field}", error)) from error
    except OverflowError as error:
        raise DataError(f"{where}, field {field}: a whole number of more than 64 bits; write it as text") from error


def _of_different_types(where: str, field: str, error: Exception) -> str:
    return (
        f"{where}, {field}: values of different types, which parquet cannot hold ({' '.join(str(error).split())}); "
        "write them all as text, or all as numbers"
    )
