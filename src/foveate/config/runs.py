"""Every setting of a run. What is not here cannot be set, and what is here acts.

Models are frozen, refuse unknown keys and take types literally. `foveate.config.recipe` reads them from YAML. Paths are
relative to the current directory. A step is one round of generating answers and training on them (RL), or one
optimizer update (SFT, MPO).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from foveate.config.algorithm import AlgorithmSettings, PreferenceSettings, RewardSettings
from foveate.config.base import Settings, refuse, refuse_any
from foveate.config.cluster import ClusterSettings
from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.config.rollout import EnvironmentChoice, EnvironmentSettings, RolloutSettings
from foveate.config.run_base import OfflineSettings, RunSettings
from foveate.config.train import (
    LogSettings,
    MPOOptimSettings,
    MPOTrainSettings,
    OptimSettings,
    RLEvalSettings,
    RLTrainSettings,
    RouterTrainSettings,
    SFTOptimSettings,
    SFTTrainSettings,
    VicoTrainSettings,
    VirTrainSettings,
)

# The algorithms whose baseline is not the mean of the other answers to the same prompt.
_WITHOUT_GROUPS = ("distill", "ppo", "reinforce_plus_plus", "remax")


class RLSettings(RunSettings):
    """A run of online reinforcement learning."""

    train: RLTrainSettings  # pyright: ignore[reportIncompatibleVariableOverride]
    rollout: RolloutSettings = RolloutSettings()
    environment: EnvironmentSettings | None = Field(
        default=None, description="What replies to answers of several turns; null: answers have one turn."
    )
    algorithm: AlgorithmSettings = AlgorithmSettings()
    reward: RewardSettings = RewardSettings()
    eval: RLEvalSettings = RLEvalSettings()  # pyright: ignore[reportIncompatibleVariableOverride]

    def _check_budget(self) -> None:
        rollout, budget, split = self.rollout, self.train.tokens_per_micro_batch, self.cluster.sequence_parallel
        longest = self.data.max_prompt_tokens + rollout.max_tokens
        refuse_any(
            (
                budget * split < longest,
                "train.tokens_per_micro_batch",
                f"is {budget}{f' on {split} devices' if split > 1 else ''}, less than one longest prompt and answer: "
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} + rollout.max_tokens={rollout.max_tokens}; "
                f"use {-(-longest // split)} or more, or lower those",
            )
        )

    @model_validator(mode="after")
    def _rewards_of_steps_count(self) -> Self:
        environment = self.environment
        has_steps = environment is not None and environment.reward != "function"
        refuse_any(
            (
                self.algorithm.turn_discount < 1 and not has_steps,
                "algorithm.turn_discount",
                f"is {self.algorithm.turn_discount:g}, but no rewards of an environment count; set "
                "environment.reward=environment (or both), or leave it out",
            ),
            (
                environment is not None and environment.credit != "sum" and not has_steps,
                "environment.credit",
                "is final, but the rewards of the environment do not count; set environment.reward=environment (or "
                "both), or leave it out",
            ),
        )
        return self

    @model_validator(mode="after")
    def _rollouts_fit_together(self) -> Self:
        rollout, train, name = self.rollout, self.train, self.algorithm.name
        by_trainer = self.algorithm.old_logprobs == "trainer"
        divisors = [n for n in range(1, train.prompts_per_step + 1) if train.prompts_per_step % n == 0]
        refuse_any(
            (
                train.updates_per_step not in divisors,
                "train.updates_per_step",
                f"is {train.updates_per_step} but must divide train.prompts_per_step={train.prompts_per_step}; "
                f"use one of {', '.join(map(str, divisors))}",
            ),
            (
                rollout.samples == 1 and name not in _WITHOUT_GROUPS and ":" not in name,
                "rollout.samples",
                f"is 1, but algorithm {name} compares answers to the same prompt; use 2 or more (8 is usual)",
            ),
            (
                rollout.temperature == 0,
                "rollout.temperature",
                "is 0, which gives equal answers and nothing to train on; use a value above 0 (1.0 is usual)",
            ),
            (
                rollout.staleness > 0 and self.algorithm.correction is None and by_trainer,
                "rollout.staleness",
                f"is {rollout.staleness}, so that answers are sampled by older weights than those that are trained on "
                "them, but algorithm.correction is null; set 'algorithm.correction={mode: token-truncate}' "
                "(or another mode), algorithm.old_logprobs=engine, or rollout.staleness=0",
            ),
            (
                rollout.partial and not rollout.staleness,
                "rollout.partial",
                "is true, so that answers continue under new weights, but rollout.staleness is 0, where none is under "
                "way then; set rollout.staleness=1 or more, or rollout.partial=false",
            ),
            (
                rollout.over_sample > 0 and not rollout.partial,
                "rollout.over_sample",
                f"is {rollout.over_sample}, but rollout.partial is false, so that a publish would wait for those "
                "groups after all; set rollout.partial=true, or rollout.over_sample=0",
            ),
            (
                self.eval.prompts is not None and self.eval.gallery > self.eval.prompts,
                "eval.gallery",
                f"is {self.eval.gallery}, more than eval.prompts={self.eval.prompts}; use {self.eval.prompts} or less",
            ),
        )
        return self

    @model_validator(mode="after")
    def _choice_fits_the_sampling(self) -> Self:
        refuse_any(
            (
                self.data.rlcs is not None and self.rollout.staleness > 0,
                "data.rlcs",
                "chooses prompts by what the step before scored, but rollout.staleness="
                f"{self.rollout.staleness} samples ahead of it; set rollout.staleness=0, or data.rlcs=null",
            ),
        )
        return self


class SFTSettings(OfflineSettings):
    """A run of supervised fine-tuning."""

    optim: SFTOptimSettings = SFTOptimSettings()  # pyright: ignore[reportIncompatibleVariableOverride]
    train: SFTTrainSettings  # pyright: ignore[reportIncompatibleVariableOverride]
    environment: EnvironmentChoice | None = Field(
        default=None, description="The environment whose tools every prompt shows, as in a run with it; null: none."
    )


class _FlashSettings(SFTSettings):
    """Runs of Flash models."""

    @model_validator(mode="after")
    def _compares_whole_answers(self) -> Self:
        refuse_any(
            (self.model.lora is not None, "model.lora", "is set, but whole weights are trained here; leave it out"),
            (self.environment is not None, "environment", "is set, but no tools are shown here; leave it out"),
            (
                self.model.router_aux_loss_coef > 0,
                "model.router_aux_loss_coef",
                "is set, but experts are not balanced here; leave it out",
            ),
            (
                self.train.trained_turns != "last",
                "train.trained_turns",
                "is all, but the last turn alone is compared here; leave it out",
            ),
        )
        return self


class VicoSettings(_FlashSettings):
    """A run of visual consistency learning."""

    train: VicoTrainSettings  # pyright: ignore[reportIncompatibleVariableOverride]


class VirSettings(_FlashSettings):
    """A run that trains the router of a Flash model."""

    train: VirTrainSettings  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="after")
    def _trains_the_router(self) -> Self:
        every = ModelSettings.model_fields["trainable"].default
        refuse_any(
            (
                self.model.trainable != every,
                "model.trainable",
                "is set, but vir trains the router alone; leave it out",
            )
        )
        return self


class MPOSettings(OfflineSettings):
    """A run of preference optimisation."""

    optim: MPOOptimSettings = MPOOptimSettings()  # pyright: ignore[reportIncompatibleVariableOverride]
    train: MPOTrainSettings  # pyright: ignore[reportIncompatibleVariableOverride]
    loss: PreferenceSettings = PreferenceSettings()


class SFTStage(Settings):
    data: DataSettings
    optim: SFTOptimSettings = SFTOptimSettings()
    train: SFTTrainSettings


class PairSettings(Settings):
    prompts: int = Field(
        default=1024, ge=1, description="Training prompts that the start model answers, drawn by the seed."
    )
    samples: int = Field(default=16, ge=2, description="Answers to each of them.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of these answers.")
    max_per_prompt: int = Field(default=15, ge=1, description="Most pairs of one prompt.")
    part: str | None = Field(
        default=None, description="Part of the score that makes an answer right; null: accuracy, hit, or the score."
    )
    threshold: float = Field(default=0.5, description="The least value of a right answer.")


class MPOStage(Settings):
    loss: PreferenceSettings = PreferenceSettings()
    optim: MPOOptimSettings = MPOOptimSettings()
    train: MPOTrainSettings


class RLStage(Settings):
    algorithm: AlgorithmSettings = AlgorithmSettings()
    optim: OptimSettings = OptimSettings()
    train: RLTrainSettings


class VicoStage(Settings):
    data: DataSettings
    optim: SFTOptimSettings = SFTOptimSettings()
    train: VicoTrainSettings


class VirStage(Settings):
    optim: SFTOptimSettings = SFTOptimSettings()
    train: RouterTrainSettings


class CascadeSettings(Settings):
    """SFT where it is set, pairs of the model's own answers, preference optimisation, online RL, and where they are set
    visual consistency learning and the training of a router: one run each."""

    run: str = Field(min_length=1, description="Folder of all stages; the same folder again continues them.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    model: ModelSettings
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    sft: SFTStage | None = Field(default=None, description="Supervised cold start; null: the model needs none.")
    pairs: PairSettings = PairSettings()
    mpo: MPOStage
    rl: RLStage
    vico: VicoStage | None = Field(
        default=None, description="Visual consistency learning of a Flash model; null: all tiles keep their tokens."
    )
    vir: VirStage | None = Field(default=None, description="The router of that model, on the rows of vico.")
    eval: RLEvalSettings = RLEvalSettings()
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        lora = self.model.lora
        longest = self.data.max_prompt_tokens + self.rollout.max_tokens + 1  # the pairs are sampled answers, ended
        budget = self.mpo.train.tokens_per_micro_batch * self.cluster.sequence_parallel
        refuse_any(
            (
                not self.data.test and not self.data.hold_out,
                "data.test",
                "is empty; name held-out files, on which the stages are compared, or set data.hold_out=0.05",
            ),
            (
                lora is not None and lora.save == "adapter",
                "model.lora.save",
                "is adapter, but each stage begins from the whole model of the one before; use merged or both",
            ),
            (
                lora is not None and lora.adapter is not None,
                "model.lora.adapter",
                "begins one run, and each stage here merges its own; merge it first, or leave it out",
            ),
            (
                (self.vico is None) != (self.vir is None),
                "vico" if self.vico is None else "vir",
                "is not set, but visual consistency learning and its router need each other; set both, or none",
            ),
            (
                budget < longest,
                "mpo.train.tokens_per_micro_batch",
                f"is {self.mpo.train.tokens_per_micro_batch}, less than one longest prompt and sampled answer: "
                f"data.max_prompt_tokens={self.data.max_prompt_tokens} + rollout.max_tokens={self.rollout.max_tokens} "
                f"+ 1; use {-(-longest // self.cluster.sequence_parallel)} or more, or lower those",
            ),
        )
        for name in self.stages:
            try:
                self.stage(name, "model", ("pairs.parquet",), "reference")
            except ValidationError as error:
                context = error.errors()[0]["ctx"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
                path: str = context["path"]
                own = path.split(".")[0] in ("optim", "train", "algorithm") or name in ("sft", "vico")
                refuse(f"{name}.{path}" if own else path, context["text"])
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that are set, in order."""
        groups = {"sft": self.sft, "mpo": self.mpo, "rl": self.rl, "vico": self.vico, "vir": self.vir}
        return tuple(name for name, group in groups.items() if group is not None)

    def stage(
        self, name: str, model: str, pairs: tuple[str, ...] = (), reference: str = ""
    ) -> SFTSettings | MPOSettings | RLSettings:
        """The settings of the run of a stage (`sft`, `mpo`, `rl`, `vico`, `vir`) that starts from the folder `model`.
        pairs: files of `mpo`; reference: the folder that `vico` has started from, for `vir`."""
        model_settings = self.model.model_copy(update={"path": model})
        common: dict[str, Any] = {
            "run": f"{self.run}/{name}",
            "seed": self.seed,
            "model": model_settings,
            "log": self.log,
        }
        if name == "rl":
            evaluation = self.eval.model_copy(update={"every": self.eval.every or self.rl.train.steps})
            shared = {name: value for name, value in self if name in ("data", "rollout", "reward", "cluster")}
            return RLSettings(**common, **shared, **dict(self.rl), eval=evaluation)
        of_engines = {"engines", "engine_tensor_parallel", "engine_memory"}
        several = self.cluster.ranks > 1
        offline = ClusterSettings(**self.cluster.model_dump(exclude=of_engines)) if several else ClusterSettings()
        if name == "sft":
            assert self.sft is not None
            return SFTSettings(**common, **dict(self.sft), cluster=offline)
        if name in ("vico", "vir"):
            assert self.vico is not None
            # all weights learn, or the router's
            whole = {"lora": None, "quantization": None, "router_aux_loss_coef": 0.0, "feature_cache": None}
            common["model"] = model_settings.model_copy(update=whole)
            if name == "vico":
                return VicoSettings(**common, **dict(self.vico), cluster=offline)
            assert self.vir is not None
            every = ModelSettings.model_fields["trainable"].default
            common["model"] = common["model"].model_copy(update={"trainable": every})
            train = VirTrainSettings(**self.vir.train.model_dump(), reference=reference)
            return VirSettings(**common, data=self.vico.data, optim=self.vir.optim, train=train, cluster=offline)
        # all but what the pairs are made from, and the order in which its prompts come
        of_rows = {"train", "test", "hold_out", "image_root", "columns", "weights", "shares", "rlcs", "curriculum"}
        data = DataSettings(train=pairs, **self.data.model_dump(exclude=of_rows))
        return MPOSettings(**common, **dict(self.mpo), data=data, cluster=offline)


STAGES = {
    "sft": SFTSettings, "mpo": MPOSettings, "rl": RLSettings, "cascade": CascadeSettings, "vico": VicoSettings,
    "vir": VirSettings,
}  # fmt: skip
"""The settings of each command that trains."""
StageName = Literal["sft", "mpo", "rl", "cascade", "vico", "vir"]


def walk(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted path (`train.steps`), in order; a group (`train`) comes before its members."""
    for name, field in cls.model_fields.items():
        yield prefix + name, field
        if is_group(field):
            yield from walk(field.annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]


def is_group(field: FieldInfo, of: type[Settings] = Settings) -> bool:
    """Whether a field holds a group of settings (of the given kind) rather than a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, of)
