"""The settings of a recipe, from those of a launch."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.rollout import ENGINES
from foveate.tools.import_verl.algorithm import Choice, algorithm_of, algorithm_settings, reward_settings
from foveate.tools.import_verl.defaults import A, M, R
from foveate.tools.import_verl.easyr1 import PROGRAM as EASYR1
from foveate.tools.import_verl.given import Given, UnreadSetting

_NEEDED = ("model.path", "data.train", "optim.lr", "train.steps", "train.prompts_per_step")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab")
_DTYPES = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
_OTHER_FAMILIES = ("qwen", "llama", "gemma", "deepseek", "glm", "mistral", "kimi", "phi")
FORK = "the fork for InternVL freezes its vision tower"


def recipe_settings(given: Given, script: Path, program: str, rows: int | None, forked: bool) -> dict[str, Any]:
    """Settings by dotted path. What depends on a value that was not read is left out, and named.

    Raises ConfigError where a setting without which there is no recipe is missing or was not read.
    """
    _require(given)
    sizes = _Sizes(given, program)
    choice: Choice = {
        "run": lambda: _run(given, script),
        "seed": lambda: given.whole("data.seed", least=0) if given.get("data.seed") is not None else None,
        "model.path": lambda: given.path(M + "path"),
        "model.trainable": lambda: _trainable(given, forked),
        "model.lora": lambda: _lora(given),
        "model.dtype": lambda: _dtype(given),
        "model.gradient_checkpointing": lambda: given.flag(M + "enable_gradient_checkpointing"),
        "model.max_pixels": lambda: _pixels(given),
        "data.train": lambda: given.paths("data.train_files"),
        "data.test": lambda: given.paths("data.val_files"),
        "data.max_prompt_tokens": lambda: given.whole("data.max_prompt_length", least=1),
        "data.on_bad_row": lambda: "skip" if given.flag("data.filter_overlong_prompts") else None,
        "rollout.engine": lambda: _engine(given),
        "rollout.samples": lambda: _samples(given),
        "rollout.max_tokens": lambda: given.whole("data.max_response_length", least=1),
        "rollout.temperature": lambda: given.number(R + "temperature"),
        "rollout.top_p": lambda: given.number(R + "top_p"),
        "rollout.top_k": lambda: max(0, given.whole(R + "top_k")),
        **algorithm_settings(given, sizes.several_updates()),
        **reward_settings(given),
        "optim.lr": lambda: given.number(A + "optim.lr"),
        "optim.weight_decay": lambda: given.number(A + "optim.weight_decay"),
        "optim.betas": lambda: given.numbers(A + "optim.betas", 2),
        "optim.warmup_steps": lambda: _warmup(given, sizes.steps(rows)),
        "optim.schedule": lambda: _schedule(given),
        "optim.max_grad_norm": lambda: given.number(A + "grad_clip", A + "optim.clip_grad"),
        "train.steps": lambda: sizes.steps(rows),
        "train.prompts_per_step": sizes.prompts,
        "train.updates_per_step": sizes.updates,
        "train.epochs_per_step": lambda: given.whole(A + "ppo_epochs", least=1),
        "train.tokens_per_micro_batch": lambda: _budget(given),
        "train.save_every": lambda: _every(given, "trainer.save_freq"),
        "eval.every": lambda: _every(given, "trainer.test_freq") if given.paths("data.val_files") else 0,
        "eval.samples": lambda: _sampled_answers(given),
        "log.to": lambda: _trackers(given),
        "cluster": lambda: _cluster(given),
    }
    return _computed(given, choice)


def _require(given: Given) -> None:
    for key in (M + "path", "data.train_files"):
        if not given.has(key):
            raise ConfigError(f"{given.where}: sets no {given.called(key)}, which a recipe needs")
    if "megatron" in (given.values.get("model_engine"), given.values.get(A + "strategy")) or given.megatron:
        given.refused.append(
            "Megatron: how it keeps, shards, offloads and recomputes (actor.megatron) has no counterpart; "
            "the recipe has FSDP"
        )


def _computed(given: Given, choice: Choice) -> dict[str, Any]:
    settings = dict[str, Any]()
    for path, compute in choice.items():
        try:
            value = compute()
        except UnreadSetting as unread:
            if path in _NEEDED:
                raise ConfigError(
                    f"{given.where}: {unread.key} was not read ({unread.reason}), and a recipe needs {path}"
                ) from None
            line = f"{unread.key}: {unread.reason}; the recipe has no {path}"
            given.refused.append(line)
            continue
        if path in _NEEDED and value in ("", []):
            raise ConfigError(f"{given.where}: a recipe needs {path}, and the launch gives it empty")
        if value is not None:
            settings[path] = value
    return settings


def _run(given: Given, script: Path) -> str:
    own, key = f"runs/{script.stem}", "trainer.default_local_dir"
    try:
        if given.get(key) is not None:
            return given.path(key)
    except UnreadSetting as unread:
        given.refused.append(f"{unread.key}: {unread.reason}; the run is {own}")
        return own
    given.filled[key] = own
    return own


def _trainable(given: Given, forked: bool) -> list[str]:
    parts = ["vision", "projector", "language"]
    if given.flag(A + "freeze_vision_tower"):
        return parts[1:]
    path = given.path(M + "path").lower()
    if forked and not any(family in path for family in _OTHER_FAMILIES):
        given.filled["vision tower"] = f"frozen ({FORK})"
        return parts[1:]
    if given.get(M + "lora_rank") and _excludes_vision(given):
        return ["language"]
    given.filled["vision tower"] = "trained"
    return parts


def _excludes_vision(given: Given) -> bool:
    excluded = given.get(M + "exclude_modules")
    if excluded in (None, "DONT_EXCLUDE"):
        return False
    if excluded != ".*visual.*":
        given.refuse(M + "exclude_modules", "name the layers that get adapters in model.lora.targets")
        return False
    return True


def _lora(given: Given) -> dict[str, Any] | None:
    rank = given.whole(M + "lora_rank", M + "lora.rank", least=0)
    if rank == 0:
        return None
    targets = given.first(M + "target_modules", M + "lora.target_modules")
    names = targets if isinstance(targets, list) else None if targets == "all-linear" else str(targets).split(",")
    lora = {"rank": rank, "alpha": given.whole(M + "lora_alpha", M + "lora.alpha", least=1)}
    return lora | ({"targets": [str(name).strip() for name in names]} if names else {})


def _dtype(given: Given) -> str | None:
    kind = given.text(A + "fsdp_config.model_dtype")
    if kind not in _DTYPES:
        given.refuse(A + "fsdp_config.model_dtype", f"known are {', '.join(_DTYPES)}")
        return None
    return _DTYPES[kind]


def _pixels(given: Given) -> int | None:
    return given.whole("data.max_pixels", least=1) if given.get("data.max_pixels") is not None else None


def _engine(given: Given) -> str:
    name = None if given.get(R + "name") is None else given.text(R + "name")
    if name in ENGINES:
        return name
    given.refuse(R + "name", f"the engines here are {', '.join(ENGINES)}; the recipe has native")
    return "native"


def _samples(given: Given) -> int | None:
    samples = given.whole(R + "n", least=1)
    name = algorithm_of(given)
    if samples > 1 or name in ("ppo", "reinforce_plus_plus", "remax"):
        return samples
    given.refuse(R + "n", f"{name} here compares answers to the same prompt; rollout.samples is left at its default")
    return None


def _every(given: Given, key: str) -> int:
    """Steps from one to the next; none where it is below 1, or False."""
    return 0 if given.get(key) in (None, False) else max(0, given.whole(key))


class _Sizes:
    """Prompts, updates and steps. An asynchronous run of verl counts in mini-batches between two publishes."""

    def __init__(self, given: Given, program: str) -> None:
        self.given, self.asynchronous = given, "fully_async" in program
        self.is_easyr1 = program == EASYR1
        if self.asynchronous:
            given.refuse(
                "async_training.staleness_threshold", "set rollout.staleness (in steps) and algorithm.correction"
            )
        if "one_step_off" in program:
            given.refused.append(
                f"{program}: set rollout.staleness=1 and algorithm.correction for answers one step ahead"
            )

    def _mini_batches(self) -> int:
        """Mini-batches of a step of an asynchronous run: those between two publishes of the weights."""
        keys = ("async_training.require_batches", "async_training.trigger_parameter_sync_step")
        return math.prod(self.given.whole(key, least=1) for key in keys)

    def prompts(self) -> int:
        """Prompts of a step. verl trains all that it draws at once; where groups are filtered, and in EasyR1, it draws
        until it has those of a step."""
        if self.asynchronous:
            return self.given.whole(A + "ppo_mini_batch_size", least=1) * self._mini_batches()
        draws_until = self.is_easyr1 or self.given.flag("algorithm.filter_groups.enable")
        return self.given.whole("data.train_batch_size", least=1) if draws_until else self._drawn()

    def _drawn(self) -> int:
        given = self.given.get("data.gen_batch_size")
        return self.given.whole("data.gen_batch_size" if given else "data.train_batch_size", least=1)

    def updates(self) -> int:
        if self.asynchronous:
            return self._mini_batches()
        prompts, mini = self.prompts(), self.given.whole(A + "ppo_mini_batch_size", least=1)
        if mini > prompts:
            self.given.refuse(
                A + "ppo_mini_batch_size", f"is more than the {prompts} prompts of a step, which verl refuses"
            )
            return 1
        updates = -(-prompts // mini)
        if prompts % mini == 0:
            return updates
        small = [n for n in range(1, math.isqrt(prompts) + 1) if prompts % n == 0]
        allowed = max(n for one in small for n in (one, prompts // one) if n <= updates)
        self.given.refuse(
            A + "ppo_mini_batch_size", f"does not divide {prompts} prompts; the recipe has {allowed} updates"
        )
        return allowed

    def several_updates(self) -> bool:
        try:
            return self.updates() > 1 or self.given.whole(A + "ppo_epochs") > 1
        except UnreadSetting:
            return True

    def steps(self, rows: int | None) -> int:
        given = self.given
        key = "trainer.total_training_steps"
        limit = given.whole(key, least=1) if given.get(key) is not None else None
        rollouts = "rollout.total_rollout_steps"
        if self.asynchronous:
            return max(1, given.whole(rollouts, least=1) // self.prompts())
        if limit is not None and self.is_easyr1:
            return limit
        epochs = given.whole("trainer.total_epochs", least=1)
        if rows is None:
            if limit is None:
                raise ConfigError(
                    f"{given.where}: {given.called('trainer.total_epochs')}={epochs} counts passes over the data, a "
                    "recipe counts steps; say with --rows how many rows data.train_files have"
                )
            given.refuse("trainer.total_epochs", f"verl may end before {limit} steps; --rows says when")
            return limit
        return min(max(1, rows // self._drawn() * epochs), limit or rows * epochs)


def _warmup(given: Given, steps: int) -> int:
    """verl takes a share of the steps where the number of warm-up steps is below 0."""
    count = given.get(A + "optim.lr_warmup_steps")
    if count is None or given.whole(A + "optim.lr_warmup_steps") < 0:
        return min(steps, int(given.number(A + "optim.lr_warmup_steps_ratio") * steps))
    return min(steps, given.whole(A + "optim.lr_warmup_steps"))


def _schedule(given: Given) -> str:
    keys = (A + "optim.warmup_style", A + "optim.lr_scheduler_type")
    key = keys[0] if given.has(keys[0]) and given.get(keys[0]) is not None else keys[1]
    name = given.text(key)
    if name not in ("constant", "cosine"):
        raise ConfigError(f"{given.where}: {given.called(key)}={name} has no counterpart here; known: constant, cosine")
    if name == "cosine":
        for other, usual in ((A + "optim.min_lr_ratio", (0, None)), (A + "optim.num_cycles", (0.5,))):
            if given.get(other) not in usual:
                given.refuse(other, "the cosine here falls once, to 0")
    return name


def _budget(given: Given) -> int:
    """A memory setting: tokens of a micro-batch, at least those of the longest row."""
    longest = given.whole("data.max_prompt_length") + given.whole("data.max_response_length")
    key, each = A + "ppo_max_token_len_per_gpu", A + "ppo_micro_batch_size_per_gpu"
    if given.flag(A + "use_dynamic_bsz"):
        try:
            split = _cluster(given)["sequence_parallel"]
        except UnreadSetting:
            split = 1
        if given.whole(key) * split < longest:
            given.refuse(key, f"is raised to hold one longest prompt and answer, {longest} tokens")
        return max(given.whole(key), -(-longest // split))
    rows = given.get(each)
    return longest * (given.whole(each, least=1) if rows is not None else 1)


def _sampled_answers(given: Given) -> int | None:
    prefix = R + "val_kwargs."
    if not given.flag(prefix + "do_sample"):
        return None
    if given.number(prefix + "temperature") != 1:
        given.refuse(
            prefix + "temperature", "sampled answers of an evaluation have temperature 1 here, beside the greedy one"
        )
    return given.whole(prefix + "n", least=1)


def _trackers(given: Given) -> list[str] | None:
    names, found = given.texts("trainer.logger"), list[str]()
    for name in names:
        if name in ("console", "file"):
            continue
        if name not in _TRACKERS:
            given.refuse("trainer.logger", f"{name} is not known here; known: {', '.join(_TRACKERS)}")
        elif find_spec(name) is None:
            given.refuse("trainer.logger", f"{name} is not installed; run pip install {name}, and set log.to=[{name}]")
        else:
            found.append(name)
    return found or None


def _cluster(given: Given) -> dict[str, Any]:
    nodes, gpus = given.whole("trainer.nnodes", least=1), given.whole("trainer.n_gpus_per_node", least=1)
    size = -1 if given.get(A + "fsdp_config.fsdp_size") is None else given.whole(A + "fsdp_config.fsdp_size")
    rows = (A + "ulysses_sequence_parallel_size", A + "fsdp_config.ulysses_sequence_parallel_size")
    tensors = R + "tensor_model_parallel_size"
    row, joined = given.whole(*rows, least=1), given.whole(tensors, least=1)
    apart = given.has("rollout.n_gpus_per_node")
    if apart:
        machines, training = nodes, gpus
        generating = given.whole("rollout.n_gpus_per_node", least=0)
        generating *= given.whole("rollout.nnodes", least=1) if given.has("rollout.nnodes") else 1
    else:
        machines, training = _halved(nodes, gpus, row, joined)
        generating = nodes * gpus - machines * training
    if size > 0 and size not in (gpus, nodes * gpus):
        given.refuse(
            A + "fsdp_config.fsdp_size",
            f"with {nodes} x {gpus} GPUs a copy is sharded over {nodes * gpus}",
        )
    row_key = next((key for key in rows if given.has(key)), rows[0])
    for key, value, whole in ((row_key, row, training), (tensors, joined, generating)):
        if whole % value:
            given.refuse(key, f"does not divide the {whole} GPUs that are left for it")
    row, joined = math.gcd(row, training), math.gcd(joined, generating or 1)
    engines = {
        "engines": generating // joined,
        "engine_tensor_parallel": joined,
        "engine_memory": given.number(R + "gpu_memory_utilization"),
    }
    offload = ("fsdp_config.param_offload", "fsdp_config.optimizer_offload", "fsdp_config.offload_policy")
    return {
        "nodes": machines,
        "gpus_per_node": training,
        **(engines if generating else {}),
        "shard": "hybrid" if size == gpus and machines > 1 else "full",
        "sequence_parallel": row,
        "offload": any(given.flag(A + name) for name in offload),
        "reshard": given.flag(A + "fsdp_config.reshard_after_forward"),
        "dtype": "bfloat16",
    }


def _halved(nodes: int, gpus: int, row: int, joined: int) -> tuple[int, int]:
    """(machines, GPUs on each) that train, half of those that verl uses: half of each machine, or half of the machines
    where `row` or `joined` GPUs, which communicate in every layer, need more."""
    half = gpus // 2
    if nodes == 1 or (half and half % row == 0 and half % joined == 0):
        return nodes, max(1, half)
    return nodes // 2, gpus
