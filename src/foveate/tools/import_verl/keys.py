"""The fate of verl's keys: where each acts in a recipe, or why it needs no setting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from foveate.tools.import_verl.defaults import A, F, M, R

_GSPO, _LEGACY, _REWARD = "gspo keeps its own range where this is wide", "custom_reward_function.", "reward."

MAPPED = {
    M + "path": "model.path",
    M + "enable_gradient_checkpointing": "model.gradient_checkpointing",
    M + "lora_rank": "model.lora.rank (0: none)",
    M + "lora_alpha": "model.lora.alpha",
    M + "target_modules": "model.lora.targets (all-linear: null)",
    M + "exclude_modules": "model.trainable: [language] for .*visual.*",
    "data.train_files": "data.train",
    "data.val_files": "data.test",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "data.max_response_length": "rollout.max_tokens",
    "data.max_pixels": "model.max_pixels",
    "data.train_batch_size": "train.prompts_per_step",
    "data.gen_batch_size": "train.prompts_per_step, where no groups are filtered; train.steps",
    "data.filter_overlong_prompts": "data.on_bad_row: skip",
    "data.seed": "seed",
    R + "name": "rollout.engine",
    R + "n": "rollout.samples",
    R + "temperature": "rollout.temperature",
    R + "top_p": "rollout.top_p",
    R + "top_k": "rollout.top_k (-1 is 0)",
    R + "tensor_model_parallel_size": "cluster.engine_tensor_parallel",
    R + "gpu_memory_utilization": "cluster.engine_memory",
    R + "val_kwargs.n": "eval.samples, where answers are sampled",
    R + "val_kwargs.do_sample": "eval.samples",
    R + "val_kwargs.temperature": "eval.samples, which have temperature 1",
    A + "policy_loss.loss_mode": "algorithm.name",
    A + "policy_loss.clip_cov_ratio": "algorithm.loss.share (clip_cov)",
    A + "policy_loss.clip_cov_lb": "algorithm.loss.cov_low (clip_cov)",
    A + "policy_loss.clip_cov_ub": "algorithm.loss.cov_high (clip_cov)",
    A + "policy_loss.kl_cov_ratio": "algorithm.loss.share (kl_cov)",
    A + "policy_loss.ppo_kl_coef": "algorithm.loss.penalty (kl_cov)",
    A + "tau_pos": "algorithm.loss.tau_positive (sapo)",
    A + "tau_neg": "algorithm.loss.tau_negative (sapo)",
    A + "loss_agg_mode": "algorithm.loss.aggregate; gspo, sapo and gmpo have their own",
    A + "loss_scale_factor": "algorithm.loss.norm_length",
    A + "clip_ratio": "clip_low and clip_high, where their own keys are null",
    A + "clip_ratio_low": f"algorithm.loss.clip_low, limit_low (dppo); {_GSPO}",
    A + "clip_ratio_high": f"algorithm.loss.clip_high, limit_high (dppo); {_GSPO}",
    A + "clip_ratio_c": "algorithm.loss.dual_clip, ratio_max (dppo); gspo in verl has none",
    A + "entropy_coeff": "algorithm.loss.entropy_coefficient",
    A + "use_kl_loss": "algorithm.loss.kl_coefficient (0 where false)",
    A + "kl_loss_coef": "algorithm.loss.kl_coefficient",
    A + "kl_loss_type": "algorithm.loss.kl_estimator (low_var_kl is k3, not clamped here)",
    A + "freeze_vision_tower": "model.trainable",
    A + "optim.lr": "optim.lr",
    A + "optim.lr_warmup_steps": "optim.warmup_steps",
    A + "optim.lr_warmup_steps_ratio": "optim.warmup_steps, where those are below 0",
    A + "optim.warmup_style": "optim.schedule",
    A + "optim.lr_scheduler_type": "optim.schedule",
    A + "optim.min_lr_ratio": "optim.schedule, at 0",
    A + "optim.num_cycles": "optim.schedule, at 0.5",
    A + "optim.weight_decay": "optim.weight_decay",
    A + "optim.betas": "optim.betas",
    A + "optim.clip_grad": "optim.max_grad_norm, where grad_clip is not given",
    A + "grad_clip": "optim.max_grad_norm",
    A + "ppo_mini_batch_size": "train.updates_per_step (prompts of a step / this)",
    A + "ppo_epochs": "train.epochs_per_step",
    A + "use_dynamic_bsz": "train.tokens_per_micro_batch",
    A + "ppo_max_token_len_per_gpu": "train.tokens_per_micro_batch, where micro-batches are dynamic",
    A + "ppo_micro_batch_size_per_gpu": "train.tokens_per_micro_batch (this times the longest row), where they are not",
    A + "ulysses_sequence_parallel_size": "cluster.sequence_parallel",
    A + "fsdp_config.ulysses_sequence_parallel_size": "cluster.sequence_parallel",
    A + "fsdp_config.fsdp_size": "cluster.shard (a machine: hybrid, else full)",
    A + "fsdp_config.param_offload": "cluster.offload",
    A + "fsdp_config.optimizer_offload": "cluster.offload",
    A + "fsdp_config.offload_policy": "cluster.offload",
    A + "fsdp_config.reshard_after_forward": "cluster.reshard",
    A + "fsdp_config.model_dtype": "model.dtype",
    "algorithm.adv_estimator": "algorithm.name (gae is ppo)",
    "algorithm.gamma": "algorithm.advantage.gamma (ppo; 1 for the others)",
    "algorithm.lam": "algorithm.advantage.lam, algorithm.critic.lam (ppo)",
    "algorithm.norm_adv_by_std_in_grpo": "algorithm.advantage.normalise",
    "algorithm.use_kl_in_reward": "algorithm.reward_kl",
    "algorithm.kl_penalty": "algorithm.reward_kl.estimator",
    "algorithm.kl_ctrl.type": "algorithm.reward_kl, at fixed",
    "algorithm.kl_ctrl.kl_coef": "algorithm.reward_kl.coefficient, where algorithm.use_kl_in_reward",
    "algorithm.filter_groups.enable": "algorithm.resample_rounds",
    "algorithm.filter_groups.max_num_gen_batches": "algorithm.resample_rounds (one less)",
    "algorithm.rollout_correction.bypass_mode": "algorithm.old_logprobs",
    "algorithm.rollout_correction.rollout_is": "algorithm.correction.mode",
    "algorithm.rollout_correction.rollout_is_threshold": "algorithm.correction.high",
    "critic.optim.lr": "algorithm.critic.lr (ppo)",
    "critic.cliprange_value": "algorithm.critic.clip (ppo)",
    "trainer.critic_warmup": "algorithm.critic.warmup_steps (ppo)",
    _LEGACY + "path": "reward.name (the predecessor's grounding is ours; others: path:function)",
    _LEGACY + "name": "reward.name, behind the path",
    _LEGACY + "reward_kwargs": "reward.settings",
    "trainer.default_local_dir": "run",
    "trainer.n_gpus_per_node": "cluster.gpus_per_node, cluster.engines (half of the GPUs train, half generate)",
    "trainer.nnodes": "cluster.nodes, cluster.engines",
    "rollout.n_gpus_per_node": "cluster.engines (all of trainer's GPUs train then)",
    "rollout.nnodes": "cluster.engines",
    "rollout.total_rollout_steps": "train.steps (an asynchronous run)",
    "async_training.require_batches": "train.prompts_per_step, updates_per_step (an asynchronous run)",
    "async_training.trigger_parameter_sync_step": "train.prompts_per_step, updates_per_step (an asynchronous run)",
    "trainer.save_freq": "train.save_every",
    "trainer.test_freq": "eval.every",
    "trainer.total_epochs": "train.steps (with --rows)",
    "trainer.total_training_steps": "train.steps (at most; enough without --rows)",
    "trainer.logger": "log.to (tensorboard, wandb, mlflow, trackio, swanlab, where installed)",
}
"""Keys of verl that act here, and where."""

_BUDGET, _SHARDED = "micro-batches are token budgets", "the reference is sharded as the policy is"
_CODE, _ENGINE = "code of a checkpoint is never run", "the engine's own choice"

NO_EFFECT = {
    "data.filter_overlong_prompts_workers": "data.workers, chosen by itself",
    "data.val_batch_size": "an evaluation takes all prompts",
    "data.return_raw_chat": "prompts are kept as messages",
    "data.trust_remote_code": _CODE,
    "data.reward_fn_key": "data_source; rewards by source are reward by_source",
    M + "trust_remote_code": _CODE,
    M + "use_remove_padding": "there is no padding",
    M + "use_fused_kernels": "the vocabulary terms are always computed in chunks",
    M + "fused_kernel_options.impl_backend": "the vocabulary terms are always computed in chunks",
    M + "use_shm": "where a model is loaded from changes no result",
    A + "ppo_micro_batch_size": _BUDGET,
    A + "strategy": "fsdp and fsdp2 are sharded data parallelism, as here",
    A + "fsdp_config.strategy": "fsdp and fsdp2 are sharded data parallelism, as here",
    A + "fsdp_config.forward_prefetch": "prefetched by itself",
    A + "use_torch_compile": "model.compile; changes no result",
    A + "entropy_from_logits_with_chunking": "the vocabulary terms are always computed in chunks",
    A + "entropy_checkpointing": "the vocabulary terms are always computed in chunks",
    F + "log_prob_use_dynamic_bsz": _BUDGET,
    F + "log_prob_micro_batch_size": _BUDGET,
    F + "log_prob_micro_batch_size_per_gpu": _BUDGET,
    F + "log_prob_max_token_len_per_gpu": _BUDGET,
    F + "ulysses_sequence_parallel_size": _SHARDED,
    F + "fsdp_config.ulysses_sequence_parallel_size": _SHARDED,
    F + "fsdp_config.param_offload": _SHARDED,
    F + "fsdp_config.offload_policy": _SHARDED,
    F + "fsdp_config.reshard_after_forward": _SHARDED,
    F + "fsdp_config.forward_prefetch": _SHARDED,
    F + "strategy": _SHARDED,
    F + "use_torch_compile": "model.compile; changes no result",
    F + "entropy_from_logits_with_chunking": "the vocabulary terms are always computed in chunks",
    R + "log_prob_use_dynamic_bsz": _BUDGET,
    R + "log_prob_micro_batch_size": _BUDGET,
    R + "log_prob_micro_batch_size_per_gpu": _BUDGET,
    R + "log_prob_max_token_len_per_gpu": _BUDGET,
    R + "free_cache_engine": "an engine frees its memory during updates",
    R + "enable_chunked_prefill": _ENGINE,
    R + "enforce_eager": _ENGINE,
    R + "max_num_batched_tokens": _ENGINE,
    R + "max_num_seqs": _ENGINE,
    R + "max_model_len": "the longest prompt and answer",
    R + "load_format": "engines start with the weights of the trainer",
    R + "layered_summon": "weights are published in parts",
    R + "enable_prefix_caching": "a prompt is computed once per group",
    R + "calculate_log_probs": "the engine's log-probs are always kept",
    R + "mode": "engines answer asynchronously",
    R + "disable_log_stats": "metrics are always written",
    "trainer.project_name": "the folder names the run",
    "trainer.experiment_name": "the folder names the run",
    "trainer.rollout_data_dir": "rollouts/ of the run's folder, always",
    "trainer.validation_data_dir": "evaluations are always kept",
    "trainer.log_val_generations": "evaluations are always kept",
    "trainer.resume_mode": "the same folder again continues a run",
    "trainer.val_before_train": "the first evaluation comes before the first step",
    "trainer.balance_batch": "rows are always balanced over the ranks",
    "trainer.use_legacy_worker_impl": "a choice between two implementations in verl",
}
"""Keys of verl that need no setting here, and why."""

_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "algorithm.filter_groups.metric": (("seq_reward",), "groups of equal rewards are replaced"),
    R + "dtype": (("bfloat16",), "the type of the model's computation"),
    R + "ignore_eos": ((False,), "an answer ends at its stop token"),
    R + "multi_turn.enable": ((False,), "answers have one turn"),
    "data.truncation": (("error",), "a prompt that is too long is an error or is skipped, never truncated"),
    "data.shuffle": ((True, None), "always, by seed"),
    "data.image_key": (("images",), "another column is mapped in data.columns"),
    "data.prompt_key": (("prompt",), "another column is mapped in data.columns"),
    "trainer.device": (("cuda",), "ranks compute on CUDA or CPUs"),
    "model_engine": (("dp", "fsdp", "fsdp2", "fsdp_turbo"), "FSDP"),
    A + "strategy": (("fsdp", "fsdp2", "fsdp_turbo"), "FSDP"),
    "reward_model.enable": ((False, None), "a model as a reward is reward judge"),
    "reward.reward_model.enable": ((False, None), "a model as a reward is reward judge"),
    "reward_model.reward_manager": (("naive", "dapo"), "how rewards are called"),
    "reward.reward_manager.name": (("naive", "dapo"), "how rewards are called"),
    "actor_rollout_ref.hybrid_engine": ((True, False), "cluster.engines says where answers are generated"),
    "algorithm.rollout_correction.rollout_rs": ((None,), "no rejection"),
}
"""Keys that need no setting at these values, and cannot be honoured at others."""

_OTHER_NAMES = (
    (re.compile(rf"{re.escape(_REWARD)}custom_reward_function\."), _LEGACY),
    (re.compile(r"(custom_reward_function\.reward_kwargs)\..*"), r"\1"),
    (re.compile(re.escape(M) + r"lora\.(rank|alpha)"), M + r"lora_\1"),
    (re.compile(re.escape(M) + r"lora\.target_modules"), M + "target_modules"),
)
_QUIET = re.compile(
    r"ray_kwargs\.|ray_init\.|.*\bprofiler\b|global_profiler\.|.*\.checkpoint\.|.*nccl_timeout|hydra\.|.*\._target_$"
)


def fate(key: str, value: Any, uses_critic: bool) -> tuple[str, str]:
    """The fate of a key with a value: ("mapped" | "no effect" | "refused", the place or the reason)."""
    for pattern, name in _OTHER_NAMES:
        key = pattern.sub(name, key)
    if key in _ONLY:
        values, reason = _ONLY[key]
        return (
            ("no effect", reason) if value in values else ("refused", f"honoured at {_listed(values)} only: {reason}")
        )
    if key in ("critic.optim.lr", "critic.cliprange_value", "trainer.critic_warmup") and not uses_critic:
        return "no effect", "there is no critic"
    if key in MAPPED:
        return "mapped", MAPPED[key]
    if key in NO_EFFECT:
        return "no effect", NO_EFFECT[key]
    if key.startswith("critic."):
        reason = "the critic is a copy of the policy, trained as it is" if uses_critic else "there is no critic"
        return ("refused" if uses_critic else "no effect"), reason
    if _QUIET.match(key):
        return "no effect", "how verl is run, not what it trains"
    return "refused", "has no counterpart here"


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join("null" if value is None else str(value) for value in values)


def mapping_table(names: Mapping[str, str] | None = None) -> str:
    """The table of docs/recipes.md: verl's keys, or the other names of `names` with what becomes of verl's."""
    rows = dict[str, str]()
    for key, text in MAPPED.items():
        rows[key] = text
    for key, text in NO_EFFECT.items():
        rows[key] = f"no effect: {text}"
    for key, (values, text) in _ONLY.items():
        rows[key] = f"honoured at {_listed(values)}: {text}"
    rows = rows if names is None else {other: rows.get(key, key) for other, key in names.items()}
    lines = [f"| `{key}` | {text} |" for key, text in sorted(rows.items())]
    return "\n".join([f"| {'verl' if names is None else 'EasyR1'} | foveate |", "|---|---|", *lines]) + "\n"
