"""Advantage, loss, KL and reward of a launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.tools.import_verl.defaults import A
from foveate.tools.import_verl.given import Given, shown

Choice = dict[str, Callable[[], Any]]
"""Settings by path, each with what computes it; None leaves it out."""

_LOSSES = {
    "vanilla": "grpo", "gspo": "gspo", "geo_mean": "gmpo", "sapo": "sapo", "cispo": "cispo", "clip_cov": "clip_cov",
    "kl_cov": "kl_cov", "dppo_tv": "dppo", "dppo_kl": "dppo", "gpg": "gpg", "gspo_token": "gspo_token",
}  # fmt: skip
_ADVANTAGES = {
    "gae": "ppo", "rloo": "rloo", "rloo_vectorized": "rloo", "remax": "remax", "opo": "opo", "gpg": "gpg",
    "grpo_passk": "grpo_passk", "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
}  # fmt: skip
_NO_RATIO = ("rloo", "remax", "opo", "gpg")
_OWN_MEAN = ("gspo", "gspo_token", "sapo", "gmpo")
"""Losses that verl averages over answers whatever `loss_agg_mode` says."""
_ESTIMATORS = {"low_var_kl": "k3", "k3": "k3", "kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2"}
_AGGREGATES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_WIDEST_SEQUENCE_CLIP = 0.05
_BYPASS = "algorithm.rollout_correction.bypass_mode"
_MODE, _ADVANTAGE = A + "policy_loss.loss_mode", "algorithm.adv_estimator"


def algorithm_of(given: Given) -> str:
    """foveate's name of what a launch trains with. Raises ConfigError for an advantage or a loss that is not here."""
    advantage, mode = shown(given.get(_ADVANTAGE)), given.text(_MODE)
    if advantage in ("grpo", "grpo_vectorized"):
        if mode not in _LOSSES or mode == "gpg":
            known = ", ".join(name for name in _LOSSES if name != "gpg")
            raise ConfigError(
                f"{given.where}: {given.called(_MODE)}={mode} has no counterpart here with grpo; known: {known}"
            )
        return _LOSSES[mode]
    if advantage not in _ADVANTAGES:
        known = ", ".join(("grpo", *_ADVANTAGES))
        raise ConfigError(
            f"{given.where}: {given.called(_ADVANTAGE)}={advantage} has no counterpart here; known: {known}"
        )
    if mode not in ("vanilla", advantage):
        raise ConfigError(
            f"{given.where}: {given.called(_MODE)}={mode} has no counterpart here with {_ADVANTAGE}={advantage}, which "
            "takes vanilla"
        )
    return _ADVANTAGES[advantage]


def algorithm_settings(given: Given, several_updates: bool) -> Choice:
    name = algorithm_of(given)
    prefix = "algorithm.loss."
    choice: Choice = {
        "algorithm.name": lambda: name,
        "algorithm.advantage": lambda: _advantage(given, name),
        prefix + "aggregate": lambda: _aggregate(given, name),
        prefix + "norm_length": lambda: _norm_length(given, name),
        prefix + "entropy_coefficient": lambda: given.number(A + "entropy_coeff") or None,
        prefix + "kl_coefficient": lambda: _kl(given)[0],
        prefix + "kl_estimator": lambda: _kl(given)[1],
        "algorithm.reward_kl": lambda: _reward_kl(given),
        "algorithm.resample_rounds": lambda: _rounds(given),
        "algorithm.correction": lambda: _correction(given),
        "algorithm.old_logprobs": lambda: "engine" if given.flag(_BYPASS) else None,
        "algorithm.critic": lambda: _critic(given) if name == "ppo" else None,
    }
    if name in _NO_RATIO:
        if several_updates:
            given.refuse(
                _ADVANTAGE,
                f"verl clips its ratio (PPO); {name} here knows none, and is exact for one update of a step only",
            )
        for key in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"):
            if given.has(A + key):
                given.refuse(A + key, f"{name} here has no ratio that could be clipped")
        return choice
    return choice | {prefix + path: compute for path, compute in _loss(given, name).items()}


def _loss(given: Given, name: str) -> Choice:
    """The settings of one loss, without those that all losses share."""
    low, high = lambda: _clip(given, "low"), lambda: _clip(given, "high")
    if name in ("gspo", "gspo_token"):
        return _sequence_clip(given)
    if name == "sapo":
        for key in ("low", "high"):
            if given.has(f"{A}clip_ratio_{key}"):
                given.refuse(f"{A}clip_ratio_{key}", "sapo clips nothing, in verl neither")
        return {
            "tau_positive": lambda: given.number(A + "tau_pos"),
            "tau_negative": lambda: given.number(A + "tau_neg"),
        }
    if name == "dppo":
        divergence = given.text(_MODE).removeprefix("dppo_")
        ratio = lambda: given.number(A + "clip_ratio_c")  # noqa: E731
        return {"divergence": lambda: divergence, "limit_low": low, "limit_high": high, "ratio_max": ratio}
    if name == "kl_cov":
        share = lambda: given.number(A + "policy_loss.kl_cov_ratio")  # noqa: E731
        return {"share": share, "penalty": lambda: given.number(A + "policy_loss.ppo_kl_coef")}
    choice: Choice = {"clip_low": low, "clip_high": high}
    if name == "clip_cov":
        return choice | {
            "share": lambda: given.number(A + "policy_loss.clip_cov_ratio"),
            "cov_low": lambda: given.number(A + "policy_loss.clip_cov_lb"),
            "cov_high": lambda: given.number(A + "policy_loss.clip_cov_ub"),
        }
    if name in ("cispo", "gmpo"):
        return choice
    return choice | {"dual_clip": lambda: _dual_clip(given)}


