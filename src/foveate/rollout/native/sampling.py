"""Logits -> sampled tokens and their log-probs, for a batch of rows at once and without a generator of its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from foveate.errors import EngineError
from foveate.models.logprobs import logits_of
from foveate.records import SamplingParams

_BELOW_ONE = 1 - 2.0**-50
"""The largest uniform that is used: u * total stays below the total of a float64 sum, whatever the rounding."""
_BLOCK = 256
"""Tokens whose probabilities are summed before they are looked at one by one."""
_FEW = 4096
"""Tokens that are looked at one by one at once."""
_LEFT = 1e-4
"""The share of the probability below which allowed tokens are too small beside banned ones."""
_NUCLEUS = 256
"""Tokens that are sorted at first for top-p; the whole vocabulary only where these hold too little probability."""
_HELD, _CACHED = 1 << 24, 1 << 20
"""Logits held at a time, rows x vocabulary (2**24 float32 values are 64 MB), and those that a processor draws from at a
time: so many stay in its caches."""


class Logits(threading.local):
    """The logits of a batch, some rows at a time. On a processor they lie in memory that each thread keeps from step to
    step: the system would clear new pages for each."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:
        """Those of hidden states (B, D) by the head (V, D): (B', V) of the next B' rows, until the next are asked
        for."""
        rows = max(1, _HELD // len(weight))
        if hidden.device.type != "cpu":
            yield from (logits_of(some, weight) for some in hidden.split(rows))
            return
        for some in hidden.split(rows):
            logits = logits_of(some, weight, self._room(len(some), weight))
            yield from logits.split(max(1, _CACHED // len(weight)))

    def _room(self, rows: int, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self._memory.numel() < rows * len(weight) or self._memory.dtype != dtype:
            self._memory = torch.empty(rows * len(weight), dtype=dtype)
        return self._memory[: rows * len(weight)].view(rows, len(weight))


def uniforms(seed: int, answer: int, count: int) -> Tensor:
    """The uniform numbers in [0, 1) that draw the tokens of one answer, float64 (count,).

    Number t depends on (seed, answer, t) alone: a longer sequence begins with the shorter one. `seed` is not negative.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(answer,))))
    return torch.from_numpy(np.minimum(generator.random(count), _BELOW_ONE))


def draw(
    logits: Tensor, uniform: Tensor, sampling: SamplingParams, banned: Tensor, known: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the row's uniform number.

    logits float32 (B, V), uniform float64 (B,), banned ids int64 (K,) among the first `known` (None: V), behind which
    all are banned; returns token ids int64 (B,) and log-probs float32 (B,). Logits are divided by the temperature,
    banned tokens leave, top-k keeps the k most probable of the rest, top-p the smallest set of the most probable that
    holds at least that share of what top-k left. Temperature 0 takes the most probable allowed token.

    The log-prob is that of the token under softmax(logits / temperature) over the whole vocabulary, at temperature 1
    where sampling is greedy: what a trainer computes, which knows no bans and no truncation. The trap: with top-k or
    top-p, or where banned tokens hold probability, the draw came from the narrower distribution, under which the token
    is more probable than reported. The ratio of trainer to engine stays 1 all the same, which is what the corrections
    for a stale or mismatched engine measure.
    """
    greedy = sampling.temperature == 0
    scaled = logits if greedy or sampling.temperature == 1 else logits / sampling.temperature
    if greedy:
        token = scaled[:, :known].index_fill(1, banned, float("-inf")).argmax(-1)
        return token, _logprob(scaled, token)
    probs = scaled.softmax(-1)
    allowed = _allowed(probs, banned, known)
    if allowed is None:
        allowed = scaled[:, :known].index_fill(1, banned, float("-inf")).softmax(-1)
        require_numbers(allowed[:, 0].tolist())  # NaN where no token is allowed that has a probability
        token = _invert(allowed, uniform, sampling.top_k, sampling.top_p)
        return token, _logprob(scaled, token)
    token = _invert(allowed, uniform, sampling.top_k, sampling.top_p)
    return token, probs.gather(1, token[:, None])[:, 0].log()


def _logprob(scaled: Tensor, token: Tensor) -> Tensor:
    return scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)


def _allowed(probs: Tensor, banned: Tensor, known: int | None) -> Tensor | None:
    """The probabilities (B, known), those of banned tokens set to 0; None where the others are too small beside these.
    Raises EngineError where a row is NaN."""
    outside = 0.0 if known is None else probs[:, known:].sum(-1)
    probs = probs[:, :known]
    lost = probs[:, banned].sum(-1) + outside + 0 * probs[:, 0]  # which is NaN in all of a row or nowhere
    if not bool((lost <= 1 - _LEFT).all()):
        require_numbers(lost.tolist())
        return None
    return probs.index_fill_(1, banned, 0.0)


def require_numbers(values: Iterable[float]) -> None:
    """Raise EngineError if any of some probabilities or log-probs is NaN."""
    if any(map(math.isnan, values)):
        raise EngineError(
            "the model computes probabilities that are not finite (NaN): its numbers are too large for its dtype, or "
            "its weights are damaged; try float32 or bfloat16"
        )


def _invert(probs: Tensor, uniform: Tensor, top_k: int, top_p: float) -> Tensor:
    """The token at which the cumulative sum of the filtered probabilities (B, V) first exceeds u times their total."""
    ids = None
    if 0 < top_k < probs.shape[1]:
        probs, ids = probs.topk(top_k)
    if top_p < 1:
        probs, order = _nucleus(probs, top_p)
        ids = order if ids is None else ids.gather(1, order)
    place = _first_to_exceed(probs, uniform)
    return place if ids is None else ids.gather(1, place[:, None])[:, 0]


def _first_to_exceed(probs: Tensor, uniform: Tensor) -> Tensor:
    """The place at which the cumulative sum of probabilities (B, V) first exceeds u times their total, in one pass over
    them: the sums of blocks say in which block it is.

    A token of probability 0 leaves the cumulative sum as it is and is therefore never the first to exceed anything.
    """
    width = probs.shape[1]
    if width <= _FEW:
        return _search(probs, uniform * probs.sum(-1, dtype=torch.float64))[0][:, 0]
    whole = width - width % _BLOCK
    blocks = probs[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < width:
        blocks = torch.cat([blocks, probs[:, whole:].sum(-1, keepdim=True)], 1)
    block, before = _search(blocks, uniform * blocks.sum(-1, dtype=torch.float64))
    places = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    own = probs.gather(1, places.clamp(max=width - 1)) * (places < width)
    place, _ = _search(own, before)
    return (block * _BLOCK + place)[:, 0]


def _search(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of values (B, n) first exceeds a target (B,), or, where rounding has it exceed nothing,
    where it reaches its total: (B, 1); and what is left of the target there (B,)."""
    cumulative = values.cumsum(-1, dtype=torch.float64)
    target = torch.minimum(target, cumulative[:, -1] * _BELOW_ONE)
    place = torch.searchsorted(cumulative, target[:, None], right=True)
    before = cumulative.gather(1, place) - values.gather(1, place)
    return place, (target - before[:, 0]).clamp(min=0)


def _nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens in falling order, (B, K) with K <= V, those outside the nucleus at 0; and their ids.

    A token is inside while the tokens before it hold less than `top_p` of the row's total."""
    mass = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    ranked, order = probs.topk(min(_NUCLEUS, probs.shape[1]))
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    if ranked.shape[1] < probs.shape[1] and bool((before[:, -1:] + ranked[:, -1:] < mass).any()):
        ranked, order = probs.sort(-1, descending=True)
        before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    inside = before < mass
    inside[:, 0] = True
    return ranked * inside, order
