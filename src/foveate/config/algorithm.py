"""Algorithm, reward and preference loss."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from foveate.config.base import Named, Settings, is_http_address, refuse_any


class RewardKLSettings(Settings):
    coefficient: float = Field(ge=0, description="First weight of the KL to the reference model.")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field(default="k1", description="Estimate of the KL of a token.")
    target: float | None = Field(
        default=None, gt=0, description="KL in nats per answer that the coefficient adapts to; null: it is fixed."
    )
    horizon: float = Field(
        default=10_000.0,
        gt=0,
        description="Answers over which an error of 20 percent changes the coefficient by 20 percent.",
    )


class CorrectionSettings(Settings):
    mode: Literal["token-truncate", "sequence-truncate", "token-mask", "sequence-mask", "sequence-reject"] = Field(
        description="How importance weights between trainer and engine are applied."
    )
    low: float | None = Field(default=None, ge=0, description="Least weight that counts; null: 0, or not used.")
    high: float = Field(
        default=2.0, gt=0, description="Largest weight; above it a weight is truncated or does not count."
    )


class CriticSettings(Settings):
    lr: float = Field(gt=0, description="Peak learning rate of the critic; it follows the policy's schedule.")
    warmup_steps: int = Field(default=0, ge=0, description="First steps, in which only the critic is trained.")
    clip: float | None = Field(
        default=0.5, gt=0, description="How far a value may move in a step before its loss is clipped; null: any."
    )
    lam: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Lambda of the returns that the critic is trained on; 1: Monte Carlo returns.",
    )


class TeacherSettings(Settings):
    path: str = Field(
        min_length=1,
        description="The frozen teacher: a model folder, a name on the Hugging Face Hub, a checkpoint of a run, or the "
        "address of a vLLM server.",
    )
    sources: dict[str, str] = Field(
        default={}, description="Other teachers for the rows of some data_source: {geo3k: models/geometry}."
    )
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = Field(
        default="reverse_kl",
        description="What is minimised at each token of an answer: KL(model || teacher), "
        "KL(teacher || model), or Jensen-Shannon's.",
    )
    beta: float | None = Field(
        default=None, gt=0, lt=1, description="Weight of the teacher in jensen_shannon, as in GKD; null: 0.5 there."
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="The teacher's most probable tokens alone are compared, all others as one; null: the vocabulary.",
    )
    term: Literal["loss", "advantage"] = Field(
        default="loss",
        description="The divergence is a term of the loss, or the reverse KL of each sampled token is taken from its "
        "advantage.",
    )
    coefficient: float = Field(default=1.0, gt=0, description="Weight of that term beside those of the rewards.")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="Type of the teacher's weights, also at a server; null: model.dtype."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        path = "algorithm.teacher"
        refuse_any(
            (
                self.beta is not None and self.divergence != "jensen_shannon",
                f"{path}.beta",
                f"is {self.beta}, but the divergence is {self.divergence}; leave it out, or use jensen_shannon",
            ),
            (
                self.term == "advantage" and self.divergence != "reverse_kl",
                f"{path}.divergence",
                f"is {self.divergence}, but term=advantage knows sampled tokens alone, which estimate reverse_kl; use "
                "that, or term=loss",
            ),
            (
                bool(self.servers) and self.term == "loss",
                f"{path}.term",
                f"is loss, but {next(iter(self.servers), '')} is a server, which tells log-probs of sampled tokens "
                "alone; use term=advantage, or a teacher in a folder",
            ),
            (
                self.term == "advantage" and self.top_k is not None,
                f"{path}.top_k",
                f"is {self.top_k}, but term=advantage compares sampled tokens alone; leave it out, or use term=loss",
            ),
        )
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """All teachers, each once."""
        return tuple(dict.fromkeys((self.path, *self.sources.values())))

    @property
    def servers(self) -> tuple[str, ...]:
        """The teachers that are addresses."""
        return tuple(path for path in self.paths if is_http_address(path))

    @property
    def folders(self) -> tuple[str, ...]:
        """The teachers that are not."""
        return tuple(path for path in self.paths if not is_http_address(path))

    def of(self, source: str) -> str:
        """The teacher of the rows of a data_source."""
        return self.sources.get(source, self.path)


class AlgorithmSettings(Named):
    name: str = Field(default="gspo", description="A known algorithm, such as gspo or grpo.")
    advantage: dict[str, Any] = Field(
        default={}, description="Settings of its advantage; the others are the algorithm's defaults."
    )
    loss: dict[str, Any] = Field(
        default={}, description="Settings of its loss; the others are the algorithm's defaults."
    )
    advantage_clip: float | None = Field(
        default=None, gt=0, description="Advantages are clipped to this absolute value; null: not clipped."
    )
    reward_kl: RewardKLSettings | None = Field(
        default=None, description="KL to the reference model that is subtracted from the reward; null: none."
    )
    correction: CorrectionSettings | None = Field(
        default=None, description="Correction for engines whose log-probs differ from the trainer's; null: none."
    )
    old_logprobs: Literal["trainer", "engine"] = Field(
        default="trainer",
        description="Whose log-probs the ratio of the loss compares with: those of the weights before the step, for "
        "which several updates take a pass of their own, or those that the engine reported (verl's bypass_mode).",
    )
    resample_rounds: int | None = Field(
        default=None,
        ge=0,
        description="Rounds in which groups of equal rewards are replaced by new ones; null: the algorithm's default.",
    )
    mask_truncated: bool = Field(
        default=False,
        description="Answers that reached rollout.max_tokens or rollout.time_limit count in the baseline, and are left "
        "out of loss and totals.",
    )
    router_replay: bool = Field(
        default=False,
        description="A mixture of experts computes the old log-probs and the updates with the experts that the sampler "
        "chose (R3).",
    )
    turn_discount: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Rewards of an environment count this much less with every turn.",
    )
    critic: CriticSettings | None = Field(
        default=None, description="The value model of an algorithm that needs one (ppo); null: none."
    )
    teacher: TeacherSettings | None = Field(
        default=None,
        description="A frozen model whose probabilities are learned from, alone (distill) or beside the rewards of "
        "another algorithm; null: none.",
    )

    @model_validator(mode="after")
    def _weigh_once(self) -> Self:
        truncates = self.correction is not None and self.correction.mode.endswith("truncate")
        refuse_any(
            (
                self.old_logprobs == "engine" and truncates,
                "algorithm.correction.mode",
                "truncates weights of trainer over engine, which the ratio of the loss has already with "
                "algorithm.old_logprobs=engine; use token-mask, sequence-mask or sequence-reject, or "
                "old_logprobs=trainer",
            ),
        )
        return self


class RewardSettings(Named):
    name: str = Field(default="grounding", description="A known reward or an import path, such as my_rewards.py:score.")
    settings: dict[str, Any] = Field(default={}, description="Settings of the reward; the others keep their defaults.")
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that compute rewards; 0: the run's own, without limits; null: none for rewards that are "
        "always quick, else one per core.",
    )
    time_limit: float = Field(
        default=10.0,
        gt=0,
        description="Seconds for the reward of one answer; an answer that takes longer is not graded.",
    )
    memory_limit: float = Field(
        default=8.0,
        gt=0,
        le=10_000,
        description="GB that a reward process may allocate; an answer that takes more is not graded.",
    )


class PreferenceSettings(Named):
    name: str = Field(default="mpo", description="A known loss (mpo, dpo, ipo, bco, sft) or an import path.")
    settings: dict[str, Any] = Field(default={}, description="Settings of the loss; the others keep their defaults.")
