"""Log-probs of preference pairs under the frozen start: computed once, kept on disk, checked whenever they are used."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.algorithms.targets import LossOut, PairTargets
from foveate.errors import DataError
from foveate.files import disk_error, require_held
from foveate.log import progress
from foveate.records import PackedGroup

logger = logging.getLogger(__name__)

PreferenceLoss = Callable[..., LossOut]

_ENTRY = np.dtype([("pair", "V16"), ("chosen", "<f8"), ("rejected", "<f8"), ("seconds", "<f8")])
_IDENTITY = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""The files of a model folder that can change a log-prob."""


@dataclass(frozen=True, slots=True)
class TrainPair:
    """A preference pair as the update eats it: one prompt with two answers, the chosen one first, and the log-probs of
    both under the frozen reference, sums over their tokens (None: the loss needs none)."""

    group: PackedGroup
    ref: tuple[float, float] | None


def pair_targets(pairs: Sequence[TrainPair], shift: float, device: torch.device | None = None) -> PairTargets:
    """Targets of one micro-batch, on a device."""
    known = [value for pair in pairs if pair.ref is not None for value in pair.ref]
    assert len(known) in (0, 2 * len(pairs)), "some pairs have reference log-probs and some have none"
    return PairTargets(torch.tensor(known, dtype=torch.float64, device=device) if known else None, shift)


class Reference:
    """The log-probs of all pairs of a dataset, in a file that grows while they are computed.

    `key` names the start and the data (`reference_key`). Each entry holds a digest of its pair as it was encoded, so
    that rows, pictures or templates that changed since are found when they are used. It has a `state`, its name.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"{key}.pairs"
        self._entries = np.zeros(0, _ENTRY)
        if self.path.exists():
            data = self.path.read_bytes()
            whole = len(data) - len(data) % _ENTRY.itemsize  # what follows was cut off by a kill
            self._entries = np.frombuffer(data[:whole], _ENTRY)
        self._number: dict[bytes, int] = {}

    @property
    def seconds(self) -> float:
        """How long it took to compute them, whenever that was."""
        return float(self._entries["seconds"].sum())

    def complete(
        self,
        rows: int,
        chunk: int,
        encode: Callable[[int], PackedGroup],
        logprobs: Callable[[Sequence[PackedGroup]], Sequence[Tensor]],
    ) -> None:
        """Compute what is missing of `rows` pairs, `chunk` at a time.

        encode: the pair of a row; logprobs: the log-probs of all answer tokens of each pair, under the start.
        """
        with progress("reference log-probs", rows) as advance:
            advance(len(self._entries))
            while len(self._entries) < rows:
                begin = time.perf_counter()
                first = len(self._entries)
                groups = [encode(row) for row in range(first, min(first + chunk, rows))]
                found = np.zeros(len(groups), _ENTRY)
                for entry, group, logp in zip(found, groups, logprobs(groups), strict=True):
                    chosen, rejected = (part.double().sum().item() for part in logp.split(group.lengths))
                    entry["pair"], entry["chosen"], entry["rejected"] = digest(group), chosen, rejected
                found["seconds"] = (time.perf_counter() - begin) / len(groups)
                self._append(found)
                advance(len(groups))
        self._number = {entry["pair"].tobytes(): number for number, entry in enumerate(self._entries)}

    def __call__(self, group: PackedGroup, where: str) -> tuple[float, float]:
        """The log-probs of the chosen and the rejected answer of a pair. Raises DataError if its row has changed."""
        number = self._number.get(digest(group))
        if number is None:
            raise DataError(
                f"{where}: the row, its image or the model's template changed since its reference log-probs were "
                f"computed; delete {self.path} to compute them again, in a new run folder"
            )
        entry = self._entries[number]
        return float(entry["chosen"]), float(entry["rejected"])

    def state(self) -> dict[str, Any]:
        return {"name": self.path.name}

    def restore(self, state: dict[str, Any]) -> None:
        """A run that continues must compare with the start that it began with."""
        if state["name"] != self.path.name:
            raise DataError(
                f"{self.path.parent}: the start (model.path) or the pairs changed since this run began, so that its "
                "reference log-probs are others; bring them back, or choose another run="
            )

    def _append(self, found: np.ndarray) -> None:
        self._entries = np.concatenate([self._entries, found])
        size = (len(self._entries) - len(found)) * _ENTRY.itemsize
        require_held(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "r+b" if self.path.exists() else "wb") as file:
                file.seek(size)
                file.truncate()
                file.write(found.tobytes())
        except OSError as error:
            raise disk_error(self.path, error) from error


def reference_key(model: Path, data: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """A name for the log-probs of some data under a model: by the content of the files of both, and by whatever else
    changes them."""
    key = hashlib.sha256(repr(sorted(settings.items())).encode())
    for file in [*sorted(file for pattern in _IDENTITY for file in model.glob(pattern)), *data]:
        with file.open("rb") as content:
            key.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return key.hexdigest()[:32]


def digest(group: PackedGroup) -> bytes:
    """16 bytes that stand for a pair as it was encoded: tokens, pixels, answers."""
    answers = tuple(answer.token_ids for answer in group.answers)
    found = hashlib.blake2b(repr((group.prompt.token_ids, group.prompt.slots, answers)).encode(), digest_size=16)
    if group.prompt.pixels is not None:
        found.update(group.prompt.pixels.contiguous().numpy().data)
    return found.digest()
