"""The table of algorithms: a name, an advantage, a policy loss, and the settings that its authors vetted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ADVANTAGES: dict[str, str] = {
    "gae": "foveate.algorithms.values:gae",
    "grpo": "foveate.algorithms.advantages:grpo",
    "grpo_passk": "foveate.algorithms.advantages:grpo_passk",
    "gpg": "foveate.algorithms.advantages:gpg",
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

PREFERENCE_LOSSES: dict[str, str] = {
    "bco": "foveate.algorithms.preference_losses:bco",
    "dpo": "foveate.algorithms.preference_losses:dpo",
    "ipo": "foveate.algorithms.preference_losses:ipo",
    "mpo": "foveate.algorithms.preference_losses:mpo",
    "sft": "foveate.algorithms.preference_losses:sft",
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A named algorithm: where its advantage and its policy loss are ("module:function"), the settings in which it
    differs from their defaults, and the arXiv number of its paper.

    token_mask: a function that marks the tokens which the loss treats apart; its settings are those of the loss that it
    names. resample_rounds: rounds of dynamic sampling, in which new groups replace those of equal rewards.
    """

    advantage: str
    loss: str
    source: str
    advantage_settings: Mapping[str, Any] = field(default_factory=dict)
    loss_settings: Mapping[str, Any] = field(default_factory=dict)
    token_mask: str = ""
    resample_rounds: int = 0


ALGORITHMS: dict[str, Algorithm] = {
    "gspo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["gspo"],
        source="2507.18071",
        loss_settings={"clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "seq-mean-token-mean"},
    ),
    "gspo_token": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["gspo_token"],
        source="2507.18071",
        loss_settings={"clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "seq-mean-token-mean"},
    ),
    "luspo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["gspo"],
        source="2602.05261",
        loss_settings={"clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "seq-mean-token-sum"},
    ),
    "grpo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["grpo"],
        source="2402.03300",
        loss_settings={"clip_low": 0.2, "clip_high": 0.2, "aggregate": "seq-mean-token-mean"},
    ),
    "dr_grpo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["grpo"],
        source="2503.20783",
        advantage_settings={"normalise": "none"},
        loss_settings={"clip_low": 0.2, "clip_high": 0.2, "aggregate": "seq-mean-token-sum-norm"},
    ),
    "dapo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["grpo"],
        source="2503.14476",
        loss_settings={"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "aggregate": "token-mean"},
        resample_rounds=9,
    ),
    "cispo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["cispo"],
        source="2506.13585",
        loss_settings={"clip_low": 1.0, "clip_high": 0.2, "aggregate": "token-mean"},
    ),
    "sapo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["sapo"],
        source="2511.20347",
        loss_settings={"tau_positive": 1.0, "tau_negative": 1.05, "aggregate": "seq-mean-token-mean"},
    ),
    "gmpo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["gmpo"],
        source="2507.20673",
        loss_settings={"clip_low": 0.4, "clip_high": 0.4, "aggregate": "seq-mean-token-mean"},
    ),
    "dppo": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["dppo"],
        source="2602.04879",
        loss_settings={"divergence": "tv", "limit_low": 0.2, "limit_high": 0.2, "aggregate": "token-mean"},
    ),
    "clip_cov": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["clip_cov"],
        source="2505.22617",
        loss_settings={"share": 2e-4, "cov_low": 1.0, "cov_high": 5.0, "aggregate": "token-mean"},
        token_mask=TOKEN_MASKS["clip_cov"],
    ),
    "kl_cov": Algorithm(
        advantage=ADVANTAGES["grpo"],
        loss=POLICY_LOSSES["kl_cov"],
        source="2505.22617",
        loss_settings={"share": 2e-4, "penalty": 1.0, "aggregate": "token-mean"},
        token_mask=TOKEN_MASKS["kl_cov"],
    ),
    "ppo": Algorithm(
        advantage=ADVANTAGES["gae"],
        loss=POLICY_LOSSES["grpo"],
        source="1707.06347",
        advantage_settings={"gamma": 1.0, "lam": 0.95},
        loss_settings={"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token-mean"},
    ),
    "grpo_passk": Algorithm(
        advantage=ADVANTAGES["grpo_passk"],
        loss=POLICY_LOSSES["grpo"],
        source="2503.19595",
        loss_settings={"clip_low": 0.2, "clip_high": 0.2, "aggregate": "seq-mean-token-mean"},
    ),
    "rloo": Algorithm(
        advantage=ADVANTAGES["rloo"],
        loss=POLICY_LOSSES["reinforce"],
        source="2402.14740",
        loss_settings={"aggregate": "seq-mean-token-sum"},
    ),
    "remax": Algorithm(
        advantage=ADVANTAGES["remax"],
        loss=POLICY_LOSSES["reinforce"],
        source="2310.10505",
        loss_settings={"aggregate": "seq-mean-token-sum"},
    ),
    "opo": Algorithm(
        advantage=ADVANTAGES["opo"],
        loss=POLICY_LOSSES["reinforce"],
        source="2505.23585",
        loss_settings={"aggregate": "token-mean"},
    ),
    "gpg": Algorithm(
        advantage=ADVANTAGES["gpg"],
        loss=POLICY_LOSSES["reinforce"],
        source="2504.02546",
        loss_settings={"aggregate": "token-mean"},
    ),
    "reinforce_plus_plus": Algorithm(
        advantage=ADVANTAGES["reinforce_plus_plus"],
        loss=POLICY_LOSSES["grpo"],
        source="2501.03262",
        loss_settings={"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token-mean"},
    ),
    "reinforce_plus_plus_baseline": Algorithm(
        advantage=ADVANTAGES["reinforce_plus_plus_baseline"],
        loss=POLICY_LOSSES["grpo"],
        source="2501.03262",
        loss_settings={"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token-mean"},
    ),
}