def _clip(given: Given, side: str) -> float:
    """verl takes `clip_ratio` only where the side's own key is null."""
    key = f"{A}clip_ratio_{side}"
    if given.get(key) is None:
        return given.number(A + "clip_ratio")
    if given.has(A + "clip_ratio") and not given.has(key):
        given.refuse(A + "clip_ratio", f"verl reads {A}clip_ratio_low and clip_ratio_high, which are 0.2 by themselves")
    return given.number(key)


def _dual_clip(given: Given) -> float | None:
    if given.get(A + "clip_ratio_c") is None:
        return None
    ceiling = given.number(A + "clip_ratio_c")
    if ceiling <= 1 + _clip(given, "high"):
        given.refuse(A + "clip_ratio_c", "a dual clip is above 1 + clip_ratio_high here")
        return None
    return ceiling


def _sequence_clip(given: Given) -> Choice:
    def side(key: str) -> float | None:
        value = _clip(given, key)
        if value <= _WIDEST_SEQUENCE_CLIP:
            return value
        given.refuse(f"{A}clip_ratio_{key}", "gspo has its own clip range, 3e-4 and 4e-4; such a wide one never clips")
        return None

    if given.names:  # EasyR1 has one
        return {
            "clip_low": lambda: side("low"),
            "clip_high": lambda: side("high"),
            "dual_clip": lambda: _dual_clip(given),
        }
    if given.has(A + "clip_ratio_c"):
        given.refuse(A + "clip_ratio_c", "gspo in verl has no dual clip")
    return {"clip_low": lambda: side("low"), "clip_high": lambda: side("high")}


