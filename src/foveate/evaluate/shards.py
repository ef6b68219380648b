"""The folder of `foveate generate`: rows of answers in shards that survive a kill at any moment.

generate.json              the request; the folder is continued by the same one only
shards/answers_00000.jsonl one `GeneratedRow` per line, in the order in which they came; a torn last line is removed
failed.jsonl               rows without an answer, and why
summary.json               counts, latency and tokens
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveate.data.answers import GeneratedRow, read_answers, row_line
from foveate.errors import DataError
from foveate.files import MOST_ROWS, disk_error, inside, require_file


@dataclass(frozen=True, slots=True)
class Failed:
    """A row without an answer: "refused" by the server (or the encoder) as it stands, or "failed" after every try."""

    index: int
    id: str
    kind: Literal["refused", "failed"]
    reason: str
    tries: int


class AnswerStore:
    """Appends rows to shards of `shard_rows` lines. A line is with the system when `write` returns, so that the death
    of the process loses nothing; `done` are the rows that are there already. Use it as a context."""

    def __init__(self, folder: Path, shard_rows: int) -> None:
        self.folder, self._shard_rows = folder / "shards", shard_rows
        self.done: set[int] = set()
        self._file: Any = None
        self._lines = 0

    def __enter__(self) -> AnswerStore:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shards = shard_paths(self.folder.parent)
            if shards:
                _remove_torn_line(shards[-1])
        except OSError as error:
            raise disk_error(self.folder, error) from error
        for row in read_generated(self.folder.parent):
            if row.index in self.done:
                raise DataError(f"{self.folder}: row {row.index} stands there twice; was a shard copied?")
            self.done.add(row.index)
        self._number = len(shards)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, row: GeneratedRow) -> None:
        """Append one row. Raises DiskError, with nothing of the row left, where it cannot be written."""
        line = row_line(row)
        file = self._file if self._file is not None else self._open()
        before = file.tell()
        try:
            file.write(line)
        except OSError as error:
            os.truncate(file.fileno(), before)
            raise disk_error(Path(file.name), error) from error
        self.done.add(row.index)
        self._lines += 1
        if self._lines == self._shard_rows:
            self._close()

    def _open(self) -> Any:
        path = self.folder / f"answers_{self._number:05d}.jsonl"
        require_file(path)
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise disk_error(path, error) from error
        self._number += 1
        self._lines = 0
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def shard_paths(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("answers_*.jsonl"))


def read_generated(folder: Path) -> Iterator[GeneratedRow]:
    """The rows of a folder in the order in which they came. Raises DataError for a line that is no such row."""
    for path in shard_paths(folder):
        yield from read_answers(inside(path, folder, MOST_ROWS), GeneratedRow, appending=True)


def _remove_torn_line(path: Path) -> None:
    """Remove what follows the last line break: half a line of a process that was killed."""
    content = inside(path, path.parent.parent, MOST_ROWS).read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
