"""Every setting of a run. What is not here cannot be set, and what is here acts.

Models are frozen, refuse unknown keys and take types literally. `foveate.config.recipe` reads them from YAML. Paths are
relative to the current directory. A step is one round of generating answers and learning from them (RL), or one
optimizer update (SFT).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from foveate.config.algorithm import AlgorithmSettings, PreferenceSettings, RewardSettings
from foveate.config.base import Settings, refuse
from foveate.config.cluster import ClusterSettings
from foveate.config.data import DataSettings, RLDataSettings
from foveate.config.model import ModelSettings
from foveate.config.rollout import RolloutSettings
from foveate.config.train import (
    EvalSettings,
    LogSettings,
    MPOTrainSettings,
    OptimSettings,
    RLTrainSettings,
    SFTTrainSettings,
    TrainSettings,
)

# The algorithms whose baseline is not the mean of the other answers to the same prompt.
_WITHOUT_GROUPS = ("ppo", "reinforce_plus_plus", "remax")


class RLSettings(Settings):
    """A run of online reinforcement learning."""

    run: str = Field(min_length=1, description="Folder of the run; the same folder again continues it.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    model: ModelSettings
    data: RLDataSettings
    rollout: RolloutSettings = RolloutSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    reward: RewardSettings = RewardSettings()
    optim: OptimSettings
    train: RLTrainSettings
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        _check_modules(self.model)
        _check_warmup(self.optim, self.train)
        _check_weights(self.data)
        _check_system(self.data)
        self._check_batch()
        self._check_staleness()
        self._check_evaluation()
        _check_disk(self.train, self.cluster)
        return self

    def _check_batch(self) -> None:
        rollout, train = self.rollout, self.train
        if train.prompts_per_step % train.updates_per_step:
            divisors = [n for n in range(1, train.prompts_per_step + 1) if train.prompts_per_step % n == 0]
            refuse(
                "train.updates_per_step",
                f"is {train.updates_per_step} but must divide train.prompts_per_step={train.prompts_per_step}; "
                f"use one of {', '.join(map(str, divisors))}",
            )
        if rollout.samples == 1:
            self._check_single_answers()
        if rollout.temperature == 0:
            refuse(
                "rollout.temperature",
                "is 0, which gives equal answers and nothing to learn from; use a value above 0 (1.0 is usual)",
            )
        longest = self.data.max_prompt_tokens + rollout.max_tokens
        split = self.cluster.sequence_parallel
        if train.tokens_per_micro_batch * split < longest:
            ranks = f" on {split} devices" if split > 1 else ""
            refuse(
                "train.tokens_per_micro_batch",
                f"is {train.tokens_per_micro_batch}{ranks}, less than one longest prompt and answer: "
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} + rollout.max_tokens={rollout.max_tokens}; "
                f"use {-(-longest // split)} or more, or lower those",
            )

    def _check_staleness(self) -> None:
        if self.rollout.staleness and self.algorithm.correction is None:
            refuse(
                "rollout.staleness",
                f"is {self.rollout.staleness}, so that answers are sampled by older weights than those that learn from "
                "them, but algorithm.correction is null; set 'algorithm.correction={mode: token-truncate}' "
                "(or another mode), or rollout.staleness=0",
            )
        if self.rollout.partial and not self.rollout.staleness:
            refuse(
                "rollout.partial",
                "is true, so that answers go on under new weights, but rollout.staleness is 0, where none is under way "
                "then; set rollout.staleness=1 or more, or rollout.partial=false",
            )
        if self.rollout.over_sample and not self.rollout.partial:
            refuse(
                "rollout.over_sample",
                f"is {self.rollout.over_sample}, but rollout.partial is false, so that a publish would wait for those "
                "groups after all; set rollout.partial=true, or rollout.over_sample=0",
            )

    def _check_single_answers(self) -> None:
        name = self.algorithm.name
        if name not in _WITHOUT_GROUPS and ":" not in name:
            refuse(
                "rollout.samples",
                f"is 1, but algorithm {name} compares answers to the same prompt; use 2 or more (8 is usual)",
            )

    def _check_evaluation(self) -> None:
        if self.eval.every and not self.data.test:
            refuse(
                "eval.every",
                f"is {self.eval.every}, but data.test is empty; name held-out files in data.test, or set eval.every=0 "
                "for a run without evaluation",
            )
        if self.eval.prompts is not None and self.eval.gallery > self.eval.prompts:
            refuse(
                "eval.gallery",
                f"is {self.eval.gallery}, more than eval.prompts={self.eval.prompts}; use {self.eval.prompts} or less",
            )


class SFTSettings(Settings):
    """A run of supervised fine-tuning."""

    run: str = Field(min_length=1, description="Folder of the run; the same folder again continues it.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    model: ModelSettings
    data: DataSettings
    optim: OptimSettings
    train: SFTTrainSettings
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        _check_modules(self.model)
        _check_warmup(self.optim, self.train)
        _check_weights(self.data)
        _check_system(self.data)
        _check_budget(self.data, self.train, self.cluster)
        _check_disk(self.train, self.cluster)
        return self


class MPOSettings(Settings):
    """A run of preference optimisation."""

    run: str = Field(min_length=1, description="Folder of the run; the same folder again continues it.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    model: ModelSettings
    data: DataSettings
    loss: PreferenceSettings = PreferenceSettings()
    optim: OptimSettings
    train: MPOTrainSettings
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        _check_modules(self.model)
        _check_warmup(self.optim, self.train)
        _check_weights(self.data)
        _check_system(self.data)
        _check_budget(self.data, self.train, self.cluster)
        _check_disk(self.train, self.cluster)
        return self


class SFTStage(Settings):
    data: DataSettings
    optim: OptimSettings
    train: SFTTrainSettings


class PairSettings(Settings):
    prompts: int = Field(default=1024, ge=1, description="Training prompts that the start answers, drawn by the seed.")
    samples: int = Field(default=16, ge=2, description="Answers to each of them.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of these answers.")
    max_per_prompt: int = Field(default=15, ge=1, description="Most pairs of one prompt.")
    part: str | None = Field(
        default=None, description="Part of the score that makes an answer right; null: accuracy, hit, or the score."
    )
    threshold: float = Field(default=0.5, description="The least value of a right answer.")


class MPOStage(Settings):
    loss: PreferenceSettings = PreferenceSettings()
    optim: OptimSettings
    train: MPOTrainSettings


class RLStage(Settings):
    algorithm: AlgorithmSettings = AlgorithmSettings()
    optim: OptimSettings
    train: RLTrainSettings


class CascadeSettings(Settings):
    """SFT where it is set, pairs of the model's own answers, preference optimisation, online RL: one run each."""

    run: str = Field(min_length=1, description="Folder of all stages; the same folder again continues them.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    model: ModelSettings
    data: RLDataSettings
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    sft: SFTStage | None = Field(default=None, description="Supervised cold start; null: the model is one already.")
    pairs: PairSettings = PairSettings()
    mpo: MPOStage
    rl: RLStage
    eval: EvalSettings = EvalSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not self.data.test:
            refuse("data.test", "is empty; name held-out files, on which the stages are compared")
        for name in ("sft", "mpo", "rl"):
            if name == "sft" and self.sft is None:
                continue
            try:
                self.stage(name, "model", ("pairs.parquet",))
            except ValidationError as error:
                context = error.errors()[0]["ctx"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
                path: str = context["path"]
                own = path.split(".")[0] in ("optim", "train", "algorithm") or name == "sft"
                refuse(f"{name}.{path}" if own else path, context["text"])
        return self

    def stage(self, name: str, model: str, pairs: tuple[str, ...] = ()) -> SFTSettings | MPOSettings | RLSettings:
        """The whole settings of the run of a stage (`sft`, `mpo`, `rl`) that starts from the folder `model`."""
        common: dict[str, Any] = {
            "run": f"{self.run}/{name}",
            "seed": self.seed,
            "model": self.model.model_copy(update={"path": model}),
        }
        offline = ClusterSettings()
        if self.cluster.ranks > 1:
            of_engines = {"engines", "engine_tensor_parallel", "engine_memory"}
            offline = ClusterSettings(**self.cluster.model_dump(exclude=of_engines))
        if name == "sft":
            assert self.sft is not None
            own = {"data": self.sft.data, "optim": self.sft.optim, "train": self.sft.train}
            return SFTSettings(**common, **own, cluster=offline)
        if name == "mpo":
            kept = self.data.model_dump(include={"max_prompt_tokens", "system", "workers"})
            data = DataSettings(train=pairs, **kept)
            own = {"data": data, "loss": self.mpo.loss, "optim": self.mpo.optim, "train": self.mpo.train}
            return MPOSettings(**common, **own, cluster=offline)
        every = self.eval.every or self.rl.train.steps
        return RLSettings(
            **common,
            data=self.data,
            rollout=self.rollout,
            algorithm=self.rl.algorithm,
            reward=self.reward,
            optim=self.rl.optim,
            train=self.rl.train,
            eval=self.eval.model_copy(update={"every": every}),
            cluster=self.cluster,
        )


def walk(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted path (`train.steps`), in order; a group (`train`) comes before its members."""
    for name, field in cls.model_fields.items():
        yield prefix + name, field
        if is_group(field):
            yield from walk(field.annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]


def is_group(field: FieldInfo, of: type[Settings] = Settings) -> bool:
    """Whether a field holds a group of settings (of the given kind) rather than a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, of)


def _check_modules(model: ModelSettings) -> None:
    if len(set(model.trainable)) < len(model.trainable):
        refuse("model.trainable", f"names a part twice: {', '.join(model.trainable)}; name each once")


def _check_weights(data: DataSettings) -> None:
    if data.weights and (len(data.weights) != len(data.train) or not sum(data.weights)):
        refuse(
            "data.weights",
            f"has {len(data.weights)} entries that add up to {sum(data.weights):g} for {len(data.train)} files in "
            "data.train; give one per file, at least one of them above 0",
        )


def _check_system(data: DataSettings) -> None:
    if data.thinking and data.system is not None:
        refuse("data.thinking", "is true and data.system is set, but a conversation has one system prompt; choose one")


def _check_budget(data: DataSettings, train: TrainSettings, cluster: ClusterSettings) -> None:
    if train.tokens_per_micro_batch * cluster.sequence_parallel < data.max_prompt_tokens:
        refuse(
            "train.tokens_per_micro_batch",
            f"is {train.tokens_per_micro_batch}, less than data.max_prompt_tokens={data.max_prompt_tokens}; raise it, "
            "or lower data.max_prompt_tokens",
        )


def _check_disk(train: TrainSettings, cluster: ClusterSettings) -> None:
    if cluster.ranks > 1 and train.disk_wait is not None and train.disk_wait >= cluster.timeout:
        refuse(
            "train.disk_wait",
            f"is {train.disk_wait:g}, but ranks that wait for cluster.timeout={cluster.timeout:g} seconds are given up "
            "for hung; use less, or raise that",
        )


def _check_warmup(optim: OptimSettings, train: TrainSettings) -> None:
    if optim.warmup_steps > train.steps:
        refuse(
            "optim.warmup_steps",
            f"is {optim.warmup_steps}, more than train.steps={train.steps}; use a few percent of the steps, or 0",
        )
