"""Preference losses: pure functions of the log-probs of pairs of answers to the same prompt.

The samples of a batch alternate: chosen, rejected. With the reward of an answer y, r(y) = beta (log pi(y) - log
ref(y)), log-probs summed over the tokens of y, each term is a mean over the pairs:

- dpo: -log sigmoid(r(chosen) - r(rejected))  (arXiv 2305.18290, eq. 7)
- ipo: (m - 1 / (2 beta))^2, where m is the difference of the log ratios *per token*  (arXiv 2310.12036, eq. 17; the
  average over tokens, which keeps long answers from dominating, is the form that its authors confirmed for TRL)
- bco: -log sigmoid(r(chosen) - shift) - log sigmoid(-(r(rejected) - shift))  (arXiv 2404.04656, in the paired form of
  MPO); the shift is the mean of the rewards of all steps before
- sft: minus the mean log-prob of the chosen answers' tokens; needs no reference
- mpo: preference * dpo + quality * bco + generation * L_g  (arXiv 2411.10442, section 3; 0.8, 0.2 and 1). Its
  generation term L_g is -log pi(chosen) / |chosen|, a mean over tokens and then over pairs, as in the paper and in the
  released trainer, whose batches hold one pair; `generation_mean="token"` is the mean over all tokens, as in sft

`totals` counts the whole optimizer step: `groups` are pairs, `tokens` those of the chosen answers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.algorithms.aggregate import sum_by_sample
from foveate.algorithms.targets import LossOut, PairTargets, Totals
from foveate.errors import require
from foveate.records import Batch


@dataclass(frozen=True, slots=True)
class _Term:
    """A term of a loss: its weight, its sum over the pairs or tokens of this micro-batch, and over what it is a mean:
    the pairs of the step, or the tokens of their chosen answers."""

    weight: float
    sum: Tensor
    over: Literal["pairs", "tokens"] = "pairs"


_Terms = dict[str, _Term]


def dpo(logp_M: Tensor, batch: Batch, targets: PairTargets, totals: Totals, *, beta: float = 0.1) -> LossOut:
    """Direct preference optimisation with the sigmoid loss."""
    pairs = _pairs(logp_M, batch, targets, beta)
    return _combine({"dpo": _Term(1.0, _dpo(pairs).sum())}, pairs, totals)


def ipo(logp_M: Tensor, batch: Batch, targets: PairTargets, totals: Totals, *, beta: float = 0.1) -> LossOut:
    """Identity preference optimisation, with log ratios per token."""
    pairs = _pairs(logp_M, batch, targets, beta)
    chosen_P, rejected_P = _split(pairs.reward_S / beta / pairs.length_S)
    return _combine({"ipo": _Term(1.0, (chosen_P - rejected_P - 1 / (2 * beta)).square().sum())}, pairs, totals)


def bco(logp_M: Tensor, batch: Batch, targets: PairTargets, totals: Totals, *, beta: float = 0.1) -> LossOut:
    """Binary classifier optimisation: each answer against the shift by itself."""
    pairs = _pairs(logp_M, batch, targets, beta)
    return _combine({"bco": _Term(1.0, _bco(pairs, targets.shift).sum())}, pairs, totals)


def sft(logp_M: Tensor, batch: Batch, targets: PairTargets, totals: Totals) -> LossOut:
    """Imitate the chosen answers."""
    pairs = _pairs(logp_M, batch, targets, 1.0, needs_reference=False)
    return _combine({"sft": _Term(1.0, -pairs.chosen_logp_P.sum(), "tokens")}, pairs, totals)


def mpo(
    logp_M: Tensor,
    batch: Batch,
    targets: PairTargets,
    totals: Totals,
    *,
    beta: float = 0.1,
    preference: float = 0.8,
    quality: float = 0.2,
    generation: float = 1.0,
    generation_mean: Literal["pair", "token"] = "pair",
) -> LossOut:
    """Mixed preference optimisation: which answer is better, whether each is good, and how to write the better one."""
    weights = {"preference": preference, "quality": quality, "generation": generation}
    for name, weight in weights.items():
        require(weight >= 0, f"setting {name}: is {weight}, a weight must be at least 0")
    require(
        any(weights.values()), "settings preference, quality, generation: all are 0, so there is nothing to train on"
    )
    pairs = _pairs(logp_M, batch, targets, beta)
    if generation_mean == "pair":
        chosen_length_P, _ = _split(pairs.length_S)
        imitate = _Term(generation, -(pairs.chosen_logp_P / chosen_length_P).sum())
    else:
        imitate = _Term(generation, -pairs.chosen_logp_P.sum(), "tokens")
    terms: _Terms = {
        "dpo": _Term(preference, _dpo(pairs).sum()),
        "bco": _Term(quality, _bco(pairs, targets.shift).sum()),
        "sft": imitate,
    }
    return _combine(terms, pairs, totals)


@dataclass(slots=True)
class RewardShift:
    """BCO's shift: the mean of the rewards of both answers of all pairs so far, over all ranks.

    It moves between steps only, so that it is the same for every micro-batch and rank of a step.
    """

    mean: float = 0.0
    count: int = 0

    def add(self, chosen: float, rejected: float, pairs: int) -> None:
        """Count in a step with these mean rewards of its `pairs` pairs."""
        self.count += 2 * pairs
        self.mean += ((chosen + rejected) / 2 - self.mean) * 2 * pairs / self.count

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]


# ------------------------------------------------------------------------------------------------------- the terms


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Input of all terms: lengths and rewards of the answers, (S,), the rewards meaningless without a reference; and
    the log-probs of the chosen and of the rejected answers, (P,)."""

    length_S: Tensor
    reward_S: Tensor
    has_reference: bool
    chosen_logp_P: Tensor
    rejected_logp_P: Tensor