def _advantage(given: Given, name: str) -> dict[str, Any] | None:
    if name == "ppo":
        return {"gamma": given.number("algorithm.gamma"), "lam": given.number("algorithm.lam")}
    if given.has("algorithm.gamma") and given.number("algorithm.gamma") != 1:
        given.refuse("algorithm.gamma", f"the advantage of {name} is not discounted here")
    if name == "gpg":
        return {"count": "rewarded"}
    by_deviation = given.flag("algorithm.norm_adv_by_std_in_grpo")
    takes = name not in ("rloo", "remax", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    return {"normalise": "none"} if takes and not by_deviation else None


def _aggregate(given: Given, name: str) -> str | None:
    mode = given.text(A + "loss_agg_mode")
    if mode not in _AGGREGATES:
        raise ConfigError(
            f"{given.where}: {given.called(A + 'loss_agg_mode')}={mode} has no counterpart here; known: "
            f"{', '.join(_AGGREGATES)}"
        )
    if name not in _OWN_MEAN or given.names:  # EasyR1 takes the mode for all
        return mode
    if given.has(A + "loss_agg_mode") and mode != "seq-mean-token-mean":
        given.refuse(
            A + "loss_agg_mode", f"verl averages {name} over answers whatever this says, and so does the recipe"
        )
    return None if name != "gmpo" else "seq-mean-token-mean"


def _norm_length(given: Given, name: str) -> int | None:
    if name in _OWN_MEAN or given.text(A + "loss_agg_mode") != "seq-mean-token-sum-norm":
        return None
    if given.get(A + "loss_scale_factor") is not None:
        return given.whole(A + "loss_scale_factor", least=1)
    return given.whole("data.max_response_length", least=1)


def _kl(given: Given) -> tuple[float | None, str | None]:
    """Coefficient and estimator of the KL term of the loss; None where there is none."""
    if not given.flag(A + "use_kl_loss") or not given.number(A + "kl_loss_coef"):
        return None, None
    return given.number(A + "kl_loss_coef"), _estimator(given, A + "kl_loss_type")


def _estimator(given: Given, key: str) -> str:
    kind = given.text(key)
    straight = kind.endswith("+")
    if kind.removesuffix("+") not in _ESTIMATORS:
        raise ConfigError(
            f"{given.where}: {given.called(key)}={kind} has no counterpart here; known: {', '.join(_ESTIMATORS)}"
        )
    estimator = _ESTIMATORS[kind.removesuffix("+")]
    if straight and estimator != "k2":
        given.refuse(key, "its gradient is that of k2, which the recipe has; its value in the metrics differs")
        return "k2"
    if estimator == "k3":
        given.refuse(
            key, "verl clamps k3 to 10 nats at a token, beyond which it has no gradient; here it is not clamped"
        )
    return estimator


def _reward_kl(given: Given) -> dict[str, Any] | None:
    if not given.flag("algorithm.use_kl_in_reward"):
        return None
    if given.text("algorithm.kl_ctrl.type") != "fixed":
        given.refuse(
            "algorithm.kl_ctrl.type",
            "an adaptive target is per token in verl and per answer here; set reward_kl.target",
        )
    coefficient = given.number("algorithm.kl_ctrl.kl_coef")
    return {"coefficient": coefficient, "estimator": _estimator(given, "algorithm.kl_penalty")}


def _rounds(given: Given) -> int | None:
    key = "algorithm.filter_groups.max_num_gen_batches"
    if not given.flag("algorithm.filter_groups.enable"):
        return None
    batches = given.whole(key)
    if batches <= 0:
        given.refuse(key, "draws without end in verl; the recipe has 9 rounds more, as dapo")
        return 9
    return batches - 1


def _correction(given: Given) -> dict[str, Any] | None:
    key = "algorithm.rollout_correction.rollout_is"
    level = given.get(key)
    if level is not None and given.flag(_BYPASS):
        given.refuse(key, f"with {_BYPASS} the ratio of the loss has these weights already")
        return None
    if level is None:
        return None
    if level not in ("token", "sequence"):
        raise ConfigError(f"{given.where}: {given.called(key)}={level} has no counterpart here; known: token, sequence")
    return {"mode": f"{level}-truncate", "high": given.number(key + "_threshold")}


def _critic(given: Given) -> dict[str, Any]:
    return {
        "lr": given.number("critic.optim.lr"),
        "warmup_steps": given.whole("trainer.critic_warmup", least=0),
        "clip": given.number("critic.cliprange_value"),
        "lam": given.number("algorithm.lam"),
    }


# -------------------------------------------------------------------------------------------------------- rewards

_BY_SOURCE = {
    "hiyouga/geometry3k": "geo3k", "openai/gsm8k": "math", "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math", "HuggingFaceH4/MATH-500": "math", "math": "math",
    "math_dapo": "math", "math_dapo_reasoning": "math",
}  # fmt: skip
_CUSTOM = ("custom_reward_function.", "reward.custom_reward_function.")
_MANAGER = ("reward_model.reward_manager", "reward.reward_manager.name")
_OVERLONG = ("reward_model.reward_kwargs.", "reward.reward_kwargs.", "reward_model.")


def reward_settings(given: Given) -> Choice:
    reward = _reward(given)
    return {f"reward.{name}": lambda value=value: value for name, value in reward.items()}


def _reward(given: Given) -> dict[str, Any]:
    """The reward that a launch means: its function, the fork's grounding, or by the source of a row."""
    prefix = next((one for one in _CUSTOM if given.has(one + "path")), _CUSTOM[0])
    start = prefix + "reward_kwargs."
    path = None if given.get(prefix + "path") is None else given.text(prefix + "path")
    if path is None:
        return _with_overlong(given, {"name": "by_source", "settings": {"rewards": _sources(given)}})
    arguments = {key.removeprefix(start): given.get(key) for key in given.values if key.startswith(start)}
    given_as_one = given.get(start[:-1]) if given.has(start[:-1]) else None
    arguments |= given_as_one if isinstance(given_as_one, dict) else {}
    if Path(path).parts[-2:] == ("reward_score", "grounding.py"):
        named = {"reward_type": "kind", "alpha": "alpha", "threshold": "threshold"}
        settings = {named[key]: value for key, value in arguments.items() if key in named}
        for key in arguments.keys() - named.keys():
            given.refuse(start + key, "the grounding reward here has no such setting")
        return {"name": "grounding", **({"settings": settings} if settings else {})}
    name = given.text(prefix + "name") if given.get(prefix + "name") else "compute_score"
    return {"name": f"{path}:{name}", **({"settings": arguments} if arguments else {})}


def _sources(given: Given) -> dict[str, str]:
    manager = next((key for key in _MANAGER if given.has(key)), _MANAGER[0])
    rewards = dict(_BY_SOURCE)
    if given.has(manager) and given.get(manager) == "dapo":
        given.refuse(manager, "math_dapo is +1 or -1 in verl; the reward math here is 1 or 0")
    given.filled["reward by data_source"] = ", ".join(f"{source}: {reward}" for source, reward in rewards.items())
    return rewards


def _with_overlong(given: Given, reward: dict[str, Any]) -> dict[str, Any]:
    """DAPO's overlong buffer counts tokens of the model, whose folder a recipe would have to name."""
    for prefix in _OVERLONG:
        for buffer in ("overlong_buffer_cfg.", "overlong_buffer."):
            key = prefix + buffer + "enable"
            if given.has(key) and given.flag(key):
                given.refuse(
                    key, "is the reward overlong of a weighted_sum, which needs a local tokenizer; see docs/rewards.md"
                )
    return reward
