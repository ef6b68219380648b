"""Experiment trackers: the settings of a run, its metrics, and some of its answers with their images.

TensorBoard purges the steps after which a run resumes; the others get the same run again, and what they have of later
steps is written over where they allow it. Each is imported only where `log.to` names it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from foveate.config.recipe import flatten, values_to_yaml
from foveate.config.run_base import RunSettings
from foveate.data.answers import prompt_fields
from foveate.data.images import load_image
from foveate.evaluate.draw import as_shown
from foveate.log import masked_values
from foveate.records import Group

PROJECT, TABLE = "foveate", "answers"
ANSWERS, EVERY, MOST_SIDE = 8, 10, 400
"""Answers that are shown of a step, steps from one showing to the next, and the longest side of an image in pixels."""
TABLE_COLUMNS = ("id", "image", "prompt", "answer", "ground truth", "reward")


@dataclass(frozen=True, slots=True)
class TrackedAnswer:
    """A row of the table of answers: `cells` by `TABLE_COLUMNS` but for the image, the first one of the prompt."""

    image: Image.Image | None
    cells: Mapping[str, str | float | None]

    def row(self, image: Callable[[Image.Image], Any]) -> list[Any]:
        """The values of all columns, the image as a tracker has it."""
        shown = None if self.image is None else image(self.image)
        return [shown if name == "image" else self.cells[name] for name in TABLE_COLUMNS]

    @property
    def caption(self) -> str:
        return f"{self.cells['prompt']}\n{self.cells['answer']}\nreward {self.cells['reward']}"


class Tracker(Protocol):
    """One tracker of one run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the finite numbers of a step."""

    def show(self, step: int, answers: Sequence[TrackedAnswer]) -> None:
        """Take some answers of a step."""


class Trackers:
    """The trackers of a run, opened with its settings when there is something to log."""

    def __init__(self, settings: RunSettings, run: Path) -> None:
        self._settings, self._run = settings, run
        self._opened: list[Tracker] | None = None

    def _of(self, step: int) -> list[Tracker]:
        if self._opened is None:
            config = masked_values(self._settings.model_dump(mode="json"))
            self._opened = [OPENERS[name](self._run, step - 1, config) for name in self._settings.log.to]
        return self._opened

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give all of them the finite numbers of a step."""
        for tracker in self._of(step):
            tracker.log(step, metrics)

    def show(self, step: int, groups: Sequence[Group]) -> None:
        """Give all of them an answer to each of the first prompts of a step: of the first step, and of one in ten."""
        if self._settings.log.to and (step == 1 or step % EVERY == 0):
            answers = [_tracked(group) for group in groups[:ANSWERS]]
            for tracker in self._of(step):
                tracker.show(step, answers)


def _tracked(group: Group) -> TrackedAnswer:
    task, image = group.task, None
    if task.images:
        image = as_shown(load_image(task.images[0], task.where))
        image.thumbnail((MOST_SIDE, MOST_SIDE))
    asked, answer, score = prompt_fields(task), group.answers[0], group.scores[0]
    cells = {"id": task.id, "prompt": asked["question"], "answer": answer.text, "reward": score.value}
    return TrackedAnswer(image, {**cells, "ground truth": str(asked["ground_truth"])})


def _identity(run: Path, characters: int = 8) -> str:
    """The same for the same folder: a run that resumes is one run for its trackers too."""
    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:characters]


# -------------------------------------------------------------------------------------------------------- each of them


class TensorBoard:
    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        module: Any = import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("settings", f"```yaml\n{values_to_yaml(config)}```", step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, step: int, answers: Sequence[TrackedAnswer]) -> None:
        columns = [name for name in TABLE_COLUMNS if name != "image"]
        lines = [columns, ["---"] * len(columns), *([str(one.cells[name]) for name in columns] for one in answers)]
        rows = (
            "| " + " | ".join(re.sub(r"\s*\n\s*", "<br>", cell.replace("|", "\\|")) for cell in line) for line in lines
        )
        self._writer.add_text(TABLE, "\n".join(f"{row} |" for row in rows), step)
        for place, one in enumerate(answers):
            if one.image is not None:
                self._writer.add_image(f"{TABLE}/{place}", np.asarray(one.image), step, dataformats="HWC")
        self._writer.flush()


