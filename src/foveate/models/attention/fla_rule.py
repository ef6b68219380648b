"""The gated delta rule over a forest by the Triton kernels of flash-linear-attention (fla), on GPUs that have it.

fla chooses its backend when it is imported, and without a GPU it takes one that computes nothing. So it is looked for
without importing it, and imported when the first row of a GPU comes. Its kernels multiply float32 as TF32; they are
taken for models that compute in 16 bits, as which they were made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foveate.errors import ConfigError, one_line
from foveate.models.attention.runs import depths
from foveate.records import Forest

_WIDEST = 256
"""The most numbers of a key that the kernels know."""


@lru_cache(maxsize=1)
def has_fla() -> bool:
    """Whether fla and the compiler of its kernels are installed."""
    return all(find_spec(name) is not None for name in ("fla", "triton"))


def binds_kernels() -> bool:
    """Whether transformers binds kernels to its own recurrent layers when it imports them, on CPUs, too, where they
    fail."""
    return any(find_spec(name) is not None for name in ("fla", "causal_conv1d"))


def fla_computes(device: torch.device, dtype: torch.dtype, key_width: int) -> bool:
    """Whether fla's kernels compute a layer on that device whose activations have that type."""
    return device.type == "cuda" and dtype != torch.float32 and key_width <= _WIDEST and has_fla()


def described_rule() -> str:
    """Which rule computes rows of Gated DeltaNet on this machine, for `foveate doctor`."""
    if not has_fla():
        return "PyTorch; flash-linear-attention is not installed"
    version = metadata.version("fla-core")
    if not torch.cuda.is_available():
        return f"PyTorch; flash-linear-attention {version} is installed, and there is no GPU"
    return f"flash-linear-attention {version} in bfloat16, with model.attention=auto; else PyTorch"


@lru_cache(maxsize=1)
def _kernel() -> Any:
    try:
        return import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except Exception as error:
        raise ConfigError(
            f"flash-linear-attention is installed and fails when it is imported ({type(error).__name__}: "
            f"{one_line(error)[:200]}); mend or uninstall it, or set model.attention=flex, which does without"
        ) from error


def fla_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    forest: Forest,
    *,
    dtype: torch.dtype,
    ends: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A `DeltaRule` whose products are of type `dtype`; states stay float32. Segments of one distance from the root are
    one call, each from the state behind its parent."""
    repeat = value.shape[1] // key.shape[1]
    query, key = (rows.repeat_interleave(repeat, 1).to(dtype) for rows in (query, key))
    inputs = query, key, value.to(dtype), decay, beta
    levels = _levels(forest, query.device)
    out, behind = list[Tensor](), list[Tensor]()
    for number, level in enumerate(levels):
        queries, keys, values, decays, betas = (rows.index_select(0, level.tokens)[None] for rows in inputs)
        made, states = _kernel()(
            queries,
            keys,
            values,
            g=decays,
            beta=betas,
            scale=query.shape[-1] ** -0.5,
            initial_state=None if level.parent is None else behind[-1].index_select(0, level.parent),
            output_final_state=ends or number + 1 < len(levels),
            cu_seqlens=level.bounds,
        )
        out.append(made[0])
        behind.append(states)
    places = torch.cat([level.tokens for level in levels]).argsort()
    order = torch.cat([level.segments for level in levels]).argsort()
    return torch.cat(out)[places].to(value.dtype), torch.cat(behind)[order] if ends else None


@dataclass(frozen=True, slots=True)
class _Level:
    """Segments at one distance from the root: their numbers (K,), the places of their tokens (T,), the bounds of each
    segment among these (K + 1,), and where its parent stands in the level before (K,), None for roots."""

    segments: Tensor
    tokens: Tensor
    bounds: Tensor
    parent: Tensor | None


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # those that were made for sampling must also do for training
def _levels(forest: Forest, device: torch.device) -> tuple[_Level, ...]:
    depth = depths(forest)
    levels, above = list[_Level](), list[int]()
    for distance in range(max(depth) + 1):
        own = [k for k, at in enumerate(depth) if at == distance]
        place = {k: i for i, k in enumerate(above)}
        parents = torch.tensor([place[forest.parent[k]] for k in own], device=device) if above else None
        tokens = torch.cat([torch.arange(forest.start[k], forest.start[k] + forest.length[k]) for k in own])
        bounds = functional.pad(torch.tensor([forest.length[k] for k in own]).cumsum(0), (1, 0))
        levels.append(_Level(torch.tensor(own, device=device), tokens.to(device), bounds.to(device), parents))
        above = own
    return tuple(levels)
