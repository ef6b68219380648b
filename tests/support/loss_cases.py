"""Packed batches for the tests of losses: from padded reference numbers, and at random."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.algorithms.policy_losses import (
    cispo,
    clip_cov,
    dppo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    kl_cov,
    reinforce,
    sapo,
)
from foveate.algorithms.targets import LossOut, PolicyTargets, Totals
from foveate.records import Batch, Forest

LOSSES = (grpo, gspo, gspo_token, reinforce, cispo, sapo, gmpo, dppo, clip_cov, kl_cov)


def read_reference(name: str) -> Any:
    return json.loads(gzip.decompress((Path(__file__).parent.parent / "data" / f"{name}.json.gz").read_bytes()))


def double(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def make_batch(sample_M: Tensor, samples: int) -> Batch:
    """A batch of which only the fields that a loss reads are filled."""
    empty = torch.empty(0, dtype=torch.long)
    return Batch(empty, empty, Forest((), (), ()), None, empty, empty, empty, sample_M, samples)


def pack(mask: Tensor) -> Batch:
    """The packed form of answers padded to one length, `mask` (S, length)."""
    return make_batch(mask.bool().nonzero()[:, 0], len(mask))


def value_and_gradient(
    loss: Callable[..., LossOut],
    logp_M: Tensor,
    batch: Batch,
    targets: PolicyTargets,
    totals: Totals,
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    leaf_M = logp_M.clone().requires_grad_()
    out = loss(leaf_M, -leaf_M, batch, targets, totals, **settings)
    (gradient_M,) = torch.autograd.grad(out.loss, leaf_M)
    return out.loss.detach(), gradient_M


def random_case(seed: int, drift: float = 0.4) -> tuple[Tensor, Batch, PolicyTargets, Totals]:
    """Eight answers of 1 to 6 tokens in two groups, with log-probs of four policies and an advantage per answer."""
    generator = torch.Generator().manual_seed(seed)
    sample_M = torch.repeat_interleave(torch.arange(8), torch.randint(1, 7, (8,), generator=generator))

    def noise(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    old_M = -noise(len(sample_M)).abs() - 0.5
    logp_M, engine_M, ref_M = (old_M + drift * noise(len(sample_M)) for _ in range(3))
    targets = PolicyTargets(old_M, engine_M, noise(8)[sample_M], ref_M, noise(len(sample_M)) > 0.5)
    return logp_M, make_batch(sample_M, 8), targets, Totals(tokens=len(sample_M), samples=8, groups=2)


def take_answers(
    answers: list[int], values_M: Tensor, batch: Batch, targets: PolicyTargets
) -> tuple[Tensor, Batch, PolicyTargets, Tensor]:
    """The micro-batch of these answers in this order; the last item says where its tokens stood."""
    index_M = torch.cat([(batch.sample_M == answer).nonzero()[:, 0] for answer in answers])
    lengths = [int((batch.sample_M == answer).sum()) for answer in answers]
    sample_M = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(lengths))
    assert targets.ref_M is not None
    assert targets.masked_M is not None
    part = PolicyTargets(
        targets.old_M[index_M],
        targets.engine_M[index_M],
        targets.advantage_M[index_M],
        targets.ref_M[index_M],
        targets.masked_M[index_M],
    )
    return values_M[index_M], make_batch(sample_M, len(answers)), part, index_M
