"""Rows in files of text, read by index: JSONL, arrays of JSON, CSV and TSV, each also packed with gzip.

Only the places of the rows are kept. Packed files are unpacked into a temporary file once for each process.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import mmap
import os
import re
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from foveate.data.sources import Raw, Source, dig
from foveate.errors import DataError, one_line

MAX_ROW_BYTES = 2**28
"""Bytes of the longest row that is read."""
MAX_UNPACKED_BYTES = 2**35
"""Bytes of the largest file that is unpacked."""
SANE_BYTES, SANE_RATIO = 2**30, 200
"""A packed file that unpacks to more bytes, and to more than so many times its own size, is refused: text does not."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}

_BOM = b"\xef\xbb\xbf"
_SOMETHING = re.compile(rb"\S")
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
_ARRAY_BEGINS = re.compile(rb"\[\s*(?:\{|$)")
_OPENING, _CLOSING = frozenset(b"[{"), frozenset(b"]}")

Span = tuple[int, int, int]
"""Where a row begins and ends in bytes, and its line from 1."""


class TextRows(Source):
    """The rows of a text file by the bytes that they take. Subclasses find these, and read a row from them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] | None = None
        self._text = _unpacked(self)
        try:
            with self._text.open("rb") as file:
                spans = list(self._spans(file))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self._spans_R3 = np.array(spans, dtype=np.int64).reshape(-1, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_text"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._text = _unpacked(self)

    def _spans(self, file: BinaryIO) -> Iterator[Span]:
        raise NotImplementedError

    def _row(self, data: bytes) -> Raw:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._spans_R3)

    def line(self, row: int) -> int | None:
        return int(self._spans_R3[row, 2])

    def block(self, first: int, count: int) -> Iterator[Raw]:
        with self._text.open("rb") as file:
            for begin, end, _ in self._spans_R3[first : first + count].tolist():
                if end - begin > MAX_ROW_BYTES:
                    yield DataError(f"has {end - begin} bytes; rows of at most {MAX_ROW_BYTES} are read")
                    continue
                file.seek(begin)
                yield self._row(file.read(end - begin))

    def values(self, path: Sequence[str]) -> list[Any]:
        return [dig(raw, path) if isinstance(raw, dict) else None for raw in self.block(0, len(self))]


def open_text(path: Path, suffix: str) -> TextRows:
    """A file of text by its suffix, without `.gz`. What begins with a bracket is an array, whatever its suffix, unless
    that is a line of JSONL which is closed, or torn, before the next one."""
    if suffix in DELIMITERS:
        return DelimitedRows(path, DELIMITERS[suffix])
    first, more = _first_line(path)
    left_open = _ARRAY_BEGINS.match(first) and first.endswith((b"[", b"{", b","))
    is_array = first.startswith(b"[") and bool(suffix == ".json" or not more or left_open)
    return ArrayRows(path) if is_array else JsonlRows(path)


# --------------------------------------------------------------------------------------------------------- packed


def _unpacked(rows: TextRows) -> Path:
    """The file to read: itself, or a temporary one that lives as long as `rows`."""
    if rows.path.suffix != ".gz":
        return rows.path
    handle, name = tempfile.mkstemp(prefix="foveate-", suffix=rows.path.stem[-20:])
    weakref.finalize(rows, _remove, name)
    most = min(MAX_UNPACKED_BYTES, max(SANE_BYTES, SANE_RATIO * rows.path.stat().st_size))
    with os.fdopen(handle, "wb") as out:
        size = 0
        for piece in _pieces(rows.path):
            size += len(piece)
            if size > most:
                raise DataError(f"{rows.path}: unpacks to more than {most} bytes; unpack it yourself")
            try:
                out.write(piece)
            except OSError as error:
                raise DataError(f"{rows.path}: cannot be unpacked into {name} ({error.strerror})") from error
    return Path(name)


def _pieces(path: Path) -> Iterator[bytes]:
    """The text of a file in pieces, unpacked where it is packed."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while piece := file.read(2**20):
                yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def _remove(name: str) -> None:
    with suppress(OSError):
        os.unlink(name)


def _first_line(path: Path) -> tuple[bytes, bool]:
    """The start of the first line that is not blank, and the end of it, and whether anything follows it."""
    line = b""
    for piece in islice(_pieces(path), 64):
        text = (line + piece.removeprefix(_BOM)).lstrip() if not line else line + piece
        head, newline, rest = text.partition(b"\n")
        line = head if len(head) < 1000 else head[:500] + head[-500:]
        if newline and line:
            return line.strip(), bool(rest.strip())
    return line.strip(), False


# ----------------------------------------------------------------------------------------------------------- json


