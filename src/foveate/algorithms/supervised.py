"""Weights of supervised training: what a token of an answer of n tokens counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.algorithms.aggregate import sum_by_sample
from foveate.records import Batch, PackedGroup

_SFT_EXPONENT = {"token": 0.0, "sample": 1.0, "square": 0.5}


def sft_total(groups: Sequence[PackedGroup], weighting: str) -> float:
    """The sum of `sft_weights` over all trained tokens."""
    return math.fsum(n ** (1 - _SFT_EXPONENT[weighting]) for group in groups for n in group.lengths)


def sft_loss(groups: Sequence[PackedGroup], logps: Sequence[Tensor], weighting: str) -> tuple[float, float]:
    """The sum of the loss over all trained tokens, and of their weights, from the log-probs of each group."""
    exponent, loss = _SFT_EXPONENT[weighting], 0.0
    for group, logp_M in zip(groups, logps, strict=True):
        for n, own in zip(group.lengths, logp_M.double().split(group.lengths), strict=True):
            loss -= own.sum().item() * n**-exponent
    return loss, sft_total(groups, weighting)


def sft_weights(batch: Batch, weighting: str) -> Tensor:
    """Weight of each trained token in an answer of n tokens: 1 (token), 1/n (sample) or 1/n**0.5 (square averaging,
    InternVL3.5, arXiv 2508.18265, section 2)."""
    ones = torch.ones(len(batch.sample_M), device=batch.sample_M.device)
    lengths = sum_by_sample(ones, batch.sample_M, batch.samples)
    return lengths[batch.sample_M] ** -_SFT_EXPONENT[weighting]
