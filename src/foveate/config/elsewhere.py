"""Settings by the names that other trainers give them."""

ELSEWHERE = {
    "learning_rate": "optim.lr",
    "num_generations": "rollout.samples",
    "max_completion_length": "rollout.max_tokens",
    "max_new_tokens": "rollout.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.prompts_per_step",
    "num_iterations": "train.epochs_per_step",
    "beta": "algorithm.loss.kl_coefficient",
    "epsilon": "algorithm.loss.clip_low",
    "loss_type": "algorithm.name",
    "output_dir": "run",
    "warmup_ratio": "optim.warmup_steps",
    "lr_scheduler_type": "optim.schedule",
    "use_peft": "model.lora",
}
"""Names of settings in TRL and transformers, and what they are here."""
