"""Low-rank adapters through peft: put in after loading, merged into the weights when the model is saved.

LoRA (arXiv 2106.09685): a linear layer W becomes W + alpha / rank * B A, with B = 0 at the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.config.model import LoraSettings
from foveate.errors import ConfigError
from foveate.models.adapters import load_adapter
from foveate.models.policy import Policy, freeze_except
from foveate.models.quantize import dequantized, owner_of, quantized_layers
from foveate.models.sharded import put

ADAPTER = "default"
"""What peft calls an adapter that has no name."""
_WITHOUT_TARGETS = ("vision", "language")
"""The parts whose linear layers get adapters when no targets are named; the projector is small and trains in full."""


def train_parts(policy: Policy, parts: Sequence[str], lora: LoraSettings | None) -> None:
    """Say what trains: these parts, or the adapters in them. Raises as `freeze_except` and `add_adapters`, and
    ConfigError for a part that would train in full and whose layers are quantised."""
    freeze_except(policy, parts)
    if lora is not None:
        add_adapters(policy, lora, parts)
    adapted = {policy.family.part_of(name) for name in adapted_layers(policy.model)}
    for name in quantized_layers(policy.model):
        if (part := policy.family.part_of(name)) in set(parts) - adapted:
            raise ConfigError(
                f"model.quantization: the linear layers of {part} are frozen, and it has no adapters; give it some by "
                f"model.lora, or leave {part} out of model.trainable"
            )


def add_adapters(policy: Policy, settings: LoraSettings, modules: Sequence[str]) -> None:
    """Put adapters into linear layers of the parts `modules`, and say what trains: in a part with adapters these alone
    (the head belongs to the language model here), else the part in full. Experts of mixture models are no linear layers
    and get none.

    Raises ConfigError where peft is missing, and for a target that no linear layer of these parts is called; DataError
    for an adapter to begin from that does not fit (`foveate.models.adapters.load_adapter`).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("model.lora needs peft; install it by: pip install 'foveate[lora]'") from error
    layers = [name for name, module in policy.model.named_modules() if isinstance(module, nn.Linear)]
    linear = {name: part for name in layers if (part := policy.family.part_of(name)) in modules}
    called = {name.rpartition(".")[2] for name in linear}
    unknown = [target for target in settings.targets or () if target not in called]
    if unknown:
        raise ConfigError(
            f"model.lora.targets: no linear layer of {', '.join(modules)} is called {unknown[0]}; "
            f"there are {', '.join(sorted(called))}"
        )
    if settings.targets is None:
        chosen = [name for name, part in linear.items() if part in _WITHOUT_TARGETS]
    else:
        chosen = [name for name in linear if name.rpartition(".")[2] in settings.targets]
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    root = nn.ModuleDict({"policy": policy.model})  # of a model that it knows, peft would adapt experts as well
    targets = [f"policy.{name}" for name in chosen]
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    inject_adapter_in_model(config, root)  # freezes all but the adapters
    adapted = {linear[name] for name in chosen}
    adapted |= {"head"} if "language" in adapted else set()
    for name, parameter in policy.model.named_parameters():
        if name in trained and policy.family.part_of(name) not in adapted:
            parameter.requires_grad_(True)
    if not policy.is_meta:
        begin_adapters(policy, settings)


def with_adapters(load: Callable[[], Policy], parts: Sequence[str], lora: LoraSettings) -> Policy:
    """A policy with the adapters of one that trains these parts, to be given their values."""
    policy = load()
    train_parts(policy, parts, lora.model_copy(update={"adapter": None}))
    return policy


def begin_adapters(policy: Policy, settings: LoraSettings | None) -> None:
    """The adapters of a policy that has memory as a run begins with them: new ones, or those of `settings.adapter`."""
    reset_adapters(policy.model)
    if settings is not None and settings.adapter is not None:
        load_adapter(policy, settings, settings.adapter)


@torch.no_grad()
def reset_adapters(model: nn.Module) -> None:
    """The adapters as they start: A uniform as PyTorch makes linear layers, the same on all ranks, and B = 0."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        first, second = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        bound = first.shape[1] ** -0.5
        put(first, torch.empty(first.shape).uniform_(-bound, bound, generator=generator))
        second.zero_()


def trains_adapters_only(model: nn.Module) -> bool:
    """Whether the model with its adapters off is what it was before training."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(".lora_" in name for name in trained)


@contextmanager
def adapters_weighed(model: nn.Module, weight: float | Tensor) -> Iterator[None]:
    """The adapters count so many times: with 0 the model is what it was before they trained; (T, 1) says it for each
    token of a row. (peft's own switch also says of their weights that they need no gradient, which FSDP takes over for
    good.)"""
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.set_scale(ADAPTER, weight)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.set_scale(ADAPTER, 1.0)


def merged_state(
    model: nn.Module, *, apart: Container[str] = (), only: Callable[[str], bool] | None = None
) -> dict[str, Tensor]:
    """The weights under the names of the model without adapters (`plain_name`), with the adapters merged into them;
    those that are quantised as the numbers that their layers multiply with.

    apart: layers that stay as they are, with the matrices of their adapters beside them; only: whether a name is asked
    for at all."""
    layers, quantized = adapted_layers(model), quantized_layers(model)
    state = {}
    for name, tensor in model.state_dict().items():
        plain, (owner, is_adapted, rest) = plain_name(name), name.partition(".base_layer.")
        layer, is_matrix, _ = name.partition(".lora_")
        if (only is not None and not only(plain)) or (is_matrix and layer not in apart):
            continue
        frozen = owner_of(name, quantized)
        if frozen is not None and not is_matrix and not name.endswith(".bias"):
            if name != f"{frozen}.weight":
                continue  # its scales
            tensor = dequantized(quantized[frozen])
        if is_adapted and rest == "weight" and owner not in apart:
            tensor = tensor + layers[owner].get_delta_weight(ADAPTER).detach().to(tensor.dtype)
        state[plain] = tensor
    return state


def plain_name(name: str) -> str:
    """The name of a tensor of a model with adapters: that of the model without, or peft's for a matrix in a file."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters. Nothing is imported for a model without."""
    return {
        name.removesuffix(".lora_A"): model.get_submodule(name.removesuffix(".lora_A"))
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    }


def weighs_tokens(policy: Policy) -> bool:
    """Whether the adapters see the tokens of a row and nothing else, so that they can be weighed for each."""
    parts = {policy.family.part_of(f"{name}.weight") for name in adapted_layers(policy.model)}
    return parts == {"language"}


def frozen_copy(policy: Policy, again: Callable[[], Policy], lora: LoraSettings | None) -> Policy:
    """The model before training, without adapters: the policy itself, to be asked with its adapters off, where nothing
    but these learns; else a copy, read `again` where they are not new."""
    if trains_adapters_only(policy.model):
        return policy
    is_start = lora is None or lora.adapter is None
    return replace(policy, model=(copy.deepcopy(policy.model) if is_start else again().model).requires_grad_(False))