class WandB:
    def __init__(self, run: Path, _step: int, config: Mapping[str, Any]) -> None:
        self._module: Any = import_module("wandb")
        self._run = self._module.init(
            project=PROJECT, name=run.name, id=_identity(run), resume="allow", dir=str(run), config=dict(config),
            allow_val_change=True,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def show(self, step: int, answers: Sequence[TrackedAnswer]) -> None:
        rows = [one.row(self._module.Image) for one in answers]
        self._run.log({TABLE: self._module.Table(columns=list(TABLE_COLUMNS), data=rows)}, step=step)


class MLflow:
    MOST_PARAMETERS, MOST_CHARACTERS = 100, 250
    """Of one request, and of the value of one."""

    def __init__(self, run: Path, _step: int, config: Mapping[str, Any]) -> None:
        self._module: Any = import_module("mlflow")
        self._module.set_experiment(PROJECT)
        self._module.start_run(run_name=run.name, tags={"foveate.run": str(run.resolve())})
        flat = {re.sub(r"[^\w./ :-]", "_", name): str(value) for name, value in flatten(config).items()}
        parameters = [one for one in flat.items() if len(one[0]) <= self.MOST_CHARACTERS >= len(one[1])]
        for first in range(0, len(parameters), self.MOST_PARAMETERS):
            self._module.log_params(dict(parameters[first : first + self.MOST_PARAMETERS]))
        self._module.log_dict(dict(config), "settings.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(metrics), step=step)

    def show(self, step: int, answers: Sequence[TrackedAnswer]) -> None:
        rows = [one.row(self._module.Image) for one in answers]
        columns = dict(zip(TABLE_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        if any(one.image for one in answers):  # a column of images takes nothing else
            blank = Image.new("RGB", (1, 1), "white")
            columns["image"] = [image or self._module.Image(blank) for image in columns["image"]]
        self._module.log_table({"step": [step] * len(rows), **columns}, f"{TABLE}.json")


class Trackio:
    def __init__(self, run: Path, _step: int, config: Mapping[str, Any]) -> None:
        self._module: Any = import_module("trackio")
        name = f"{run.name}-{_identity(run)}"
        self._module.init(project=PROJECT, name=name, resume="allow", config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def show(self, step: int, answers: Sequence[TrackedAnswer]) -> None:
        pandas: Any = import_module("pandas")  # of which trackio is made
        rows = [one.row(self._module.Image) for one in answers]
        table = self._module.Table(dataframe=pandas.DataFrame(rows, columns=list(TABLE_COLUMNS)))
        self._module.log({TABLE: table}, step=step)


class SwanLab:
    """Its tables hold no images: the table, and the images with answer and reward as captions."""

    def __init__(self, run: Path, _step: int, config: Mapping[str, Any]) -> None:
        self._module: Any = import_module("swanlab")
        self._module.init(
            project=PROJECT, experiment_name=run.name, config=dict(config), logdir=str(run / "swanlab"),
            id=_identity(run, 21), resume="allow",
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def show(self, step: int, answers: Sequence[TrackedAnswer]) -> None:
        columns = [name for name in TABLE_COLUMNS if name != "image"]
        table = self._module.echarts.Table()
        table.add(columns, [[str(one.cells[name]) for name in columns] for one in answers])
        shown: dict[str, Any] = {TABLE: table}
        images = [self._module.Image(one.image, caption=one.caption) for one in answers if one.image is not None]
        self._module.log(shown | ({f"{TABLE}/images": images} if images else {}), step=step)


OPENERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
    "swanlab": SwanLab,
}
"""Each takes the folder of the run, the step after which it resumes, and its settings."""
