"""Seconds of a step by phase, from counts of arithmetic and of bytes. Prompt and images are computed once per group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from foveate.models.sizes import head_width, recurrent_layers, state_numbers
from foveate.parallel.fsdp import blocks as blocks_of
from foveate.plan.hardware import BANDWIDTH_SHARE, FLOPS_SHARE, HOST_BANDWIDTH, Machines
from foveate.plan.memory import (
    ENGINE_BYTES,
    ByText,
    Memory,
    key_value_bytes,
    moved_activations,
    optimizer_bytes,
    sizes_of,
    state_bytes_of,
)
from foveate.plan.trace import piece_of, traced_policy
from foveate.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one step. Reading data and grading are not estimated."""

    generate: float
    forward: float
    update: float
    publish: float
    overlaps: bool

    @property
    def step(self) -> float:
        train = self.forward + self.update
        return (max(self.generate, train) if self.overlaps else self.generate + train) + self.publish


def active_parameters(config: Any) -> int:
    """Weights of the language model's blocks that one token is multiplied with; of the experts, the chosen ones."""
    return _active(ByText(config))  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=256)
def _active(held: ByText) -> int:
    text = held.config.get_text_config().to_dict()
    experts = next((text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), 1)
    share = text.get("num_experts_per_tok", experts) / experts
    blocks = blocks_of(traced_policy(held.config, torch.float32, "auto").part("language"))
    return sum(
        int(weight.numel() * (share if ".experts." in f".{name}" else 1))
        for block in blocks
        for name, weight in block.named_parameters()
        if weight.ndim > 1
    )


def language_flops(config: Any, prompt: float, answer: float, answers: int) -> float:
    """A forward pass of one group: the prompt once, each answer after it, logits of the answers alone."""
    text, tokens = config.get_text_config(), prompt + answers * answer
    pairs = prompt**2 / 2 + answers * (answer * prompt + answer**2 / 2)
    layers = text.num_hidden_layers - recurrent_layers(text)
    attention = 4 * layers * text.num_attention_heads * head_width(text) * pairs
    states = 8 * state_numbers(text) * tokens  # read, corrected, written and asked in each recurrent layer
    head = 2 * text.vocab_size * text.hidden_size * answers * answer
    return 2 * active_parameters(config) * tokens + attention + states + head


def vision_flops(config: Any, tiles: int) -> float:
    """A forward pass of the vision tower and the projector."""
    return tiles * piece_of(config).flops


