"""The loss of SFT and preference learning on held-out rows: one pass without gradients, when it is due."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from foveate.algorithms.metrics import Metrics, reduce_metrics
from foveate.config.train import EvalSettings
from foveate.data.table import TaskTable
from foveate.log import progress
from foveate.records import Task

logger = logging.getLogger(__name__)


class HeldOutLoss:
    """Computes the loss on held-out tasks, `chunk` at a time, by `metrics_of` some of them, whose values and weights
    add up over all (`foveate.algorithms.metrics`)."""

    def __init__(
        self,
        settings: EvalSettings,
        tasks: TaskTable | None,
        last_step: int,
        chunk: int,
        metrics_of: Callable[[Sequence[Task]], Metrics],
    ) -> None:
        """`tasks`: None for a run without evaluation; `eval.prompts` of them are asked. After `last_step` an
        evaluation is due."""
        self.tasks = None if tasks is None else tasks.of_each_source(settings.prompts)
        self._every, self._last, self._chunk, self._metrics_of = settings.every, last_step, chunk, metrics_of

    def is_due(self, step: int) -> bool:
        """Before the first step, every `eval.every` steps, and after the last one."""
        return self.tasks is not None and (step % self._every == 0 or step == self._last)

    def measure(self, step: int) -> dict[str, float]:
        """The means over all tasks: `eval/loss`, and what else `metrics_of` measures."""
        assert self.tasks is not None
        rows, parts = len(self.tasks), list[Metrics]()
        with progress(f"evaluating step {step}", rows) as advance:
            for first in range(0, rows, self._chunk):
                some = [self.tasks[index] for index in range(first, min(first + self._chunk, rows))]
                parts.append(self._metrics_of(some))
                advance(len(some))
        found = reduce_metrics(parts)
        told = ", ".join(f"held-out {name.removeprefix('eval/')} {value:.4f}" for name, value in found.items())
        logger.info("step %d: %s on %d rows", step, told, rows)
        return found
