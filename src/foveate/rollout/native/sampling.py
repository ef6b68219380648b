"""Logits -> sampled tokens and their log-probs, for a batch of rows at once and without a generator of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.records import SamplingParams

_BELOW_ONE = 1 - 2.0**-50
"""The largest uniform that is used: u * total stays below the total of a float64 sum, whatever the rounding."""
_NUCLEUS = 256
"""Tokens that are sorted at first for top-p; the whole vocabulary only where these hold too little probability."""


def uniforms(seed: int, answer: int, count: int) -> Tensor:
    """The uniform numbers in [0, 1) that draw the tokens of one answer, float64 (count,).

    Number t depends on (seed, answer, t) alone: a longer sequence begins with the shorter one. `seed` is not negative.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(answer,))))
    return torch.from_numpy(np.minimum(generator.random(count), _BELOW_ONE))


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingParams, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the row's uniform number.

    logits float32 (B, V), uniform float64 (B,), banned bool (V,); returns token ids int64 (B,) and log-probs float32
    (B,). Logits are divided by the temperature, banned tokens leave, top-k keeps the k most probable of the rest, top-p
    the smallest set of the most probable that holds at least that share of what top-k left. Temperature 0 takes the
    most probable allowed token.

    The log-prob is that of the token under softmax(logits / temperature) over the whole vocabulary, at temperature 1
    where sampling is greedy: what a trainer computes, which knows no bans and no truncation. The trap: with top-k or
    top-p, or where banned tokens hold probability, the draw came from the narrower distribution, under which the token
    is more probable than reported. The ratio of trainer to engine stays 1 all the same, which is what the corrections
    for a stale or mismatched engine measure.
    """
    greedy = sampling.temperature == 0
    scaled = logits if greedy or sampling.temperature == 1 else logits / sampling.temperature
    allowed = scaled.masked_fill(banned, float("-inf"))
    token = allowed.argmax(-1) if greedy else _invert(allowed.softmax(-1), uniform, sampling.top_k, sampling.top_p)
    return token, scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)


def _invert(probs: Tensor, uniform: Tensor, top_k: int, top_p: float) -> Tensor:
    """The token at which the cumulative sum of the filtered probabilities (B, V) first exceeds u times their total.

    A token of probability 0 leaves the cumulative sum as it is and is therefore never the first to exceed anything.
    """
    ids = None
    if 0 < top_k < probs.shape[1]:
        probs, ids = probs.topk(top_k)
    if top_p < 1:
        probs, order = _nucleus(probs, top_p)
        ids = order if ids is None else ids.gather(1, order)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform * cumulative[:, -1]
    place = torch.searchsorted(cumulative, target[:, None], right=True)
    return (place if ids is None else ids.gather(1, place))[:, 0]


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