def seconds_of(work: Workload, machines: Machines, memory: Memory) -> Seconds:
    """Time of each phase, on the `machines` of the ranks. Communication overlaps with arithmetic: the longer of both
    counts; what a group that is split over micro-batches repeats is counted."""
    row, group = work.budget * work.cluster.sequence_parallel, work.answers * work.answer
    pieces = max(1, -(-group // max(1, row - work.prompt)))
    language = language_flops(work.config, work.prompt, work.answer, work.answers)
    language += (pieces - 1) * language_flops(work.config, work.prompt, 0, 0)
    vision = pieces * vision_flops(work.config, work.tiles)
    # backward is twice a forward; a checkpointed block is computed once more
    again = 3 + work.checkpointing
    trained = again * language + (again if "vision" in work.trainable else 1) * vision
    ranks = work.cluster.ranks
    rate = machines.gpu.flops * FLOPS_SHARE * ranks / work.groups
    batches = max(
        work.updates / work.epochs,
        work.groups * (work.prompt * pieces + group) / (row * ranks / work.cluster.sequence_parallel),
    )
    gather = _gather(work, machines)
    moved = batches * 2 * moved_activations(work) / (machines.gpu.host * BANDWIDTH_SHARE)
    frozen = language  # of a pass beside the update
    if work.whole_prompt is not None:
        frozen = language_flops(work.config, work.whole_prompt, work.answer, work.answers)
    taught = [language_flops(one, work.prompt, work.answer, work.answers) for one in work.teachers]
    taught += [vision_flops(one, work.tiles) for one in work.teachers]
    teachers = sum(taught) / max(1, len(work.teachers)) * work.epochs / rate  # each row has one of them
    return Seconds(
        generate=_generate(work, machines, memory) if work.generates else 0.0,
        forward=work.forwards * max((frozen + vision) / rate, batches * gather) + teachers,
        update=work.epochs * (max(trained / rate, batches * 3 * gather) + moved) + _optimizer(work, machines),
        publish=_publish(work, machines),
        overlaps=work.overlaps,
    )


def _gather(work: Workload, machines: Machines) -> float:
    """All weights brought together once on every rank."""
    shards = work.cluster.shards
    total = sizes_of(work.config, work.trainable, work.lora).total * work.compute_dtype.itemsize
    host = total / shards / (machines.gpu.host * BANDWIDTH_SHARE) if work.cluster.offload else 0.0
    return total * (shards - 1) / shards / machines.reach(shards) + host


def _optimizer(work: Workload, machines: Machines) -> float:
    """Weights, gradients and state read, weights and state written, in each update of a step."""
    trained = sizes_of(work.config, work.trainable, work.lora).trained * work.dtype.itemsize
    moved = (3 * trained + 2 * optimizer_bytes(work)) / work.cluster.shards
    speed = HOST_BANDWIDTH if work.cluster.offload else machines.gpu.bandwidth * BANDWIDTH_SHARE
    return work.updates * moved / speed


def _publish(work: Workload, machines: Machines) -> float:
    if not work.generates or work.cluster.gpus == 1:
        return 0.0
    sizes = sizes_of(work.config, work.trainable, work.lora)
    moved = sizes.changing if work.applies_adapters else sizes.total
    return moved * ENGINE_BYTES / machines.reach(work.cluster.gpus)


def in_flight(work: Workload, machines: Machines, memory: Memory) -> int:
    """Answers of mean length that the keys and values of one engine hold at a time, its prompts once per group."""
    parallel = work.cluster.engine_tensor_parallel
    beside = 0.0 if memory.apart else memory.weights + memory.optimizer
    pool = min(work.cluster.engine_memory * machines.usable, machines.usable - beside)
    token = key_value_bytes(work.config, ENGINE_BYTES) / parallel
    answer = token * (work.prompt / work.answers + work.answer) + state_bytes_of(work.config) / parallel
    return max(1, int((pool - memory.engine) / answer))


def _generate(work: Workload, machines: Machines, memory: Memory) -> float:
    """Prompts are read in, then answers grow a token at a time at the speed of memory or of arithmetic; a few run on to
    the longest length when the others are done."""
    gpu, parallel, engines = machines.gpu, work.cluster.engine_tensor_parallel, work.engines
    queue = work.groups * work.answers / engines
    live = min(queue, in_flight(work, machines, memory))
    flops, speed = gpu.flops * FLOPS_SHARE * parallel, gpu.bandwidth * BANDWIDTH_SHARE * parallel
    head = work.config.get_text_config().vocab_size * work.config.get_text_config().hidden_size
    active, weights = active_parameters(work.config) + head, sizes_of(work.config, work.trainable, work.lora).total
    context = (work.prompt + work.answer / 2) * key_value_bytes(work.config, ENGINE_BYTES) + state_bytes_of(work.config)
    read = min(weights, active * live) * ENGINE_BYTES
    token = max((read + live * context) / speed, 2 * active * live / flops)
    alone = (active * ENGINE_BYTES + (work.prompt + work.longest) * key_value_bytes(work.config, ENGINE_BYTES)) / speed
    looks = 1 if work.compressed is None else 2  # a router sees all tiles before the prompt is known
    prefill = language_flops(work.config, work.prompt, 0, 0) + looks * vision_flops(work.config, work.tiles)
    return (
        queue / live * work.answer * token
        + (work.longest - work.answer) * alone
        + (work.groups / engines * prefill / flops)
    )
