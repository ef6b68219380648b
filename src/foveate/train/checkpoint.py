"""Checkpoints: everything that a resumed run needs, whole or not there at all, the newest few kept.

A checkpoint is a folder `step_000020` with weights and optimizer state in the format of torch.distributed.checkpoint,
each rank's share in files of its own, and `state.json` with the rest, the hashes of these files and one of itself. It
is written beside its place, synced, and renamed, and can be read by any number of ranks. Reading it runs nothing of
what is in it. The link `latest` leads to the newest, `best` to the one that did best when it was evaluated.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_leaves

from foveate.errors import ConfigError, DataError, DiskError, UserError, one_line
from foveate.files import OtherSchema, atomic_path, disk_error, gone, read_sealed, sealed, sha256, with_room
from foveate.models.quantize import quantized_layers, without_quantized
from foveate.parallel.ranks import Ranks
from foveate.train.checkpoint_reader import load_tensors

CHECKPOINT_SCHEMA = 3
"""Of checkpoints. It grows when their content changes, and others are refused."""

_NAME = re.compile(r"step_(\d{6,})")
_FILE = re.compile(r"\.metadata|__\d+_\d+\.distcp")
_HASH = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)

Trained = tuple[nn.Module, torch.optim.Optimizer]


def save_checkpoint(
    folder: Path,
    step: int,
    content: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write `folder/step_XXXXXX` and delete all but the `keep` newest and the best. After a DiskError nothing new is
    there. Several `ranks` call it together, and share the file system.

    content: `tensors_of` the models and their optimizers, or a copy of it. `state["score"]`, where it is a number, says
    how well these weights did.
    """
    path = place_of(folder, step)
    tensors = [leaf for leaf in tree_leaves(dict(content)) if isinstance(leaf, Tensor)]
    state = {"schema": CHECKPOINT_SCHEMA, "ranks": _count(ranks), "step": step, **state}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with_room(partial(_write, path, content, state, ranks), needed)
    if ranks is None or ranks.is_first:
        _rotate(folder, keep)
    _gather(ranks, None)
    return path


def _count(ranks: Ranks | None) -> int:
    return 1 if ranks is None else ranks.cluster.ranks


def _gather(ranks: Ranks | None, value: Any) -> list[Any]:
    return [value] if ranks is None else ranks.gather(value, ranks.saving)


def _write(path: Path, content: Mapping[str, Any], state: Mapping[str, Any], ranks: Ranks | None) -> None:
    """Write a checkpoint, whole or not at all. If a rank fails, all raise its error."""
    problem: DiskError | None = None
    is_first = ranks is None or ranks.is_first
    try:
        if is_first and not path.parent.parent.is_dir():
            raise gone(path.parent.parent)
        with atomic_path(path) if is_first else nullcontext(path) as temporary:
            temporary = Path(_gather(ranks, str(temporary))[0])
            shares = _gather(ranks, _write_share(path, temporary, content, ranks))
            if is_first:
                hashes = {name: value for share in shares for name, value in share.items()}
                _write_state(temporary, {**state, "hashes": hashes})
    except DiskError as error:
        problem = error
    problem = next((one for one in _gather(ranks, problem) if one is not None), None)
    if problem is not None:
        raise problem


def _write_state(temporary: Path, state: Mapping[str, Any]) -> None:
    (temporary / "state.json").write_text(sealed(state), encoding="utf-8")


def _write_share(path: Path, temporary: Path, content: Mapping[str, Any], ranks: Ranks | None) -> dict[str, str]:
    """Write this rank's share; the hashes of its files by name. A failure on one rank is raised on all."""
    group = None if ranks is None else ranks.saving
    try:
        with _one_process():
            save(dict(content), checkpoint_id=str(temporary), no_dist=ranks is None, process_group=group)
    except CheckpointException as error:
        raise disk_error(path, _cause(error)) from error
    rank = 0 if ranks is None else ranks.rank
    own = [*temporary.glob(f"__{rank}_*"), *([temporary / ".metadata"] if rank == 0 else [])]
    return {file.name: sha256(file) for file in own}


class Saving:
    """Checkpoints that are written while training goes on: one at a time, from copies in host memory."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[Path] | None = None

    def start(self, folder: Path, step: int, content: Mapping[str, Any], *rest: Any) -> Path:
        """`save_checkpoint` of a copy of the tensors as they are now. The one before must be done."""
        copied = BlockingAsyncStager(cache_staged_state_dict=False).stage(dict(content))
        self._under_way = self._thread.submit(save_checkpoint, folder, step, copied, *rest)
        return place_of(folder, step)

    def check(self) -> None:
        """Raise what ended the last one, if anything did."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is under way. Raises what ended it, once."""
        if self._under_way is not None:
            future, self._under_way = self._under_way, None
            future.result()


def _rotate(folder: Path, keep: int) -> None:
    found = checkpoints(folder)
    scores = {path: _score(path) for _, path in found}
    scored = [path for _, path in found if scores[path] is not None]
    best = max(reversed(scored), key=lambda path: scores[path], default=None)
    _link(folder / "latest", found[-1][1])
    if best is not None:
        _link(folder / "best", best)
    for _, old in found[:-keep]:
        if old != best:
            going = old.with_name(f".{old.name}.{os.getpid()}.tmp")  # half of it must not be taken for a checkpoint
            old.replace(going)
            shutil.rmtree(going)


