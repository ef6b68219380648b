"""Online RL step by step: `for step in trainer:`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.api.inputs import Reward, checked_call, picture_bytes
from foveate.api.run import Run
from foveate.api.training import finished, prepared, rl_settings
from foveate.errors import ConfigError
from foveate.registry import explain

if TYPE_CHECKING:
    from foveate.train.rl import Step


class RLTrainer:
    """A run of online RL whose steps are yours to look at.

        trainer = RLTrainer("demo", rows, reward, steps=30)
        for step in trainer:
            print(step.number, step.metrics["reward/mean"], step.groups[0].answers[0].text)

    Arguments are those of `foveate.train_rl`. Within the loop `generate`, `evaluate` and `save` work with the weights
    of the step that was done last. Leaving the loop early ends the run as it is; another loop, or `train_rl` with the
    same arguments, continues after its last checkpoint. At the end of the loop the run has its model and its report.
    """

    @checked_call
    def __init__(
        self,
        model: str | Path,
        train_data: Any,
        reward: Reward | Mapping[str, Any],
        *,
        eval_data: Any = None,
        algorithm: str | Mapping[str, Any] = "gspo",
        config: str | Path | None = None,
        run_dir: str | Path | None = None,
        accept_changes: bool = False,
        **overrides: Any,
    ) -> None:
        self.settings = rl_settings(
            model, train_data, reward, eval_data=eval_data, algorithm=algorithm, config=config, run_dir=run_dir,
            overrides=overrides,
        )  # fmt: skip
        self._accept_changes = accept_changes
        self._step: Step | None = None

    @property
    def run(self) -> Run:
        """The run, also while it is under way."""
        return Run(self.settings.run)

    def __iter__(self) -> Iterator[Step]:
        from foveate.train.rl import rl_steps

        settings = prepared(self.settings)
        with closing(rl_steps(settings, accept_changes=self._accept_changes)) as steps:
            try:
                for step in steps:
                    self._step = step
                    yield step
            finally:
                self._step = None
        finished(self.run.folder)

    def generate(
        self,
        question: str,
        images: Sequence[Any] = (),
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> list[str]:
        """`n` answers of the policy to a question, with images (PIL images, paths or bytes) at the marks `<image>` in
        it. Raises UserError outside the loop, and for a question that cannot be encoded."""
        from pydantic import ValidationError

        from foveate.config.rollout import RolloutSettings
        from foveate.data.images import read_image
        from foveate.records import Message, SamplingParams, Task
        from foveate.rollout.engine import Request

        step = self._at_rest("generate")
        limit = max_tokens if max_tokens is not None else self.settings.rollout.max_tokens
        asked = {"samples": n, "max_tokens": limit, "temperature": temperature}
        try:
            RolloutSettings.model_validate(asked)
        except ValidationError as error:
            problem = error.errors()[0]
            name = {"samples": "n"}.get(str(problem["loc"][0]), str(problem["loc"][0]))
            raise ConfigError(f"generate: {name} {explain(problem)}") from None
        if not isinstance(question, str) or question != question.encode("utf-8", "ignore").decode() or seed < 0:
            raise ConfigError("generate: the question must be a text without halves of surrogates, and seed at least 0")
        read = tuple(read_image(picture_bytes(image), [Path.cwd()]) for image in images)
        task = Task(
            "question",
            "question",
            (Message("user", question),),
            read,
            None,
            where="the question",
        )
        sampling = SamplingParams(n, limit, temperature)
        [answers] = step.engine.generate([Request(step.encoder(task), seed)], sampling)
        return [answer.text for answer in answers]

    def evaluate(self) -> dict[str, float]:
        """Accuracy and scores on the held-out rows; the report shows them, too. Raises ConfigError without any."""
        step = self._at_rest("evaluate")
        if step.evaluator.tasks is None:
            raise ConfigError("there are no held-out rows to evaluate on; give eval_data")
        return step.evaluator.evaluate(step.engine, step.number)

    def save(self) -> None:
        """Write a checkpoint of this step, from which the run resumes."""
        self._at_rest("save").save()

    def _at_rest(self, what: str) -> Step:
        if self._step is None:
            raise ConfigError(f"{what}: only within the loop over the trainer, `for step in trainer:`")
        if self.settings.rollout.staleness:
            raise ConfigError(f"{what}: the engine is busy with the next answers; set rollout.staleness=0")
        return self._step
