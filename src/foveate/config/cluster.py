"""The machines that a run uses, and how it is sharded over them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from foveate.config.base import Settings, has_gpu, refuse


class ClusterSettings(Settings):
    nodes: int = Field(default=1, ge=1, description="Machines.")
    gpus_per_node: int = Field(default=1, ge=1, description="Training processes on each machine, one per GPU.")
    shard: Literal["full", "hybrid", "none"] = Field(
        default="full",
        description="Weights, gradients and optimizer state are sharded over all GPUs (full), over those of each "
        "machine (hybrid), or replicated on every GPU (none).",
    )
    sequence_parallel: int = Field(
        default=1, ge=1, description="Neighbouring GPUs that share one packed row, each holding a part of its tokens."
    )
    offload: bool = Field(
        default=False, description="Weights, gradients and optimizer state stay in host memory between their uses."
    )
    reshard: bool = Field(
        default=True,
        description="The weights of a block are freed after its forward pass and gathered again for the backward one; "
        "false: kept in between, for more memory and a third less communication.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="Type of the computation, while weights and optimizer stay in model.dtype; null: that type. "
        "float16: gradients are scaled, which keeps small ones from becoming 0.",
    )
    engines: int = Field(
        default=0,
        ge=0,
        description="Rollout engines in separate processes, on GPUs that the ranks do not use; 0: the ranks generate.",
    )
    engine_tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share one copy of the engine's model.")
    engine_memory: float = Field(
        default=0.8, gt=0, lt=1, description="Share of a GPU's memory that the engine may fill while it generates."
    )

    device: Literal["cpu", "cuda"] | None = Field(
        default=None,
        description="Where ranks compute; null: cuda for several ranks, and for one where there is a GPU, else cpu.",
    )
    timeout: float = Field(
        default=1800, gt=0, description="Seconds after which a rank that does not respond counts as hung."
    )
    retries: int = Field(
        default=3, ge=0, description="Times that a run resumes from its last checkpoint after it has lost a process."
    )

    @property
    def kind(self) -> str:
        return self.device or ("cuda" if self.ranks > 1 or has_gpu() else "cpu")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpus(self) -> int:
        """Those of the ranks, and those of engines in separate processes."""
        return self.ranks + self.engines * self.engine_tensor_parallel

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the weights is sharded."""
        return {"full": self.ranks, "hybrid": self.gpus_per_node, "none": 1}[self.shard]

    def needs(self, cpus: int, gpus: int) -> dict[str, float]:
        """Resources that processes take of a machine, in Ray's terms; GPUs where these are computed on."""
        return {"CPU": float(cpus), **({"GPU": float(gpus)} if self.kind == "cuda" else {})}

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.gpus_per_node % self.sequence_parallel:
            refuse(
                "cluster.sequence_parallel",
                f"is {self.sequence_parallel} but must divide cluster.gpus_per_node={self.gpus_per_node}: these GPUs "
                "communicate in every layer and have to be on one machine",
            )
        for name in self.model_dump(include={"engine_tensor_parallel", "engine_memory"}, exclude_defaults=True):
            if not self.engines:
                refuse(f"cluster.{name}", "acts only on engines in separate processes: set cluster.engines")
        return self
