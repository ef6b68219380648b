"""Advantages from the values of a critic, and its loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.algorithms.targets import LossOut, Totals


def gae(
    reward_M: Tensor,
    value_M: Tensor,
    sample_M: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    normalise: Literal["whiten", "none"] = "whiten",
    eps: float = 1e-8,
) -> Tensor:
    """Generalised advantage estimation: A_t = sum_k (gamma lam)^k d_{t+k} with d_t = r_t + gamma v_{t+1} - v_t.

    reward_M: the reward of each token (an answer's score stands on its last); value_M: what the critic expects before
    the token; sample_M: the answer of each token, ordered. An answer ends with its last token, also where it was
    truncated. "whiten" makes mean 0 and variance 1 over all tokens (divisor tokens - 1, plus eps). Returns (M,) in the
    dtype of reward_M; the arithmetic is float64. Source: arXiv 1506.02438.
    """
    lengths = torch.bincount(sample_M).tolist()
    reward_SL, value_SL = (pad_sequence(list(v.double().split(lengths)), batch_first=True) for v in (reward_M, value_M))
    present_SL = pad_sequence([torch.ones(n, dtype=torch.bool) for n in lengths], batch_first=True)
    advantage_SL = torch.zeros_like(reward_SL)
    value_next = advantage_next = torch.zeros_like(reward_SL[:, 0])
    for t in reversed(range(reward_SL.shape[1])):  # behind its end an answer has reward 0 and value 0
        advantage_next = reward_SL[:, t] + gamma * value_next - value_SL[:, t] + gamma * lam * advantage_next
        value_next = value_SL[:, t]
        advantage_SL[:, t] = advantage_next
    advantage_M = advantage_SL[present_SL]
    if normalise == "whiten":
        variance = advantage_M.var() if len(advantage_M) > 1 else advantage_M.new_zeros(())
        advantage_M = (advantage_M - advantage_M.mean()) * (variance + eps).rsqrt()
    return advantage_M.to(reward_M.dtype)


def value_loss(value_M: Tensor, old_M: Tensor, return_M: Tensor, totals: Totals, clip: float | None) -> LossOut:
    """Half the squared distance to the return, mean over tokens. With `clip` a value that moved further than that from
    `old_M`, the value before the step, counts as moved by it where that is worse: PPO's clipped value loss.

    Metrics, means over tokens: critic/loss, critic/error (absolute distance), critic/value, critic/return.
    """
    loss_M = (value_M - return_M).square()
    if clip is not None:
        near_M = old_M + (value_M - old_M).clamp(-clip, clip)
        loss_M = torch.maximum(loss_M, (near_M - return_M).square())
    loss = 0.5 * loss_M.sum() / totals.tokens
    tokens = float(len(value_M))
    values = {
        "critic/loss": (loss, tokens / totals.tokens),
        "critic/error": ((value_M - return_M).abs().sum(), tokens),
        "critic/value": (value_M.sum(), tokens),
        "critic/return": (return_M.sum(), tokens),
    }
    return LossOut(loss, values)
