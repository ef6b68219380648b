"""Groups as an update eats them, and what a policy loss compares with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from foveate.algorithms.kl import kl
from foveate.parallel.packing import PackedGroup, split
from foveate.records import LossOut, PolicyTargets


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """A group as the update eats it: one vector over all answer tokens in order of each.

    engine: log-probs as sampled; old: under the weights before the step (None: the current ones are those); ref: under
    the frozen reference (None: there is none); advantage; value, returns: what the critic expected and what it learns;
    masked: bool, the tokens that the loss treats apart.
    """

    packed: PackedGroup
    engine: Tensor
    advantage: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    value: Tensor | None = None
    returns: Tensor | None = None
    masked: Tensor | None = None

    @property
    def has_advantage(self) -> bool:
        """Whether any token has an advantage other than 0."""
        return self.advantage is not None and bool(self.advantage.any())

    def part(self, packed: PackedGroup, tokens: slice) -> TrainGroup:
        """The group of some of the answers: `packed`, whose tokens are `tokens`."""
        rest = (self.advantage, self.old, self.ref, self.value, self.returns, self.masked)
        return TrainGroup(packed, self.engine[tokens], *(None if vector is None else vector[tokens] for vector in rest))


PolicyLoss = Callable[..., LossOut]


def split_group(group: TrainGroup, budget: int) -> list[TrainGroup]:
    """The group, cut by answers into parts that fit the token budget where the whole does not."""
    cuts = split(group.packed, budget)
    if len(cuts) == 1:
        return [group]
    ends = list(accumulate(packed.answer_tokens for packed in cuts))
    return [group.part(packed, slice(end - packed.answer_tokens, end)) for packed, end in zip(cuts, ends, strict=True)]


def policy_targets(groups: Sequence[TrainGroup], logp_M: Tensor) -> PolicyTargets:
    """Targets of one micro-batch. Without an old-policy pass the current log-probs are the old ones."""

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat([v for v in values if v is not None]).to(logp_M)

    engine_M, advantage_M = joined([group.engine for group in groups]), joined([group.advantage for group in groups])
    assert engine_M is not None
    assert advantage_M is not None
    masks = [group.masked for group in groups if group.masked is not None]
    old_M = joined([group.old for group in groups])
    return PolicyTargets(
        old_M=logp_M.detach() if old_M is None else old_M,
        engine_M=engine_M,
        advantage_M=advantage_M,
        ref_M=joined([group.ref for group in groups]),
        masked_M=torch.cat(masks).to(logp_M.device) if masks else None,
    )


def mismatch(targets: PolicyTargets) -> dict[str, tuple[float, float]]:
    """How far the sampler's log-probs are from the trainer's, for the same weights: absolute differences, and
    KL(engine || trainer) by the estimators k1 and k3 of Schulman (2020), nats per token; and the share of tokens whose
    ratio is beyond 2 or 1/2, which `algorithm.correction` would cut by its default."""
    difference = (targets.old_M - targets.engine_M).abs()
    tokens = float(len(difference))
    return {
        "engine/kl_k1": (kl(targets.engine_M, targets.old_M, "k1").sum().item(), tokens),
        "engine/kl_k3": (kl(targets.engine_M, targets.old_M, "k3").sum().item(), tokens),
        "engine/logprob_difference": (difference.sum().item(), tokens),
        "engine/logprob_difference_max": (difference.max().item(), tokens),
        "engine/ratio_beyond_2": ((difference > math.log(2)).sum().item(), tokens),
    }
