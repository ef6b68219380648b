"""Evaluation inside a run: when it is due, what it asks, and the files that the report reads."""

from __future__ import annotations

import logging
from pathlib import Path

from foveate.config.train import EvalSettings
from foveate.data.images import load_image
from foveate.data.table import TaskTable
from foveate.encoding.encode import Encoder
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.predict import predict
from foveate.evaluate.predictions import thumbnail_path, write_evaluation, write_gallery
from foveate.log import progress
from foveate.rewards.pool import Graders
from foveate.rollout.engine import Engine

logger = logging.getLogger(__name__)


class Evaluator:
    """Asks the held-out tasks of a run, when it is due. Predictions and gallery go to the run's folder."""

    def __init__(
        self,
        folder: Path,
        settings: EvalSettings,
        tasks: TaskTable | None,
        encoder: Encoder,
        graders: Graders,
        *,
        seed: int,
        max_tokens: int,
        last_step: int,
    ) -> None:
        """`tasks` None: the run has no evaluation. `max_tokens` bounds an answer; after `last_step` one is due."""
        self.folder, self.settings, self.encoder, self.graders = folder, settings, encoder, graders
        self.tasks = None if tasks is None else tasks.first(settings.prompts)
        self.seed, self.max_tokens, self.last_step = seed, max_tokens, last_step
        self._gallery_saved = False

    def is_due(self, step: int) -> bool:
        """Before the first step, every `eval.every` steps, and after the last one."""
        return self.tasks is not None and (step % self.settings.every == 0 or step == self.last_step)

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Ask all held-out tasks with the engine's weights and write the answers; returns the headline figures."""
        assert self.tasks is not None
        if not self._gallery_saved:
            save_gallery(self.folder, self.tasks.first(self.settings.gallery))
            self._gallery_saved = True
        with progress(f"evaluating step {step}", len(self.tasks)) as advance:
            predictions = predict(
                engine,
                self.tasks,
                self.encoder,
                self.graders,
                samples=self.settings.samples,
                max_tokens=self.max_tokens,
                seed=self.seed,
                advance=advance,
            )
        summary = write_evaluation(self.folder, step, predictions)
        figures = {
            f"eval/{way}_{name}": summary[way][name]
            for way in ("greedy", "sampled")
            for name in ("accuracy", "mean_iou", "score")
            if summary[way][name] is not None
        }
        logger.info(
            "step %d: %s", step, ", ".join(f"{name.removeprefix('eval/')} {v:.3f}" for name, v in figures.items())
        )
        return figures


def save_gallery(folder: Path, tasks: TaskTable) -> None:
    """Small copies of the pictures of the tasks that the report shows."""
    shown = [task for task in tasks if task.images]
    for task in shown:
        save_thumbnail(load_image(task.images[0], task.where), thumbnail_path(folder, task.id))
    write_gallery(folder, [task.id for task in shown])
