"""Adapters that travel to a server as they are, over a base that it holds once (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from foveate.encoding.family import ServedAs
from foveate.models.lora import ADAPTER, adapted_layers, plain_name
from foveate.models.policy import Policy
from foveate.rollout.server.process import Server

logger = logging.getLogger(__name__)

AdapterTransfer = Literal["auto", "merged"]
"""How adapters are published: as they are where the server takes them, or always merged into the weights."""


@dataclass(frozen=True, slots=True)
class SeparateAdapters:
    """Adapters that are not merged into the weights that are published.

    layers: the layers that they are in; changing: the names, without adapters' own (`plain_name`), of all that training
    changes and a publish holds, the matrices of these layers among them; rank, alpha: those of every layer."""

    layers: frozenset[str]
    changing: frozenset[str]
    rank: int
    alpha: float

    @property
    def targets(self) -> list[str]:
        """The last names of the layers."""
        return sorted({layer.rpartition(".")[2] for layer in self.layers})

    @property
    def config(self) -> dict[str, Any]:
        """As peft has it."""
        return {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "target_modules": self.targets}


def adapter_name(version: int) -> str:
    """The name of an adapter in a server: another one for each version, which is part of the keys of prefixes."""
    return f"adapter-{version}"


def loaded_adapters(server: Server, timeout_s: float) -> list[str]:
    """The names of the adapters that a server of vLLM or SGLang has."""
    models = server.call("GET", "/v1/models", timeout_s=timeout_s)["data"]
    return [model["id"] for model in models if model["parent"]]


def is_matrix(name: str) -> bool:
    """Whether a published tensor is a matrix of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def all_adapters(model: nn.Module) -> SeparateAdapters | None:
    """All adapters of a model and what else trains, for another process that has the same layers; None without any."""
    layers = adapted_layers(model)
    trained = (plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return _separate(layers, trained) if layers else None


def language_adapters(policy: Policy) -> SeparateAdapters | None:
    """The adapters of the language model, which servers can apply by themselves; None without any. What trains beside
    them changes in full, with its own adapters merged, and part by part, since servers fuse layers."""
    part_of = policy.family.part_of
    layers = {name: layer for name, layer in adapted_layers(policy.model).items() if part_of(name) == "language"}
    if not layers:
        return None
    parameters = [(plain_name(name), parameter) for name, parameter in policy.model.named_parameters()]
    trained = {name for name, parameter in parameters if parameter.requires_grad}
    matrices = {name for name in trained if is_matrix(name) and name.partition(".lora_")[0] in layers}
    parts = {part_of(name) for name in trained - matrices}
    return _separate(
        layers, matrices | {name for name, _ in parameters if part_of(name) in parts and not is_matrix(name)}
    )


def served_adapters(
    policy: Policy, engine: str, served: ServedAs, wanted: AdapterTransfer, largest_rank: float = math.inf
) -> SeparateAdapters | None:
    """The adapters of a policy that a server applies by itself. None for a policy without adapters, where they are
    `wanted` merged, and, with the reason in the log, where the server cannot apply them."""
    if wanted == "merged" or not adapted_layers(policy.model):
        return None
    adapters, reason = language_adapters(policy), served.no_adapters
    if adapters is None:
        reason = "those of the language model alone are applied by servers, and it has none"
    elif adapters.rank > largest_rank:
        reason = f"their rank of {adapters.rank} is above {largest_rank}, the largest that the server takes"
    if reason:
        logger.warning("engine %s: adapters are published merged into the weights: %s", engine, reason)
        return None
    return adapters


def _separate(layers: Mapping[str, Any], changing: Iterable[str]) -> SeparateAdapters:
    layer = next(iter(layers.values()))
    return SeparateAdapters(frozenset(layers), frozenset(changing), layer.r[ADAPTER], layer.lora_alpha[ADAPTER])