def _score(path: Path) -> Any:
    """How well a checkpoint did; None where it does not say so, or cannot be read."""
    try:
        return read_state(path).get("score")
    except UserError as error:
        logger.warning("%s", error)
        return None


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)


def place_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a folder with their steps, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def load_checkpoint(
    path: Path, trained: Mapping[str, Trained], ranks: Ranks | None = None, *, bound_to_ranks: str = ""
) -> dict[str, Any]:
    """Restore weights and optimizer in place; returns the `state` that was saved, with "step".

    Several `ranks` call it together, not necessarily as many as have saved, unless `bound_to_ranks` names an optimizer
    whose state only serves the number of ranks that saved it: then another number raises ConfigError. Raises DataError
    for a file that is not as it was written.
    """
    tensors = tensors_of(trained)
    state = _read(path, tensors, ranks, bound_to_ranks)
    for name, (model, optimizer) in trained.items():
        _load(model, tensors[f"{name}model"])
        set_optimizer_state_dict(model, optimizer, tensors[f"{name}optimizer"], options=_OPTIONS)
    return state


def load_weights(path: Path, model: nn.Module) -> int:
    """The weights of the policy alone, into a model in this process; returns the step. Raises as `load_checkpoint`."""
    tensors = {"model": without_quantized(model.state_dict(), model)}
    state = _read(path, tensors, None)
    _load(model, tensors["model"])
    return state["step"]


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    model.load_state_dict(tensors, strict=not quantized_layers(model))


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that was saved, with "step", "ranks" and "hashes". Raises DataError for one that is not as it was
    written, ConfigError for one of another version."""
    with _unreadable(path):
        try:
            state = read_sealed(path / "state.json", CHECKPOINT_SCHEMA)
        except OtherSchema as other:
            raise ConfigError(
                f"{path}: this checkpoint has schema {other.found}, this version of foveate reads {CHECKPOINT_SCHEMA}; "
                "use the version that wrote it, or start over with another run="
            ) from None
        _check_state(path, state)
    return state


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError for values that no checkpoint is saved with."""
    step, ranks, score, hashes = (state.get(name) for name in ("step", "ranks", "score", "hashes"))
    if type(step) is not int or type(ranks) is not int or step < 0 or ranks < 1:
        raise ValueError(f"state.json says step {step!r}, ranks {ranks!r}")
    if score is not None and not (type(score) in (int, float) and math.isfinite(score)):
        raise ValueError(f"state.json says score {score!r}")
    name = _NAME.fullmatch(path.resolve().name)
    if name is not None and int(name[1]) != step:
        raise ValueError(f"state.json says step {step}")
    if not isinstance(hashes, dict) or ".metadata" not in hashes or len(hashes) < 2:
        raise ValueError("state.json has no hashes of its files")
    for file, value in hashes.items():
        if not (_FILE.fullmatch(file) and isinstance(value, str) and _HASH.fullmatch(value)):
            raise ValueError(f"state.json has {value!r:.80} as the hash of {file!r:.60}")


def _read(path: Path, tensors: dict[str, Any], ranks: Ranks | None, bound_to_ranks: str = "") -> dict[str, Any]:
    """Fill tensors in place from files that are as they were written; the `state` that was saved."""
    state = read_state(path)
    del state["schema"]
    saved_by, hashes = state.pop("ranks"), state.pop("hashes")
    if bound_to_ranks and saved_by != _count(ranks):
        raise ConfigError(
            f"{path}: was saved by {saved_by} ranks; the state of optimizer {bound_to_ranks} cannot be resumed by"
            f" {_count(ranks)}: use as many ranks as before"
        )
    with _unreadable(path), _one_process():
        _verify(path, hashes, ranks)
        load_tensors(path, hashes.keys(), tensors, alone=ranks is None)
    return state


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Errors of reading a checkpoint as a DataError in one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, UnpicklingError, CheckpointException) as error:
        reason = one_line(_cause(error))[:300]
        raise DataError(
            f"{path}: this checkpoint cannot be read ({reason}); delete it to resume from an older one"
        ) from error


def _verify(path: Path, hashes: Mapping[str, str], ranks: Ranks | None) -> None:
    """Compare the files with their hashes, each rank a share of them."""
    names = sorted(hashes) if ranks is None else sorted(hashes)[ranks.rank :: ranks.cluster.ranks]
    changed = [name for name in names if not _is_own_file(path / name) or sha256(path / name) != hashes[name]]
    if ranks is not None:
        changed = [name for own in ranks.gather(changed) for name in own]
    if changed:
        raise ValueError(f"{changed[0]} is not as it was written")


def _is_own_file(file: Path) -> bool:
    """Whether there is a file, and no link to one elsewhere."""
    return file.is_file() and not file.is_symlink()


def _cause(error: BaseException) -> Exception:
    """The error that torch wraps in its own: that of the operating system where there is one, which torch hides behind
    one of its file format; else the error as it came."""
    inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
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


def tensors_of(trained: Mapping[str, Trained]) -> dict[str, Any]:
    """The weights and optimizer states of models by name; that of the policy is "". Its tensors are theirs. Quantised
    layers are left out: they are frozen, and made from the model folder, which must be the same. An optimizer holds the
    state of all its parameters from the start (`build_optimizer`)."""
    tensors: dict[str, Any] = {}
    for name, (model, optimizer) in trained.items():
        tensors[f"{name}model"] = without_quantized(model.state_dict(), model)
        tensors[f"{name}optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return tensors
