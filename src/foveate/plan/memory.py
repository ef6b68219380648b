"""Bytes of one GPU and of the host by part, for a workload on some machines."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from foveate.config.model import LoraSettings
from foveate.config.train import OptimSettings
from foveate.models.lora import plain_name, train_parts
from foveate.models.policy import Policy, freeze_except, parameters_by_part
from foveate.models.quantize import Quantization, linear_layers, packed_bytes
from foveate.models.sizes import RECURRENT, key_value_numbers, recurrent_layers, state_numbers
from foveate.plan.hardware import GIB, HOST_MEMORY, Machines
from foveate.plan.trace import RowShape, StepMemory, family_of, piece_of, step_memory, traced_policy
from foveate.plan.workload import Workload
from foveate.rollout.server.adapters import language_adapters
from foveate.train.optim import state_bytes

ENGINE_BYTES = 2
"""Of a weight, key or value in an engine of its own: bfloat16."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per GPU, on those that train and those that generate. Where they are the same, an engine keeps weights of
    its own while they train, and there are no gradients and activations while they generate."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    features: float
    chunk: float
    scratch: float
    engine: float
    keys_values: float
    host: float
    apart: bool = False

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def training(self) -> float:
        """The most while training: in a backward pass, or in the optimizer step with its copy of the weights."""
        epochs = self.gathered + self.activations + self.features + self.chunk
        return self.state + (0 if self.apart else self.engine) + max(epochs, self.scratch)

    @property
    def generating(self) -> float:
        """The least that generating takes, with room for one longest answer."""
        return (0 if self.apart else self.weights + self.optimizer) + self.engine + self.keys_values

    def fits(self, machines: Machines) -> bool:
        return max(self.training, self.generating) <= machines.usable and self.host <= HOST_MEMORY


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of the parts of a model, of one block of the language model, and of what is in no block. `changing`:
    those that a server gets of each update, which applies adapters by itself."""

    total: int
    trained: int
    block: int
    root: int
    changing: int


def parameter_counts(policy: Policy) -> dict[str, int]:
    """Parameters of `vision`, `projector` and `language`; the head is part of the language model."""
    parts = parameters_by_part(policy)
    counts = {part: sum(one.numel() for one in own.values()) for part, own in parts.items()}
    counts["language"] += counts.pop("head")
    return counts


def sizes_of(config: Any, train: tuple[str, ...], lora: LoraSettings | None = None) -> Sizes:
    return _sizes(ByText(config), train, lora)  # pyright: ignore[reportArgumentType]  # frozen settings have a hash


class ByText:
    """A configuration that equals another with the same text, so that results can be cached by it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.text = config.to_json_string()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByText) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=256)
def _sizes(held: ByText, train: tuple[str, ...], lora: LoraSettings | None) -> Sizes:
    policy = traced_policy(held.config, torch.float32, "auto")
    counts = parameter_counts(policy)
    text = held.config.get_text_config()
    root = text.vocab_size * text.hidden_size * (1 if held.config.tie_word_embeddings else 2)
    block = (counts["language"] - root) // text.num_hidden_layers
    freeze_except(policy, train)
    trained, total, adapters = sum(counts[part] for part in train), sum(counts.values()), None
    if lora is not None:
        train_parts(policy, train, lora)
        trained = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
        adapters = language_adapters(policy)
    changing = total
    if adapters is not None:
        own = policy.model.named_parameters()
        changing = sum(parameter.numel() for name, parameter in own if plain_name(name) in adapters.changing)
    return Sizes(total, trained, block, root + counts.get("projector", 0) + counts.get("router", 0), changing)


@dataclass(frozen=True, slots=True)
class FewBits:
    """Of quantised layers: the bytes that they save, and the numbers of the largest."""

    saved: int = 0
    largest: int = 0


def quantized_of(config: Any, kind: Quantization, itemsize: int) -> FewBits:
    """The layers that `kind` makes of those of a model whose numbers take `itemsize` bytes."""
    return _quantized(ByText(config), kind, itemsize)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=256)
def _quantized(held: ByText, kind: Quantization, itemsize: int) -> FewBits:
    policy = traced_policy(held.config, torch.float32, "auto")
    sizes = [(layer.out_features, layer.in_features) for _, layer in linear_layers(policy.model, policy.family)]
    saved = sum(rows * columns * itemsize - packed_bytes(kind, rows, columns) for rows, columns in sizes)
    return FewBits(saved, max(rows * columns for rows, columns in sizes))


def optimizer_bytes(work: Workload) -> int:
    """The optimizer's state, over all ranks: its first state for the model's shapes."""
    adapters, optim = work.lora, work.optim.model_dump_json()
    held = ByText(work.config)
    return _optimizer_bytes(held, work.trainable, adapters, work.dtype, optim)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=256)
def _optimizer_bytes(
    held: ByText, train: tuple[str, ...], lora: LoraSettings | None, dtype: torch.dtype, optim: str
) -> int:
    policy = traced_policy(held.config, dtype, "auto")
    train_parts(policy, train, lora)
    return state_bytes(policy.model, OptimSettings.model_validate_json(optim))


def key_value_bytes(config: Any, itemsize: int) -> int:
    """Of one token in all layers."""
    return key_value_numbers(config.get_text_config()) * itemsize


def state_bytes_of(config: Any) -> int:
    """Of one answer in all recurrent layers, whatever its length."""
    return 4 * state_numbers(config.get_text_config())


