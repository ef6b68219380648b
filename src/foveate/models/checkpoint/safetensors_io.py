"""Safetensors as byte ranges: headers of a checkpoint folder, and files written piece by piece.

A converter only renames tensors, splits them along their first axis and joins them again. In row-major storage each is
a copy of byte ranges: nothing is decoded, every dtype passes bit for bit, and memory holds one buffer.

The format: 8 bytes with the length of the header (little endian), a JSON header, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from foveate.errors import DataError

INDEX = "model.safetensors.index.json"
_BUFFER = 1 << 24
"""Bytes copied at a time."""
_BITS = re.compile(r"(?:F|BF|I|U|C)(\d+)(?:_.+)?")
"""Names of dtypes, with the bits of an element."""
_HEADER_LIMIT = 100_000_000
"""No header is longer, says the format: a larger number means that the file is something else."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A contiguous range of bytes of a file."""

    file: Path
    start: int
    size: int

    def part(self, index: int, count: int) -> ByteRange:
        """One of `count` equal parts."""
        size = self.size // count
        return ByteRange(self.file, self.start + index * size, size)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk: its dtype as safetensors calls it, its shape, and the pieces that its bytes are made of. One of
    a single piece can be read by `read_tensor`: it begins at a `row` of the tensor `name` of its file."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[ByteRange, ...]
    name: str = ""
    row: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.size for piece in self.pieces)

    @property
    def itemsize(self) -> float:
        """Bytes per element; some dtypes have less than one."""
        return self.size / max(1, math.prod(self.shape))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or the only one.

    Raises DataError for a folder without safetensors, with a missing shard, or with shards but no index.
    """
    index = folder / INDEX
    if index.is_file():
        return _indexed_files(index)
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not found:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        what = ", ".join(pickles) or "no weights"
        raise DataError(f"{folder}: found {what}; weights must be *.safetensors (a pickle can run code when opened)")
    if len(found) > 1:
        raise DataError(f"{folder}: {len(found)} *.safetensors files but no {INDEX}; copy or download it, too")
    return found


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{strange[0]} is no file of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not an index of safetensors ({error!r}); copy or download it again") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise DataError(
            f"{index.parent}: {missing[0]} is missing, one of {len(names)} shards named by {INDEX}; "
            "copy or download it again"
        )
    return [index.parent / name for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of some files by name, in the order of their bytes. Only headers are read.

    Raises DataError for a file that is truncated or not safetensors, whose tensors overlap or leave a gap, and for a
    tensor that two files hold.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        header, data_start = _read_header(file)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if name in tensors:
                raise DataError(f"{file}: {name} is in {tensors[name].pieces[0].file.name}, too; one of them is old")
            piece = ByteRange(file, data_start + start, end - start)
            tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), (piece,), name)
    return tensors


def read_tensor(stored: Stored, rows: slice | None = None) -> Tensor:
    """A tensor of one piece, or some of its rows, mapped into memory: pages are read when used."""
    [piece] = stored.pieces
    with safe_open(piece.file, framework="pt") as file:
        tensor = file.get_slice(stored.name)
        if not stored.shape:
            return tensor[...]
        rows = rows or slice(0, stored.shape[0])
        return tensor[stored.row + rows.start : stored.row + rows.stop]


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a header, without its metadata, and where the data begins."""
    bytes_there = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT
        if length >= _HEADER_LIMIT:
            raise DataError(f"{file}: {bytes_there:,} bytes that are not safetensors; copy or download it again")
        raw = stream.read(length)
    try:
        header: Any = json.loads(raw, object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["data_offsets"][0] != end:
                raise DataError(
                    f"{file}: {name} begins at byte {entry['data_offsets'][0]} of the data, where the tensor before it "
                    f"ends at {end}; copy or download it again"
                )
            end += _bytes(entry)
        end += 8 + length
    except DataError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{file}: its header is not that of safetensors; copy or download it again") from None
    if bytes_there != end:
        raise DataError(f"{file}: has {bytes_there:,} bytes where its header says {end:,}; copy or download it again")
    return header, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _bytes(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor by the entry of a header. Raises ValueError where its dtype, shape and range disagree."""
    bits = 8 if entry["dtype"] == "BOOL" else int(_BITS.fullmatch(entry["dtype"]).group(1))  # type: ignore[union-attr]
    start, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"])):
        raise ValueError(entry)
    if math.prod(entry["shape"], start=bits) != 8 * (end - start):
        raise ValueError(entry)
    return end - start


def write_weights(
    folder: Path, tensors: Mapping[str, Stored], shard_bytes: int, advance: Callable[[int], None]
) -> list[Path]:
    """Write tensors to `model.safetensors`, or to shards of at most `shard_bytes` bytes of data with an index.

    A tensor larger than a shard gets one of its own. Tensors keep their order, except that wide dtypes come first
    within a file, so that each is aligned. `advance` is called with the bytes just written.
    """
    split: Any = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, shard in split.filename_to_tensors.items():
        _write_file(folder / name, {tensor: tensors[tensor] for tensor in shard}, advance)
    return [folder / name for name in split.filename_to_tensors]


def add_weights(folder: Path, tensors: Mapping[str, Stored], file: str) -> None:
    """Write more tensors into the folder of a checkpoint, as another shard called `file`."""
    there = read_headers(weight_files(folder))
    weights = {name: stored.pieces[0].file.name for name, stored in there.items()} | dict.fromkeys(tensors, file)
    total = sum(stored.size for stored in (*there.values(), *tensors.values()))
    _write_file(folder / file, tensors, lambda _: None)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, Stored], advance: Callable[[int], None]) -> None:
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].size
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        _copy_pieces([piece for name in order for piece in tensors[name].pieces], out, advance)


def _copy_pieces(pieces: Sequence[ByteRange], out: BinaryIO, advance: Callable[[int], None]) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    for piece in pieces:
        with open(piece.file, "rb", buffering=0) as source:
            source.seek(piece.start)
            left = piece.size
            while left:
                count = source.readinto(buffer[: min(left, _BUFFER)])
                if not count:
                    raise DataError(f"{piece.file}: became shorter while it was read; copy or download it again")
                out.write(buffer[:count])
                advance(count)
                left -= count
