"""Inputs of a loss beside log-probs, and its result. Like `foveate.records`, without torch at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyTargets:
    """The inputs of a policy loss besides the current log-probs: float tensors over the M trained tokens.

    old_M: log-probs under the weights before the update; engine_M: as the sampler reported them; ref_M: under the
    frozen reference, or None; advantage_M: the advantage of each token (constant within an answer for group methods);
    masked_M: bool, the tokens that a loss treats apart (clip-cov, kl-cov), or None; divergence_M: how far the policy is
    from a teacher, differentiable (`models.logprobs.Divergence`), or None."""

    old_M: Tensor
    engine_M: Tensor
    advantage_M: Tensor
    ref_M: Tensor | None = None
    masked_M: Tensor | None = None
    divergence_M: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PairTargets:
    """The inputs of a preference loss besides the current log-probs. The samples of its batch are pairs: chosen,
    rejected, chosen, rejected, ...
    ref_S: log-probs of whole answers (sums over their tokens) under the frozen reference, float64 (S,), or None for a
    loss that needs none; shift: BCO's reward shift."""

    ref_S: Tensor | None
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Totals:
    """The denominators of a loss: counts over the whole optimizer step, over all micro-batches and ranks."""

    tokens: int
    samples: int
    groups: int


@dataclass(frozen=True, slots=True)
class LossOut:
    """A scalar to differentiate, and sums for the metrics: name -> (scalar tensor or float, weight). Whoever asked
    fetches them from the device, all at once."""

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor | float, float]]
