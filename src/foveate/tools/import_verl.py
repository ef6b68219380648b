"""A verl launch script as a recipe. Every setting of the script is mapped, of no effect here, or named as one that
cannot be honoured; none is dropped in silence."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import ConfigError, DataError
from foveate.rollout import ENGINES

_A, _R, _F = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.ref."

MAPPED = {
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "model.gradient_checkpointing",
    "data.train_files": "data.train",
    "data.val_files": "data.test",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "data.max_response_length": "rollout.max_tokens",
    "data.train_batch_size": "train.prompts_per_step",
    _R + "n": "rollout.samples",
    _R + "temperature": "rollout.temperature",
    _R + "top_p": "rollout.top_p",
    _R + "top_k": "rollout.top_k (-1 is 0)",
    _R + "tensor_model_parallel_size": "cluster.engine_tensor_parallel",
    _R + "gpu_memory_utilization": "cluster.engine_memory",
    _A + "policy_loss.loss_mode": "algorithm.name",
    _A + "loss_agg_mode": "algorithm.loss.aggregate; gspo always has its own",
    _A + "clip_ratio_low": "algorithm.loss.clip_low; gspo keeps its own range",
    _A + "clip_ratio_high": "algorithm.loss.clip_high; gspo keeps its own range",
    _A + "clip_ratio_c": "algorithm.loss.dual_clip; gspo in verl has none",
    _A + "entropy_coeff": "algorithm.loss.entropy_coefficient",
    _A + "use_kl_loss": "algorithm.loss.kl_coefficient (0 where false)",
    _A + "kl_loss_coef": "algorithm.loss.kl_coefficient",
    _A + "kl_loss_type": "algorithm.loss.kl_estimator (low_var_kl is k3)",
    _A + "optim.lr": "optim.lr",
    _A + "optim.lr_warmup_steps": "optim.warmup_steps",
    _A + "optim.warmup_style": "optim.schedule",
    _A + "grad_clip": "optim.max_grad_norm",
    _A + "ppo_mini_batch_size": "train.updates_per_step (prompts of a step / this)",
    _A + "ppo_epochs": "train.epochs_per_step",
    _A + "ppo_max_token_len_per_gpu": "train.tokens_per_micro_batch",
    _A + "ulysses_sequence_parallel_size": "cluster.sequence_parallel",
    _A + "fsdp_config.fsdp_size": "cluster.shard (a machine: hybrid, else full)",
    _A + "fsdp_config.param_offload": "cluster.offload",
    _A + "fsdp_config.optimizer_offload": "cluster.offload",
    "algorithm.use_kl_in_reward": "algorithm.reward_kl",
    "algorithm.kl_ctrl.kl_coef": "algorithm.reward_kl.coefficient, where algorithm.use_kl_in_reward",
    "algorithm.filter_groups.enable": "algorithm.resample_rounds",
    "algorithm.filter_groups.max_num_gen_batches": "algorithm.resample_rounds (one less)",
    "custom_reward_function.path": "reward.name (the predecessor's grounding is ours; others: path:function)",
    "custom_reward_function.name": "reward.name, behind the path",
    "custom_reward_function.reward_kwargs.reward_type": "reward.settings.kind",
    "custom_reward_function.reward_kwargs.alpha": "reward.settings.alpha",
    "custom_reward_function.reward_kwargs.threshold": "reward.settings.threshold",
    "trainer.default_local_dir": "run",
    "trainer.n_gpus_per_node": "cluster.gpus_per_node, cluster.engines (half of the GPUs train, half generate)",
    "trainer.nnodes": "cluster.nodes, cluster.engines",
    "trainer.save_freq": "train.save_every",
    "trainer.test_freq": "eval.every",
    "trainer.total_epochs": "train.steps (with --rows)",
}
"""Keys of verl that act here, and where."""

NO_EFFECT = {
    "data.truncation": "a prompt that is too long is an error or is skipped, never truncated",
    "data.filter_overlong_prompts": "always checked, image tokens included",
    "data.filter_overlong_prompts_workers": "data.workers, chosen by itself",
    "data.image_key": "images; another column is mapped in data.columns",
    "data.trust_remote_code": "code of a checkpoint is never run",
    "data.reward_fn_key": "data_source; rewards by source are reward by_source",
    "data.shuffle": "always, by seed",
    "reward_model.enable": "a model as a reward is reward judge",
    "actor_rollout_ref.model.trust_remote_code": "code of a checkpoint is never run",
    "actor_rollout_ref.model.use_remove_padding": "there is no padding",
    _A + "use_dynamic_bsz": "micro-batches are token budgets",
    _A + "ppo_micro_batch_size_per_gpu": "micro-batches are token budgets",
    _F + "log_prob_use_dynamic_bsz": "micro-batches are token budgets",
    _F + "log_prob_micro_batch_size_per_gpu": "micro-batches are token budgets",
    _F + "ulysses_sequence_parallel_size": "the reference is sharded as the policy is",
    _F + "fsdp_config.param_offload": "the reference is sharded as the policy is",
    _R + "log_prob_use_dynamic_bsz": "micro-batches are token budgets",
    _R + "log_prob_micro_batch_size_per_gpu": "micro-batches are token budgets",
    _R + "free_cache_engine": "an engine frees its memory during updates",
    _R + "enable_chunked_prefill": "the engine's own choice",
    _R + "enforce_eager": "the engine's own choice",
    _R + "val_kwargs.n": "evaluation is greedy; eval.samples adds sampled answers",
    _R + "val_kwargs.do_sample": "evaluation is greedy; eval.samples adds sampled answers",
    "trainer.critic_warmup": "there is no critic",
    "trainer.logger": "metrics.jsonl and report.html are always written",
    "trainer.project_name": "the folder names the run",
    "trainer.experiment_name": "the folder names the run",
    "trainer.rollout_data_dir": "rollouts/ of the run's folder, always",
    "trainer.resume_mode": "the same folder again continues a run",
    "trainer.val_before_train": "the first evaluation comes before the first step",
}
"""Keys of verl that need no setting here, and why."""

_LIMITS = {
    "algorithm.adv_estimator": ("grpo",),
    "algorithm.filter_groups.metric": ("seq_reward",),
    _R + "name": tuple(ENGINES),
    _R + "dtype": (),
}
"""Keys that are honoured only at these values."""
_CLIPS = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high", "dual_clip": "clip_ratio_c"}
_LOSSES = {"vanilla": "grpo", "gspo": "gspo", "geo_mean": "gmpo"}
_OVERRIDE = re.compile(r"\+{0,2}([a-z_]+(?:\.[a-z_0-9]+)+)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-((?:[^{}]|\{[^}]*\})*))?\}|\$(\w+)")


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe as YAML, and a line for each key of the script: how it is mapped, why it has no effect, or that it is
    refused."""

    recipe: str
    mapped: list[str]
    no_effect: list[str]
    refused: list[str]

    @property
    def account(self) -> str:
        parts = (("mapped", self.mapped), ("of no effect here", self.no_effect), ("cannot be honoured", self.refused))
        return "\n".join(
            f"{title} ({len(lines)}):\n" + "".join(f"  {line}\n" for line in lines) for title, lines in parts
        )