class JsonlRows(TextRows):
    """One JSON object a line. Blank lines are no rows."""

    def _spans(self, file: BinaryIO) -> Iterator[Span]:
        text, size = _mapped(file)
        begin, number = 0, 1
        while found := _SOMETHING.search(text, begin):
            place = found.start()
            for start in range(begin, place, 2**20):  # blank lines, however many
                number += text[start : min(start + 2**20, place)].count(b"\n")
            begin = max(begin, text.rfind(b"\n", begin, place) + 1)
            end = text.find(b"\n", place) + 1 or size
            yield begin, end, number
            begin, number = end, number + 1

    def _row(self, data: bytes) -> Raw:
        return _parsed(data)


class ArrayRows(TextRows):
    """The JSON objects of an array. An array that is not closed, or holds something else, is refused as a whole."""

    def _spans(self, file: BinaryIO) -> Iterator[Span]:
        text, size = _mapped(file)
        depth, begin, done, line = 0, 0, 0, 1
        for token in _STRING_OR_BRACKET.finditer(text):
            place = token.start()
            kind = text[place]
            if kind in _OPENING:
                if depth == 1:
                    line += text[done:place].count(b"\n")
                    self._require_between(text[done:place], b"" if begin == 0 else b",", line)
                    begin = place
                depth += 1
            elif kind in _CLOSING:
                depth -= 1
                if depth == 1:
                    yield begin, place + 1, line
                    line += text[begin : place + 1].count(b"\n")
                elif depth == 0:
                    self._require_between(text[done:place], b"", line)
                    done = place + 1
                    break
            elif depth == 1:
                raise self._fault("an entry that is no object", line)
            if depth == 1:
                done = place + 1
        if depth != 0:
            raise self._fault("an array that is not closed; the file is cut off or damaged", line)
        if text[done:size].strip():
            raise self._fault("something behind the end of the array", line)

    def _require_between(self, found: bytes, separator: bytes, line: int) -> None:
        if found.strip() != separator:
            raise self._fault(f"{found.strip()[:40].decode(errors='replace')!r} where an object should begin", line)

    def _fault(self, what: str, line: int) -> DataError:
        return DataError(
            f"{self.path}, line {line}: begins with [ and so must be one array of JSON objects, but has {what}"
        )

    def _row(self, data: bytes) -> Raw:
        return _parsed(data)


def _mapped(file: BinaryIO) -> tuple[Any, int]:
    """The bytes of a file without reading them, and their number."""
    size = file.seek(0, 2)
    return (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""), size


def _parsed(line: bytes) -> Raw:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return DataError(f"is not valid JSON ({error})")
    except RecursionError:
        return DataError("is not usable JSON (it is nested too deeply)")
    except ValueError as error:  # a whole number of thousands of digits
        return DataError(f"is not usable JSON ({one_line(error)})")
    return value if isinstance(value, dict) else DataError(f"must hold one JSON object, not {type(value).__name__}")


# ------------------------------------------------------------------------------------------------------ csv and tsv


class DelimitedRows(TextRows):
    """Rows of cells under a first row of names. All values are text; empty cells are null."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.delimiter = delimiter
        super().__init__(path)

    def _spans(self, file: BinaryIO) -> Iterator[Span]:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        consumed = number = 0

        def lines() -> Iterator[str]:
            nonlocal consumed, number
            while line := file.readline(MAX_ROW_BYTES + 1):
                if len(line) > MAX_ROW_BYTES:
                    raise DataError(f"{self.path}, line {number + 1}: has more than {MAX_ROW_BYTES} bytes")
                consumed, number = consumed + len(line), number + 1
                yield line.decode("utf-8", "surrogateescape")

        cells = csv.reader(lines(), delimiter=self.delimiter)
        try:
            names = [name.removeprefix("\ufeff").strip() for name in next(cells, [])]
            self.names = [name or f"column_{position}" for position, name in enumerate(names)]
            if len(set(self.names)) < len(self.names):
                raise DataError(f"{self.path}: two columns have the same name: {', '.join(self.names)}")
            begin, first = consumed, number + 1
            for row in cells:
                if row:
                    yield begin, consumed, first
                begin, first = consumed, number + 1
        except csv.Error as error:
            raise DataError(f"{self.path}, line {number}: cannot be read as CSV ({error})") from error

    def _row(self, data: bytes) -> Raw:
        assert self.names is not None
        try:
            text = data.decode("utf-8")
            [cells] = csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter)
        except (UnicodeDecodeError, csv.Error) as error:
            return DataError(f"cannot be read as CSV ({one_line(error)})")
        if len(cells) != len(self.names):
            return DataError(f"has {len(cells)} cells, but the first row names {len(self.names)} columns")
        return {name: cell or None for name, cell in zip(self.names, cells, strict=True)}
