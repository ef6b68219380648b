"""Arguments of servers: devices, a plug-in, tokens that they may not sample, and weights from where."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from foveate.encoding.family import ServedAs
from foveate.errors import ConfigError
from foveate.models.checkpoint.convert import write_served_files
from foveate.models.policy import Policy

DEFAULT_MEMORY_FRACTION = 0.4
"""The part of a GPU's memory for a server that shares it with the trainer, if nobody says so."""
BAN = -100.0
"""Added to the logits of tokens that may not be sampled: e**-100 of their probability is left."""


def banned_ids(policy: Policy) -> list[int]:
    """Tokens that no server may sample: placeholders of images, and rows of the vocabulary without a token."""
    head = policy.part("head").weight
    assert isinstance(head, Tensor)
    return sorted({*policy.family.placeholder_ids, *range(len(policy.tokenizer), len(head))})


def visible_devices(devices: list[str] | None, servers: int) -> list[dict[str, str]]:
    """The variables of each server that name its GPUs. Raises ConfigError where they are not one for each."""
    if devices is not None and len(devices) != servers:
        raise ConfigError(f"engine: devices names the GPUs of {len(devices)} servers, there are {servers}")
    return [{}] * servers if devices is None else [{"CUDA_VISIBLE_DEVICES": numbers} for numbers in devices]


def sent_from(policy: Policy, devices: list[dict[str, str]]) -> torch.device:
    """Where weights are when they are sent: on the trainer's GPU to servers that have GPUs of their own, else in host
    memory, because NCCL joins no two processes on one GPU."""
    return policy.device if all(devices) else torch.device("cpu")


def require_place(policy: Policy, shared: bool, devices: list[str] | None, workers: int, transfer: str) -> None:
    """Raise ConfigError where a server cannot share the trainer's device, or weights cannot travel within one."""
    if shared and (devices is not None or workers > 1):
        raise ConfigError("engine: shared is for one server of one worker on the trainer's GPU; leave out devices")
    if transfer == "ipc" and not (shared and policy.device.type == "cuda"):
        raise ConfigError("engine: transfer=ipc is for a server on the trainer's GPU: shared=true, and a run on a GPU")


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_launch_files(
    folder: Path, policy: Policy, served: ServedAs, plugin: Path, name: str, group: str
) -> tuple[Path, Path]:
    """Write the model's small files and, as an installed package with an entry point of `group`, the plug-in file;
    returns the folders of both, within `folder`."""
    write_served_files(
        policy.folder, folder / "model", policy.format, served, policy.tokenizer.eos_token, is_tied=policy.is_tied
    )
    write_plugin(folder / "plugin", plugin, name, group)
    return folder / "model", folder / "plugin"


def write_plugin(folder: Path, file: Path, name: str, group: str) -> None:
    """A folder that, on the path of a server's Python, is an installed package with one entry point of `group`: the
    function `register` of `file`."""
    module = f"foveate_{name}_plugin"
    info = folder / f"{module}-0.dist-info"
    info.mkdir(parents=True)
    shutil.copyfile(file, folder / f"{module}.py")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nfoveate = {module}:register\n")


def python_path(folder: Path) -> str:
    """PYTHONPATH with a folder in front."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
