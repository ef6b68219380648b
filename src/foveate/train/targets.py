"""Groups as an update eats them, and the tensors that a policy loss compares with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from foveate.algorithms.kl import kl
from foveate.algorithms.targets import LossOut, PolicyTargets
from foveate.parallel.packing import split_answers
from foveate.records import PackedGroup

PolicyLoss = Callable[..., LossOut]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A group as an update of the policy eats it, with a vector (M,) each over the trained tokens of its answers.

    engine: log-probs as sampled; old: under the weights before the step (None: the current ones are those); ref: under
    the frozen reference (None: there is none); masked: bool, the tokens that the loss treats apart (None: there are
    none). teacher: the path of the one that the loss compares with, or None. engine_is_old: `old` are those as
    sampled.
    """

    group: PackedGroup
    engine: Tensor
    advantage: Tensor
    old: Tensor | None
    ref: Tensor | None
    masked: Tensor | None
    teacher: str | None = None
    engine_is_old: bool = False

    def part(self, answers: slice, tokens: slice) -> PolicyRow:
        """The row of some of the answers, whose trained tokens are `tokens`."""
        vectors = (self.engine, self.advantage, self.old, self.ref, self.masked)
        own: Any = [None if one is None else one[tokens] for one in vectors]
        return PolicyRow(_part(self.group, answers), *own, teacher=self.teacher, engine_is_old=self.engine_is_old)


@dataclass(frozen=True, slots=True)
class ValueRow:
    """A group as an update of the critic eats it: what it expected before each trained token, and what came, both
    (M,)."""

    group: PackedGroup
    value: Tensor
    returns: Tensor

    def part(self, answers: slice, tokens: slice) -> ValueRow:
        """The row of some of the answers, whose trained tokens are `tokens`."""
        return ValueRow(_part(self.group, answers), self.value[tokens], self.returns[tokens])


MISMATCH = (
    "engine/kl_k1", "engine/kl_k3", "engine/logprob_difference", "engine/logprob_difference_max",
    "engine/ratio_beyond_2",
)  # fmt: skip
"""What `mismatch` measures."""

Row = TypeVar("Row", PolicyRow, ValueRow)


def split_group(row: Row, budget: int) -> list[Row]:
    """The row of a group, by answers in parts that fit the token budget where the whole does not."""
    parts = split_answers(row.group, budget)
    if len(parts) == 1:
        return [row]
    ends = list(accumulate(row.group.lengths, initial=0))
    return [row.part(answers, slice(ends[answers.start], ends[answers.stop])) for answers in parts]


def _part(group: PackedGroup, answers: slice) -> PackedGroup:
    return PackedGroup(group.prompt, group.answers[answers])


def policy_targets(rows: Sequence[PolicyRow], logp_M: Tensor, divergence_M: Tensor | None = None) -> PolicyTargets:
    """Targets of one micro-batch, with the divergence to its teacher where there is one. Without an old-policy pass the
    current log-probs are the old ones."""
    old_M = _joined([row.old for row in rows], logp_M)
    masked_M = [row.masked for row in rows if row.masked is not None]
    return PolicyTargets(
        old_M=logp_M.detach() if old_M is None else old_M,
        engine_M=torch.cat([row.engine for row in rows]).to(logp_M),
        advantage_M=torch.cat([row.advantage for row in rows]).to(logp_M),
        ref_M=_joined([row.ref for row in rows], logp_M),
        masked_M=torch.cat(masked_M).to(logp_M.device) if masked_M else None,
        divergence_M=divergence_M,
    )


def _joined(vectors: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """All vectors as one, or None where there are none."""
    found = [vector for vector in vectors if vector is not None]
    return torch.cat(found).to(like) if found else None


def mismatch(targets: PolicyTargets, logp_M: Tensor, row: PolicyRow) -> dict[str, tuple[Tensor, float]]:
    """How far the sampler's log-probs are from the trainer's, for the same weights: from the old ones or, where these
    are the sampler's in rows such as `row`, from the current ones (M,). Absolute differences, and KL(engine || trainer)
    by the estimators k1 and k3 of Schulman (2020), nats per token; and the share of tokens whose ratio is beyond 2 or
    1/2, which `algorithm.correction` would truncate by its default."""
    trainer_M = logp_M.detach() if row.engine_is_old else targets.old_M
    difference = (trainer_M - targets.engine_M).abs()
    tokens = float(len(difference))
    found = (
        kl(targets.engine_M, trainer_M, "k1").sum(),
        kl(targets.engine_M, trainer_M, "k3").sum(),
        difference.sum(),
        difference.max(),
        (difference > math.log(2)).sum(),
    )
    return {name: (value, tokens) for name, value in zip(MISMATCH, found, strict=True)}