def memory_of(work: Workload) -> Memory:
    """The memory of a workload. A single process without a cluster shares its weights with the engine."""
    sizes, cluster = sizes_of(work.config, work.trainable, work.lora), work.cluster
    stored, computed = work.dtype.itemsize, work.compute_dtype.itemsize
    shards, spread = cluster.shards, cluster.ranks > 1
    few_bits = quantized_of(work.config, work.quantization, stored) if work.quantization is not None else FewBits()
    weights = (sizes.total * stored - few_bits.saved) / shards * (2 if work.reference else 1)
    weights += sum(sizes_of(one, ("language",)).total for one in work.teachers) * work.teacher_dtype.itemsize / shards
    gradients, moments = sizes.trained * stored / shards, optimizer_bytes(work) / shards
    gathered = float(few_bits.largest * computed)  # one layer at a time is multiplied in full
    if not spread and computed < stored:  # copies that autocast keeps: of a block alone where it is computed again
        gathered = float(computed * (sizes.root + sizes.block if work.checkpointing else sizes.trained))
    if spread:  # the root and two blocks, one of them on its way; gradients of the root and of a block, in float32
        gathered = computed * (2 * sizes.root + 3 * sizes.block) + 4 * sizes.block
    if spread and not cluster.reshard:
        gathered += computed * (sizes.total - sizes.root)
    step = activation_memory(work)
    rest = cluster.offload and spread
    apart = work.generates and cluster.engines > 0
    own = spread or apart or computed != stored or work.overlaps or work.served  # the engine has weights of its own
    one_answer = (work.prompt + work.longest) * key_value_bytes(work.config, ENGINE_BYTES if own else computed)
    one_answer += state_bytes_of(work.config)
    parallel = cluster.engine_tensor_parallel
    offloaded = (weights + 2 * gradients + moments if rest else 0) + _pixels(work) / cluster.ranks
    offloaded += moved_activations(work)
    return Memory(
        weights=0 if rest else weights,
        gradients=0 if rest else gradients,
        optimizer=0 if rest else moments,
        gathered=gathered,
        activations=step.activations,
        features=step.features,
        chunk=step.chunk,
        scratch=0 if rest else gradients,
        engine=sizes.total * ENGINE_BYTES / parallel if own and work.generates else 0,
        keys_values=one_answer / parallel if work.generates else 0,
        host=max(offloaded, sizes.total * ENGINE_BYTES / parallel if apart else 0) + 4 * GIB,
        apart=apart,
    )


def _pixels(work: Workload) -> float:
    """Float32 tiles of all prompts of a step."""
    return 4.0 * math.prod(piece_of(work.config).pixels) * work.tiles * work.groups


def activation_memory(work: Workload) -> StepMemory:
    """The real step, traced in small depths and extrapolated: every further block adds the same."""
    on_gpu = work.cluster.device != "cpu"
    model = ByText(work.config), work.row, work.compute_dtype, work.trainable, work.lora
    return _extrapolated(*model, work.checkpointing, on_gpu, work.offloads_activations)  # pyright: ignore[reportArgumentType]


def moved_activations(work: Workload) -> float:
    """Bytes of a row's activations that rest in host memory between its forward and its backward pass."""
    if not work.offloads_activations:
        return 0.0
    return (
        activation_memory(replace(work, offloads_activations=False)).activations - activation_memory(work).activations
    )


@lru_cache(maxsize=256)
def _extrapolated(
    held: ByText,
    row: RowShape,
    dtype: torch.dtype,
    train: tuple[str, ...],
    lora: LoraSettings | None,
    checkpointing: bool,
    on_gpu: bool,
    offloads: bool,
) -> StepMemory:
    family, text = family_of(held.config), held.config.get_text_config()
    vision = held.config.vision_config.to_dict()[family.vision_depth] if family.sees_images else 1
    how: dict[str, Any] = {"dtype": dtype, "train": train, "lora": lora}
    how |= {"checkpointing": checkpointing, "on_gpu": on_gpu, "offloads": offloads}
    counts = [text.num_hidden_layers - recurrent_layers(text), recurrent_layers(text)]
    kinds = [kind for kind, count in enumerate(counts) if count]
    uneven = family.uneven_blocks(held.config)
    start = [1 if count and len(kinds) > 1 else 2 * bool(count) for count in counts]
    start[0], seen = max(start[0], uneven), max(1, uneven)

    def traced(language: Sequence[int], blocks: int) -> StepMemory:
        return step_memory(shallow(held.config, *language, vision=blocks), row, **how)

    base = traced(start, seen)
    more = (traced(start, seen + 1).activations - base.activations) * (vision - seen) if family.sees_images else 0
    for kind in kinds:
        deeper = traced([blocks + 2 * (kind == other) for other, blocks in enumerate(start)], seen).activations
        more += (deeper - base.activations) * (counts[kind] - start[kind]) / 2
    return replace(base, activations=int(base.activations + more))


def shallow(config: Any, language: int, recurrent: int = 0, *, vision: int = 1) -> Any:
    """The same model with fewer blocks: of attention and recurrent ones in the language model, and in the tower. A
    sliding window is left out: its kernel keeps as much, and cuts the row in pieces that need values."""
    cut, family = copy.deepcopy(config), family_of(config)
    text = cut.get_text_config()
    kinds = text.to_dict().get("layer_types")
    text.num_hidden_layers = language + recurrent
    if kinds:
        text.layer_types = [RECURRENT] * recurrent + ["full_attention"] * language
    elif text.to_dict().get("sliding_window"):
        text.sliding_window = None
    if family.sees_images:
        cut.vision_config.update(family.shallow_tower(config, vision))
    return cut
