"""The rows of a dataset in numbers: images, lengths, and rows, images and ids that stand twice."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.data.rows import Problem
from foveate.records import Image, Task

ANSWER_FIELDS = ("response", "chosen")
MOST_SOURCES = 8


@dataclass(frozen=True, slots=True)
class RowFacts:
    """One row in numbers. prompt: characters, or tokens where they are counted; row, id, images: fingerprints."""

    source: str
    prompt: int
    answer: int
    row: int
    id: int
    images: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]


def row_facts(task: Task, length: Callable[[Task], int] | None = None) -> RowFacts:
    """A task in numbers. The fingerprint of a row is that of its prompt, images and answers; that of an image is that
    of its path, or of its bytes where they are embedded. `length` counts the tokens of a prompt."""
    answers = [task.meta.get(name) for name in (*ANSWER_FIELDS, "rejected")]
    images = tuple(map(_image_fingerprint, task.images))
    said = [(message.role, message.content) for message in task.messages]
    videos = tuple(map(_image_fingerprint, task.videos))
    written = next((text for text in answers if isinstance(text, str)), None) or task.answer
    return RowFacts(
        source=task.source,
        prompt=sum(len(content) for _, content in said) if length is None else length(task),
        answer=0 if written is None else len(str(written)),
        row=_fingerprint(repr((said, images + videos, task.answer, answers)).encode("utf-8", "backslashreplace")),
        id=_fingerprint(task.id.encode("utf-8", "backslashreplace")),
        images=images,
        sizes=tuple((image.width, image.height) for image in task.images),
    )


def _image_fingerprint(image: Image) -> int:
    return _fingerprint(str(image.path).encode() if image.data is None else image.data)


def _fingerprint(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class FactsCollector:
    """Facts of rows as they come, kept in little memory."""

    def __init__(self) -> None:
        self.rows, self.images = array("Q"), array("Q")
        self.sources: dict[str, int] = {}

    def add(self, facts: RowFacts) -> None:
        """One more row."""
        source = self.sources.setdefault(facts.source, len(self.sources))
        row = len(self.rows) // 5
        self.rows.extend((source, facts.prompt, facts.answer, facts.row, facts.id))
        for fingerprint, (width, height) in zip(facts.images, facts.sizes, strict=True):
            self.images.extend((row, fingerprint, width, height))

    def statistics(self, unit: str) -> Statistics:
        """The numbers of all rows. unit: what the length of a prompt counts."""
        rows_R5 = np.array(self.rows, dtype=np.uint64).reshape(-1, 5)
        images_I4 = np.array(self.images, dtype=np.uint64).reshape(-1, 4)
        return Statistics(rows_R5, images_I4, tuple(self.sources), unit)


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """The numbers of rows. rows_R5: source, length of prompt and answer, fingerprints of row and id; images_I4: row,
    fingerprint, width, height."""

    rows_R5: np.ndarray
    images_I4: np.ndarray
    sources: tuple[str, ...]
    unit: str

    def __len__(self) -> int:
        return len(self.rows_R5)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        same = np.array_equal(self.rows_R5, other.rows_R5) and np.array_equal(self.images_I4, other.images_I4)
        return same and (self.sources, self.unit) == (other.sources, other.unit)

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: Sequence[int] | np.ndarray) -> Statistics:
        """Those of some of the rows."""
        chosen = np.asarray(rows, dtype=np.int64)
        new = np.full(len(self), -1)
        new[chosen] = np.arange(len(chosen))
        places = new[self.images_I4[:, 0].astype(np.int64)]
        images_I4 = self.images_I4[places >= 0].copy()
        images_I4[:, 0] = places[places >= 0]
        return Statistics(self.rows_R5[chosen], images_I4, self.sources, self.unit)

    def lines(self) -> list[str]:
        """For a person, a line for each kind of number."""
        if not len(self):
            return []
        lines = [self._image_line(), f"prompts: {_spread(self.rows_R5[:, 1], self.unit)}"]
        if self.rows_R5[:, 2].any():
            lines.append(f"answers: {_spread(self.rows_R5[:, 2], 'characters')}")
        counts = Counter(self.rows_R5[:, 0].tolist())
        if 1 < len(counts) <= MOST_SOURCES:
            lines.append("sources: " + ", ".join(f"{self.sources[int(one)]} {n}" for one, n in counts.most_common()))
        for what, column in (("equal another row", 3), ("have the id of another row", 4)):
            twice = len(self) - len(np.unique(self.rows_R5[:, column]))
            lines += [f"twice: {twice} rows {what}"] if twice else []
        return lines

    def _image_line(self) -> str:
        rows, counts = np.unique(self.images_I4[:, 0], return_counts=True)
        if not len(rows):
            return f"images: none in {len(self)} rows"
        sizes = self.images_I4[np.argsort(self.images_I4[:, 2] * self.images_I4[:, 3], kind="stable"), 2:].tolist()
        small, middle, large = (f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        most = f", up to {counts.max()} in one" if counts.max() > 1 else ""
        bare = f"; {len(self) - len(rows)} rows without" if len(rows) < len(self) else ""
        shown = f"{small} pixels" if small == large else f"{small} to {large} pixels, median {middle}"
        return f"images: {len(sizes)} in {len(rows)} rows{most}{bare}; {shown}"


def shared_lines(parts: Mapping[str, Statistics]) -> list[str]:
    """Rows and images that stand in more than one part of a dataset (training and test rows), a line for each pair."""
    lines: list[str] = []
    names = list(parts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            one, other = parts[first], parts[second]
            rows = int(np.isin(other.rows_R5[:, 3], one.rows_R5[:, 3]).sum())
            images = np.unique(other.images_I4[:, 1])
            common = int(np.isin(images, one.images_I4[:, 1]).sum())
            told = [f"{rows} of {len(other)} rows"] * (rows > 0) + [f"{common} of {len(images)} images"] * (common > 0)
            if told:
                lines.append(f"shared: {' and '.join(told)} of {second} are also in {first}")
    return lines


def dropped_line(problems: Sequence[Problem], total: int) -> str:
    """How many rows cannot be used, and the fields why, by how many rows they are the first fault of."""
    first: dict[str, str] = {}
    for problem in problems:
        first.setdefault(problem.where, problem.field or "the row itself")
    counts = Counter(first.values())
    why = ", ".join(f"{field} {count}" for field, count in counts.most_common())
    return f"rows: {total - len(first)} of {total} can be used" + (f"; {len(first)} cannot ({why})" if first else "")


def _spread(values_R: Any, unit: str) -> str:
    least, middle, most = (int(np.sort(values_R)[place]) for place in (0, len(values_R) // 2, -1))
    return f"{least} {unit}" if least == most else f"{least} to {most} {unit}, median {middle}"
