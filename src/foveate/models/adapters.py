"""Adapters on disk, in peft's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.config.model import LoraSettings
from foveate.data.hub import is_hub_name, model_folder
from foveate.errors import DataError, one_line
from foveate.files import atomic_path, gone
from foveate.models.checkpoint.formats import is_finite
from foveate.models.checkpoint.safetensors_io import read_headers, read_tensor
from foveate.models.checkpoint.small_files import content_of, write_json
from foveate.models.policy import Policy, save_policy
from foveate.models.sharded import put

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
logger = logging.getLogger(__name__)
_BASE = "foveate_base"
"""The entry of the file's metadata that says over which weights an adapter was trained."""
_PREFIX, _ADAPTER = "base_model.model.", ".default."
_PLAIN = {
    "peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "lora_bias": False,
    "use_qalora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
    "trainable_token_indices": None, "layer_replication": None, "target_parameters": None,
    "alora_invocation_tokens": None,
}  # fmt: skip
"""The settings of a plain adapter. One that says otherwise is another model, and is refused."""


def trained_tensors(policy: Policy) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by the names of the model: its matrices, and what trains in full beside."""
    return {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}


def write_adapter(policy: Policy, settings: LoraSettings, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write adapters, the `trained_tensors` or copies of them, so that plain peft loads them over the folder that the
    policy came from: `PeftModel.from_pretrained(model, folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    adapted = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    full = {policy.family.part_of(name) for name in tensors if ".lora_" not in name}
    config = {
        **_PLAIN,
        "base_model_name_or_path": str(policy.folder),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": adapted,
        "modules_to_save": [policy.family.parts[part][0] for part in sorted(full)] or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    stored = {f"{_PREFIX}{name.replace(_ADAPTER, '.')}": tensor.contiguous() for name, tensor in tensors.items()}
    base = _base_of(policy.folder)
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", **({_BASE: base} if base else {})})


def write_trained(
    policy: Policy,
    folder: Path,
    state: dict[str, Tensor],
    settings: LoraSettings | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a model folder with the weights `state`, that of adapters, or the former with the latter in `adapter`;
    whole or not at all. Raises `foveate.files.gone` where there is no folder to write into any more."""
    if not folder.parent.is_dir():
        raise gone(folder.parent)
    with atomic_path(folder) as temporary:
        if state:
            save_policy(policy, temporary, state)
        if settings is not None and tensors:
            write_adapter(policy, settings, temporary / "adapter" if state else temporary, tensors)


def check_adapter(path: str, settings: LoraSettings) -> dict[str, Any]:
    """The configuration of an adapter that `model.lora` continues with. Raises DataError for what is none, for one of
    another kind (DoRA, rsLoRA) by the name of the setting, and for another rank or alpha."""
    folder = adapter_folder(path)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(f"{folder}: no adapter in peft's layout ({one_line(error)[:200] or ADAPTER_CONFIG})") from error
    others = {name: False for name in config if name.startswith("use_")}  # variants that there may be by now
    for name, plain in {**others, **_PLAIN}.items():
        if (found := config.get(name, plain)) != plain and (found or plain):
            raise DataError(
                f"{folder / ADAPTER_CONFIG}: {name} is {found!r}; foveate trains plain LoRA, with {plain!r} there"
            )
    for name, own, setting in (("r", settings.rank, "rank"), ("lora_alpha", settings.alpha, "alpha")):
        if config.get(name) != own:
            raise DataError(
                f"{folder / ADAPTER_CONFIG}: {name} is {config.get(name)!r}, and model.lora.{setting} {own}; set "
                f"model.lora.{setting}={config.get(name)}"
            )
    return config


@torch.no_grad()
def load_adapter(policy: Policy, settings: LoraSettings, path: str) -> None:
    """Let the adapters of a policy, and what trains in full beside them, begin as they are in a folder. Raises as
    `check_adapter`, and DataError unless it holds these tensors and no others."""
    check_adapter(path, settings)
    weights = adapter_folder(path) / ADAPTER_WEIGHTS
    stored = read_headers([weights]) if weights.is_file() else {}
    own = {f"{_PREFIX}{name.replace(_ADAPTER, '.')}": tensor for name, tensor in trained_tensors(policy).items()}
    for kind, names in (("lacks", own.keys() - stored.keys()), ("also holds", stored.keys() - own.keys())):
        if names:
            raise DataError(
                f"{weights}: {kind} {sorted(names)[0].removeprefix(_PREFIX)} and {len(names) - 1} more; use "
                "the model.trainable and model.lora.targets that it was trained with"
            )
    for name, tensor in own.items():
        if tuple(stored[name].shape) != tuple(tensor.shape):
            shapes = f"shape {tuple(stored[name].shape)} and not {tuple(tensor.shape)}"
            raise DataError(f"{weights}: {name.removeprefix(_PREFIX)} has {shapes}; was it another model?")
        if not is_finite(value := read_tensor(stored[name])):
            raise DataError(f"{weights}: {name.removeprefix(_PREFIX)} holds numbers that are not finite; it is damaged")
        put(tensor, value)
    _warn_of_base(policy, weights)


def _warn_of_base(policy: Policy, weights: Path) -> None:
    """Say where an adapter of foveate was trained over other weights than those of the policy's folder, whose layers
    may have the same names and shapes. It may be the same model in another layout; adapters of peft do not say."""
    with safe_open(weights, framework="pt") as file:
        trained_over = (file.metadata() or {}).get(_BASE)
    base = _base_of(policy.folder)
    if trained_over is not None and base and trained_over != base:
        named = json.loads((weights.parent / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        logger.warning(
            "%s: this adapter was trained over the weights of %s, and those of %s are others; unless it is the same "
            "model in another format, begin with a new adapter (model.lora.adapter=null)",
            weights.parent,
            named,
            policy.folder,
        )


def _base_of(folder: Path) -> str:
    """A digest of the weights in a model folder, by size and content; "" for a folder without any."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("\n".join(map(content_of, files)).encode()).hexdigest()[:16] if files else ""


def adapter_folder(path: str) -> Path:
    """The folder of an adapter, or of one on the Hub; of the `final/` of a run that has both, the adapter in it."""
    folder = model_folder(path) if is_hub_name(path) else Path(path)
    return folder / "adapter" if not (folder / ADAPTER_CONFIG).is_file() and (folder / "adapter").is_dir() else folder