def _pairs(logp_M: Tensor, batch: Batch, targets: PairTargets, beta: float, *, needs_reference: bool = True) -> _Pairs:
    require(beta > 0, f"setting beta: is {beta}, must be above 0")
    require(targets.ref_S is not None or not needs_reference, "this preference loss needs the log-probs of a reference")
    length_S = sum_by_sample(torch.ones_like(logp_M), batch.sample_M, batch.samples)
    logp_S = sum_by_sample(logp_M.double(), batch.sample_M, batch.samples)
    chosen_P, rejected_P = _split(logp_S)
    reward_S = logp_S if targets.ref_S is None else beta * (logp_S - targets.ref_S)
    return _Pairs(length_S, reward_S, targets.ref_S is not None, chosen_P, rejected_P.detach())


def _split(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) as chosen (P,) and rejected (P,)."""
    chosen_P, rejected_P = values_S.view(-1, 2).unbind(1)
    return chosen_P, rejected_P


def _dpo(pairs: _Pairs) -> Tensor:
    chosen_P, rejected_P = _split(pairs.reward_S)
    return -F.logsigmoid(chosen_P - rejected_P)


def _bco(pairs: _Pairs, shift: float) -> Tensor:
    chosen_P, rejected_P = _split(pairs.reward_S)
    return -F.logsigmoid(chosen_P - shift) - F.logsigmoid(shift - rejected_P)


def _combine(terms: _Terms, pairs: _Pairs, totals: Totals) -> LossOut:
    """The weighted sum of the terms, each a mean over the whole step, with metrics.

    Metrics: loss (its reduction over the step is that of the whole step), loss/NAME for each term, logp/chosen and
    logp/rejected per token; and with a reference, means over pairs: reward/chosen, reward/rejected, reward/margin, and
    reward/preferred, the share of pairs whose chosen answer has the larger reward.
    """
    chosen_length_P, rejected_length_P = _split(pairs.length_S)
    own = {"pairs": float(len(chosen_length_P)), "tokens": float(chosen_length_P.sum())}
    whole = {"pairs": totals.groups, "tokens": totals.tokens}
    count = own["pairs"]
    loss = torch.stack([term.weight * term.sum / whole[term.over] for term in terms.values()]).sum()
    values = {
        "loss/total": (loss, count / totals.groups),
        **{f"loss/{name}": (term.sum, own[term.over]) for name, term in terms.items()},
        "loss/logp_chosen": (pairs.chosen_logp_P.sum(), own["tokens"]),
        "loss/logp_rejected": (pairs.rejected_logp_P.sum(), float(rejected_length_P.sum())),
    }
    if pairs.has_reference:
        chosen_P, rejected_P = _split(pairs.reward_S.detach())
        values |= {
            "reward/chosen": (chosen_P.sum(), count),
            "reward/rejected": (rejected_P.sum(), count),
            "reward/margin": ((chosen_P - rejected_P).sum(), count),
            "reward/preferred": ((chosen_P > rejected_P).sum(), count),
        }
    return LossOut(loss, values)
