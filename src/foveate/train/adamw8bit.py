"""AdamW whose moments take one byte each, by bitsandbytes, on a GPU or on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.train.optim import OptimizerSpec, decay_groups


def adamw8bit(
    named: Mapping[str, Tensor],
    optim: OptimSettings,
    *,
    min_8bit_size: Annotated[int, Field(ge=0)] = 4096,
    paged: bool = False,
) -> torch.optim.Optimizer:
    """AdamW with moments quantised in blocks of 256 (arXiv 2110.02861).

    min_8bit_size: parameters with fewer elements keep moments in float32. paged: those of a GPU lie in memory that it
    shares with the host, to which they are moved while it lacks room (arXiv 2305.14314); a plan counts them as there.
    """
    devices = {parameter.device.type for parameter in named.values()}
    if paged and "cpu" in devices:
        raise ConfigError("optim.settings={paged: true}, but pages are those of a GPU: leave it out on a CPU")
    bitsandbytes: Any = import_module("bitsandbytes")  # an extra, and slow to import
    how = {"min_8bit_size": min_8bit_size, "is_paged": paged and devices == {"cuda"}}
    return bitsandbytes.optim.AdamW8bit(decay_groups(named.values(), optim), lr=optim.lr, betas=optim.betas, **how)


def _first_state(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    optimizer.init_state(group, parameter, 0, 0)  # the two numbers name a parameter with overridden settings: none here
    return optimizer.state[parameter]


ADAMW8BIT = OptimizerSpec(adamw8bit, _first_state, needs="bitsandbytes", sharded=False)
