"""The value model of PPO: a copy of the policy whose head gives one number per token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.algorithms.targets import LossOut, Totals
from foveate.algorithms.values import value_loss
from foveate.config.algorithm import CriticSettings
from foveate.config.train import OptimSettings
from foveate.models.policy import Policy
from foveate.parallel.fsdp import Values
from foveate.records import Batch
from foveate.train.optim import build_optimizer


class Critic:
    """Starts from the weights of the policy, with a head that gives 0, and trains the same parts of the model."""

    def __init__(
        self, policy: Policy, settings: CriticSettings, optim: OptimSettings, ready: Callable[[Policy], Values]
    ) -> None:
        """`ready` makes the module that computes its values, and shards its weights where there are several ranks."""
        model: Any = copy.deepcopy(policy.model)
        weight = policy.part("head").weight
        assert isinstance(weight, Tensor)
        head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype)
        model.set_output_embeddings(head)
        self.model: nn.Module = model
        self.policy = replace(policy, model=model)
        self._values = ready(self.policy)
        nn.init.zeros_(head.weight)
        self.optimizer = build_optimizer(model, optim.model_copy(update={"lr": settings.lr}))
        self._clip = settings.clip

    def values(self, batch: Batch) -> Tensor:
        """The value expected before each trained token: (M,), float32 or wider."""
        value_M = self._values(batch)
        return value_M.to(torch.promote_types(value_M.dtype, torch.float32))

    def loss(self, batch: Batch, old: Sequence[Tensor], returns: Sequence[Tensor], totals: Totals) -> LossOut:
        """The clipped value loss of one micro-batch; `old` and `returns` are per group."""
        value_M = self.values(batch)
        return value_loss(value_M, torch.cat([*old]).to(value_M), torch.cat([*returns]).to(value_M), totals, self._clip)
