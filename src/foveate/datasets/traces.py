"""Rows of tasks with environments, and of conversations with them for supervised training: files by split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from foveate.data.table import row_schema, write_rows
from foveate.environments.protocol import Environment, Observation
from foveate.files import atomic_write_text, sha256
from foveate.records import Image, Message, Task

DRAWN_SPLITS = ("train", "test", "traces")
"""The files of a dataset: tasks to train on, tasks held out, and conversations to imitate, about other tasks."""


def recorded_trace(environment: Environment, task: Task, seed: int, answers: Sequence[str]) -> dict[str, Any]:
    """A conversation of a policy that writes these answers with an environment: `prompt`, `images` and `response`, the
    last answer. What the environment shows is what it shows in a run."""
    messages = [*environment.reset(task, seed)]
    for answer in answers[:-1]:
        step = environment.step(answer)
        assert not step.done, f"the environment ended at {answer!r}"
        messages += [Observation("assistant", answer), *step.messages]
    environment.close()
    return {
        "prompt": [{"role": one.role, "content": one.content} for one in messages],
        "images": [{"bytes": image.data, "path": None} for one in messages for image in one.images],
        "response": answers[-1],
    }


def drawn_task(text: str, picture: Image, meta: Mapping[str, Any]) -> Task:
    """A task about one image."""
    return Task("", "", (Message("user", text),), (picture,), None, meta)


def write_splits(
    folder: Path,
    rows: Mapping[str, Iterable[dict[str, Any]]],
    extra_info: Mapping[str, pa.DataType],
    manifest: Mapping[str, Any],
    advance: Callable[[int], None],
    *,
    truth: pa.DataType | None = None,
    videos: bool = False,
) -> None:
    """Write `SPLIT.parquet` for each split, and `manifest.json` with what they were made from and their hashes. Files
    appear whole or not at all, and the same rows give the same bytes. `advance` is told of each row. `truth`: the type
    of the ground truth, by default a string; `videos`: whether rows have a column of videos beside that of images."""

    def counted(split: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in split:
            yield row
            advance(1)

    schema = row_schema(truth or pa.string(), extra_info, videos=videos)
    hashes = {}
    for name, split in rows.items():
        path = folder / f"{name}.parquet"
        write_rows(path, counted(split), schema)
        hashes[path.name] = sha256(path)
    atomic_write_text(folder / "manifest.json", json.dumps({**manifest, "sha256": hashes}, indent=2) + "\n")
