"""Memory of the real training step without doing it: its forward and backward run on the meta device, where tensors
have shapes but no memory, while every storage is counted from the operation that makes it until nothing holds it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from foveate.config.model import LoraSettings
from foveate.encoding.family import Family, ImagePiece
from foveate.models.attention.gated_delta_net import replace_layers
from foveate.models.attention.kernels import KERNELS
from foveate.models.families import family_class
from foveate.models.forward import token_logprobs
from foveate.models.logprob_blocks import COLUMNS, ROWS
from foveate.models.logprobs import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, chunked_logprobs
from foveate.models.lora import train_parts
from foveate.models.offload import HostActivations
from foveate.models.policy import Policy
from foveate.parallel.packing import pack
from foveate.records import Batch, ImageSlot, PackedGroup, Prompt


class StorageCounter(TorchDispatchMode):
    """Bytes of all storages made inside it that are still alive (`live`), and the most there were at once (`peak`).
    Those of the tensors in `outside` do not count. `marked`: how many of the elements are true in masks of so many;
    all are in others. Tensors on the meta device have no values to be asked."""

    def __init__(self, outside: Iterable[Tensor], marked: Mapping[int, int] = MappingProxyType({})) -> None:
        super().__init__()
        self._marked = marked
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in outside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 1  # the value of a tensor, which transformers asks of its masks: any will do, no size hangs on it
        args, kwargs = _on_meta((args, kwargs or {}))
        if func.overloadpacket in _INDEXED:
            args = (args[0], [number for index in args[1] for number in self._numbers(index)], *args[2:])
        out = _grouped(*args, **kwargs) if func is _GROUPED else func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._count(leaf.untyped_storage())
        return out

    def _numbers(self, index: Any) -> list[Any]:
        """Indices by numbers, one for each dimension, in place of one by a mask."""
        if not isinstance(index, Tensor) or index.dtype != torch.bool or not index.is_meta:
            return [index]
        count = self._marked.get(index.numel(), index.numel())
        return [torch.empty(count, dtype=torch.int64, device="meta") for _ in range(index.ndim)]

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
_GROUPED = torch.ops.aten._grouped_mm.default


def _grouped(*args: Any, **kwargs: Any) -> Tensor:
    """The product of the rows of each expert with its matrix, which the meta device knows in bfloat16 alone."""
    dtype = args[0].dtype
    args = tree_map_only(Tensor, lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor, args)
    return _GROUPED(*args, **kwargs).to(dtype)


def _on_meta(arguments: Any) -> Any:
    """Arguments of an operation, on the meta device where one of them is: shapes of images are known on the CPU."""
    devices = {leaf.is_meta for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(devices) < 2:
        return arguments
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta") if tensor.ndim else tensor, arguments)


@dataclass(frozen=True, slots=True)
class RowShape:
    """A packed row: prompt tokens with the image tokens among them, answer tokens, and image tiles, so many of them
    compressed."""

    prompt: int
    answer: int
    tiles: int
    compressed: int = 0


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes at the peak of a forward and backward, without weights and accumulated gradients.

    `features`: pixels and image features; `chunk`: the log-probs, without their input; `activations`: the rest.
    """

    activations: int
    features: int
    chunk: int

    @property
    def total(self) -> int:
        return self.activations + self.features + self.chunk


