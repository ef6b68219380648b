"""Products of float32 matrices on processors with AVX-512 that are not Intel's, by oneDNN.

PyTorch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors alone; on AMD's it stays at half
of their speed (measured in docs/performance.md). oneDNN, which PyTorch also carries, takes it on both, but on Intel's
it gains nothing, and each call costs more. Sums are in float32 in either, in another order.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LEAST_PRODUCTS = 1 << 21
"""Multiplications below which the call takes longer than it saves."""
_FEW_ROWS, _MOST_PADDED = 64, 512
_TURNED = 1024
"""Rows whose share of a weight's gradient is computed at a time."""
_CACHED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "96", "LRU_CACHE_CAPACITY": "8"}
"""How many shapes keep the code that oneDNN makes for each, a megabyte or two, and how many PyTorch keeps of each kind
beside that: 1,024 by default. The blocks of attention of one row of unequal segments have up to ninety shapes. Read
at the first call."""

_Model = TypeVar("_Model", bound=nn.Module)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_threads(threads: int | None) -> None:
    """Bound the CPU threads of torch; None leaves its own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def use_fast_linear(model: _Model, device: str) -> _Model:
    """Give the plain linear layers of a model for a processor the class `Linear`; parameters and names stay."""
    if torch.device(device).type != "cpu" or not has_fast_matmul():
        return model
    for name, value in _CACHED.items():
        os.environ.setdefault(name, value)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


@cache
def has_fast_matmul() -> bool:
    """Whether oneDNN multiplies faster than MKL here: with AVX-512 on processors that are not Intel's."""
    return torch.backends.mkldnn.is_available() and _has_avx512() and not has_fast_mkl()


@cache
def has_fast_mkl() -> bool:
    """Whether MKL takes AVX-512 here: on Intel's processors."""
    return _has_avx512() and torch.cpu.get_capabilities()["cpu_name"].startswith("Intel")


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight.T (N, K) + bias (N,): `functional.linear`, differentiable once."""
    if torch.compiler.is_compiling():  # first: what else is asked would be guarded, or break the graph
        return functional.linear(x, weight, bias)
    rows = x.numel() // max(x.shape[-1], 1)
    if not _gains(x, weight, rows, len(weight)) or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    out = _Linear.apply(flat, weight, bias) if torch.is_grad_enabled() else _multiply(flat, weight, bias)
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))  # a view may not change in place


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) @ right (K, N), of tensors that need no gradient."""
    if not _gains(left, right, len(left), right.shape[1]):
        return left @ right
    return _multiply(left, right.t(), None)


def added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total (M, N), or nothing, + left (M, K) @ right.T (N, K), by oneDNN whatever the size; `right` is contiguous or
    the transpose of what is."""
    if total is None:
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(left, total, right, None, "add")


def _gains(left: Tensor, right: Tensor, rows: int, columns: int) -> bool:
    return (
        rows >= 4
        and rows * columns * left.shape[-1] >= _LEAST_PRODUCTS
        and left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and has_fast_matmul()
        and type(right) in (Tensor, nn.Parameter)  # no stand-in, as tracing and sharding have
        and type(left) is Tensor
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) @ weight.T (N, K) + bias. A few rows are made a multiple of 8 or 32, so that batches which grow and
    shrink have few shapes."""
    rows = len(x)
    if rows < _MOST_PADDED:
        missing = -rows % (8 if rows < _FEW_ROWS else 32)
        x = functional.pad(x, (0, 0, 0, missing)) if missing else x
    if not (weight.is_contiguous() or weight.t().is_contiguous()):  # oneDNN's way for these is a thousand times slower
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # oneDNN takes its stride to be 1
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[:rows]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        return (
            None if weight is None else matmul(grad, weight),
            None if x is None else _gradient_of_weight(grad, x),
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T (N, M) @ x (M, K), some rows at a time: oneDNN turns them, which is cheap in a processor's cache."""
    x = x.contiguous()
    total = matmul(grad[:_TURNED].t(), x[:_TURNED])
    for first in range(_TURNED, len(x), _TURNED):
        some, theirs = grad[first : first + _TURNED], x[first : first + _TURNED]
        if len(theirs) == _TURNED:
            total = added(total, some.t(), theirs.t())
        else:
            total += matmul(some.t(), theirs)
    return total