def import_script(path: Path, environment: Mapping[str, str], rows: int | None) -> Imported:
    """The recipe that a script stands for; its variables are those of the script, then those of `environment`.

    Raises DataError for a file without a launch command, ConfigError where a needed value is missing.
    """
    values, unset = read_overrides(path, environment)
    settings, refused = _settings(path, values, rows)
    refused += [
        f"{key}: needs ${name}, which neither the script nor the environment sets" for key, name in unset.items()
    ]
    named = {line.partition("=")[0] for line in refused}
    honoured = {key: "the same here" for key, value in values.items() if value in _LIMITS.get(key, ())} | MAPPED
    given = {key: f"{key}={_shown(value)}" for key, value in values.items() if key not in named}
    return Imported(
        "# From a verl launch script by `foveate import-verl`.\n" + _yaml(settings),
        mapped=[f"{text} -> {honoured[key]}" for key, text in given.items() if key in honoured],
        no_effect=[f"{text}: {NO_EFFECT[key]}" for key, text in given.items() if key in NO_EFFECT],
        refused=[*refused, *(text for key, text in given.items() if key not in honoured and key not in NO_EFFECT)],
    )


def read_overrides(path: Path, environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Dotted overrides of the launch command with their values, and the keys whose variable is set nowhere. Where a
    merge conflict was committed, the last assignment counts, as in the shell."""
    try:
        lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a launch script: {error}") from None
    variables = {"PWD": ".", **environment}
    for line in lines:
        line = re.sub(r"\$\(basename [^)]*\)", path.stem, line).replace("$(pwd)", ".")
        assigned = re.match(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;#]*)\s*(?:#.*)?$", line)
        if assigned and "%" not in assigned[2]:  # that would cut a suffix off its own value
            value, missing = _expanded(assigned[2].strip("\"'"), variables)
            if not missing:
                variables[assigned[1]] = value
    command = next((line for line in lines if re.search(r"python3?\s+-m\s+\S*main_\w+", line)), None)
    if command is None:
        raise DataError(f"{path}: no line launches verl (python3 -m verl.trainer.main_ppo key=value ...)")
    found, unset = dict[str, Any](), dict[str, str]()
    for word in shlex.split(command, comments=True):
        if match := _OVERRIDE.fullmatch(word):
            text, missing = _expanded(match[2], variables)
            if missing:
                unset[match[1]] = missing
            else:
                found[match[1]] = _value(text)
    if not found:
        raise DataError(f"{path}: the launch command has no key=value settings")
    return found, unset


def _expanded(text: str, variables: Mapping[str, str]) -> tuple[str, str]:
    """The text with its variables put in, and the name of one that is set nowhere."""
    while match := _VARIABLE.search(text):
        name = match[1] or match[3]
        value = variables.get(name, match[2])
        if value is None:
            return text, name
        text = text[: match.start()] + value + text[match.end() :]
    return text, ""


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"\[.*\]", text):
        return [part.strip(" '\"") for part in text[1:-1].split(",")]
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return "[" + ",".join(value) + "]" if isinstance(value, list) else str(value)


def _yaml(settings: Mapping[str, Any]) -> str:
    packed: dict[str, Any] = {}
    for path, value in settings.items():
        *groups, name = path.split(".")
        inner = packed
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return yaml.safe_dump(packed, sort_keys=False, width=120)


# ------------------------------------------------------------------------------------------------------- the values


def _settings(path: Path, verl: Mapping[str, Any], rows: int | None) -> tuple[dict[str, Any], list[str]]:
    """Settings by dotted path, and what they could not honour. Defaults of verl where the script says nothing."""
    refused: list[str] = []
    for key in ("actor_rollout_ref.model.path", "data.train_files"):
        if key not in verl:
            raise ConfigError(f"{path}: sets no {key}, which a recipe needs")
    prompts, epochs = verl.get("data.train_batch_size", 1024), verl.get("trainer.total_epochs", 30)
    if rows is None:
        raise ConfigError(
            f"{path}: trainer.total_epochs={epochs} counts passes over the data, a recipe counts steps; say "
            "with --rows how many rows data.train_files have"
        )
    every, train_steps = verl.get("trainer.test_freq", -1), max(1, rows // prompts * epochs)
    mini = verl.get(_A + "ppo_mini_batch_size", prompts)
    settings = {
        "run": verl.get("trainer.default_local_dir", f"runs/{path.stem}"),
        "model.path": verl["actor_rollout_ref.model.path"],
        "model.trainable": ["projector", "language"],  # verl's fork for InternVL always froze the vision tower
        "model.gradient_checkpointing": verl.get("actor_rollout_ref.model.enable_gradient_checkpointing", False),
        "data.train": _listed(verl["data.train_files"]),
        "data.test": _listed(verl.get("data.val_files", [])),
        "data.max_prompt_tokens": verl.get("data.max_prompt_length", 512),
        "rollout.engine": verl[_R + "name"] if verl.get(_R + "name") in ENGINES else "native",
        "rollout.samples": verl.get(_R + "n", 1),
        "rollout.max_tokens": verl.get("data.max_response_length", 512),
        "rollout.temperature": float(verl.get(_R + "temperature", 1.0)),
        "rollout.top_p": float(verl.get(_R + "top_p", 1.0)),
        "rollout.top_k": max(0, verl.get(_R + "top_k", 0)),
        **_algorithm(verl, refused),
        **_reward(verl),
        "optim.lr": float(verl.get(_A + "optim.lr", 1e-6)),
        "optim.weight_decay": 0.01,
        "optim.warmup_steps": min(train_steps, max(0, verl.get(_A + "optim.lr_warmup_steps", 0))),
        "optim.schedule": verl.get(_A + "optim.warmup_style", "constant"),
        "optim.max_grad_norm": float(verl.get(_A + "grad_clip", 1.0)),
        "train.steps": train_steps,
        "train.prompts_per_step": prompts,
        "train.updates_per_step": max(1, prompts // mini),
        "train.epochs_per_step": max(1, verl.get(_A + "ppo_epochs", 1)),
        "train.tokens_per_micro_batch": verl.get(_A + "ppo_max_token_len_per_gpu", 16384),
        "train.save_every": max(0, verl.get("trainer.save_freq", 0)),
        "eval.every": max(0, every) if verl.get("data.val_files") else 0,
        **_cluster(verl, refused),
    }
    return settings, refused


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [str(value)]


def _algorithm(verl: Mapping[str, Any], refused: list[str]) -> dict[str, Any]:
    mode = verl.get(_A + "policy_loss.loss_mode", "vanilla")
    if mode not in _LOSSES:
        refused.append(f"{_A}policy_loss.loss_mode={mode}: known are {', '.join(_LOSSES)}; the recipe has gspo")
    name = _LOSSES.get(mode, "gspo")
    loss: dict[str, Any] = {}
    if entropy := verl.get(_A + "entropy_coeff", 0):
        loss["entropy_coefficient"] = float(entropy)
    if verl.get(_A + "use_kl_loss") and verl.get(_A + "kl_loss_coef", 0):
        kinds = {"low_var_kl": "k3", "kl": "k1", "abs": "abs", "mse": "k2"}
        loss |= {"kl_coefficient": float(verl[_A + "kl_loss_coef"])}
        loss |= {"kl_estimator": kinds[verl.get(_A + "kl_loss_type", "low_var_kl")]}
    given = [key for key in (*_CLIPS.values(), "loss_agg_mode") if _A + key in verl]
    if name == "gspo":
        refused += [f"{_A}{key}={verl[_A + key]}: gspo has its own clip range and mean over answers" for key in given]
    else:
        loss |= {ours: float(verl[_A + theirs]) for ours, theirs in _CLIPS.items() if _A + theirs in verl}
        loss |= {"aggregate": verl[_A + "loss_agg_mode"]} if _A + "loss_agg_mode" in verl else {}
    chosen: dict[str, Any] = {"algorithm.name": name}
    if verl.get("algorithm.use_kl_in_reward"):
        chosen["algorithm.reward_kl.coefficient"] = float(verl.get("algorithm.kl_ctrl.kl_coef", 0.001))
    if verl.get("algorithm.filter_groups.enable"):
        chosen["algorithm.resample_rounds"] = max(0, verl.get("algorithm.filter_groups.max_num_gen_batches", 1) - 1)
    return {**chosen, **{f"algorithm.loss.{key}": value for key, value in loss.items()}}


def _reward(verl: Mapping[str, Any]) -> dict[str, Any]:
    """The reward that the script means: its own grounding function is ours; none is geo3k, verl's for MMPR-Tiny."""
    path, prefix = verl.get("custom_reward_function.path"), "custom_reward_function.reward_kwargs."
    arguments = {key.removeprefix(prefix): value for key, value in verl.items() if key.startswith(prefix)}
    if path is None:
        return {"reward.name": "geo3k"}
    if Path(path).parts[-2:] == ("reward_score", "grounding.py"):
        named = {"reward_type": "kind", "alpha": "alpha", "threshold": "threshold"}
        return {"reward.name": "grounding", **{f"reward.settings.{named[key]}": v for key, v in arguments.items()}}
    name = verl.get("custom_reward_function.name", "compute_score")
    return {"reward.name": f"{path}:{name}", **({"reward.settings": arguments} if arguments else {})}


def _cluster(verl: Mapping[str, Any], refused: list[str]) -> dict[str, Any]:
    nodes, gpus = verl.get("trainer.nnodes", 1), verl.get("trainer.n_gpus_per_node", 8)
    size = verl.get(_A + "fsdp_config.fsdp_size", -1)
    if size > 0 and size not in (gpus, nodes * gpus):
        refused.append(
            f"{_A}fsdp_config.fsdp_size={size}: with {nodes} x {gpus} GPUs a copy is sharded over {nodes * gpus}"
        )
    rows, tensors = _A + "ulysses_sequence_parallel_size", _R + "tensor_model_parallel_size"
    row, joined = verl.get(rows, 1), verl.get(tensors, 1)
    machines, training = _halved(nodes, gpus, row, joined)
    generating = nodes * gpus - machines * training
    for key, value, whole in ((rows, row, training), (tensors, joined, generating)):
        if whole % value:
            refused.append(f"{key}={value}: does not divide the {whole} GPUs that are left for it")
    row, joined = math.gcd(row, training), math.gcd(joined, generating or 1)
    engines = {
        "cluster.engines": generating // joined,
        "cluster.engine_tensor_parallel": joined,
        "cluster.engine_memory": float(verl.get(_R + "gpu_memory_utilization", 0.5)),
    }
    return {
        "cluster.nodes": machines,
        "cluster.gpus_per_node": training,
        **(engines if generating else {}),
        "cluster.shard": "hybrid" if size == gpus and machines > 1 else "full",
        "cluster.sequence_parallel": row,
        "cluster.offload": bool(
            verl.get(_A + "fsdp_config.param_offload", False) or verl.get(_A + "fsdp_config.optimizer_offload", False)
        ),
        "cluster.dtype": "bfloat16",
    }


def _halved(nodes: int, gpus: int, row: int, joined: int) -> tuple[int, int]:
    """(machines, GPUs on each) that train, half of those that verl uses: half of each machine, or half of the machines
    where `row` or `joined` GPUs, which communicate in every layer, need more."""
    half = gpus // 2
    if nodes == 1 or (half and half % row == 0 and half % joined == 0):
        return nodes, max(1, half)
    return nodes // 2, gpus


def mapping_table() -> str:
    """The table of docs/recipes.md."""
    rows = [f"| `{key}` | {value} |" for key, value in MAPPED.items()]
    rows += [f"| `{key}` | no effect: {why} |" for key, why in NO_EFFECT.items()]
    rows += [f"| `{key}` | honoured at {', '.join(map(str, only)) or 'no value'} |" for key, only in _LIMITS.items()]
    return "\n".join(["| verl | foveate |", "|---|---|", *sorted(rows)]) + "\n"
