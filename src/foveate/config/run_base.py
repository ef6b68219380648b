"""Settings that the runs of all stages have."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from foveate.config.base import Settings, refuse_any
from foveate.config.cluster import ClusterSettings
from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings, check_model
from foveate.config.train import EvalSettings, LogSettings, OptimSettings, TrainSettings


class RunSettings(Settings):
    """Settings that the runs of all stages have."""

    run: str = Field(min_length=1, description="Folder of the run; the same folder again continues it.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    model: ModelSettings
    data: DataSettings
    optim: OptimSettings = OptimSettings()
    train: TrainSettings
    eval: EvalSettings = EvalSettings()
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="before")
    @classmethod
    def _evaluated_where_there_is_data(cls, values: Any) -> Any:
        """Without held-out rows there is no evaluation, unless it is asked for, which is refused below."""
        data, evaluation = values.get("data"), values.get("eval", {})
        given = data.model_dump() if isinstance(data, DataSettings) else data if isinstance(data, dict) else {}
        if given.get("test") or given.get("hold_out") or not isinstance(evaluation, dict):
            return values
        return {**values, "eval": {"every": 0, **evaluation}}

    @property
    def disk_wait(self) -> float:
        """Seconds to wait for room on a full disk: ranks that wait longer than `cluster.timeout` count as hung."""
        if self.train.disk_wait is None:
            return 900.0 if self.cluster.ranks == 1 else min(900.0, self.cluster.timeout / 2)
        return self.train.disk_wait

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        model, data, train, cluster = self.model, self.data, self.train, self.cluster
        refuse_any(
            (
                len(set(model.trainable)) < len(model.trainable),
                "model.trainable",
                f"names a part twice: {', '.join(model.trainable)}; name each once",
            ),
            (
                self.optim.warmup_steps > train.steps,
                "optim.warmup_steps",
                f"is {self.optim.warmup_steps}, more than train.steps={train.steps}; use a few percent of the steps, "
                "or 0",
            ),
            (
                bool(data.weights) and (len(data.weights) != len(data.train) or not sum(data.weights)),
                "data.weights",
                f"has {len(data.weights)} entries that add up to {sum(data.weights):g} for {len(data.train)} files in "
                "data.train; give one per file, at least one of them above 0",
            ),
            (
                bool(data.shares) and not sum(data.shares.values()),
                "data.shares",
                "are all 0, which leaves no row; give at least one data_source a share above 0",
            ),
            (
                cluster.ranks > 1 and self.disk_wait >= cluster.timeout,
                "train.disk_wait",
                f"is {self.disk_wait:g}, but ranks that wait for cluster.timeout={cluster.timeout:g} seconds are given "
                "up for hung; use less, or raise that",
            ),
            (
                bool(data.test) and data.hold_out > 0,
                "data.hold_out",
                f"is {data.hold_out:g}, but data.test names held-out files; choose one",
            ),
            (
                self.eval.every > 0 and not data.test and not data.hold_out,
                "eval.every",
                f"is {self.eval.every}, but data.test is empty; name held-out files there, set data.hold_out=0.05 to "
                "keep rows of data.train aside, or set eval.every=0 for a run without evaluation",
            ),
        )
        check_model(model, cluster)
        self._check_budget()
        return self

    def _check_budget(self) -> None:
        data, train = self.data, self.train
        refuse_any(
            (
                train.tokens_per_micro_batch * self.cluster.sequence_parallel < data.max_prompt_tokens,
                "train.tokens_per_micro_batch",
                f"is {train.tokens_per_micro_batch}, less than data.max_prompt_tokens={data.max_prompt_tokens}; raise "
                "it, or lower data.max_prompt_tokens",
            )
        )


class OfflineSettings(RunSettings):
    """A run that generates nothing."""

    @model_validator(mode="after")
    def _scores_nothing(self) -> Self:
        refuse_any(
            (
                self.data.rlcs is not None,
                "data.rlcs",
                "chooses prompts by what their answers score, but this run generates none; leave it out",
            )
        )
        return self
