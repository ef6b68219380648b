"""The table of algorithms: a name, an advantage, a policy loss, and the settings that its authors vetted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ADVANTAGES: dict[str, str] = {
    "g2rpo": "foveate.algorithms.advantages:g2rpo",
    "gae": "foveate.algorithms.values:gae",
    "grpo": "foveate.algorithms.advantages:grpo",
    "grpo_passk": "foveate.algorithms.advantages:grpo_passk",
    "gpg": "foveate.algorithms.advantages:gpg",
    "lite_ppo": "foveate.algorithms.advantages:lite_ppo",
    "none": "foveate.algorithms.advantages:none",
    "opo": "foveate.algorithms.advantages:opo",
    "reinforce_plus_plus": "foveate.algorithms.advantages:reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "foveate.algorithms.advantages:reinforce_plus_plus_baseline",
    "remax": "foveate.algorithms.advantages:remax",
    "rloo": "foveate.algorithms.advantages:rloo",
}

POLICY_LOSSES: dict[str, str] = {
    "cispo": "foveate.algorithms.policy_losses:cispo",
    "clip_cov": "foveate.algorithms.policy_losses:clip_cov",
    "dppo": "foveate.algorithms.policy_losses:dppo",
    "gmpo": "foveate.algorithms.policy_losses:gmpo",
    "grpo": "foveate.algorithms.policy_losses:grpo",
    "gspo": "foveate.algorithms.policy_losses:gspo",
    "gspo_token": "foveate.algorithms.policy_losses:gspo_token",
    "kl_cov": "foveate.algorithms.policy_losses:kl_cov",
    "reinforce": "foveate.algorithms.policy_losses:reinforce",
    "sapo": "foveate.algorithms.policy_losses:sapo",
}

TOKEN_MASKS: dict[str, str] = {
    "clip_cov": "foveate.algorithms.covariance:clip_cov_tokens",
    "kl_cov": "foveate.algorithms.covariance:kl_cov_tokens",
}

TOKEN_FORMS: dict[str, str | None] = {"gspo": "gspo_token", "gmpo": None}
"""Losses whose ratio and advantage are those of a whole answer, and the loss that equals them and weighs each token by
itself, which a correction by token needs; None: there is none."""

PREFERENCE_LOSSES: dict[str, str] = {
    "bco": "foveate.algorithms.preference_losses:bco",
    "dpo": "foveate.algorithms.preference_losses:dpo",
    "ipo": "foveate.algorithms.preference_losses:ipo",
    "mpo": "foveate.algorithms.preference_losses:mpo",
    "sft": "foveate.algorithms.preference_losses:sft",
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A named algorithm: its advantage and its policy loss (names of the tables above, or import paths), the arXiv
    number of its paper, and the settings in which it differs from the defaults of both.

    token_mask: a function that marks the tokens which the loss treats apart; its settings are those of the loss that it
    names. resample_rounds: rounds of dynamic sampling, in which new groups replace those of equal rewards.
    needs_advantage: whether an answer contributes a gradient only where its advantage is not 0, so that groups of equal
    rewards need no pass; terms for KL and entropy are apart (`trains_without_advantage`).
    needs_teacher: whether nothing is learned without a teacher (`algorithm.teacher`).
    """

    advantage: str
    loss: str
    source: str
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    advantage_settings: Mapping[str, Any] = field(default_factory=dict)
    token_mask: str = ""
    resample_rounds: int = 0
    needs_advantage: bool = False
    needs_teacher: bool = False

    def trains_without_advantage(self, loss_settings: Mapping[str, Any]) -> bool:
        """Whether answers whose advantage is 0 contribute a gradient, under these settings of the loss."""
        terms = ("kl_coefficient", "entropy_coefficient")
        return not self.needs_advantage or any(loss_settings.get(name, 0.0) != 0 for name in terms)


def _ours(
    advantage: str, loss: str, source: str, aggregate: str, loss_settings: Mapping[str, Any] = {}, **rest: Any
) -> Algorithm:
    """A row with a loss of ours, which is proportional to the advantage unless it treats some tokens apart."""
    settings = {**loss_settings, "aggregate": aggregate}
    return Algorithm(advantage, loss, source, settings, needs_advantage="token_mask" not in rest, **rest)


_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4}
_PPO = {"clip_low": 0.2, "clip_high": 0.2}

ALGORITHMS: dict[str, Algorithm] = {
    "gspo": _ours("grpo", "gspo", "2507.18071", "seq-mean-token-mean", _GSPO),
    "gspo_token": _ours("grpo", "gspo_token", "2507.18071", "seq-mean-token-mean", _GSPO),
    "luspo": _ours("grpo", "gspo", "2602.05261", "seq-mean-token-sum", _GSPO),
    "grpo": _ours("grpo", "grpo", "2402.03300", "seq-mean-token-mean", _PPO),
    "dr_grpo": _ours(
        "grpo", "grpo", "2503.20783", "seq-mean-token-sum-norm", _PPO, advantage_settings={"normalise": "none"}
    ),
    "dapo": _ours(
        "grpo",
        "grpo",
        "2503.14476",
        "token-mean",
        {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0},
        resample_rounds=9,
    ),
    "cispo": _ours("grpo", "cispo", "2506.13585", "token-mean", {"clip_low": 1.0, "clip_high": 0.2}),
    "sapo": _ours("grpo", "sapo", "2511.20347", "seq-mean-token-mean", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "gmpo": _ours("grpo", "gmpo", "2507.20673", "seq-mean-token-mean", {"clip_low": 0.4, "clip_high": 0.4}),
    "dppo": _ours(
        "grpo", "dppo", "2602.04879", "token-mean", {"divergence": "tv", "limit_low": 0.2, "limit_high": 0.2}
    ),
    "clip_cov": _ours(
        "grpo",
        "clip_cov",
        "2505.22617",
        "token-mean",
        {"share": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
        token_mask="clip_cov",
    ),
    "kl_cov": _ours("grpo", "kl_cov", "2505.22617", "token-mean", {"share": 2e-4, "penalty": 1.0}, token_mask="kl_cov"),
    "ppo": _ours("gae", "grpo", "1707.06347", "token-mean", _PPO, advantage_settings={"gamma": 1.0, "lam": 0.95}),
    "distill": _ours("none", "grpo", "2306.13649", "token-mean", _PPO, needs_teacher=True),
    "grpo_passk": _ours("grpo_passk", "grpo", "2503.19595", "seq-mean-token-mean", _PPO),
    "lite_ppo": _ours("lite_ppo", "grpo", "2508.08221", "token-mean", _PPO),
    "g2rpo": _ours("g2rpo", "grpo", "2604.08539", "token-mean", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}),
    "rloo": _ours("rloo", "reinforce", "2402.14740", "seq-mean-token-sum"),
    "remax": _ours("remax", "reinforce", "2310.10505", "seq-mean-token-sum"),
    "opo": _ours("opo", "reinforce", "2505.23585", "token-mean"),
    "gpg": _ours("gpg", "reinforce", "2504.02546", "token-mean"),
    "reinforce_plus_plus": _ours("reinforce_plus_plus", "grpo", "2501.03262", "token-mean", _PPO),
    "reinforce_plus_plus_baseline": _ours("reinforce_plus_plus_baseline", "grpo", "2501.03262", "token-mean", _PPO),
}
