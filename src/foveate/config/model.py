"""The model, and which of its parts are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from foveate.config.base import ONE_OR_MORE, Settings, Strings, refuse_any
from foveate.config.cluster import ClusterSettings

Modules = Annotated[
    tuple[Literal["vision", "projector", "language"], ...], ONE_OR_MORE, Field(strict=False, min_length=1)
]


class LoraSettings(Settings):
    rank: int = Field(default=16, ge=1, le=4096, description="Rank of the adapters.")
    alpha: int = Field(default=32, ge=1, description="Their update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an adapter's inputs set to 0 in updates.")
    targets: Strings | None = Field(
        default=None,
        description="Linear layers that get adapters, such as [q_proj, v_proj], of the parts in model.trainable; "
        "null: all of the language model and of the vision tower.",
    )
    adapter: str | None = Field(
        default=None,
        description="Folder of an adapter in peft's layout, or its name on the Hub, to begin from; null: a new one.",
    )
    save: Literal["merged", "adapter", "both"] = Field(
        default="merged",
        description="What final/ holds: the model with its adapters merged, the adapter alone in peft's layout, or "
        "both, the adapter in final/adapter.",
    )


class FeatureCacheSettings(Settings):
    gigabytes: float = Field(gt=0, description="GB of disk at most; images beyond them are computed in each pass.")
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="Where they are kept, for all runs that use the same weights; null: foveate/features in the user's "
        "cache folder.",
    )


class ModelSettings(Settings):
    path: str = Field(
        min_length=1,
        description='Folder of a model, or its name on the Hugging Face Hub, owner/name or owner/name@revision; "demo" '
        "is a small one shipped with foveate.",
    )
    attention: Literal["auto", "sdpa", "flex", "reference"] = Field(
        default="auto",
        description="Attention kernel: sdpa on CPUs, flex (FlexAttention) on GPUs; auto takes the one for the device, "
        "reference is the slow one that tests compare the others with. With auto, flash-linear-attention computes "
        "Gated DeltaNet on GPUs in 16 bits where it is installed.",
    )
    trainable: Modules = Field(
        default=("vision", "projector", "language"),
        description="Parts of the model that are trained; the others stay frozen.",
    )
    lora: LoraSettings | None = Field(
        default=None,
        description="Low-rank adapters in the parts of model.trainable: only these are trained there; null: none.",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="Frozen linear layers of the language model and of the vision tower in 4 bits (nf4, by "
        "bitsandbytes) or 8 (int8), under model.lora (QLoRA); null: none.",
    )
    feature_cache: FeatureCacheSettings | None = Field(
        default=None,
        description="Image features are kept on disk, so that a frozen vision tower and projector compute each image "
        "once for all passes and epochs, on one rank; null: they are computed in each.",
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
    router_aux_loss_coef: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the load-balancing loss of a mixture of experts, in every stage; what config.json says "
        "is not read. 0: none.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of weights and activations.")
    compile: bool = Field(
        default=False,
        description="torch.compile of what each block does around its attention: minutes at the start, faster steps on "
        "GPUs; needs a C++ compiler.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, about a third more time.",
    )
    offload_activations: bool = Field(
        default=False,
        description="What gradient_checkpointing keeps, the input of each block, rests in host memory until the "
        "backward pass; GPUs only.",
    )

    @property
    def has_dropout(self) -> bool:
        """Whether updates compute with dropout: that of the adapters, as the models have none."""
        return self.lora is not None and self.lora.dropout > 0


def check_model(model: ModelSettings, cluster: ClusterSettings) -> None:
    """Refuse settings of a model that do not fit together, or not this cluster."""
    frozen = [part for part in model.trainable if part != "projector"]
    changing = [part for part in ("vision", "projector") if part in model.trainable]
    kept = model.feature_cache is not None
    path, start = "model.quantization", f"is {model.quantization}, "
    quantized, balance = model.quantization is not None, model.router_aux_loss_coef
    refuse_any(
        (
            kept and bool(changing),
            "model.feature_cache",
            f"keeps what frozen parts make of images, but model.trainable has {' and '.join(changing)}; set "
            "model.trainable=[language], or leave it out",
        ),
        (
            kept and cluster.ranks > 1,
            "model.feature_cache",
            f"is set, but the {cluster.ranks} ranks share the vision tower and call it together; leave it out, or use "
            "one rank",
        ),
        (
            model.offload_activations and not model.gradient_checkpointing,
            "model.offload_activations",
            "is true, but moves the inputs of blocks that are computed again: set model.gradient_checkpointing=true",
        ),
        (
            model.offload_activations and cluster.device == "cpu",
            "model.offload_activations",
            "is true, but the trainer computes on a CPU, whose activations are in host memory: leave it out",
        ),
        (
            quantized and model.lora is None and bool(frozen),
            path,
            f"{start}so that {', '.join(frozen)} cannot train; set model.lora, or model.trainable=[projector]",
        ),
        (
            quantized and cluster.ranks > 1,
            path,
            f"{start}but the weights are sharded over {cluster.ranks} ranks, which have them in full; leave it out, or "
            "use one rank",
        ),
        (
            quantized and cluster.dtype is not None,
            path,
            f"{start}but cluster.dtype={cluster.dtype} would compute in another type than that of the weights; leave "
            "that out, and set model.dtype",
        ),
        (
            balance > 0 and cluster.sequence_parallel > 1,
            "model.router_aux_loss_coef",
            f"is {balance:g} and balances whole rows, of which ranks see parts with cluster.sequence_parallel="
            f"{cluster.sequence_parallel}; leave one of them out",
        ),
    )