def step_memory(
    config: Any,
    row: RowShape,
    *,
    dtype: torch.dtype,
    train: Sequence[str],
    checkpointing: bool,
    kernel: str = "auto",
    on_gpu: bool = False,
    lora: LoraSettings | None = None,
    offloads: bool = False,
) -> StepMemory:
    """Memory of one micro-batch of the real step (`token_logprobs` and its backward) in a model of `config`. `on_gpu`:
    log-probs are computed in the larger chunks of GPUs. `offloads`: without what rests in host memory.

    The gradient of each weight is dropped as soon as it is whole: the plan counts gradients by themselves.
    """
    policy = traced_policy(config, dtype, kernel)
    model: Any = policy.model
    train_parts(policy, train, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    piece = piece_of(config)
    batch = _meta_batch(row, piece, policy.family.sides)
    marked = {len(batch.token_ids_T): len(batch.slot_index)}
    with StorageCounter([*model.parameters(), *model.buffers(), *_tensors(batch).values()], marked) as step:
        with HostActivations() if offloads else nullcontext():
            logp_M, entropy_M = token_logprobs(policy, batch)
        loss = (logp_M - entropy_M).sum()
        loss.backward()
    head: Any = policy.part("head").weight
    traced = _chunk_memory(head, batch.target_M, CHUNK_ELEMENTS)
    own = _chunk_memory(head, batch.target_M, GPU_CHUNK_ELEMENTS if on_gpu else ROWS * COLUMNS)
    pixels = batch.pixels
    features = 0 if pixels is None else pixels.nbytes + len(batch.slot_index) * head.shape[1] * dtype.itemsize
    return StepMemory(step.peak + (0 if pixels is None else pixels.nbytes) - features - traced, features, own)


def _chunk_memory(head: Any, target_M: Tensor, elements: int) -> int:
    """Memory of log-probs and their backward, without hidden states and head. From two chunks on, each token adds as
    much as any other, so that no more than four are traced."""
    few, tokens = 2 * max(1, elements // len(head)), len(target_M)
    if tokens <= 2 * few:
        return _traced_chunks(head, target_M, elements)
    one, two = (_traced_chunks(head, target_M[:count], elements) for count in (few, 2 * few))
    return two + (two - one) * (tokens - 2 * few) // few


def _traced_chunks(head: Any, target_M: Tensor, elements: int) -> int:
    with StorageCounter([head, target_M]) as counter:
        hidden = torch.empty(len(target_M), head.shape[1], dtype=head.dtype, device="meta", requires_grad=True)
        before = counter.live
        logp_M, entropy_M = chunked_logprobs(hidden, head, target_M, chunk_elements=elements)
        (logp_M - entropy_M).sum().backward()
    return counter.peak - before


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _fused(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention that keeps as much as `sdpa` does on a device: on the meta device that would compute all scores."""
    assert attention_mask is None
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


_FUSED = "foveate_planned"
AttentionInterface.register(_FUSED, _fused)
AttentionMaskInterface.register(_FUSED, lambda *_, **__: None)


def family_of(config: Any) -> Family:
    """The family of a configuration. Raises ConfigError for one that is not planned."""
    return family_class(config.model_type).planned(config)


def piece_of(config: Any) -> ImagePiece:
    """The piece of an image that the plan of a model counts in."""
    return family_of(config).piece(config)


def traced_policy(config: Any, dtype: torch.dtype, kernel: str) -> Policy:
    """A policy on the meta device."""
    family = family_of(config)
    kernels: Any = KERNELS[kernel]
    if family.sees_images:
        kernels = {"text_config": kernels, "vision_config": _FUSED}
    with torch.device("meta"):
        model = family.auto_class.from_config(config, dtype=dtype, attn_implementation=kernels)
    tokenizer: Any = None
    return Policy(replace_layers(model.eval()), tokenizer, family, Path(), "hf")


def _meta_batch(row: RowShape, piece: ImagePiece, sides: tuple[int, int] | None = None) -> Batch:
    """A batch on the meta device. Memory hangs on the totals alone, so the prompt is one of at least 128 tokens and its
    answers are equal and at most a quarter as long: no run of tokens is filled up, which would need values. `sides`: of
    a family that compresses tiles (`Family.sides`)."""
    shapes = [(piece.tokens, ())] * row.tiles
    if sides is not None:
        chosen = (sides[place < row.compressed] for place in range(row.tiles))
        shapes = [(side**2, (side,)) for side in chosen]
    starts = [0, *accumulate(tokens for tokens, _ in shapes)]
    prompt = max(row.prompt, starts[-1], 128)
    count = max(1, -(-4 * row.answer // prompt))
    entries, *size = piece.pixels
    slots = tuple(
        ImageSlot(start, tokens, entries, piece.grid, layout=piece.layout, sides=own)
        for start, (tokens, own) in zip(starts, shapes, strict=False)
    )
    pixels = torch.empty(row.tiles * entries, *size, device="meta") if row.tiles else None
    answers = ((0,) * max(1, row.answer // count),) * count
    batch = pack([PackedGroup.of_tokens(Prompt((0,) * prompt, slots, pixels, ()), answers)])
    return replace(batch, **{name: tensor.to("meta") for name, tensor in _tensors(batch).items()})


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {"pixels": batch.pixels} if batch.pixels is not None else {}
    names = ("token_ids_T", "position_T", "slot_index", "target_M", "source_M", "sample_M")
    return values | dict(zip(names, attrgetter(*names)(batch), strict=True))
