"""Per-token estimators of KL(policy || reference) from log-probs of sampled tokens.

Source: J. Schulman, "Approximating KL Divergence" (2020). With d = logp - ref: k1 = d is unbiased, but as a loss its
expected gradient is zero; k2 = d^2 / 2 is biased in value and has the right gradient; k3 = exp(-d) + d - 1 is unbiased,
never negative and of low variance; abs = |d|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, assert_never

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]

MAX_LOG_RATIO = 20.0  # beyond it a ratio carries no gradient, and exp stays finite in float32


def kl(logp_M: Tensor, ref_M: Tensor, estimator: KLEstimator) -> Tensor:
    """One estimate per token, in nats, differentiable with respect to both arguments.

    logp_M, ref_M: float (M,), log-probs of the same tokens under the policy and under the reference. Returns (M,).
    In k3 the log-ratio is clamped to +-20, beyond which it gives no gradient.
    """
    difference_M = logp_M - ref_M
    match estimator:
        case "k1":
            return difference_M
        case "k2":
            return 0.5 * difference_M.square()
        case "k3":
            log_ratio_M = (-difference_M).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return log_ratio_M.exp() - log_ratio_M - 1
        case "abs":
            return difference_M.abs()
        case _:
            assert_never(estimator)


_MAX_ERROR = 0.2  # of the target, beyond which the coefficient changes no faster


@dataclass(slots=True)
class KLPenalty:
    """A KL to the reference that is taken from the reward: reward_t - coefficient * kl_t.

    coefficient: its weight, which changes where there is a `target`, in nats per answer: after every step it grows by
    the factor 1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon. Source: Ziegler et al. 2019, arXiv 1909.08593.
    """

    coefficient: float
    estimator: KLEstimator = "k1"
    target: float | None = None
    horizon: float = 10_000.0

    def observe(self, divergence: float, answers: int) -> None:
        """Adapt the coefficient to the mean KL of `answers` answers, in nats per answer."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
            self.coefficient *= 1 + error * answers / self.horizon

    def state(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]
