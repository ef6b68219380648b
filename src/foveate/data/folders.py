"""The files of a path: a file, a folder of a dataset, and one split of it."""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from foveate.data.sources import ArrowRows, ParquetRows, RowGroups, Source
from foveate.data.text_rows import DELIMITERS, open_text
from foveate.errors import DataError, counted, one_line

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".jsonl", ".json", *DELIMITERS)
SUFFIXES = (".parquet", ".arrow", *TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))

_IN_FOLDERS = (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
"""What counts as rows in a folder, the first kind that is there; other JSON there is mostly something else."""
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLITS.items() for word in words}
DEMO_DATA = "demo-data"
"""The folder of the scenes that the shipped recipes for the demo read."""
_SHARD = re.compile(r"(.+?)-\d+-of-\d+$")


def expand(path: Path) -> list[Path]:
    """The files of a path in order: itself, or for a folder what `datasets.save_to_disk` wrote into it, or else the
    files of rows below it. `FOLDER@SPLIT` is one split of a folder.

    Raises DataError where there is nothing that can be read, and for a folder of several splits without a word which:
    test rows are never read along with training rows.
    """
    name, at, split = path.name.rpartition("@")
    if not path.exists() and at and name and (folder := path.with_name(name)).is_dir():
        return _one_split(folder, split)
    if not path.exists():
        hint = f"give a file ({', '.join(SUFFIXES)}) or a folder of a dataset"
        if path.parent.name == DEMO_DATA:
            hint = f"`foveate demo` makes it, or `foveate prepare shapes --out {path.parent}`"
        raise DataError(f"{path}: no such file; {hint}")
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise DataError(f"{path}: unknown kind of file {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
        return [path]
    splits = expand_splits(path)
    if len(splits) > 1:
        names = ", ".join(name or "files of no split" for name in splits)
        asked = next(name for name in splits if name)
        raise DataError(f"{path}: holds several splits ({names}); ask for one of them: {path}@{asked}")
    return next(iter(splits.values()))


def expand_splits(path: Path) -> dict[str, list[Path]]:
    """The files of a folder by their split, or of a single file."""
    if path.is_file():
        return {split_name(path): expand(path)}
    if (path / "dataset_dict.json").is_file():
        return {str(split): expand(path / str(split)) for split in _listed(path / "dataset_dict.json", "splits")}
    if (path / "state.json").is_file():
        return {path.name: [path / str(entry["filename"]) for entry in _listed(path / "state.json", "_data_files")]}
    for place, suffix in enumerate(_IN_FOLDERS):
        if files := _rows_in(path, suffix):
            if others := [file for other in _IN_FOLDERS[place + 1 :] for file in _rows_in(path, other)]:
                _warn_once(
                    f"{path}: read are its {counted(len(files), f'{suffix} file')} alone, and not "
                    f"{', '.join(str(file.relative_to(path)) for file in others[:5])}"
                    f"{f' and {len(others) - 5} more' if len(others) > 5 else ''}; name files to read them"
                )
            splits: dict[str, list[Path]] = {}
            for file in files:
                splits.setdefault(_split_in(file, path), []).append(file)
            return splits
    raise DataError(
        f"{path}: a folder without files of rows ({', '.join(_IN_FOLDERS)}) and without the state.json or "
        "dataset_dict.json of datasets.save_to_disk; name the files"
    )


def _rows_in(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.rglob(f"*{suffix}") if file.is_file())


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def split_name(file: Path) -> str:
    """The split that a file of a dataset belongs to: the start of its name (`train-00000-of-00002.parquet`) or, for
    what save_to_disk wrote, the name of its folder."""
    return file.parent.name if file.suffix == ".arrow" else file.name.split(".")[0].split("-")[0]


def suffix_of(path: Path) -> str:
    """The suffix that says what a file is: `.jsonl.gz` of a packed one."""
    return f"{path.with_suffix('').suffix}.gz" if path.suffix == ".gz" else path.suffix


def open_source(path: Path, cache: RowGroups) -> Source:
    """Open one file by its suffix. Raises DataError if it cannot be read."""
    suffix = suffix_of(path).removesuffix(".gz")
    if suffix in TEXT_SUFFIXES:
        return open_text(path, suffix)
    return ArrowRows(path) if suffix == ".arrow" else ParquetRows(path, cache)


def _one_split(folder: Path, split: str) -> list[Path]:
    splits = expand_splits(folder)
    wanted = split if split in splits else _SPLIT_OF_WORD.get(split, split)
    if wanted not in splits:
        raise DataError(f"{folder}@{split}: no such split; the folder has {', '.join(filter(None, splits)) or 'none'}")
    return splits[wanted]


def _split_in(file: Path, folder: Path) -> str:
    """The split that the name of a file, or of a folder above it, speaks of; empty if none does."""
    parts = file.relative_to(folder).parts
    for part in (parts[-1].split(".")[0], *reversed(parts[:-1])):
        words = re.split(r"[^a-z]+", part.lower())
        if found := next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), ""):
            return found
    shard = _SHARD.match(parts[-1].split(".")[0])
    return shard[1] if shard else ""


def _listed(file: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(file.read_bytes())[key])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not written by datasets.save_to_disk ({one_line(error)})") from error
