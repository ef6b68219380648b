"""Reading the files of a checkpoint without running anything in them.

torch.distributed.checkpoint keeps its table of contents, `.metadata`, and small values as pickles, and opens them as
such. Here the table may hold the few classes that it is made of and name files of its own folder only, and the values
are read as `torch.load` reads weights.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as table
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.serialization import _get_layout

_CLASSES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        table.BytesStorageMetadata,
        table.ChunkStorageMetadata,
        table.Metadata,
        table.MetadataIndex,
        table.StorageMeta,
        table.TensorProperties,
        table.TensorStorageMetadata,
        table._MEM_FORMAT_ENCODING,
        _StorageInfo,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}
"""All that a table of contents is made of, besides dtypes."""


def load_tensors(path: Path, files: Collection[str], tensors: dict[str, Any], *, alone: bool) -> None:
    """Fill tensors in place from some files of the folder `path`; `alone`: in this process, else with all ranks.

    Raises ValueError for a table of contents that holds anything else than tensors in these files.
    """
    reader = _Reader(path, read_table(path / ".metadata", files))
    load(tensors, storage_reader=reader, planner=_Planner(), no_dist=alone)


def read_table(file: Path, files: Collection[str]) -> table.Metadata:
    """The table of contents of a checkpoint. Raises ValueError where it holds anything but descriptions of tensors and
    values in `files`."""
    try:
        content = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # a pickle that is not as it was written may raise anything
        raise ValueError(f"{file.name}: {error}") from error
    if not isinstance(content, table.Metadata):
        raise ValueError(f"{file.name} holds a {type(content).__name__}")
    entries, places = content.state_dict_metadata, content.storage_data
    kinds = (table.TensorStorageMetadata, table.BytesStorageMetadata)
    if not _is_mapping(entries, str, kinds) or not _is_mapping(places, table.MetadataIndex, _StorageInfo):
        raise ValueError(f"{file.name} is not a table of tensors")
    for place in places.values():
        if place.relative_path not in files or place.transform_descriptors:
            raise ValueError(f"{file.name} names {place.relative_path!r:.60}, which is no file of this checkpoint")
        if not all(type(number) is int and number >= 0 for number in (place.offset, place.length)):
            raise ValueError(f"{file.name} names a place in {place.relative_path} that cannot be")
    return replace(content, planner_data=None, storage_meta=table.StorageMeta())


def _is_mapping(value: Any, key: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, key) and isinstance(v, kind) for k, v in value.items())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (known := _CLASSES.get((module_name, global_name))) is not None:
            return known
        if module_name == "torch" and isinstance(dtype := vars(torch).get(global_name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint holds")


class _Reader(FileSystemReader):
    """Reads by a table of contents that was read before."""

    def __init__(self, path: Path, content: table.Metadata) -> None:
        super().__init__(path)
        self._content = content

    def read_metadata(self) -> table.Metadata:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._content


class _Planner(DefaultLoadPlanner):
    """Reads values that are no tensors as data, too."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *above, last = self.mappings[read_item.dest_index.fqn]
        place: Any = self.original_state_dict
        for key in above:
            place = place[key]
        place[last] = torch.load(value, weights_only=True)
