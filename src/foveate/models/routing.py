"""The routers of mixture-of-experts layers: their choices are recorded, replayed, or balanced by a loss.

A router of transformers is a module that takes hidden states (T, D) and returns (logits (T, E), weights (T, k),
experts (T, k)). It sees nothing else, so the `Routing` of a pass reaches it by two hooks: one of the layer around it,
which is given `routing=`, and one of the router itself. Both run again where gradient checkpointing computes a layer a
second time.

Replay of the sampler's experts in training: Rollout Routing Replay (R3), arXiv 2510.11370.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from foveate.errors import ConfigError

Weigh = Callable[[Any, Tensor, Tensor], Tensor]
"""(router, logits (T, E), experts (T, k)) -> their weights (T, k), as the router itself computes them."""


def _of_all(_: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Shares of the probability of these experts among each other; the softmax is over all."""
    return _shares(logits.softmax(-1, dtype=torch.float32).gather(1, experts))


def _of_all_if_asked(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """The same where `norm_topk_prob` is set, else the probabilities as they are."""
    chosen = logits.softmax(-1, dtype=torch.float32).gather(1, experts)
    return _shares(chosen) if router.norm_topk_prob else chosen


def _of_chosen(_: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """The softmax over these experts alone."""
    return logits.gather(1, experts).softmax(-1)


def _of_sigmoids(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Each expert by itself, scaled."""
    chosen = logits.sigmoid().gather(1, experts)
    if router.norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * router.routed_scaling_factor


def _shares(chosen: Tensor) -> Tensor:
    return chosen / chosen.sum(-1, keepdim=True)


ROUTERS: dict[str, Weigh] = {
    "Qwen3MoeTopKRouter": _of_all_if_asked,
    "Qwen2MoeTopKRouter": _of_all_if_asked,
    "OlmoeTopKRouter": _of_all_if_asked,
    "MixtralTopKRouter": _of_all,
    "Qwen3VLMoeTextTopKRouter": _of_all,
    "Qwen3_5MoeTopKRouter": _of_all,
    "GptOssTopKRouter": _of_chosen,
    "Glm4vMoeTextTopkRouter": _of_sigmoids,
    "Glm4MoeTopkRouter": _of_sigmoids,
}
"""How the classes of transformers weigh the experts that they have chosen."""


class Routing:
    """The choices of all routers in one pass over T tokens; layers are those with a router, in order. No dataclass:
    FSDP would give each layer a copy. `reached`: how many routers it has come to."""

    def __init__(self, replay: Tensor | None = None, *, records: bool = False, balances: bool = False) -> None:
        """replay: integers (T, layers, k), the experts to compute with; -1 where the router chooses. The router still
        weighs them, and learns by that. records, balances: whether `experts` and `load_balancing_loss` are asked for
        behind the pass."""
        self.replay, self.records, self.balances = replay, records, balances
        self.reached = 0
        self._chosen: dict[int, Tensor] = {}
        self._sums: dict[int, tuple[Tensor, Tensor, int]] = {}

    def route(self, layer: int, weigh: Callable[[Tensor, Tensor], Tensor], out: Any) -> Any:
        """The output of a router with the experts and weights to compute with."""
        logits, weights, experts = out
        self.reached += 1
        if self.balances:  # the same operations also where a layer is computed again
            probs = logits.softmax(-1, dtype=torch.float32)
            counts = probs.topk(experts.shape[1]).indices.flatten().bincount(minlength=probs.shape[1])
            self._sums.setdefault(layer, (counts.to(probs.dtype), probs.sum(0), len(probs)))
        if self.replay is not None:
            wanted = self.replay[:, layer].to(experts.dtype)
            experts = torch.where(wanted < 0, experts, wanted)
            weights = weigh(logits, experts).to(weights.dtype)
        if self.records:
            self._chosen[layer] = experts.detach()
        return logits, weights, experts

    def experts(self) -> Tensor:
        """Of all tokens (T, layers, k), int16."""
        return torch.stack([self._chosen[layer] for layer in sorted(self._chosen)], 1).to(torch.int16)

    def load_balancing_loss(self) -> Tensor:
        """E times the sum over the E experts of the share of tokens that the router sends to each, which has no
        gradient, times its mean probability, over the tokens of all layers together: Switch Transformer (arXiv
        2101.03961), equations 4 to 6, as transformers' `load_balancing_loss_func` has it for k experts a token. It is k
        where the experts are used evenly."""
        counts, probs, rows = zip(*self._sums.values(), strict=True)
        total = float(sum(rows))
        return len(probs[0]) * (torch.stack(counts).sum(0) @ torch.stack(probs).sum(0)) / total**2


class _Hooks:
    """Hooks of one layer (`before_layer`) and of its router (itself). They keep what the layer is given until the
    router has it."""

    def __init__(self, layer: int, weigh: Weigh) -> None:
        self.layer, self.weigh = layer, weigh
        self.routing: Routing | None = None

    def before_layer(self, _: nn.Module, _given: Any, named: dict[str, Any]) -> None:
        self.routing = named.get("routing")

    def __call__(self, router: Any, _: Any, out: Any) -> Any:
        routing, self.routing = self.routing, None
        if routing is None:
            return out
        return _route(routing, self.layer, self.weigh, router, out)  # pyright: ignore[reportCallIssue]


@torch.compiler.disable
def _route(routing: Routing, layer: int, weigh: Weigh, router: nn.Module, out: Any) -> Any:
    return routing.route(layer, lambda logits, experts: weigh(router, logits, experts), out)


def follow_routers(model: nn.Module, asked: str = "") -> int:
    """Let the language model of `model` take `routing=`: how many layers have a router. A model without any stays as
    it is. `asked`: the setting that needs routers; then ConfigError is raised where there are none, or unknown ones."""
    modules = dict(model.named_modules())
    found = {name: module for name, module in modules.items() if type(module).__name__ in ROUTERS}
    if asked and not found:
        mixtures = {name.rpartition(".")[0] for name in modules if name.endswith(".experts")}
        kinds = sorted({type(modules[name]).__name__ for name in mixtures})
        what = "is none"
        if kinds:
            what = f"has routers in {', '.join(kinds)} that are not known; known are {', '.join(sorted(ROUTERS))}"
        raise ConfigError(f"{asked} needs a mixture of experts, but the model {what}; leave it out")
    around = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
    for number, (name, router) in enumerate(found.items()):
        if any(isinstance(hook, _Hooks) for hook in router._forward_hooks.values()):
            continue
        hooks = _Hooks(number, ROUTERS[type(router).__name__])
        layer = max((one for one in around if name.startswith(f"{one}.")), key=len)
        modules[layer].register_forward_pre_hook(hooks.before_layer, with_kwargs=True)
        router.register_forward_hook(hooks)
    return len(found)


def router_layers(model: nn.Module, asked: str) -> list[int]:
    """The numbers, among all layers of the language model, of those that have a router, in order. `asked` and errors as
    of `follow_routers`."""
    follow_routers(model, asked)
    names = (name for name, module in model.named_modules() if type(module).__name__ in ROUTERS)
    return [int(re.findall(r"\.layers\.(\d+)\.", name)[-1]) for name in names]
