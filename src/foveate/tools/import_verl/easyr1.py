"""EasyR1: its keys in verl's names, and the YAML file that its launches begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.tools.import_verl.defaults import A, M, R

PROGRAM = "verl.trainer.main"

NAMES = {
    "data.train_files": "data.train_files",
    "data.val_files": "data.val_files",
    "data.max_prompt_length": "data.max_prompt_length",
    "data.max_response_length": "data.max_response_length",
    "data.rollout_batch_size": "data.train_batch_size",
    "data.mini_rollout_batch_size": "data.gen_batch_size",
    "data.val_batch_size": "data.val_batch_size",
    "data.max_pixels": "data.max_pixels",
    "data.filter_overlong_prompts": "data.filter_overlong_prompts",
    "data.filter_overlong_prompts_workers": "data.filter_overlong_prompts_workers",
    "data.seed": "data.seed",
    "data.shuffle": "data.shuffle",
    "data.prompt_key": "data.prompt_key",
    "data.image_key": "data.image_key",
    "algorithm.adv_estimator": "algorithm.adv_estimator",
    "algorithm.gamma": "algorithm.gamma",
    "algorithm.lam": "algorithm.lam",
    "algorithm.kl_type": "algorithm.kl_ctrl.type",
    "algorithm.online_filtering": "algorithm.filter_groups.enable",
    "trainer.max_try_make_batch": "algorithm.filter_groups.max_num_gen_batches",
    "worker.actor.global_batch_size": A + "ppo_mini_batch_size",
    "worker.actor.ppo_epochs": A + "ppo_epochs",
    "worker.actor.micro_batch_size_per_device_for_update": A + "ppo_micro_batch_size_per_gpu",
    "worker.actor.micro_batch_size_per_device_for_experience": R + "log_prob_micro_batch_size_per_gpu",
    "worker.actor.max_grad_norm": A + "grad_clip",
    "worker.actor.padding_free": M + "use_remove_padding",
    "worker.actor.ulysses_size": A + "ulysses_sequence_parallel_size",
    "worker.actor.use_torch_compile": A + "use_torch_compile",
    "worker.actor.clip_ratio_low": A + "clip_ratio_low",
    "worker.actor.clip_ratio_high": A + "clip_ratio_high",
    "worker.actor.clip_ratio_dual": A + "clip_ratio_c",
    "worker.actor.loss_avg_mode": A + "loss_agg_mode",
    "worker.actor.loss_type": A + "policy_loss.loss_mode",
    "worker.actor.tau_positive": A + "tau_pos",
    "worker.actor.tau_negative": A + "tau_neg",
    "worker.actor.model.model_path": M + "path",
    "worker.actor.model.enable_gradient_checkpointing": M + "enable_gradient_checkpointing",
    "worker.actor.model.trust_remote_code": M + "trust_remote_code",
    "worker.actor.model.freeze_vision_tower": A + "freeze_vision_tower",
    "worker.actor.model.lora.rank": M + "lora_rank",
    "worker.actor.model.lora.alpha": M + "lora_alpha",
    "worker.actor.model.lora.target_modules": M + "target_modules",
    "worker.actor.model.lora.exclude_modules": M + "exclude_modules",
    "worker.actor.optim.lr": A + "optim.lr",
    "worker.actor.optim.weight_decay": A + "optim.weight_decay",
    "worker.actor.optim.betas": A + "optim.betas",
    "worker.actor.optim.lr_warmup_ratio": A + "optim.lr_warmup_steps_ratio",
    "worker.actor.optim.lr_warmup_steps": A + "optim.lr_warmup_steps",
    "worker.actor.optim.lr_scheduler_type": A + "optim.lr_scheduler_type",
    "worker.actor.optim.min_lr_ratio": A + "optim.min_lr_ratio",
    "worker.actor.fsdp.torch_dtype": A + "fsdp_config.model_dtype",
    "worker.actor.fsdp.fsdp_size": A + "fsdp_config.fsdp_size",
    "worker.actor.fsdp.enable_full_shard": A + "fsdp_config.reshard_after_forward",
    "worker.actor.fsdp.enable_cpu_offload": A + "fsdp_config.offload_policy",
    "worker.actor.offload.offload_params": A + "fsdp_config.param_offload",
    "worker.actor.offload.offload_optimizer": A + "fsdp_config.optimizer_offload",
    "worker.ref.offload.offload_params": "actor_rollout_ref.ref.fsdp_config.param_offload",
    "worker.ref.fsdp.enable_cpu_offload": "actor_rollout_ref.ref.fsdp_config.offload_policy",
    "worker.ref.fsdp.enable_full_shard": "actor_rollout_ref.ref.fsdp_config.reshard_after_forward",
    "worker.rollout.name": R + "name",
    "worker.rollout.n": R + "n",
    "worker.rollout.temperature": R + "temperature",
    "worker.rollout.top_p": R + "top_p",
    "worker.rollout.top_k": R + "top_k",
    "worker.rollout.gpu_memory_utilization": R + "gpu_memory_utilization",
    "worker.rollout.tensor_parallel_size": R + "tensor_model_parallel_size",
    "worker.rollout.enforce_eager": R + "enforce_eager",
    "worker.rollout.enable_chunked_prefill": R + "enable_chunked_prefill",
    "worker.rollout.max_model_len": R + "max_model_len",
    "worker.rollout.max_num_batched_tokens": R + "max_num_batched_tokens",
    "worker.reward.reward_function": "custom_reward_function.path",
    "worker.reward.reward_function_kwargs": "custom_reward_function.reward_kwargs",
    "trainer.total_epochs": "trainer.total_epochs",
    "trainer.max_steps": "trainer.total_training_steps",
    "trainer.project_name": "trainer.project_name",
    "trainer.experiment_name": "trainer.experiment_name",
    "trainer.logger": "trainer.logger",
    "trainer.nnodes": "trainer.nnodes",
    "trainer.n_gpus_per_node": "trainer.n_gpus_per_node",
    "trainer.val_freq": "trainer.test_freq",
    "trainer.val_before_train": "trainer.val_before_train",
    "trainer.val_generations_to_log": "trainer.log_val_generations",
    "trainer.critic_warmup": "trainer.critic_warmup",
    "trainer.save_freq": "trainer.save_freq",
    "trainer.save_checkpoint_path": "trainer.default_local_dir",
}
"""Keys of EasyR1 and what they are called in verl."""

_VALUES = {
    A + "loss_agg_mode": {"token": "token-mean", "seq": "seq-mean-token-mean"},
    A + "policy_loss.loss_mode": {"default": "vanilla"},
    A + "fsdp_config.model_dtype": {None: "fp32"},
}
_COEFFICIENT = (A + "kl_loss_coef", "algorithm.kl_ctrl.kl_coef")
_ESTIMATOR = (A + "kl_loss_type", "algorithm.kl_penalty")
KL = {
    "algorithm.disable_kl": "algorithm.loss.kl_coefficient, algorithm.reward_kl (null where true)",
    "algorithm.use_kl_loss": "algorithm.loss.kl_coefficient, else algorithm.reward_kl",
    "algorithm.kl_coef": "algorithm.loss.kl_coefficient or algorithm.reward_kl.coefficient",
    "algorithm.kl_penalty": "algorithm.loss.kl_estimator or algorithm.reward_kl.estimator",
}
"""One penalty, in the loss or in the reward: there are two in verl."""


def in_verls_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """EasyR1's settings in verl's names, and what each of these is called in EasyR1. Others keep their names."""
    found, called = dict[str, Any](), dict[str, str]()
    for key, value in values.items():
        if key in KL:
            continue
        name = NAMES.get(key, key)
        known = _VALUES.get(name, {})
        found[name] = known.get(value, value) if isinstance(value, str | None) else value
        called[name] = key
    if path := found.get("custom_reward_function.path"):
        file, _, function = str(path).rpartition(":")
        found["custom_reward_function.path"] = file or function
        found["custom_reward_function.name"] = function if file else "main"
        called["custom_reward_function.name"] = called["custom_reward_function.path"]
    for key, names in (("algorithm.kl_coef", _COEFFICIENT), ("algorithm.kl_penalty", _ESTIMATOR)):
        for name in names:
            called[name] = key
            if key in values:
                found[name] = values[key]
    in_loss = values.get("algorithm.use_kl_loss", False) is True
    disabled = values.get("algorithm.disable_kl", False) is True
    found[A + "use_kl_loss"] = in_loss and not disabled
    found["algorithm.use_kl_in_reward"] = not in_loss and not disabled
    called[A + "use_kl_loss"] = called["algorithm.use_kl_in_reward"] = "algorithm.use_kl_loss"
    return found, called
