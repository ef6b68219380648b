"""RMSNorm on processors in a few passes through memory. As transformers writes it, its gradient takes about ten; here
it comes from PyTorch's kernel for the gradient of LayerNorm, which goes through each row once."""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

_LEAST = 1 << 16
"""Numbers below which PyTorch's own function is faster: fewer calls, the same passes."""

_Model = TypeVar("_Model", bound=nn.Module)


class RMSNorm(LlamaRMSNorm):
    """Llama's norm; in float32 on a processor in fewer calls, and where the numbers are many in fewer passes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _suits(hidden_states, self.weight):
            return super().forward(hidden_states)
        if hidden_states.numel() < _LEAST:
            return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def use_fast_norms(model: _Model, device: str) -> _Model:
    """On a CPU, give the class `RMSNorm` to each layer whose forward has the bytecode of Llama's norm; parameters and
    names stay."""
    wanted = _instructions(LlamaRMSNorm.forward)
    if torch.device(device).type == "cpu" and wanted:
        for module in model.modules():
            if _instructions(type(module).forward) == wanted:
                module.__class__ = RMSNorm
    return model


def _instructions(forward: Any) -> tuple[Any, ...]:
    """Equal for functions that do the same with their arguments, however their variables are called."""
    code = forward.__code__ if isinstance(forward, FunctionType) else None
    return () if code is None else (code.co_code, code.co_names, code.co_consts, code.co_freevars, code.co_argcount)


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: what else is asked would be guarded, or break the graph
        and x.shape[-1:] == weight.shape
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(x) is Tensor  # no stand-in, as tracing and sharding have
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = (mean(x^2) + eps)^(-1/2) of each row. With the gradient g of y, that of w is the sum of g x r
    over the rows, and that of x is w g r - x r^3 mean(w g x). LayerNorm's, given a mean of 0 and this r, is the same
    but for - r mean(w g), which is added again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scales = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scales)
        return (x * scales).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        (grad,), (wants_x, wants_weight, _) = grads, ctx.needs_input_grad
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scales), scales, weight, None, [wants_x, wants_weight, False]
        )
        if wants_x:
            of_x.add_((grad @ weight).div_(len(weight)).unsqueeze(-1).mul_(scales))
        return of_x, of_weight, None
