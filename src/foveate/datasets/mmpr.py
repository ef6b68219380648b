"""Prepare MMPR-Tiny (prompts for online RL) and MMPR (preference pairs for MPO) from local copies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.demos import check_pair
from foveate.data.parsers import Parser, RecognisedRows
from foveate.data.rows import Parsed, Place, Problem
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, infer_schema, prepare_rows, publish, task_row
from foveate.errors import DataError, require

# ---------------------------------------------------------------------------------------------------------- MMPR-Tiny

TINY_SOURCE = "mmpr_tiny"


@dataclass(frozen=True, slots=True)
class MmprTinyRows(Parser):
    """Rows of mmpr_tiny.parquet: the schema, with paths that may begin with the name of the dataset's folder, and with
    rows of text alone. All get `source` as data_source; what stood there becomes extra_info.original_source."""

    source: str

    def columns(self, names: Sequence[str]) -> list[str]:
        return RecognisedRows().columns(names)

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        images = raw.get("images")
        info = raw.get("extra_info")
        extra = info if isinstance(info, dict) else {}
        row = {
            **raw,
            "data_source": self.source,
            "images": [_below(place, image) for image in images] if isinstance(images, list) else images,
            "extra_info": {**extra, "original_source": raw.get("data_source")},
        }
        return RecognisedRows()(row, place)


def _below(place: Place, image: Any) -> Any:
    """`MMPR-Tiny/images/a.png` beside a file in MMPR-Tiny, or below any other root, as the path of the file that is
    there; everything else as it is."""
    if isinstance(image, dict) and not image.get("bytes"):
        image = image.get("path")
    if not isinstance(image, str) or Path(image).is_absolute():
        return image
    roots = [*place.folders, place.file.parent.parent]
    parts = Path(image).parts
    names = [Path(*parts), *([Path(*parts[1:])] if len(parts) > 1 else [])]
    return next((str(root / name) for name in names for root in roots if (root / name).is_file()), image)


def prepare_mmpr_tiny(
    parquet: Path,
    out: Path,
    *,
    source: str = TINY_SOURCE,
    test_fraction: float = 0.0,
    seed: int = 0,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """MMPR-Tiny as train.parquet (and test.parquet) with a manifest, images named by absolute path.

    parquet: mmpr_tiny.parquet, with the folder `images` (from images.zip) beside it or below `reading.image_root`.
    source: what becomes data_source; InternVL3.5 scores these rows by the geo3k reward. Raises DataError for rows that
    cannot be used.
    """
    return prepare_rows(
        [parquet],
        out,
        parser=MmprTinyRows(source),
        test_fraction=test_fraction,
        seed=seed,
        reading=reading,
        settings={"dataset": "MMPR-Tiny", "data_source": source},
    )


# --------------------------------------------------------------------------------------------------------- MMPR pairs

PAIRS = "pairs"
"""The file of prepared pairs, without its suffix; the recipes for MPO read it."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One entry of meta.json: a JSONL file of pairs, the folder of its images, and how often its rows are taken."""

    name: str
    file: Path
    root: Path
    repeat_time: float


def prepare_mmpr(
    meta: Path, out: Path, *, root: Path | None = None, seed: int = 0, reading: ReadOptions = AS_IS
) -> Prepared:
    """MMPR's preference pairs as pairs.parquet with a manifest: the schema, with extra_info.chosen and
    extra_info.rejected in place of a ground truth.

    meta: meta.json, {name: {root, annotation, repeat_time}}. Annotations hold image (a path, a list, or nothing for
    pairs that were made without the image), question, chosen, rejected and maybe system_prompt; a question without
    marks gets its images in front. Relative paths start from `root`, else from the folder of meta.json or the one
    above. repeat_time 2 takes each row twice, 0.5 a random half, 2.5 both. The same input and seed give the same bytes.
    """
    annotations = read_meta(meta, root)
    tables: dict[str, TaskTable] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for annotation in annotations:
        parser = RecognisedRows({"source": f"=mmpr/{annotation.name}"})
        table, found = replace(reading, image_root=annotation.root)(annotation.file, parser=parser, check=check_pair)
        problems += found.problems
        notes += [f"{annotation.name} {line}" for line in found.lines()]
        tables[annotation.name] = table.select(_repeated(len(table), annotation.repeat_time, seed))
    taken = {name: table for name, table in tables.items() if len(table)}
    require(bool(taken), f"{meta}: no pair is left of any entry; raise repeat_time")
    schema = infer_schema(_pairs(taken, images=False))
    return publish(
        out,
        {PAIRS: _pairs(taken)},
        schema,
        total=sum(map(len, taken.values())),
        sources=[meta, *(annotation.file for annotation in annotations)],
        settings={"dataset": "MMPR", "seed": seed},
        problems=problems,
        counts={name: len(table) for name, table in tables.items()},
        notes=notes,
    )


def read_meta(meta: Path, root: Path | None) -> list[Annotation]:
    """The entries of a meta.json with their paths found. Raises DataError naming the entry and the field."""
    try:
        entries = json.loads(meta.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{meta}: cannot be read as JSON ({error})") from error
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{meta}: must be an object {{name: {{root, annotation, repeat_time}}}}")
    roots = [root] if root is not None else [meta.parent, meta.parent.parent]
    return [_annotation(meta, name, entry, roots) for name, entry in entries.items()]


def _annotation(meta: Path, name: str, entry: Any, roots: Sequence[Path]) -> Annotation:
    if not isinstance(entry, dict):
        raise DataError(f"{meta}, {name}: must be an object with root, annotation and repeat_time")
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 <= repeat < 1000:
        raise DataError(f"{meta}, {name}, field repeat_time: is {repeat!r}; must be a number from 0 to 1000")
    file = _found(meta, name, "annotation", entry, roots)
    return Annotation(name, file, _found(meta, name, "root", entry, roots), float(repeat))


def _found(meta: Path, name: str, field: str, entry: Mapping[str, Any], roots: Sequence[Path]) -> Path:
    value = entry.get(field)
    if not isinstance(value, str) or not value:
        raise DataError(f"{meta}, {name}, field {field}: is {value!r}; must be a path")
    places = [root / value for root in roots]  # an absolute path stays itself
    for place in places:
        if place.exists():
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise DataError(f"{meta}, {name}, field {field}: nothing at {looked}; give the folder of the dataset with --root")


def _repeated(rows: int, repeat: float, seed: int) -> list[int]:
    some = np.random.default_rng(seed).permutation(rows)[: int(repeat % 1 * rows)]
    return [*list(range(rows)) * int(repeat), *sorted(some.tolist())]


def _pairs(tables: Mapping[str, TaskTable], images: bool = True) -> Iterator[dict[str, Any]]:
    index = 0
    for name, table in tables.items():
        for task in table:
            preferred = replace(task, meta={**task.meta, "ability": "preference"})
            yield task_row(preferred, images=images, dataset=name, index=index)
            index += 1
