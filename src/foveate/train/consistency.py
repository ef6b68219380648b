"""The worker of visual consistency learning: two passes over the same answers, behind prompts of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.algorithms.metrics import to_metrics
from foveate.algorithms.supervised import sft_weights
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.models.flash import compressible, patches_of
from foveate.models.forward import evaluating
from foveate.models.logprobs import LOGP_ENTROPY, Divergence, Term
from foveate.models.policy import Policy, parameters_by_part
from foveate.models.routing import Routing
from foveate.parallel.fsdp import LogProbs, TeacherOutput, own_memory
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

    def __init__(
        self, model: ModelSettings, optim: OptimSettings, token_budget: int, *, start: str | None = None, **more: Any
    ) -> None:
        """`start`: folder of the reference; None: the model itself, before it is trained."""
        if model.feature_cache is not None:
            raise ConfigError("model.feature_cache is set, but this stage trains what images become; leave it out")
        super().__init__(model, optim, token_budget, **more)
        frozen = self._read(start or model.path)
        frozen.model.requires_grad_(False)
        self._one_tower = self.ranks is None and _have_one_tower(self.policy, frozen)
        self._start = self._ready(TeacherOutput, frozen)

    def update_consistency(
        self, rows: Sequence[ConsistencyRow], weighting: str, total: float, lr: float
    ) -> dict[str, float]:
        """One optimizer step towards what the reference says of the answers; `total` is the sum of the weights
        (`foveate.algorithms.supervised.sft_total`) of the whole step over all ranks."""
        losses = []
        for batch, members, kl_M in self._divergences(rows):
            if not members:
                kl_M.sum().backward()
                continue
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
            found = torch.cat([torch.zeros(0), *(kl_M.cpu() for _, _, kl_M in self._divergences(rows))])
        return [*found.split([row.policy.trained_tokens for row in rows])]

    def _divergences(self, rows: Sequence[ConsistencyRow]) -> Iterator[tuple[Batch, list[int], Tensor]]:
        """Packed rows of the policy with the indices of their rows, and KL(reference || policy) over the whole
        vocabulary at each trained token (M,). A pass is a model and a packed row: the reference has one of its own, in
        which rows that have one reference have it once. A vision tower that both have sees the tiles once."""
        head: Any = self.policy.part("head")
        for batch, members in self._batches([row.policy for row in rows]):
            references = {id(rows[i].reference): rows[i].reference for i in members}
            groups = [*references.values()]
            with torch.no_grad():
                whole = self._packed(groups)
                if self._one_tower and whole.pixels is not None and _are_equal(batch.pixels, whole.pixels):
                    patches = self._patches(whole.pixels)
                    batch, whole = replace(batch, patches=patches), replace(whole, patches=patches)
                said = self._start(whole, 1.0, None, len(head.weight))
            if len(groups) < len(members):
                parts = torch.arange(len(whole.target_M)).split([group.trained_tokens for group in groups])
                own = dict(zip(references, parts, strict=True))
                said = said.rows(torch.cat([own[id(rows[i].reference)] for i in members]).to(self.device))
            (kl_M,) = self._logprobs(batch, 1.0, (Divergence("forward_kl", said),))
            yield batch, members, kl_M

    def _patches(self, pixels: Tensor) -> Tensor:
        """The output of the vision tower for tiles, in the numbers that passes compute in."""
        model: Any = self._start.model
        computing = nullcontext() if self._autocast is None else torch.autocast(self.device.type, self._autocast)
        with computing:
            return patches_of(model, pixels.to(next(model.parameters()).dtype))


def _have_one_tower(policy: Policy, frozen: Policy) -> bool:
    """Whether the vision towers of both are frozen and the same, and pass on the same."""
    own, other = (parameters_by_part(one)["vision"] for one in (policy, frozen))
    if frozen.family.sides != policy.family.sides or own.keys() != other.keys():
        return False
    return all(not weight.requires_grad and _are_equal(weight, other[name]) for name, weight in own.items())


def _are_equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)


class _RouterRoot(LogProbs):
    """The log-probs of a policy; in place of a batch tiles (N, 3, H, W), and the probabilities (N,) of its router."""

    def forward(
        self,
        batch: Batch | Tensor,
        temperature: float = 1.0,
        terms: Sequence[Term] = LOGP_ENTROPY,
        routing: Routing | None = None,
    ) -> tuple[Tensor, ...]:
        if isinstance(batch, Batch):
            return LogProbs.forward(self, batch, temperature, terms, routing)
        with torch.no_grad():
            patches = patches_of(self.model, batch.to(next(self.model.parameters()).dtype))
        return (own_memory(compressible(self.model, patches).float()),)


class RouterWorker(ConsistencyWorker):
    """A worker that trains the router of its policy alone, and whose reference is another model."""

    _root: ClassVar[type[LogProbs]] = _RouterRoot

    def __init__(self, model: ModelSettings, optim: OptimSettings, token_budget: int, **more: Any) -> None:
        super().__init__(model.model_copy(update={"trainable": ("router",)}), optim, token_budget, **more)

    def update_router(self, rows: Sequence[RouterRow], tiles: int, lr: float) -> dict[str, float]:
        """One optimizer step of cross-entropy on all `rows`; `tiles` counts those of the whole step over all ranks."""
        losses = []
        alike = 1 if self.ranks is None else self.ranks.cluster.sequence_parallel  # ranks that are given the same rows
        for row, found in self._said(rows):
            if row is None:
                found.sum().mul(0).backward()
                continue
            loss = _cross_entropy(found, row)
            self._backward(loss.sum() / tiles / alike)
            losses.append(to_metrics({"loss/total": (loss.detach().sum() / tiles, len(loss) / tiles)}))
        return self._step(self.policy, self.optimizer, losses, lr, None)

    @torch.no_grad()
    def routed_right(self, rows: Sequence[RouterRow]) -> list[tuple[float, float, Tensor]]:
        """For each row the sum of its loss, how many of its tiles the router calls rightly, and what it says of each:
        how probably it loses nothing (N,)."""
        with evaluating(self.policy.model):
            said = [(_cross_entropy(found, row), found.cpu()) for row, found in self._said(rows) if row is not None]
        return [(loss.sum().item(), float((loss < math.log(2)).sum()), found) for loss, found in said]

    def _said(self, rows: Sequence[RouterRow]) -> Iterator[tuple[RouterRow | None, Tensor]]:
        """For each row the router's probabilities (N,) that its tiles lose nothing. Every rank has as many as the one
        with most: the last ones of others are of a dummy image, without a row."""
        missing = 0 if self.ranks is None else self.ranks.most(len(rows)) - len(rows)
        dummy = self.policy.family.dummy_image
        assert dummy is not None
        for row in (*rows, *[None] * missing):
            (found,) = self._logprobs((dummy if row is None else row).pixels.to(self.device))
            yield row, found


def _cross_entropy(found: Tensor, row: RouterRow) -> Tensor:
    """-log of the probability (N,) of what the tiles are taught as."""
    return -(found if row.compressible else 1 - found).clamp_min(1e-9).log()
