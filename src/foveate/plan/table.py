"""The smallest GPU for every published model and every way to train it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from foveate.config.runs import RLSettings
from foveate.models.sizes import OTHER_MODELS, PUBLISHED_SIZES
from foveate.plan.hardware import GIB, GPUS, Machines
from foveate.plan.memory import memory_of, sizes_of
from foveate.plan.workload import workload_of

MEMORIES = (16, 24, 40, 48, 80, 141)
"""GB of the GPUs that are compared."""
_ADAPTERS: dict[str, Any] = {"lora": {}}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, 8-bit AdamW": {"optim": {"name": "adamw8bit"}},
    "LoRA": {"model": _ADAPTERS},
    "QLoRA": {"model": {**_ADAPTERS, "quantization": "nf4"}},
}
_ENGINES = {"": "native", ", vLLM": "vllm"}
"""Where answers come from: the weights that are trained, or a server on the same GPU, which holds its own."""


def fits_table(models: Sequence[str] = ()) -> Iterator[str]:
    """The lines of the table in Markdown as they are found, of all published models unless some are named. A cell holds
    the GB of the smallest GPU, and in brackets the GiB that the step needs; a dash where none is large enough."""
    names = models or [*(f"InternVL3_5-{size}" for size in PUBLISHED_SIZES), *OTHER_MODELS]
    head = ["model", "parameters", *(f"{way}{server}" for server in _ENGINES for way in WAYS)]
    yield from ("| " + " | ".join(head) + " |", "|---" * len(head) + "|")
    yield from (f"| {' | '.join(_row(name))} |" for name in names)


def _row(name: str) -> Iterator[str]:
    work = workload_of(fits_settings(name, "whole", "native"), None, None, None)
    yield f"`{name}`"
    yield f"{sizes_of(work.config, work.trainable, work.lora).total / 1e9:.1f} B"
    for engine in _ENGINES.values():
        for way in WAYS:
            needed = needed_bytes(name, way, engine)
            fitting = next((memory for memory in MEMORIES if needed <= _of(memory).usable), None)
            yield f"{fitting or '-'} ({needed / GIB:.0f})"


def needed_bytes(name: str, way: str, engine: str) -> float:
    """The most that a step takes of the GPU."""
    memory = memory_of(workload_of(fits_settings(name, way, engine), None, None, None))
    return max(memory.training, memory.generating)


def fits_settings(name: str, way: str, engine: str) -> RLSettings:
    """GSPO with weights and activations in bfloat16, checkpointing, eight answers of at most 1,024 tokens to prompts of
    at most 4,096, and micro-batches of 8,192 tokens."""
    changes = WAYS[way]
    model = {"path": name, "dtype": "bfloat16", "gradient_checkpointing": True, **changes.get("model", {})}
    return RLSettings.model_validate({
        "run": "plan", "model": model, "data": {"train": ["rows"], "max_prompt_tokens": 4096},
        "rollout": {"samples": 8, "max_tokens": 1024, "engine": engine}, "optim": changes.get("optim", {}),
        "train": {"steps": 1, "prompts_per_step": 32, "tokens_per_micro_batch": 8192}, "cluster": {"device": "cuda"},
    })  # fmt: skip


def _of(memory: int) -> Machines:
    gpu = next(gpu for gpu in GPUS.values() if gpu.memory >= memory)
    return Machines(1, 1, f"{memory} GB", type(gpu)(memory, gpu.flops, gpu.bandwidth, gpu.link, gpu.network, gpu.host))
