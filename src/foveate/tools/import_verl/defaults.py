"""The values of verl where a script says nothing, by version: `verl/trainer/config` of its releases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.tools.import_verl.settings_file import read_flat

A, R, F, M = (
    "actor_rollout_ref.actor.",
    "actor_rollout_ref.rollout.",
    "actor_rollout_ref.ref.",
    "actor_rollout_ref.model.",
)

_NEWEST: dict[str, Any] = {
    M + "enable_gradient_checkpointing": True,
    M + "lora_rank": 0,
    M + "lora_alpha": 16,
    M + "target_modules": "all-linear",
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.filter_overlong_prompts": False,
    R + "name": None,
    R + "n": 1,
    R + "temperature": 1.0,
    R + "top_p": 1.0,
    R + "top_k": -1,
    R + "tensor_model_parallel_size": 2,
    R + "gpu_memory_utilization": 0.5,
    R + "val_kwargs.n": 1,
    R + "val_kwargs.do_sample": False,
    R + "val_kwargs.temperature": 0,
    A + "policy_loss.loss_mode": "vanilla",
    A + "policy_loss.clip_cov_ratio": 0.0002,
    A + "policy_loss.clip_cov_lb": 1.0,
    A + "policy_loss.clip_cov_ub": 5.0,
    A + "policy_loss.kl_cov_ratio": 0.0002,
    A + "policy_loss.ppo_kl_coef": 0.1,
    A + "loss_agg_mode": "token-mean",
    A + "loss_scale_factor": None,
    A + "clip_ratio": 0.2,
    A + "clip_ratio_low": 0.2,
    A + "clip_ratio_high": 0.2,
    A + "clip_ratio_c": 3.0,
    A + "tau_pos": 1.0,
    A + "tau_neg": 1.05,
    A + "entropy_coeff": 0,
    A + "use_kl_loss": False,
    A + "kl_loss_coef": 0.001,
    A + "kl_loss_type": "low_var_kl",
    A + "freeze_vision_tower": False,
    A + "optim.lr": 1e-6,
    A + "optim.lr_warmup_steps": -1,
    A + "optim.lr_warmup_steps_ratio": 0.0,
    A + "optim.warmup_style": None,
    A + "optim.lr_scheduler_type": "constant",
    A + "optim.min_lr_ratio": 0.0,
    A + "optim.num_cycles": 0.5,
    A + "optim.weight_decay": 0.01,
    A + "optim.betas": [0.9, 0.999],
    A + "grad_clip": 1.0,
    A + "ppo_mini_batch_size": 256,
    A + "ppo_epochs": 1,
    A + "use_dynamic_bsz": False,
    A + "ppo_max_token_len_per_gpu": 16384,
    A + "ppo_micro_batch_size_per_gpu": None,
    A + "ulysses_sequence_parallel_size": 1,
    A + "fsdp_config.fsdp_size": -1,
    A + "fsdp_config.param_offload": False,
    A + "fsdp_config.optimizer_offload": False,
    A + "fsdp_config.offload_policy": False,
    A + "fsdp_config.reshard_after_forward": True,
    A + "fsdp_config.model_dtype": "fp32",
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.type": "fixed",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "algorithm.filter_groups.enable": False,
    "algorithm.filter_groups.max_num_gen_batches": 0,
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "critic.optim.lr": 1e-5,
    "critic.cliprange_value": 0.5,
    "trainer.critic_warmup": 0,
    "async_training.require_batches": 1,
    "async_training.trigger_parameter_sync_step": 4,
    "rollout.total_rollout_steps": 100,
    "trainer.n_gpus_per_node": 8,
    "trainer.nnodes": 1,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "trainer.total_epochs": 30,
    "trainer.total_training_steps": None,
    "trainer.logger": ["console", "wandb"],
    "custom_reward_function.name": "compute_score",
}
_EARLIER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("0.5", {R + "name": "vllm"}),
    (
        "0.3",
        {A + "entropy_coeff": 0.001, A + "clip_ratio_low": None, A + "clip_ratio_high": None, A + "clip_ratio_c": None},
    ),
)
"""Defaults up to and including a version, newest first."""

EASYR1: dict[str, Any] = _NEWEST | {
    "data.train_batch_size": 512,
    "data.filter_overlong_prompts": True,
    R + "name": "vllm",
    R + "gpu_memory_utilization": 0.6,
    M + "lora_alpha": 64,
    A + "clip_ratio_high": 0.3,
    A + "ppo_micro_batch_size_per_gpu": 4,
    A + "use_dynamic_bsz": True,
    A + "use_kl_loss": False,
    A + "kl_loss_type": "kl",
    A + "fsdp_config.offload_policy": False,
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": True,
    "algorithm.filter_groups.max_num_gen_batches": 20,
    "trainer.total_epochs": 15,
    "data.seed": 1,
}
"""EasyR1's, in verl's names."""

VERSIONS = ("0.2", "0.3", "0.4", "internvl", "0.5", "0.6", "0.7", "0.8", "0.9", "0.10")
"""`internvl` is the fork of 0.4 for InternVL3.5, which freezes that model's vision tower."""
_FORK = "frozen_vision_tower"


@dataclass(frozen=True, slots=True)
class Version:
    """`name` is one of VERSIONS; `why` says how it was found; `own` are the defaults of a checkout that was found."""

    name: str
    why: str
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        place = VERSIONS.index("0.4" if self.name == "internvl" else self.name)
        values = dict(_NEWEST)
        for last, changed in _EARLIER:
            if place <= VERSIONS.index(last):
                values |= changed
        return {**values, **self.own}

    @property
    def title(self) -> str:
        return "verl's fork for InternVL" if self.name == "internvl" else f"verl {self.name}"


def find_version(asked: str | None, folders: tuple[Path, ...], given: Mapping[str, Any]) -> Version:
    """The version that was asked for, that of the checkout of verl around one of the folders, or the newest."""
    if asked is not None:
        if asked not in VERSIONS:
            raise ConfigError(f"verl {asked}: the known versions are {', '.join(VERSIONS)}")
        return Version(asked, "as asked for")
    for folder in folders:
        for parent in (folder, *folder.parents):
            if found := _checkout(parent):
                return found
    path = str(given.get(M + "path", "")).lower()
    if "internvl" in path:
        return Version("internvl", "only it has InternVL; --verl says otherwise")
    return Version(VERSIONS[-1], "the newest known; --verl names another")


def _checkout(folder: Path) -> Version | None:
    try:
        text = (folder / "verl" / "version" / "version").read_text(encoding="utf-8")[:40].strip()
        workers = folder / "verl" / "workers" / "fsdp_workers.py"
        forked = workers.is_file() and _FORK in workers.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    number = re.match(r"\d+\.\d+", text)
    if number is None:
        return None
    own = own_defaults(folder / "verl" / "trainer" / "config")
    if forked:
        return Version("internvl", f"the checkout in {folder}", own)
    known = [name for name in VERSIONS if name[0].isdigit()]
    minor = [int(part) for part in number[0].split(".")]
    older = [name for name in known if [int(part) for part in name.split(".")] <= minor]
    return Version((older or known)[-1 if older else 0], f"{text}, the checkout in {folder}", own)


def own_defaults(folder: Path) -> dict[str, Any]:
    """The defaults in a checkout's own files, of those that matter here; Hydra's references are left aside."""
    for name in ("_generated_ppo_trainer.yaml", "ppo_trainer.yaml"):
        if (folder / name).is_file():
            found = read_flat(folder / name, str(folder))
            return {key: found[key] for key in _NEWEST if key in found and "${" not in str(found[key])}
    return {}
