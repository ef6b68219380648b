"""Frozen linear layers in four or eight bits, as QLoRA trains adapters over them (arXiv 2305.14314).

`nf4` layers are bitsandbytes' Linear4bit with double quantisation, which are those of transformers' quantiser. `int8`
layers hold the numbers that bitsandbytes gives them, one scale per row, and leave activations as they are: those of
LLM.int8 depend on what else is in a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from foveate.encoding.family import Family
from foveate.errors import ConfigError

Quantization = Literal["nf4", "int8"]
QUANTIZED_PARTS = ("vision", "language")
"""The parts whose linear layers are quantised. Embeddings, norms, head, projector and the experts of mixture models,
which are no linear layers, stay as they are."""
_BLOCK, _NESTED = 64, 256
"""Weights that share a scale in nf4, and scales that share one in turn."""


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight is int8 (out, in) times a scale (out, 1) per row."""

    scale: Tensor

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().to(device)
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        numbers = (weight.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        self.register_buffer("scale", scale)
        self.dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return _Int8Product.apply(x, self.weight, self.scale, self.bias)


class _Int8Product(torch.autograd.Function):
    """x @ (weight * scale).T + bias, keeping the weight in eight bits for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _int8_weight(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return grads[0] @ _int8_weight(weight, scale, grads[0].dtype), None, None, None


def _int8_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale).to(dtype)


def quantize_layers(model: nn.Module, family: Family, kind: Quantization, device: str) -> None:
    """Replace the linear layers of `QUANTIZED_PARTS` by frozen ones of few bits on `device`, one after the other, so
    that their full weights are never there together. Raises ConfigError where bitsandbytes is missing."""
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantization=nf4 needs bitsandbytes, which is not installed; run pip install 'foveate[bnb]', or use"
            " int8"
        )
    for name, layer in linear_layers(model, family):
        model.set_submodule(name, _nf4(layer, device) if kind == "nf4" else Int8Linear(layer, torch.device(device)))


def linear_layers(model: nn.Module, family: Family) -> list[tuple[str, nn.Linear]]:
    """The layers that `quantize_layers` replaces, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and family.part_of(name) in QUANTIZED_PARTS
    ]


def _nf4(layer: nn.Linear, device: str) -> nn.Module:
    bitsandbytes: Any = import_module("bitsandbytes")  # an extra, and slow to import
    with torch.device("meta"):
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.detach(), quant_type="nf4", blocksize=_BLOCK, module=made).to(
        device
    )
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    made.support_avx512bf16_for_cpu = False  # which computes evaluation with other numbers than training
    return made


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that `quantize_layers` has made, by name. Nothing is imported for a model without."""
    return {name: module for name, module in model.named_modules() if _is_quantized(module)}


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).__name__ in ("Int8Linear", "Linear4bit")


@torch.no_grad()
def dequantized(layer: Any) -> Tensor:
    """The weight (out, in) that a layer multiplies with, in the dtype that the model was loaded in."""
    if isinstance(layer, Int8Linear):
        return _int8_weight(layer.weight, layer.scale, layer.dtype)
    functional = import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def without_quantized(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries of a state dict that are not of quantised layers, which follow from the model folder."""
    layers = quantized_layers(model)
    return {name: tensor for name, tensor in state.items() if owner_of(name, layers) is None} if layers else state


def owner_of(name: str, layers: dict[str, Any]) -> str | None:
    """The layer, by name, that an entry of a state dict belongs to."""
    return next((above for above in _above(name) if above in layers), None)


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def packed_bytes(kind: Quantization, rows: int, columns: int) -> int:
    """Bytes of a quantised weight with its scales."""
    numbers = rows * columns
    if kind == "int8":
        return numbers + 4 * rows
    scales = math.ceil(numbers / _BLOCK)
    tables = 4 * (16 + 256 + 1)  # the 16 values of nf4, the 256 of its scales, and their offset
    return math.ceil(numbers / 2) + scales + 4 * math.ceil(scales / _NESTED) + tables
