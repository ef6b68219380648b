"""The worker of visual consistency learning: two passes over the same answers, behind prompts of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.algorithms.metrics import to_metrics
from foveate.models.forward import evaluating, hidden_states
from foveate.models.logprobs import Divergence, TeacherStates
from foveate.parallel.packing import pack
from foveate.records import Batch, PackedGroup
from foveate.train.worker import Worker, sft_weights


@dataclass(frozen=True, slots=True)
class ConsistencyRow:
    """The same answers behind the prompt that the policy sees, with compressed tiles, and that of the reference."""

    policy: PackedGroup
    reference: PackedGroup


class ConsistencyWorker(Worker):
    """A worker whose frozen reference says what the policy is to say."""

    def update_consistency(
        self, rows: Sequence[ConsistencyRow], weighting: str, total: float, lr: float
    ) -> dict[str, float]:
        """One optimizer step towards what the reference says of the answers; `total` is the sum of the weights
        (`foveate.train.worker.sft_total`) of the whole step."""
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
            found = torch.cat([kl_M.cpu() for _, kl_M in self._divergences(rows)])
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
