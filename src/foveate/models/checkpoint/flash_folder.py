"""A Flash model of an InternVL: the same weights, with a second projector and a router that are new."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from foveate.errors import DataError
from foveate.files import atomic_path
from foveate.models.checkpoint.configs import with_dtype
from foveate.models.checkpoint.convert import write_hf_weights_as, write_other_files
from foveate.models.checkpoint.formats import read_config
from foveate.models.checkpoint.small_files import quiet_transformers, write_json
from foveate.models.flash import FLASH_KEYS, FlashForConditionalGeneration, begin_as_mean, is_flash, mark_as_flash
from foveate.models.policy import load_policy


def write_flash(source: str, target: Path, *, seed: int = 0) -> None:
    """Write the InternVL `source`, of any layout, as a Flash model in the GitHub layout, the one that is released. The
    second projector begins as the first one of the mean of the four tokens that it stands for (`begin_as_mean`). The
    router begins at random, by `seed`. Raises DataError for another model, for one that is a Flash model already, and
    where the target exists."""
    if target.exists():
        raise DataError(f"{target}: exists; choose another folder, or remove it")
    policy = load_policy(source)
    if is_flash(policy.model.config):
        raise DataError(f"{source}: is a Flash model already; foveate vico trains it")
    if policy.family.github_type is None:
        raise DataError(f"{source}: {policy.family.name} is no InternVL, of which alone there are Flash models")
    config: Any = copy.deepcopy(policy.model.config)
    mark_as_flash(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = FlashForConditionalGeneration(config)
    dtype = next(policy.model.parameters()).dtype
    model.load_state_dict(policy.model.state_dict(), strict=False)
    begin_as_mean(model)
    with atomic_path(target) as folder:
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix=".hf-", dir=folder) as hf, quiet_transformers():
            model.to(dtype).save_pretrained(hf, save_original_format=False)
            write_hf_weights_as(Path(hf), config, folder, "chat")
        write_other_files(policy.folder, folder, policy.format, "chat")
        form = {**read_config(folder), **{key: vars(config)[key] for key in FLASH_KEYS}}
        write_json(folder / "config.json", with_dtype(form, str(dtype).removeprefix("torch.")))
