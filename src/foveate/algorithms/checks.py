"""Checks of an advantage, or of a loss with its settings, before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.algorithms.targets import LossOut, PairTargets, PolicyTargets, Totals
from foveate.errors import require
from foveate.records import Batch, Forest

ADVANTAGE_INPUTS = ("rewards_S", "group_S", "source_S", "length_S", "baseline_S", "reward_M", "value_M", "sample_M")
"""reward_M, value_M and sample_M are per token, as in `values.gae`, whose result is per token too."""


def advantage_inputs(advantage: Callable[..., Tensor]) -> tuple[str, ...]:
    """Names of the tensors that an advantage function takes, in the order of its positional parameters.

    A caller passes these and the settings: `advantage(*(available[name] for name in names), **settings)`. A function
    that names "baseline_S" needs a greedy answer per prompt. Raises DataError for an unknown name.
    """
    parameters = inspect.signature(advantage).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)
    for name in names:
        require(
            name in ADVANTAGE_INPUTS,
            f"advantage function {advantage.__module__}:{advantage.__qualname__}: positional parameter {name!r} is not"
            f" one of {', '.join(ADVANTAGE_INPUTS)}; make it keyword-only if it is a setting",
        )
    return names


def dry_run(loss: Callable[..., LossOut], settings: Mapping[str, Any], *, reference: bool) -> None:
    """Call a policy loss once on two made-up answers, so that settings it refuses are refused at start-up.

    `reference` says whether reference log-probs will be there. Raises what the loss raises, and DataError when the
    loss is not one finite number.
    """
    _require_finite("policy loss", loss, _tried(loss, settings, reference=reference)[0])


def reads_old(loss: Callable[..., LossOut], *, reference: bool) -> bool:
    """Whether a policy loss looks at the old log-probs: others give another loss or gradient, or are refused."""
    with suppress(Exception):  # whatever a loss of one's own makes of them
        tried = [_tried(loss, {}, reference=reference, apart=apart) for apart in (0.0, 0.05, -0.5, 0.5, -3.0, 3.0)]
        found = [(out.loss.detach(), torch.autograd.grad(out.loss, logp_M)[0]) for out, logp_M in tried]
        return any(not torch.equal(one, first) for own in found for one, first in zip(own, found[0], strict=True))
    return True


def _tried(
    loss: Callable[..., LossOut], settings: Mapping[str, Any], *, reference: bool, apart: float = 0.0
) -> tuple[LossOut, Tensor]:
    """A policy loss on log-probs, and these; the old ones are so far `apart` from them."""
    logp_M = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    known_M, marked_M = logp_M.detach(), torch.tensor([True, False, False])
    targets = PolicyTargets(
        known_M + apart, known_M, torch.tensor([1.0, 1.0, -1.0]), known_M if reference else None, marked_M
    )
    totals = Totals(tokens=3, samples=2, groups=1)
    return loss(logp_M, -logp_M, _two_answers(), targets, totals, **settings), logp_M


def dry_run_pairs(loss: Callable[..., LossOut], settings: Mapping[str, Any], *, reference: bool) -> None:
    """The same for a preference loss, whose two answers are one pair."""
    logp_M = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    ref_S = torch.tensor([-1.4, -1.9], dtype=torch.float64) if reference else None
    out = loss(logp_M, _two_answers(), PairTargets(ref_S), Totals(tokens=2, samples=2, groups=1), **settings)
    _require_finite("preference loss", loss, out)


def _two_answers() -> Batch:
    """Answers of two tokens and of one."""
    index_M = torch.arange(3)
    forest, sample_M = Forest((0,), (3,), (-1,)), torch.tensor([0, 0, 1])
    return Batch(index_M, index_M, forest, None, index_M[:0], index_M, index_M, sample_M, 2)


def _require_finite(kind: str, loss: Callable[..., LossOut], out: LossOut) -> None:
    inner = loss.func if isinstance(loss, partial) else loss
    require(
        out.loss.ndim == 0 and bool(torch.isfinite(out.loss)),
        f"{kind} {inner.__module__}:{inner.__qualname__}: returned {out.loss.tolist()} on two ordinary answers; it "
        "must be one finite number",
    )
