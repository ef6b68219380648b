"""How answers are sampled."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foveate.config.base import Settings


class RolloutSettings(Settings):
    engine: str = Field(default="native", description="What generates answers: a known engine or an import path.")
    engine_settings: dict[str, Any] = Field(
        default={}, description="Settings of the engine, such as {servers: 2}; the rest by its own defaults."
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
