"""What `foveate generate` leaves: rows of answers in shards that survive a kill at any moment.

generate.json              the request; the same folder again goes on with the same one only
shards/answers_00000.jsonl one `Generated` per line, in the order in which they came; a torn last line is cut off
failed.jsonl               rows without an answer, and why
summary.json               counts, latency and tokens
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from foveate.errors import DataError
from foveate.files import disk_error

Piece = tuple[str, float]
"""The text of one token, and its log-prob in nats."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer: its text, its length in tokens (None where the server does not say), why it ended ("stop" or
    "length"), and its tokens with log-probs where they were asked for."""

    text: str
    tokens: int | None
    finish: str
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """All answers to row `index` of the data. `seconds` is what the request that succeeded took, `tries` counts it and
    those before it, `tokens` those of all its answers together."""

    index: int
    id: str
    answers: tuple[GeneratedAnswer, ...]
    prompt_tokens: int | None
    tokens: int | None
    seconds: float
    tries: int
    server: str


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
                _cut_torn_line(shards[-1])
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

    def write(self, row: Generated) -> None:
        """Append one row. Raises DiskError, with nothing of the row left, where it cannot be written."""
        line = (json.dumps(_plain(row), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
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


def read_generated(folder: Path) -> Iterator[Generated]:
    """The rows of a folder in the order in which they came. Raises DataError for a line that is no such row."""
    for path in shard_paths(folder):
        with path.open(encoding="utf-8", errors="surrogatepass") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield _generated(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    if not line.endswith("\n"):  # being written now, or torn by a kill
                        return
                    raise DataError(f"{path}:{number}: not a row of answers ({error}); delete the line") from None


def _plain(row: Generated) -> dict[str, Any]:
    content = asdict(row)
    for answer in content["answers"]:
        if not answer["pieces"]:
            del answer["pieces"]
    return content


def _generated(content: dict[str, Any]) -> Generated:
    answers = tuple(
        GeneratedAnswer(**one | {"pieces": tuple((text, logprob) for text, logprob in one.get("pieces", ()))})
        for one in content.pop("answers")
    )
    return Generated(answers=answers, **content)


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last line break: half a line of a process that was killed."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
