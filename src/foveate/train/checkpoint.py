"""Checkpoints: everything that a continued run needs, whole or not there at all, the newest few kept.

A checkpoint is a folder `step_000020` with weights and optimizer state in the format of torch.distributed.checkpoint,
each rank's share in files of its own, and `state.json` with the rest and the hashes of these files. It is written
beside its place, synced, and renamed, and can be read by any number of ranks. The link `latest` leads to the newest,
`best` to the one that did best when it was evaluated.
"""

from __future__ import annotations

import hashlib
import json
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
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from foveate.errors import DataError, DiskError
from foveate.files import atomic_path, disk_error, with_room
from foveate.parallel.ranks import Ranks

_NAME = re.compile(r"step_(\d{6,})")


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

    content: what `tensors_of` the models and their optimizers gives, or a copy of it. `state["score"]`, where it is a
    number, says how well these weights did.
    """
    path = place_of(folder, step)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _leaves(content))
    state = {"step": step, **state}
    with_room(partial(_write, path, content, state, ranks), needed)
    if ranks is None or ranks.is_first:
        _rotate(folder, keep)
    if ranks is not None:
        ranks.gather(None, ranks.saving)
    return path


def _write(path: Path, content: Mapping[str, Any], state: Mapping[str, Any], ranks: Ranks | None) -> None:
    """Write a checkpoint, whole or not at all. All ranks end alike: with what went wrong on any."""
    if ranks is None:
        with atomic_path(path) as temporary:
            _write_state(temporary, state, _write_share(path, temporary, content, None))
        return
    problem: DiskError | None = None
    try:
        with atomic_path(path) if ranks.is_first else nullcontext(path) as temporary:
            temporary = Path(ranks.gather(str(temporary), ranks.saving)[0])
            hashes = _write_share(path, temporary, content, ranks)
            hashes = {name: value for own in ranks.gather(hashes, ranks.saving) for name, value in own.items()}
            if ranks.is_first:
                _write_state(temporary, state, hashes)
    except DiskError as error:
        problem = error
    problem = next((one for one in ranks.gather(problem, ranks.saving) if one is not None), None)
    if problem is not None:
        raise problem


def _write_state(temporary: Path, state: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    (temporary / "state.json").write_text(json.dumps({**state, "hashes": hashes}, indent=2) + "\n")


def _write_share(path: Path, temporary: Path, content: Mapping[str, Any], ranks: Ranks | None) -> dict[str, str]:
    """Write this rank's share; the hashes of its files by name. What fails on a rank fails on all."""
    group = None if ranks is None else ranks.saving
    try:
        with _one_process():
            save(dict(content), checkpoint_id=str(temporary), no_dist=ranks is None, process_group=group)
    except CheckpointException as error:
        raise disk_error(path, _cause(error)) from error
    rank = 0 if ranks is None else ranks.rank
    own = [*temporary.glob(f"__{rank}_*"), *([temporary / ".metadata"] if rank == 0 else [])]
    return {file.name: _hash(file) for file in own}


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
            going = old.with_name(f".{old.name}.{os.getpid()}.tmp")  # half of it must not be taken for a checkpoint
            old.replace(going)
            shutil.rmtree(going)


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


def load_checkpoint(path: Path, trained: Mapping[str, Trained], ranks: Ranks | None = None) -> dict[str, Any]:
    """Restore weights and optimizer in place; returns what was saved as `state`, with "step". Several `ranks` call it
    together, not necessarily as many as have saved. Raises DataError for a file that is not as it was written."""
    tensors = tensors_of(trained)
    state = _read(path, tensors, ranks)
    for name, (model, optimizer) in trained.items():
        model.load_state_dict(tensors[f"{name}model"])
        set_optimizer_state_dict(model, optimizer, tensors[f"{name}optimizer"], options=_OPTIONS)
    return state


def load_weights(path: Path, model: nn.Module) -> int:
    """The weights of the policy alone, into a model in this process; returns the step. Raises as `load_checkpoint`."""
    tensors = {"model": model.state_dict()}
    state = _read(path, tensors, None)
    model.load_state_dict(tensors["model"])
    return state["step"]


def _read(path: Path, tensors: dict[str, Any], ranks: Ranks | None) -> dict[str, Any]:
    """Fill tensors in place from files that are as they were written; what was saved as `state`."""
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
    """The weights and optimizer states of models by name; that of the policy is "". Its tensors are theirs."""
    tensors: dict[str, Any] = {}
    for name, (model, optimizer) in trained.items():
        _complete(optimizer)
        tensors[f"{name}model"] = model.state_dict()
        tensors[f"{name}optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return tensors


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that had no gradient yet, such as a vision tower's before the first picture, the state with which
    AdamW begins: a checkpoint holds that of all."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step, **averages}


def _leaves(content: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _leaves(part)
