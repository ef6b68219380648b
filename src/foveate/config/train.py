"""Optimizer, length and batches of a run, evaluation and logging."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from foveate.config.base import ONE_OR_MORE, Settings, refuse

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
LearningRate = Annotated[float, Field(gt=0, le=10, description="Peak learning rate.")]
MaxAnswerTokens = Annotated[
    int | None,
    Field(
        ge=1,
        description="Longest answer of a row, in tokens; null: what fits into tokens_per_micro_batch with its prompt.",
    ),
]


class OptimSettings(Settings):
    name: str = Field(default="adamw", description="A known optimizer (adamw, adamw8bit, muon) or an import path.")
    settings: dict[str, Any] = Field(default={}, description="Settings of the optimizer; the rest by its own defaults.")
    lr: LearningRate = 1e-6
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of matrices.")
    betas: Betas = Field(default=(0.9, 0.999), description="Decay rates of AdamW's two moments.")
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which the learning rate rises linearly to its peak."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant",
        description="Learning rate after the warm-up: constant, or falling to 0, which it reaches after the last step.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradients with a larger global L2 norm are scaled down to it."
    )


class SFTOptimSettings(OptimSettings):
    lr: LearningRate = 1e-5


class MPOOptimSettings(OptimSettings):
    lr: LearningRate = 2e-7


class TrainSettings(Settings):
    steps: int = Field(ge=1, description="Length of the run, in steps.")
    tokens_per_micro_batch: int = Field(
        default=16384, ge=1, description="Token budget of one forward pass on one device."
    )
    save_every: int = Field(
        default=50, ge=0, description="Steps from one checkpoint to the next; 0: only after the last step."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept; older ones are deleted.")
    save_async: bool = Field(
        default=False,
        description="Write checkpoints while training continues, from a copy of weights and optimizer in host memory.",
    )
    disk_wait: float | None = Field(
        default=None,
        ge=0,
        description="Seconds that a run waits for room on a full disk before it ends with an error; 0: none; null: "
        "900, or with several ranks half of cluster.timeout where that is less.",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: as many as PyTorch chooses.")


class RLTrainSettings(TrainSettings):
    prompts_per_step: int = Field(default=32, ge=1, description="Prompts of one step.")
    updates_per_step: int = Field(
        default=1, ge=1, description="Optimizer updates of one step, each on an equal share of its prompts."
    )
    epochs_per_step: int = Field(
        default=1,
        ge=1,
        description="Times that a step trains on its answers, each in `updates_per_step` updates (PPO's epochs).",
    )


_Quality = Annotated[int, Field(ge=1, le=100)]
_Share = Annotated[float, Field(gt=0, le=1)]


class AugmentSettings(Settings):
    jpeg: Annotated[tuple[_Quality, _Quality], Field(strict=False)] | None = Field(
        default=None,
        description="Least and greatest quality at which images are compressed as JPEG at random; InternVL: [75, 100].",
    )
    resize: Annotated[tuple[_Share, _Share], Field(strict=False)] | None = Field(
        default=None,
        description="Least and greatest share of its sides to which an image is shrunk at random, and grown again.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name, value in (("jpeg", self.jpeg), ("resize", self.resize)):
            if value is not None and value[0] > value[1]:
                refuse(f"train.augment.{name}", f"is {list(value)}; write the smaller number first")
        return self


class SFTTrainSettings(TrainSettings):
    samples_per_step: int = Field(default=32, ge=1, description="Demonstrations in one optimizer update.")
    max_answer_tokens: MaxAnswerTokens = None
    weighting: Literal["token", "sample", "square"] = Field(
        default="token", description="Weight of a token in an answer of n tokens: 1, 1/n or 1/sqrt(n)."
    )
    trained_turns: Literal["last", "all"] = Field(
        default="last",
        description="Of conversations with several turns of the assistant, the last one is trained on, or all.",
    )
    augment: AugmentSettings = Field(default=AugmentSettings(), description="Images made worse at random.")

    @model_validator(mode="after")
    def _augments_what_it_trains(self) -> Self:
        if self.trained_turns == "all" and (self.augment.jpeg or self.augment.resize):
            refuse("train.augment", "is set, but with train.trained_turns=all images stay as they are; leave one out")
        return self


class VicoTrainSettings(SFTTrainSettings):
    weighting: Literal["token", "sample", "square"] = Field(
        default="sample", description="Weight of a token in an answer of n tokens: 1, 1/n or 1/sqrt(n)."
    )
    compressed: Literal["tiles", "prompts"] = Field(
        default="tiles",
        description="Compressed at random in what the policy sees: each tile by itself, at a share that is drawn for "
        "the prompt, or all tiles of half of the prompts.",
    )


class RouterTrainSettings(SFTTrainSettings):
    quantile: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of the rows, by how little they lose, that is taught as compressible.",
    )
    window: int = Field(default=1024, ge=2, description="Latest rows over which that share is taken.")


class VirTrainSettings(RouterTrainSettings):
    reference: str = Field(
        min_length=1, description="Folder of the model that visual consistency learning began from: its frozen start."
    )


class MPOTrainSettings(TrainSettings):
    pairs_per_step: int = Field(default=32, ge=1, description="Preference pairs in one optimizer update.")
    max_answer_tokens: MaxAnswerTokens = None
    reference_cache: str | None = Field(
        default=None,
        description="Folder of log-probs under the reference model, which runs may share; null: in the run's folder.",
    )


class EvalSettings(Settings):
    every: int = Field(
        default=20,
        ge=0,
        description="Steps between evaluations; others come before the first and after the last step. 0: none, as "
        "always where it is not set and there are no held-out rows (data.test, data.hold_out).",
    )
    prompts: int | None = Field(
        default=None, ge=1, description="Held-out prompts, the first ones of each source by turns; null: all."
    )


class RLEvalSettings(EvalSettings):
    samples: int = Field(
        default=0, ge=0, description="Answers per prompt sampled at temperature 1, besides the greedy one."
    )
    gallery: int = Field(default=16, ge=0, description="Held-out images that the report shows for each evaluation.")


TrackerNames = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"], ...], ONE_OR_MORE, Field(strict=False)
]


class LogSettings(Settings):
    to: TrackerNames = Field(
        default=(),
        description="Trackers that get settings, metrics and some answers with images; each must be installed.",
    )

    @model_validator(mode="after")
    def _installed(self) -> Self:
        for name in self.to:
            if find_spec(name) is None:
                refuse("log.to", f"names {name}, which is not installed; run pip install {name}, or leave it out")
        return self
