"""The worker of visual consistency learning: two passes over the same answers, behind prompts of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.algorithms.metrics import to_metrics
from foveate.algorithms.supervised import sft_weights
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.models.flash import compressible, patches_of
from foveate.models.forward import evaluating, hidden_states
from foveate.models.logprobs import Divergence, TeacherStates
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack
from foveate.records import Batch, PackedGroup
from foveate.train.worker import Worker


@dataclass(frozen=True, slots=True)
class ConsistencyRow:
    """The same answers behind the prompt that the policy sees, with compressed tiles, and that of the reference."""

    policy: PackedGroup
    reference: PackedGroup


@dataclass(frozen=True, slots=True)
class RouterRow:
    """All tiles (N, 3, H, W) of a prompt, and whether they are taught as compressible."""

    pixels: Tensor
    compressible: bool


class ConsistencyWorker(Worker):
    """A worker whose frozen reference says what the policy is to say."""

    def update_consistency(
        self, rows: Sequence[ConsistencyRow], weighting: str, total: float, lr: float
    ) -> dict[str, float]:
        """One optimizer step towards what the reference says of the answers; `total` is the sum of the weights
        (`foveate.algorithms.supervised.sft_total`) of the whole step."""
        losses = []
        for batch, kl_M in self._divergences(rows):
            weight_M = sft_weights(batch, weighting)
            loss = (weight_M * kl_M).sum() / total
            self._backward(loss)
            weight = weight_M.sum().item() / total
            losses.append(to_metrics({"loss/total": (loss, weight), "loss/kl": (kl_M.sum(), float(len(kl_M)))}))
        return self._step(self.policy, self.optimizer, losses, lr, [row.policy for row in rows])

    @torch.no_grad()
    def divergences(self, rows: Sequence[ConsistencyRow]) -> list[Tensor]:
        """KL(reference || policy) of all trained tokens, one vector per row."""
        with evaluating(self.policy.model):
            found = torch.cat([torch.zeros(0), *(kl_M.cpu() for _, kl_M in self._divergences(rows))])
        return [*found.split([row.policy.trained_tokens for row in rows])]

    def _divergences(self, rows: Sequence[ConsistencyRow]) -> Iterator[tuple[Batch, Tensor]]:
        """Packed rows of the policy, and KL(reference || policy) over the whole vocabulary at each trained token (M,).
        A pass is a model and a packed row: the reference has one of its own."""
        reference = self.reference
        assert reference is not None
        for batch, members in self._batches([row.policy for row in rows]):
            with torch.no_grad(), evaluating(reference.model):
                whole = pack([rows[i].reference for i in members]).to(self.device)
                hidden = hidden_states(reference, whole)[whole.source_M]
            weight = reference.part("head").weight
            assert isinstance(weight, Tensor)
            (kl_M,) = self._logprobs(batch, 1.0, (Divergence("forward_kl", TeacherStates(hidden, weight)),))
            yield batch, kl_M


class RouterWorker(ConsistencyWorker):
    """A worker that trains the router of its policy alone, and whose reference is another model."""

    def __init__(
        self, model: ModelSettings, optim: OptimSettings, token_budget: int, reference: str, **more: Any
    ) -> None:
        super().__init__(model.model_copy(update={"trainable": ("router",)}), optim, token_budget, **more)
        loaded = load_policy(reference, attention=model.attention, dtype=model.dtype, device=str(self.device))
        loaded.model.requires_grad_(False)
        self.reference = loaded

    def update_router(self, rows: Sequence[RouterRow], tiles: int, lr: float) -> dict[str, float]:
        """One optimizer step of cross-entropy on all `rows`, which have so many tiles."""
        losses = []
        for row in rows:
            loss = self._cross_entropy(row)
            self._backward(loss.sum() / tiles)
            losses.append(to_metrics({"loss/total": (loss.detach().sum() / tiles, len(loss) / tiles)}))
        return self._step(self.policy, self.optimizer, losses, lr, [])

    @torch.no_grad()
    def routed_right(self, rows: Sequence[RouterRow]) -> list[tuple[float, float, int]]:
        """For each row the sum of its loss, and how many of its tiles the router calls rightly."""
        with evaluating(self.policy.model):
            losses = [self._cross_entropy(row) for row in rows]
        return [(one.sum().item(), float((one < math.log(2)).sum()), len(one)) for one in losses]

    def _cross_entropy(self, row: RouterRow) -> Tensor:
        """-log of the probability (N,) of what the tiles are taught as."""
        model: Any = self.policy.model
        with torch.no_grad():
            patches = patches_of(model, row.pixels.to(self.device, next(model.parameters()).dtype))
        found = compressible(model, patches).float()
        return -(found if row.compressible else 1 - found).clamp_min(1e-9).log()
