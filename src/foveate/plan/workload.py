"""The work of a recipe: a model, and a step's prompts, answers and tiles."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from foveate.config.cluster import ClusterSettings
from foveate.config.model import LoraSettings
from foveate.config.runs import MPOSettings, RLSettings, SFTSettings, VicoSettings, VirSettings
from foveate.config.train import OptimSettings
from foveate.encoding.family import Family
from foveate.errors import ConfigError
from foveate.models.checkpoint.inspect import SHIPPED_MODELS, inspect_model_folder
from foveate.models.flash import most_compressed
from foveate.models.policy import DTYPES
from foveate.models.quantize import Quantization
from foveate.models.sizes import OTHER_MODELS, PUBLISHED_SIZES, published_config
from foveate.plan.trace import RowShape, family_of, piece_of
from foveate.rollout.build import keeps_adapters
from foveate.train.algorithm import build_algorithm


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompt` (image tokens included), `answer` and `tiles` are means of one prompt; `longest` bounds the answer.
    `compressed`: the mean share of the tiles that have fewer tokens, None for a model that compresses none;
    `whole_prompt`: the mean prompt of the reference, where that is another.

    A step has `groups` prompts with `answers` each, trained on in `updates` optimizer steps on micro-batches of
    `budget` tokens per device, which go `epochs` times over the answers. `forwards` counts the passes beside the
    update: old and reference log-probs. `overlaps`: the next answers are generated while these are trained on.
    `served`: answers come from a server, which holds weights of its own; `applies_adapters`: and takes adapters as they
    are.
    `teachers`: the configurations of frozen models that read every answer once, or once in every epoch.
    """

    config: Any
    trainable: tuple[str, ...]
    dtype: torch.dtype
    checkpointing: bool
    cluster: ClusterSettings
    optim: OptimSettings
    budget: int
    steps: int
    groups: int
    answers: int
    updates: int
    prompt: int
    answer: int
    tiles: int
    longest: int
    generates: bool
    forwards: int
    reference: bool
    epochs: int = 1
    overlaps: bool = False
    lora: LoraSettings | None = None
    quantization: Quantization | None = None
    served: bool = False
    applies_adapters: bool = False
    offloads_activations: bool = False
    teachers: tuple[Any, ...] = ()
    teacher_dtype: torch.dtype = torch.float32
    compressed: float | None = None
    whole_prompt: int | None = None

    @property
    def engines(self) -> int:
        """Engines that answer: in processes of their own, or one on each rank."""
        return self.cluster.engines or self.cluster.ranks

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.cluster.dtype] if self.cluster.dtype else self.dtype

    @property
    def row(self) -> RowShape:
        """The part of a full micro-batch on one device, a share of it under sequence parallelism."""
        share = self.cluster.sequence_parallel
        tokens = self.budget * share
        prompts = max(1, tokens // (self.prompt + self.answers * self.answer))
        prompt = min(prompts * self.prompt, tokens - 1)
        per_tile = mean_tokens(family_of(self.config), piece_of(self.config).tokens, self.compressed)
        tiles = -(-min(prompts * self.tiles, int(prompt / per_tile)) // share)
        return RowShape(
            prompt // share, (tokens - prompt) // share, tiles, compressed=round(tiles * (self.compressed or 0.0))
        )


def mean_tokens(family: Family, whole: int, compressed: float | None) -> float:
    """Tokens of a tile of `whole` tokens, in the mean over those of which a share is compressed."""
    if family.sides is None or compressed is None:
        return whole
    return whole - compressed * (whole - family.sides[1] ** 2)


def workload_of(
    settings: RLSettings | SFTSettings | MPOSettings,
    prompt: int | None,
    answer: int | None,
    tiles: int | None,
    compressed: float | None = None,
) -> Workload:
    """The workload of a recipe. None for a mean: 7 tiles (an image of 4:3 at 640 pixels with its thumbnail has 7 or
    13) and 100 tokens of text, or the longest prompt if that is less; an eighth of the longest answer; half of the
    tiles that a router compresses, or as many as it may, if that is less."""
    model, data, train = settings.model, settings.data, settings.train
    config = _config_of(model.path)
    family, per_tile = family_of(config), piece_of(config).tokens
    if tiles and not family.sees_images:
        raise ConfigError(f"{tiles} tiles: {family.name} is a text-only model and sees no images")
    tiles = min(7, data.max_prompt_tokens // per_tile) * family.sees_images if tiles is None else tiles
    compressed = _compressed(settings, family, tiles, compressed)
    seen = round(tiles * mean_tokens(family, per_tile, compressed))
    hidden = tiles * per_tile - seen
    prompt = min(data.max_prompt_tokens, tiles * per_tile + 100) - hidden if prompt is None else prompt
    if seen > prompt:
        raise ConfigError(f"{tiles} tiles are {seen} tokens, more than a prompt of {prompt}")
    common: dict[str, Any] = {
        "config": config, "trainable": model.trainable, "lora": model.lora, "quantization": model.quantization,
        "dtype": DTYPES[model.dtype], "cluster": settings.cluster,
        "checkpointing": model.gradient_checkpointing,
        "offloads_activations": model.offload_activations, "budget": train.tokens_per_micro_batch, "steps": train.steps,
        "prompt": prompt, "tiles": tiles, "compressed": compressed, "optim": settings.optim,
    }  # fmt: skip
    if not isinstance(settings, RLSettings):
        longest = max(2, data.max_prompt_tokens - prompt - hidden)
        if isinstance(settings, VirSettings):
            raise ConfigError("vir is not planned: it trains a few layers alone, and takes two passes of two models")
        frozen = isinstance(settings, VicoSettings)  # the start, which has a pass beside the policy's
        pairs = isinstance(settings, MPOSettings)  # their reference log-probs are computed once, before the steps
        groups = settings.train.pairs_per_step if pairs else settings.train.samples_per_step
        return Workload(
            **common, groups=groups, answers=2 if pairs else 1, updates=1, answer=answer or longest // 8 or 1,
            longest=longest, generates=False, forwards=int(frozen), reference=frozen,
            whole_prompt=prompt + hidden if frozen else None,
        )  # fmt: skip
    longest, updates = settings.rollout.max_tokens, settings.train.updates_per_step * settings.train.epochs_per_step
    algorithm = build_algorithm(settings.algorithm, longest, dropout=model.has_dropout)
    needs_reference, teacher = algorithm.needs_reference, algorithm.teacher
    needs_old = algorithm.old_logprobs == "trainer" and (updates > 1 or algorithm.needs_old)
    if teacher is not None:
        common["teachers"] = tuple(map(_config_of, teacher.folders))
        common["teacher_dtype"] = DTYPES[teacher.dtype or model.dtype]
    return Workload(
        **common, groups=settings.train.prompts_per_step, answers=settings.rollout.samples, updates=updates,
        epochs=settings.train.epochs_per_step, overlaps=bool(settings.rollout.staleness and settings.cluster.engines),
        answer=answer or longest // 8 or 1, longest=longest, generates=True,
        served=settings.rollout.engine in ("vllm", "sglang"),
        applies_adapters=_applies_adapters(settings, family),
        forwards=needs_old + needs_reference,
        reference=needs_reference and model.lora is None,  # else the model with its adapters off
    )  # fmt: skip


def _compressed(
    settings: RLSettings | SFTSettings | MPOSettings, family: Family, tiles: int, asked: float | None
) -> float | None:
    """The mean share of the tiles that are compressed. What a router leaves hangs on the images, so for RL it is the
    one `asked` for, or half, by the quantile that routers are trained with; their thresholds bound it. Other stages say
    it by themselves. Raises ConfigError for a share that cannot be."""
    if family.sides is None or family.router_thresholds is None:
        if asked is not None:
            raise ConfigError(f"--compressed {asked:g}: {family.name} compresses no tiles; leave it out")
        return None
    if not isinstance(settings, RLSettings):
        vico = isinstance(settings, VicoSettings)
        if asked is not None:
            said = "vico draws them, half of the tiles in the mean" if vico else "this stage compresses none"
            raise ConfigError(f"--compressed {asked:g}: {said}; leave it out")
        return 0.5 * vico
    relative, absolute = family.router_thresholds
    count = most_compressed(tiles, relative)
    most = count / max(1, tiles)
    if asked is not None and asked > most:
        raise ConfigError(
            f"--compressed {asked:g}: at most {count} of {tiles} tiles can be, by flash_relative_threshold "
            f"{relative:g} of {settings.model.path}; say at most {math.floor(100 * most) / 100:g}"
        )
    usual = most if absolute == 0 else min(0.5, most)
    return usual if asked is None else asked


def _applies_adapters(settings: RLSettings, family: Family) -> bool:
    served = family.servers.get(settings.rollout.engine)
    return served is not None and not served.no_adapters and keeps_adapters(settings.rollout)


def _config_of(path: str) -> Any:
    """The configuration in a model folder, or the published one where the name says the size (InternVL3_5-8B-MPO)."""
    if path in SHIPPED_MODELS or Path(path).is_dir():
        return inspect_model_folder(path).config
    name = Path(path).name
    if known := next((known for known in OTHER_MODELS if name.startswith(known)), None):
        return AutoConfig.for_model(**copy.deepcopy(OTHER_MODELS[known]))
    sizes = sorted((size for size in PUBLISHED_SIZES if re.search(rf"-{size}(-|$)", name)), key=len)
    if not sizes:
        raise ConfigError(
            f"model.path {path}: no such folder, and the name is not that of a published size: "
            f"{', '.join(OTHER_MODELS)}, or InternVL3_5- and one of {', '.join(PUBLISHED_SIZES)}"
        )
    return published_config(sizes[-1], flash="-Flash" in name)
