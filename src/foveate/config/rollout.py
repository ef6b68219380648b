"""Sampling of answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from foveate.config.base import Named, Settings


def _not_tiny(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("must be at least 0.01: dividing by less overflows")
    return value


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_not_tiny)]


class RolloutSettings(Settings):
    engine: str = Field(default="native", description="Engine that generates answers: a known name or an import path.")
    engine_settings: dict[str, Any] = Field(
        default={}, description="Settings of the engine, such as {servers: 2}; the others keep their defaults."
    )
    check_every: int = Field(
        default=20,
        ge=0,
        description="Publishes between checks that a served engine has the trainer's weights; the first is at its "
        "start. 0: none.",
    )
    staleness: int = Field(
        default=0,
        ge=0,
        description="Steps by which the weights that sample an answer may lag those that are trained on it: 0 "
        "generates and trains in turn, 1 overlaps both, more also evens out rounds of different length.",
    )
    partial: bool = Field(
        default=False,
        description="New weights interrupt answers, which continue under them from their tokens: no step waits for "
        "long answers. Needs staleness.",
    )
    over_sample: int = Field(
        default=0,
        ge=0,
        description="Prompts in flight beyond those that a step needs: it takes the groups that finish first. The "
        "others continue, and are dropped when they are older than the staleness. Needs partial.",
    )
    time_limit: float | None = Field(
        default=None,
        gt=0,
        description="Seconds for which the engine works on a prompt; unfinished answers are truncated then; null: no "
        "limit.",
    )
    samples: int = Field(default=8, ge=1, description="Answers per prompt (the group size).")
    temperature: Temperature = Field(default=1.0, description="Sampling temperature; at least 0.01.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling: probability mass kept; 1: all.")
    top_k: int = Field(default=0, ge=0, description="Most likely tokens kept; 0: all.")
    max_tokens: int = Field(
        default=256,
        ge=1,
        le=1_048_576,
        description="Longest answer, in tokens: of all of its turns, with what it reads between them.",
    )


class EnvironmentChoice(Named):
    """An environment, by its name and its own settings."""

    name: str = Field(min_length=1, description="A known environment or an import path, such as my_world.py:World.")
    settings: dict[str, Any] = Field(
        default={}, description="Settings of the environment, such as {max_turns: 4}; the others keep their defaults."
    )


class EnvironmentSettings(EnvironmentChoice):
    """Answers of several turns: what replies to them."""

    reward: Literal["function", "environment", "both"] = Field(
        default="function",
        description="What scores an answer: the reward function (group reward), the environment's own rewards, or the "
        "sum of both.",
    )
    credit: Literal["sum", "final"] = Field(
        default="sum", description="Which rewards of the environment's steps count: all, or that of the last one."
    )
    when_full: Literal["truncate", "leave_out"] = Field(
        default="truncate",
        description="An answer whose next observation has no room in rollout.max_tokens is scored as it is, as "
        "truncated, or left out of baseline and loss.",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that environments live in; 0: the run's own, without limits; null: one per core, 8 at "
        "most.",
    )
    time_limit: float = Field(
        default=10.0, gt=0, description="Seconds for one step; an answer whose environment takes longer ends ungraded."
    )
    memory_limit: float = Field(
        default=8.0, gt=0, le=10_000, description="GB that a process of environments may allocate."
    )
