"""The groups of settings that runs are made of: model, data, sampling, algorithm, reward, optimizer, evaluation."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from foveate.config_base import Named, Settings, refuse

# YAML has lists only; strict types would ask for a tuple.
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)]
Modules = Annotated[tuple[Literal["vision", "projector", "language"], ...], Field(strict=False, min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


class LoraSettings(Settings):
    rank: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(default=32, ge=1, description="Their update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an adapter's inputs set to 0 in updates.")
    targets: Strings | None = Field(
        default=None,
        description="Linear layers that get adapters, such as [q_proj, v_proj], in the parts that model.train names; "
        "null: all of the language model and of the vision tower.",
    )


class ModelSettings(Settings):
    path: str = Field(
        min_length=1,
        description='Folder of a Hugging Face InternVL model; "demo" is the small one shipped with foveate.',
    )
    attention: Literal["auto", "sdpa", "flex", "reference"] = Field(
        default="auto",
        description="Attention kernel: sdpa on CPUs, flex (FlexAttention) on GPUs; auto takes the one for the device, "
        "reference is the slow one that the others are held equal to.",
    )
    train: Modules = Field(
        default=("vision", "projector", "language"),
        description="Parts of the model that learn; the others stay frozen.",
    )
    lora: LoraSettings | None = Field(
        default=None,
        description="Parts of model.train with low-rank adapters learn by these alone, the others whole; null: none.",
    )
    max_tiles: int | None = Field(
        default=None,
        ge=1,
        description="InternVL: most tiles of a prompt, shared by its images, thumbnails not counted; null: what the "
        "model's folder says.",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Qwen-VL: most pixels of an image after resizing; null: what the model's folder says.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of weights and activations.")
    compile: bool = Field(
        default=False,
        description="torch.compile of what each block does around its attention: minutes at the start, faster steps on "
        "GPUs; needs a C++ compiler.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass: less memory, about a third more time.",
    )


class CurriculumSettings(Settings):
    key: str = Field(min_length=1, description="Field of the rows with their difficulty: extra_info.accuracy.")
    descending: bool = Field(
        default=False, description="Begin with the largest values (an accuracy) and not with the smallest (a length)."
    )
    epochs: int = Field(default=1, ge=1, description="Epochs in this order; those that follow are in random order.")
    mixing: float = Field(
        default=0.2, ge=0, description="How far a row may move at random, as a share of the epoch; 0: strictly sorted."
    )


class DataSettings(Settings):
    train: Strings = Field(min_length=1, description="Files to learn from: parquet or JSONL.")
    image_root: str | None = Field(
        default=None,
        description="Folder that relative image paths start from; null: the folder of the file that names them.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="A row that cannot be used ends the run, or is left out, counted and listed."
    )
    columns: dict[str, str] = Field(
        default={},
        description="Columns of one's own: prompt, images, answer, ... -> column, or =text for the text itself. "
        "Empty: the files have the usual ones.",
    )
    weights: Weights = Field(
        default=(),
        description="How often the rows of each file in data.train come in an epoch, such as [1, 0.5, 3]; empty: once.",
    )
    curriculum: CurriculumSettings | None = Field(
        default=None, description="From easy to hard in the first epochs; null: in random order from the start."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Processes that check rows; null: one per core where there are many rows."
    )
    image_workers: int = Field(
        default=0, ge=0, description="Processes that decode and cut images ahead of the step; 0: none, in the step."
    )
    max_prompt_tokens: int = Field(default=8192, ge=1, description="Longest prompt, in tokens, image tokens included.")
    system: str | None = Field(default=None, description="System prompt put before every conversation; null: none.")
    thinking: bool = Field(
        default=False,
        description="The system prompt is that of InternVL3.5's thinking mode: <think> ... </think> first.",
    )


class RLDataSettings(DataSettings):
    test: Strings = Field(default=(), description="Held-out files for evaluation: parquet or JSONL.")


class RolloutSettings(Settings):
    engine: str = Field(default="native", description="What generates answers: a known engine or an import path.")
    engine_settings: dict[str, Any] = Field(
        default={}, description="Settings of the engine, such as {replicas: 2}; the rest by its own defaults."
    )
    check_every: int = Field(
        default=20,
        ge=0,
        description="Publishes between checks that a served engine has the trainer's weights, which also come at its "
        "start; 0: none.",
    )
    staleness: int = Field(
        default=0,
        ge=0,
        description="Steps by which the weights of an answer may lag those that learn from it: 0 generates and learns "
        "in turn, 1 does both at once, more also evens out rounds of unlike length.",
    )
    partial: bool = Field(
        default=False,
        description="New weights interrupt answers, which go on under them from their tokens, so that none waits for "
        "long ones; needs staleness.",
    )
    over_sample: int = Field(
        default=0,
        ge=0,
        description="Prompts under way beyond those that the steps need, which take the groups that finish first; the "
        "others go on, and are dropped when they are older than the staleness. Needs partial.",
    )
    time_limit: float | None = Field(
        default=None,
        gt=0,
        description="Seconds for which the engine works on a prompt; answers that are unfinished then are cut; null: "
        "any time.",
    )
    samples: int = Field(default=8, ge=1, description="Answers per prompt (the group size).")
    temperature: float = Field(default=1.0, ge=0, description="Sampling temperature.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling: probability mass kept; 1: all.")
    top_k: int = Field(default=0, ge=0, description="Most likely tokens kept; 0: all.")
    max_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")


class RewardKLSettings(Settings):
    coefficient: float = Field(ge=0, description="Weight of the KL to the frozen start, at first.")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field(default="k1", description="Estimate of the KL of a token.")
    target: float | None = Field(
        default=None, gt=0, description="KL in nats per answer that the coefficient adapts to; null: it is fixed."
    )
    horizon: float = Field(
        default=10_000.0, gt=0, description="Answers in which an error of 20 percent changes the coefficient by 20."
    )


class CorrectionSettings(Settings):
    mode: Literal["token-truncate", "sequence-truncate", "token-mask", "sequence-mask", "sequence-reject"] = Field(
        description="What is done with importance weights between trainer and sampler."
    )
    low: float | None = Field(default=None, ge=0, description="Least weight that counts; null: 0, or not used.")
    high: float = Field(default=2.0, gt=0, description="Largest weight, beyond which it is cut or does not count.")


class CriticSettings(Settings):
    lr: float = Field(gt=0, description="Peak learning rate of the critic; it follows the policy's schedule.")
    warmup_steps: int = Field(default=0, ge=0, description="First steps in which the critic alone learns.")
    clip: float | None = Field(
        default=0.5, gt=0, description="How far a value may move in a step before its loss is clipped; null: any."
    )
    lam: float = Field(
        default=1.0, ge=0, le=1, description="Lambda of the returns that the critic learns; 1: what was earned."
    )


class AlgorithmSettings(Named):
    name: str = Field(default="gspo", description="A known algorithm, such as gspo or grpo.")
    advantage: dict[str, Any] = Field(
        default={}, description="Settings of its advantage; the rest as the algorithm has them."
    )
    loss: dict[str, Any] = Field(default={}, description="Settings of its loss; the rest as the algorithm has them.")
    advantage_clip: float | None = Field(
        default=None, gt=0, description="Advantages beyond this size, of either sign, are cut to it; null: none."
    )
    reward_kl: RewardKLSettings | None = Field(
        default=None, description="KL to the frozen start that is taken from the reward; null: none."
    )
    correction: CorrectionSettings | None = Field(
        default=None, description="Correction for a sampler whose log-probs differ from the trainer's; null: none."
    )
    refills: int | None = Field(
        default=None,
        ge=0,
        description="Rounds in which groups of equal rewards are replaced by new ones; null: as the algorithm has it.",
    )
    critic: CriticSettings | None = Field(
        default=None, description="The value model of an algorithm that needs one (ppo); null: none."
    )


class RewardSettings(Named):
    name: str = Field(default="grounding", description="A known reward or an import path, such as my_rewards.py:score.")
    settings: dict[str, Any] = Field(default={}, description="Settings of the reward; the rest by its own defaults.")
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that grade; 0: the run's own, without limits; null: none for rewards that are quick "
        "whatever the answer, else one per core.",
    )
    time_limit: float = Field(
        default=10.0, gt=0, description="Seconds that a process may grade one answer; an answer beyond scores 0."
    )
    memory_limit: float = Field(
        default=8.0, gt=0, description="GB that a process that grades may allocate; an answer beyond scores 0."
    )


class PreferenceSettings(Named):
    name: str = Field(default="mpo", description="A known loss (mpo, dpo, ipo, bco, sft) or an import path.")
    settings: dict[str, Any] = Field(default={}, description="Settings of the loss; the rest by its own defaults.")


class OptimSettings(Settings):
    lr: float = Field(gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    betas: Betas = Field(default=(0.9, 0.999), description="Decay rates of AdamW's two moments.")
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which the learning rate rises linearly to its peak."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant",
        description="Learning rate after the warm-up: held, or falling towards 0, to be reached behind the last step.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradients with a larger global L2 norm are scaled down to it."
    )


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
        description="Write checkpoints while training goes on, from a copy of weights and optimizer in host memory.",
    )
    disk_wait: float | None = Field(
        default=None,
        ge=0,
        description="Seconds that a run waits for room on a full disk before it ends with an error; 0: none; null: "
        "900, or half of cluster.timeout where that is less.",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: as many as PyTorch chooses.")


class RLTrainSettings(TrainSettings):
    prompts_per_step: int = Field(default=32, ge=1, description="Prompts answered and learned from in one step.")
    updates_per_step: int = Field(
        default=1, ge=1, description="Optimizer updates that share the prompts of one step evenly."
    )
    passes: int = Field(
        default=1,
        ge=1,
        description="Times that a step learns from its answers, each in `updates_per_step` updates (PPO's epochs).",
    )


class SFTTrainSettings(TrainSettings):
    samples_per_step: int = Field(default=32, ge=1, description="Demonstrations in one optimizer update.")
    weighting: Literal["token", "sample", "square"] = Field(
        default="token", description="Weight of a token in an answer of n tokens: 1, 1/n or 1/sqrt(n)."
    )


class MPOTrainSettings(TrainSettings):
    pairs_per_step: int = Field(default=32, ge=1, description="Preference pairs in one optimizer update.")
    reference_cache: str | None = Field(
        default=None,
        description="Folder of log-probs under the frozen start, which runs may share; null: in the run's folder.",
    )


class EvalSettings(Settings):
    every: int = Field(
        default=20,
        ge=0,
        description="Steps between evaluations, which also come before the first and after the last step; 0: none.",
    )
    prompts: int | None = Field(default=None, ge=1, description="Held-out prompts, the first of data.test; null: all.")
    samples: int = Field(
        default=0, ge=0, description="Answers per prompt sampled at temperature 1, besides the greedy one."
    )
    gallery: int = Field(default=16, ge=0, description="Held-out pictures that the report shows at each evaluation.")


class LogSettings(Settings):
    to: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(strict=False)] = Field(
        default=(), description="Where metrics go besides metrics.jsonl; each must be installed."
    )

    @model_validator(mode="after")
    def _installed(self) -> Self:
        for name in self.to:
            if find_spec(name) is None:
                refuse("log.to", f"names {name}, which is not installed; run pip install {name}, or leave it out")
        return self
