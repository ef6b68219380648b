"""Gated DeltaNet (arXiv 2412.06464) over a forest, in place of transformers' layer of that name in Qwen3.5.

transformers' own layer runs through a packed row as if it were one sequence. `replace_layers` puts a module in its
place that has its parameters, under their names, and computes each segment from the state at the end of its parent.
Checkpoints, adapters and sharding see no difference.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from foveate.models.attention.delta_rule import (
    DeltaRule,
    chunked_delta_rule,
    delta_step,
    forest_convolution,
    path_tails,
    recurrent_delta_rule,
    reference_convolution,
    rows_at,
    unit_length,
    window_convolution,
)
from foveate.models.attention.fla_rule import fla_computes, fla_delta_rule
from foveate.models.attention.kernels import KERNELS, KeyValueCache, SequenceParallelAttention
from foveate.records import Forest

_REPLACED = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
"""Classes of transformers."""

Model = TypeVar("Model", bound=nn.Module)


class ForestGatedDeltaNet(nn.Module):
    """A Gated DeltaNet layer with the parameters of transformers'. `attention` is one of `KERNELS`: the reference takes
    token by token, and "auto" fla's kernels where they suit.

    There are `key_heads` heads of queries and of keys, of `key_width` numbers, and `value_heads`, a multiple of them,
    of `value_width` numbers."""

    in_proj_qkv: nn.Linear
    in_proj_z: nn.Linear
    in_proj_b: nn.Linear
    in_proj_a: nn.Linear
    conv1d: nn.Conv1d
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    norm: nn.Module
    out_proj: nn.Linear

    def __init__(self, layer: Any, *, attention: str) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.layer_idx: int = layer.layer_idx
        self.key_heads, self.key_width = layer.num_k_heads, layer.head_k_dim
        self.value_heads, self.value_width = layer.num_v_heads, layer.head_v_dim
        self.activation = ACT2FN[layer.activation]
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        forest: Forest | None = None,
        cache: KeyValueCache | None = None,
        split: SequenceParallelAttention | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states (1, T, D) of a packed row to the layer's output; without a forest, of one token of each answer
        in the cache."""
        rows = hidden_states[0]
        mixed, gate = self.in_proj_qkv(rows), self.in_proj_z(rows)
        beta = self.in_proj_b(rows).float().sigmoid()
        decay = -self.A_log.float().exp() * functional.softplus(self.in_proj_a(rows).float() + self.dt_bias.float())
        weight = self.conv1d.weight[:, 0].float()
        # states add up over a whole path; plans are traced on the meta device, which knows no autocast
        with nullcontext() if rows.is_meta else torch.autocast(rows.device.type, enabled=False):
            if forest is None:
                assert cache is not None, "the language model was called without forest="
                out = cache.recur(self.layer_idx, (), (mixed, partial(self._step, weight, decay, beta)))
            elif split is not None:
                out = self._split(split, mixed, weight, decay, beta, forest)
            else:
                out, ends = self._mix(mixed, weight, decay, beta, forest, ends=cache is not None)
                if cache is not None:
                    tails = path_tails(forest, weight.shape[1], rows.device)
                    cache.recur(self.layer_idx, (tails[:, -1], rows_at(mixed, tails), ends), ())
        out = self.norm(out.to(mixed.dtype).flatten(0, 1), gate.reshape(-1, self.value_width))
        return self.out_proj(out.view(len(rows), -1))[None]

    def _mix(
        self, mixed: Tensor, weight: Tensor, decay: Tensor, beta: Tensor, forest: Forest, *, ends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of queries, keys and values side by side (T, channels), the weight (channels, size) of their
        convolution, decay and beta (T, heads) to the output (T, heads, value_width) and the states that the rule
        gives. There may be fewer heads than in the layer."""
        is_reference = self.attention == KERNELS["reference"]
        convolution = reference_convolution if is_reference else forest_convolution
        rule: DeltaRule = recurrent_delta_rule if is_reference else chunked_delta_rule
        if self.attention == KERNELS["auto"] and fla_computes(mixed.device, mixed.dtype, self.key_width):
            rule = partial(fla_delta_rule, dtype=mixed.dtype)
        return rule(*self._heads(convolution(mixed.float(), weight, forest)), decay, beta, forest, ends=ends)

    def _heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of the rule (T, heads, width) from rows (T, channels)."""
        activated: Tensor = self.activation(convolved)
        heads = activated.shape[-1] * self.key_heads // self.conv1d.out_channels
        query, key, value = activated.tensor_split([heads * self.key_width, 2 * heads * self.key_width], -1)
        query, key = (unit_length(rows.unflatten(-1, (heads, -1))) for rows in (query, key))
        return query, key, value.unflatten(-1, (-1, self.value_width))

    def _step(
        self,
        weight: Tensor,
        decay: Tensor,
        beta: Tensor,
        windows: Tensor,
        state: Tensor,
        tokens: Tensor | slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """One token of each of B answers: `windows` (B, size, channels), the last rows of their paths, and their states
        before it; the output (B, heads, value_width) and the states behind it. `tokens`: which of the row they are."""
        heads = self._heads(window_convolution(windows.float(), weight))
        return delta_step(*heads, decay[tokens], beta[tokens], state)

    def _split(
        self,
        split: SequenceParallelAttention,
        mixed: Tensor,
        weight: Tensor,
        decay: Tensor,
        beta: Tensor,
        forest: Forest,
    ) -> Tensor:
        """The same for this rank's tokens: each rank computes all tokens of its own heads."""
        cuts = [self.key_heads * self.key_width * i for i in (1, 2)]
        counts = (self.key_heads, self.key_heads, self.value_heads)
        rows = zip(mixed.tensor_split(cuts, -1), weight.tensor_split(cuts), counts, strict=True)
        own, kernels = [], []
        for part, kernel, heads in rows:
            own.append(split.exchange(part.unflatten(-1, (heads, -1)).transpose(0, 1), to_heads=True))
            kernels.append(split.own_heads(kernel.unflatten(0, (heads, -1))).flatten(0, 1))
        numbers = split.exchange(torch.stack([decay, beta], -1).transpose(0, 1), to_heads=True)
        decay, beta = numbers.transpose(0, 1).unbind(-1)
        all_rows = torch.cat([part.transpose(0, 1).flatten(1) for part in own], -1)
        out, _ = self._mix(all_rows, torch.cat(kernels), decay, beta, forest, ends=False)
        return split.exchange(out.transpose(0, 1), to_heads=False).transpose(0, 1)


def replace_layers(model: Model, attention: str | None = None) -> Model:
    """The model with a `ForestGatedDeltaNet` in place of each such layer of transformers. `attention` is one of
    `KERNELS`: by default, the model's own."""
    for name, module in [*model.named_modules()]:
        if type(module).__name__ in _REPLACED:
            config: Any = model.config
            kernel = attention or config.get_text_config()._attn_implementation
            model.set_submodule(name, ForestGatedDeltaNet(module, attention=kernel).train(module.training))
    return model


def leave_recurrence() -> None:
    """Let torch.compile of a module leave these layers as they are, as `kernels.keep_from_compiler` says."""
    forward: Any = torch.compiler.disable(ForestGatedDeltaNet.forward)
    ForestGatedDeltaNet.forward = forward
