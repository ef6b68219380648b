"""Checkpoints: everything that a continued run needs, whole or not there at all, the newest few kept.

A checkpoint is a folder `step_000020` with weights and optimizer state in the format of torch.distributed.checkpoint,
each rank's share in files of its own, and `state.json` with the rest and the hashes of these files. It is written
beside its place, synced, and renamed, and can be read by any number of ranks. The link `latest` leads to the newest,
`best` to the one that did best when it was evaluated.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from foveate.files import atomic_path, disk_error
from foveate.parallel.ranks import Ranks
from foveate.records import DataError

_NAME = re.compile(r"step_(\d{6,})")


Trained = tuple[nn.Module, torch.optim.Optimizer]


def save_checkpoint(
    folder: Path,
    step: int,
    trained: Mapping[str, Trained],
    state: Mapping[str, Any],
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write `folder/step_XXXXXX` and delete all but the `keep` newest and the best. After a DiskError nothing new is
    there. Several `ranks` call it together, and share the file system.

    `trained`: the models with their optimizers by name; that of the policy is "". `state["score"]`, where it is a
    number, says how well these weights did.
    """
    path = folder / f"step_{step:06d}"
    if ranks is not None and not ranks.is_first:
        temporary = Path(ranks.gather(None)[0])
        ranks.gather(_write(path, temporary, trained, ranks))
        ranks.gather(None)
        return path
    with atomic_path(path) as temporary:
        if ranks is not None:
            ranks.gather(str(temporary))
        hashes = _write(path, temporary, trained, ranks)
        if ranks is not None:
            hashes = {name: value for own in ranks.gather(hashes) for name, value in own.items()}
        content = {"step": step, **state, "hashes": hashes}
        (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    _rotate(folder, keep)
    if ranks is not None:
        ranks.gather(None)
    return path


def _write(path: Path, temporary: Path, trained: Mapping[str, Trained], ranks: Ranks | None) -> dict[str, str]:
    """Write this rank's share; the hashes of its files by name."""
    try:
        with _one_process():
            save(_tensors(trained), checkpoint_id=str(temporary), no_dist=ranks is None)
    except CheckpointException as error:
        raise disk_error(path, _cause(error)) from error
    rank = 0 if ranks is None else ranks.rank
    own = [*temporary.glob(f"__{rank}_*"), *([temporary / ".metadata"] if rank == 0 else [])]
    return {file.name: _hash(file) for file in own}


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rotate(folder: Path, keep: int) -> None:
    found = checkpoints(folder)
    scores = {path: json.loads((path / "state.json").read_text()).get("score") for _, path in found}
    scored = [path for _, path in found if scores[path] is not None]
    best = max(reversed(scored), key=lambda path: scores[path], default=None)
    _link(folder / "latest", found[-1][1])
    if best is not None:
        _link(folder / "best", best)
    for _, old in found[:-keep]:
        if old != best:
            shutil.rmtree(old)


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a folder with their steps, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def load_checkpoint(path: Path, trained: Mapping[str, Trained], ranks: Ranks | None = None) -> dict[str, Any]:
    """Restore weights and optimizer in place; returns what was saved as `state`, with "step". Several `ranks` call it
    together, not necessarily as many as have saved. Raises DataError for a file that is not as it was written."""
    tensors = _tensors(trained)
    try:
        state = json.loads((path / "state.json").read_text())
        _verify(path, state.pop("hashes"), ranks)
        with _one_process():
            load(tensors, checkpoint_id=str(path), no_dist=ranks is None)
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, UnpicklingError, CheckpointException) as error:
        reason = " ".join(str(_cause(error)).split())[:300]
        raise DataError(
            f"{path}: this checkpoint cannot be read ({reason}); delete it to go on from an older one"
        ) from error
    for name, (model, optimizer) in trained.items():
        model.load_state_dict(tensors[f"{name}model"])
        set_optimizer_state_dict(model, optimizer, tensors[f"{name}optimizer"], options=_OPTIONS)
    return state


def _verify(path: Path, hashes: Mapping[str, str], ranks: Ranks | None) -> None:
    """Compare the files with their hashes, each rank a share of them."""
    names = sorted(hashes) if ranks is None else sorted(hashes)[ranks.rank :: ranks.cluster.ranks]
    changed = [name for name in names if not (path / name).is_file() or _hash(path / name) != hashes[name]]
    if ranks is not None:
        changed = [name for own in ranks.gather(changed) for name in own]
    if changed:
        raise ValueError(f"{changed[0]} is not as it was written")


def _cause(error: BaseException) -> Exception:
    """What torch wraps in its own exception: the error of the operating system where there is one, which torch hides
    behind one of its file format; else the error as it came."""
    inner = error.failures[0][0] if isinstance(error, CheckpointException) else error
    chain: list[BaseException] = [inner]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    chosen = next((link for link in chain if isinstance(link, OSError)), inner)
    if not isinstance(chosen, Exception):
        raise chosen  # Ctrl-C, which torch wraps too
    return chosen


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns that one process saves for itself, also when it was asked to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


_OPTIONS = StateDictOptions(ignore_frozen_params=True)


def _tensors(trained: Mapping[str, Trained]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, (model, optimizer) in trained.items():
        tensors[f"{name}model"] = model.state_dict()
        tensors[f"{name}optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return tensors
