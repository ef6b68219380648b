"""Settings of the cascade: those of each of its stages, and what the stages share."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from foveate.config import MPOSettings, RLSettings, SFTSettings
from foveate.config_base import Settings, refuse
from foveate.config_cluster import ClusterSettings
from foveate.config_parts import (
    AlgorithmSettings,
    DataSettings,
    EvalSettings,
    ModelSettings,
    MPOTrainSettings,
    OptimSettings,
    PreferenceSettings,
    RewardSettings,
    RLDataSettings,
    RLTrainSettings,
    RolloutSettings,
    SFTTrainSettings,
)


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
