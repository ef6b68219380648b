"""Models without memory, and their weights read from disk into the share of them that this process holds.

One tensor is in memory at a time, and only the rows of this rank where a tensor is stored as it is held and sharded by
rows; a tensor that transformers joins from many, such as the experts of a layer, is joined and then sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from foveate.errors import DataError
from foveate.models.attention.gated_delta_net import replace_layers
from foveate.models.checkpoint.formats import hf_tensors, require_finite, require_fit
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.checkpoint.safetensors_io import Stored, read_headers, read_tensor, weight_files
from foveate.models.checkpoint.small_files import quiet_transformers
from foveate.models.matmul import use_fast_linear
from foveate.models.norms import use_fast_norms
from foveate.models.policy import Policy, keep_float32, keep_freed_memory, load_errors, model_options


def meta_policy(path: str, *, attention: str = "auto", dtype: str = "float32", quantization: None = None) -> Policy:
    """The policy of a model folder on the meta device, to be sharded, allocated and loaded. Raises DataError as
    `load_policy` does, and for weights that are quantised."""
    assert quantization is None, "settings refuse it for several ranks"
    found = inspect_model_folder(path)
    if "quantization_config" in found.config.to_dict():
        raise DataError(f"{found.folder}: the weights are quantised; several ranks read weights that are not")
    options = model_options(found, attention, dtype)
    with load_errors(found.folder), quiet_transformers(), torch.device("meta"):
        model = found.family.auto_class.from_config(**options)
    return Policy(replace_layers(model.eval()), found.tokenizer, found.family, found.folder, found.format)


def allocate(policy: Policy, root: nn.Module, device: str, computing: str | None = None) -> None:
    """Give memory to a policy on the meta device, sharded or not, whose modules are those of `root`. Its weights are
    arbitrary; buffers that follow from the configuration are computed. `computing`: where buffers are to be, if not on
    the `device` on which the weights rest."""
    keep_float32(computing or device)
    keep_freed_memory(computing or device)
    use_fast_norms(use_fast_linear(root, computing or device), computing or device)
    root.to_empty(device=device)
    model: Any = policy.model
    model.tie_weights()
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, _ in model.named_non_persistent_buffers():
        place = name.rpartition(".")[0]
        owner = max((one for one in models if not one or f"{place}.".startswith(f"{one}.")), key=len)
        with torch.no_grad():
            models[owner]._init_weights(model.get_submodule(place))
    for module in root.modules() if computing is not None else ():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(computing)


@torch.no_grad()
def load_sharded(policy: Policy, without: Sequence[str] = ()) -> None:
    """Read the weights of a policy that has memory from the folder that it came from, all but `without`. Raises
    DataError where folder and model do not fit, and on a rank whose share of the weights is not finite."""
    lacking = _targets(policy.model)
    for name in without:
        del lacking[name]
    filled: set[int] = set()
    with load_errors(policy.folder):
        for name, value in _values(policy, lacking, without):
            target = lacking.pop(name)
            put(target, value)
            require_finite(policy.folder, name, target.to_local() if isinstance(target, DTensor) else target)
            filled.add(id(target))
    require_fit(policy.folder, "lack", [name for name, target in lacking.items() if id(target) not in filled])


def put(target: Tensor, value: Tensor | Stored) -> None:
    """Copy a full tensor, or one on disk, into one that may be sharded over ranks."""
    if tuple(value.shape) != tuple(target.shape):
        raise ValueError(f"shape {tuple(value.shape)} where config.json asks for {tuple(target.shape)}")
    rows = _rows(target) if isinstance(target, DTensor) and isinstance(value, Stored) else None
    found = read_tensor(value, rows) if isinstance(value, Stored) else value
    if isinstance(target, DTensor):
        if rows is None:
            found = distribute_tensor(found, target.device_mesh, target.placements, src_data_rank=None).to_local()
        target = target.to_local()
    target.copy_(found)


def _rows(target: DTensor) -> slice | None:
    """The rows that this rank holds of a tensor that is sharded by rows alone, else None."""
    kinds = [placement for placement in target.placements if not isinstance(placement, Replicate)]
    if kinds != [Shard(0)]:
        return None
    index = distribute_tensor(
        torch.arange(target.shape[0]), target.device_mesh, target.placements, src_data_rank=None
    ).to_local()
    return slice(int(index[0]), int(index[-1]) + 1) if len(index) else slice(0, 0)


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint fills, by their names without adapters."""
    state = model.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def _values(
    policy: Policy, targets: Mapping[str, Tensor], without: Sequence[str]
) -> Iterator[tuple[str, Tensor | Stored]]:
    """The tensors of a checkpoint by the names of the model, joined as transformers joins them."""
    model: Any = policy.model
    if policy.family.github_type:
        stored = hf_tensors(policy.folder, policy.format, model.config)
    else:
        stored = read_headers(weight_files(policy.folder))
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    known: Any = {**targets, **dict.fromkeys(without, 0)}
    joined: dict[str, WeightConverter] = {}
    unknown = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if name.startswith(policy.family.untrained):
            continue
        if target not in known:
            unknown.append(name)
        elif pattern is not None:
            dtype = targets[target].dtype
            one = joined.setdefault(target, deepcopy(by_pattern[pattern]))
            one.add_tensor(target, name, pattern, partial(_read_as, stored[name], dtype))  # pyright: ignore[reportArgumentType]
        elif target not in without:
            yield target, stored[name]
    require_fit(policy.folder, "also hold", unknown)
    for target in list(joined):
        for name, value in joined.pop(target).convert(target, model=model, config=model.config).items():
            yield name, value[0] if isinstance(value, list) else value


def _read_as(stored: Stored, dtype: torch.dtype) -> Tensor:
    return read_tensor(stored).to(dtype)
