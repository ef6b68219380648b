"""A checkpoint of a run as a model folder: in one process, without a GPU, whatever number of ranks has written it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from foveate.config.model import ModelSettings
from foveate.config.recipe import read_values
from foveate.config.runs import (
    CascadeSettings,
    MPOSettings,
    RLSettings,
    RLStage,
    SFTSettings,
    VicoSettings,
    VirSettings,
)
from foveate.errors import ConfigError, one_line
from foveate.files import atomic_path
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.names import CheckpointFormat
from foveate.models.lora import merged_state, train_parts
from foveate.models.policy import load_policy, save_policy
from foveate.train.checkpoint import load_weights

_AnySettings = SFTSettings | MPOSettings | RLSettings | CascadeSettings | VicoSettings | VirSettings
_Settings = TypeVar("_Settings", bound=_AnySettings)


def export_checkpoint(checkpoint: Path, target: Path, to: CheckpointFormat | None = None) -> int:
    """Write the model of `RUN/checkpoints/step_*` (or `latest`, `best`) to a new folder: in the layout that the run's
    model came in, or `to`; adapters are merged. Returns the step of the checkpoint.

    Raises ConfigError for what is no checkpoint of a run and for a target that is there already, DataError for a
    checkpoint that is not as it was written.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another folder")
    checkpoint = _checkpoint_of(checkpoint)
    settings = _model_of(checkpoint)
    policy = load_policy(settings.path, dtype=settings.dtype, quantization=settings.quantization)
    lora = settings.lora and settings.lora.model_copy(update={"adapter": None})  # of which nothing is left
    train_parts(policy, settings.trainable, lora)
    step = load_weights(checkpoint, policy.model)
    write = partial(save_policy, policy, state=dict(merged_state(policy.model)))
    if to in (None, policy.format):
        with atomic_path(target) as temporary:
            write(temporary)
        return step
    assert to is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        write(Path(folder) / "model")
        convert(Path(folder) / "model", target, to)
    return step


def start_of(path: str) -> str:
    """The model folder to begin a run from: a checkpoint of a run is exported first, to `exports/` beside it."""
    target = model_folder_of(path)
    if target != path and not Path(target).exists():
        export_checkpoint(_checkpoint_of(Path(path)), Path(target))
    return target


def model_folder_of(path: str) -> str:
    """The folder that `start_of` returns, whether or not it is there yet."""
    if not (Path(path) / "state.json").is_file():
        return path
    checkpoint = _checkpoint_of(Path(path))
    return str(checkpoint.parent.parent / "exports" / checkpoint.name)


def with_model_folders(settings: _Settings, folder_of: Callable[[str], str] = start_of) -> _Settings:
    """The settings with model folders in place of checkpoints: the model's, and those of teachers."""
    changed: dict[str, Any] = {"model": settings.model.model_copy(update={"path": folder_of(settings.model.path)})}
    page = settings.rl if isinstance(settings, CascadeSettings) else settings
    if isinstance(page, RLSettings | RLStage) and (teacher := page.algorithm.teacher) is not None:
        sources = {source: folder_of(path) for source, path in teacher.sources.items()}
        teacher = teacher.model_copy(update={"path": folder_of(teacher.path), "sources": sources})
        algorithm = page.algorithm.model_copy(update={"teacher": teacher})
        if isinstance(page, RLStage):
            changed["rl"] = page.model_copy(update={"algorithm": algorithm})
        else:
            changed["algorithm"] = algorithm
    return settings.model_copy(update=changed)


def _checkpoint_of(path: Path) -> Path:
    """The folder of a checkpoint, which `latest` and `best` lead to. Raises ConfigError for what is none, and for a
    link that leads out of the folder of the run."""
    checkpoint = Path(os.path.realpath(path))
    config = checkpoint.parent.parent / "config.yaml"
    if not (checkpoint / "state.json").is_file() or not config.is_file():
        raise ConfigError(f"{path}: is no checkpoint of a run; name RUN/checkpoints/step_..., latest or best")
    if checkpoint.parent != Path(os.path.realpath(path.parent)) or config.is_symlink():
        raise ConfigError(f"{path if not config.is_symlink() else config}: leads out of the folder of the run")
    return checkpoint


def _model_of(checkpoint: Path) -> ModelSettings:
    """The settings of the model that a run has trained."""
    config = checkpoint.parent.parent / "config.yaml"
    try:
        return ModelSettings.model_validate(read_values(config)["model"])
    except (ValidationError, TypeError, KeyError) as error:
        reason = one_line(error)[:300]
        raise ConfigError(f"{config}: does not say which model was trained ({reason})") from error
