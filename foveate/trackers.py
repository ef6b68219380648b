"""Metrics to TensorBoard, Weights & Biases, MLflow or Trackio, besides `metrics.jsonl`: each is imported by a run that
names it, and only then."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

Tracker = Callable[[int, Mapping[str, float]], object]
"""Takes the step and its finite numbers."""

PROJECT = "foveate"


def open_trackers(names: Sequence[str], run: Path, step: int) -> list[Tracker]:
    """The trackers of a run that goes on after `step`. What a tracker has of later steps it forgets or writes over, as
    far as it can: TensorBoard purges it, the others get the same run again."""
    return [OPENERS[name](run, step) for name in names]


def _tensorboard(run: Path, step: int) -> Tracker:
    writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(run: Path, _step: int) -> Tracker:
    wandb: Any = import_module("wandb")
    opened = wandb.init(project=PROJECT, name=run.name, id=_identity(run), resume="allow", dir=str(run))
    return lambda step, metrics: opened.log(dict(metrics), step=step)


def _mlflow(run: Path, _step: int) -> Tracker:
    mlflow: Any = import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run.name, tags={"foveate.run": str(run.resolve())})
    return lambda step, metrics: mlflow.log_metrics(dict(metrics), step=step)


def _trackio(run: Path, _step: int) -> Tracker:
    trackio: Any = import_module("trackio")
    trackio.init(project=PROJECT, name=f"{run.name}-{_identity(run)}", resume="allow")
    return lambda step, metrics: trackio.log(dict(metrics), step=step)


def _identity(run: Path) -> str:
    """The same for the same folder, so that a run that continues is one run there too."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]


OPENERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
