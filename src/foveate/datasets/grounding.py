"""Prepare grounding data: RefCOCO-style JSONL to parquet files and manifest.json in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from foveate.data.folders import TEXT_SUFFIXES, suffix_of
from foveate.data.referring import AUTO, GroundingRows
from foveate.data.table import BOX, TaskTable, row_schema
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, hold_out, publish, shared_splits, task_row
from foveate.errors import require
from foveate.files import atomic_path, sha256
from foveate.records import Image

SplitBy = Literal["image", "row"]

REFCOCO_SPLITS = (
    "refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB",
    "refcocog_val", "refcocog_test",
)  # fmt: skip

EXTRA_INFO = {
    "split": pa.string(),
    "index": pa.int64(),
    "id": pa.string(),
    "height": pa.int64(),
    "width": pa.int64(),
    "question": pa.string(),
    "dataset": pa.string(),
}


def prepare_grounding(
    sources: str | Path | Sequence[str | Path],
    out: Path,
    *,
    prompt_form: str = "internvl",
    box_field: str = "bbox",
    box_unit: str = AUTO,
    hard: HardSet | None = None,
    test_fraction: float = 0.1,
    split_by: SplitBy = "image",
    seed: int = 0,
    copy_images: bool = False,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """Turn RefCOCO-style rows (see `referring.GroundingRows`) into the parquet schema, ground truth in 0..1000.

    test_fraction: the share of images (split_by "image": no image is in both splits) or of rows ("row") that is
    held out at random by `seed`; 0 and 1 put all rows into one split, whose file alone is written. Rows keep the order
    of the sources. With `hard` the training rows are its choice of them, in random order. Images are referred to by
    absolute path, or with copy_images copied into `out/images` and referred to from there, which makes the folder
    self-contained.

    The same sources, options and seed give the same bytes. All rows are checked before anything is touched; for the
    order in which files appear see `prepared.publish`. Raises DataError for sources that are no files of text, bad rows
    (unless they are skipped), a split that leaves one side empty, an empty hard set, and where `out` cannot be written.
    """
    require(0.0 <= test_fraction <= 1.0, f"setting test_fraction: must be within 0..1, not {test_fraction}")
    require(split_by in ("image", "row"), f"setting split_by: must be image or row, not {split_by!r}")
    paths = _source_paths(sources)
    keep = (hard.iou_key, hard.teacher_iou_key) if hard is not None else ()
    table, found = reading(paths, parser=GroundingRows(prompt_form, box_field, keep, box_unit))
    rng = np.random.default_rng(seed)
    keys = [_image_key(task.images[0]) for task in table] if split_by == "image" else range(len(table))
    splits = hold_out(keys, test_fraction, rng, split_by)
    counts: dict[str, int] = {}
    if hard is not None:
        splits["train"], counts = _hard(table, splits.get("train", []), hard, rng)
    copy_to = out if copy_images else None
    return publish(
        out,
        {name: _rows(table, indices, name, copy_to) for name, indices in splits.items()},
        row_schema(BOX, EXTRA_INFO),
        total=sum(map(len, splits.values())),
        sources=paths,
        settings={
            "prompt_form": prompt_form,
            "box_field": box_field,
            "box_unit": box_unit,
            "split_by": split_by,
            "test_fraction": test_fraction,
            "seed": seed,
            "hard": asdict(hard) if hard is not None else None,
        },
        problems=found.problems,
        counts=counts,
        notes=[*found.lines(), *shared_splits(found.statistics, splits)],
    )


def prepare_validation(
    sources: Sequence[str | Path],
    out: Path,
    *,
    fraction: float = 0.1,
    prompt_form: str = "internvl",
    box_field: str = "bbox",
    box_unit: str = AUTO,
    seed: int = 42,
    copy_images: bool = False,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """A share of each validation file, drawn at random by `seed`, at least one row: `test_NAME.parquet` for each
    NAME.jsonl, and `test.parquet` with all of them in random order. `extra_info.dataset` is NAME, and so is
    `data_source` for the eight splits of RefCOCO, RefCOCO+ and RefCOCOg. The rest as for `prepare_grounding`."""
    require(0.0 < fraction <= 1.0, f"setting val_fraction: must be above 0 and at most 1, not {fraction}")
    paths = _source_paths(sources)
    names = [path.stem for path in paths]
    require(len(set(names)) == len(names), f"two validation files have the same name: {', '.join(sorted(names))}")
    table, found = reading(paths, parser=GroundingRows(prompt_form, box_field, box_unit=box_unit))
    members = {name: np.flatnonzero(table.path_of == number) for number, name in enumerate(names)}
    empty = [name for name, rows in members.items() if not len(rows)]
    require(not empty, f"{', '.join(empty)}: no row is left of this file")
    chosen = {name: rows[take_share(len(rows), fraction, seed)].tolist() for name, rows in members.items()}
    joined = np.random.default_rng(seed).permutation(np.concatenate(list(chosen.values()))).tolist()
    copy_to = out if copy_images else None
    files = {f"test_{name}": rows for name, rows in chosen.items()} | {"test": joined}
    return publish(
        out,
        {name: _rows(table, rows, "test", copy_to) for name, rows in files.items()},
        row_schema(BOX, EXTRA_INFO),
        total=sum(map(len, files.values())),
        sources=paths,
        settings={
            "prompt_form": prompt_form, "box_field": box_field, "box_unit": box_unit, "val_fraction": fraction,
            "seed": seed,
        },
        problems=found.problems,
        notes=found.lines(),
        repeated=True,
    )  # fmt: skip


def _source_paths(sources: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)]
    for path in paths:
        require(
            suffix_of(path).removesuffix(".gz") in TEXT_SUFFIXES,
            f"{path}: grounding data are prepared from files of text ({', '.join(TEXT_SUFFIXES)}), not {path.suffix!r}",
        )
    return paths


def _hard(
    table: TaskTable, train: list[int], hard: HardSet, rng: np.random.Generator
) -> tuple[list[int], dict[str, int]]:
    metas = [task.meta for task in table.select(train)]
    model, teacher = ([meta[key] for meta in metas] for key in (hard.iou_key, hard.teacher_iou_key))
    chosen, counts = take_hard(model, teacher, hard.buckets, rng)
    return [train[position] for position in chosen], counts


def _rows(table: TaskTable, indices: Sequence[int], split: str, copy_to: Path | None) -> Iterator[dict[str, Any]]:
    names = [path.stem for path in table.paths]
    path_of = table.path_of
    copies: dict[Path, str] = {}
    for position, (index, task) in enumerate(zip(indices, table.select(indices), strict=True)):
        image = _image_key(task.images[0])
        name = names[path_of[index]]
        if copy_to is not None and isinstance(image, Path) and image not in copies:
            copies[image] = _copied(image, copy_to)
        info = {field: task.meta[field] for field in ("height", "width", "question")}
        yield {
            **task_row(task),
            "data_source": name if name in REFCOCO_SPLITS else task.source,
            "images": [image if isinstance(image, bytes) else copies.get(image, str(image))],
            "extra_info": {"split": split, "index": position, "id": task.id, "dataset": name, **info},
        }


def _image_key(image: Image) -> Path | bytes:
    """The file of an image, or its bytes where it has none, which tells it from others."""
    if image.path is not None:
        return image.path.resolve()
    assert image.data is not None, "an image has a path or bytes"
    return image.data


def _copied(image: Path, folder: Path) -> str:
    """Copy an image under a name that its content makes unique; returns the path relative to `folder`."""
    name = f"images/{image.stem}-{sha256(image)[:8]}{image.suffix}"
    if not (folder / name).exists():
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(image, temporary)
    return name


# ----------------------------------------------------------------------------------------- which rows are taken


@dataclass(frozen=True, slots=True)
class Buckets:
    """Ranges of IoU and the share of the positives that each gives: range i goes from edges[i] up to the next edge, the
    last one to 1. The last range gives what the shares of the others leave."""

    edges: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    shares: tuple[float, ...] = (0.15, 0.20, 0.20, 0.20)

    def __post_init__(self) -> None:
        shown = f"buckets with edges {list(self.edges)} and shares {list(self.shares)}"
        require(
            len(self.edges) == len(self.shares) + 1,
            f"{shown}: give one edge more than shares; the last range takes the rest",
        )
        require(list(self.edges) == sorted(set(self.edges)), f"{shown}: the edges must grow")
        require(min(self.edges) >= 0 and max(self.edges) < 1, f"{shown}: the edges must be within 0..1")
        require(min(self.shares, default=0) >= 0 and sum(self.shares) <= 1, f"{shown}: the shares must add up to 0..1")

    def targets(self, total: int) -> list[int]:
        """How many of `total` positives each range should give."""
        wanted = [int(total * share) for share in self.shares]
        return [*wanted, total - sum(wanted)]


@dataclass(frozen=True, slots=True)
class HardSet:
    """The hard set: rows that the model misses and a larger one does not, and as many that the model finds.

    iou_key, teacher_iou_key: fields of the rows with the IoU of the model's and of the larger model's answer.
    """

    iou_key: str
    teacher_iou_key: str = "241b_model_iou"
    buckets: Buckets = Buckets()


def take_hard(
    iou: Sequence[float], teacher_iou: Sequence[float], buckets: Buckets, rng: np.random.Generator
) -> tuple[list[int], dict[str, int]]:
    """The rows of the hard set in random order, and the counts for the summary.

    All negatives (model below 0.5, teacher above 0.5) are kept; of the positives (in one of the buckets) each bucket
    gives its share of as many, or all it has: what one lacks is not taken from another.
    """
    model, teacher = np.asarray(iou), np.asarray(teacher_iou)
    negatives = np.flatnonzero((model < 0.5) & (teacher > 0.5))
    taken = [negatives]
    counts = {"hard negatives": len(negatives)}
    ends = [*buckets.edges[1:], np.inf]
    for low, high, wanted in zip(buckets.edges, ends, buckets.targets(len(negatives)), strict=True):
        inside = np.flatnonzero((model >= low) & (model < high))
        chosen = rng.choice(inside, min(wanted, len(inside)), replace=False) if len(inside) else inside
        taken.append(chosen)
        counts[f"positives with IoU from {low:g} (wanted {wanted}, there are {len(inside)})"] = len(chosen)
    rows = np.concatenate(taken)
    require(len(negatives) > 0, "the hard set is empty: no row has a model IoU below 0.5 and a teacher IoU above 0.5")
    return rng.permutation(rows).tolist(), counts


def take_share(count: int, fraction: float, seed: int) -> list[int]:
    """At least one of `count` rows, `fraction` of them (rounded down), at random, in random order."""
    return np.random.default_rng(seed).permutation(count)[: max(1, int(fraction * count))].tolist()
