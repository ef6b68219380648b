"""The engine of a run from its settings, and the proof that it has the trainer's weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError
from foveate.models.policy import Policy
from foveate.registry import bind, resolve
from foveate.rollout import ENGINES
from foveate.rollout.check import check_engine
from foveate.rollout.engine import Engine
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.engine import ServedEngine
from foveate.rollout.server.weights import served_weights


def choose_engine(
    rollout: RolloutSettings,
    max_prompt_tokens: int,
    *,
    asynchronous: bool = False,
    dtype: str | None = None,
    given: Mapping[str, Any] = {},
) -> Callable[..., Any]:
    """A function that makes the engine from (policy, decode, *, version), with `rollout.engine_settings` filled in:
    they are the keyword-only arguments of the engine's class. An engine that asks for `longest` is told the tokens of
    the longest prompt with its answer. `given`: more arguments, for engines that know them. `asynchronous`: it answers
    while the policy learns, so that the native one gets weights of its own; and so it does to compute in another
    `dtype`.

    Raises ConfigError for whatever does not fit; nothing is started yet."""
    make: Any = resolve(ENGINES, rollout.engine, "engine")
    function = make.__init__ if inspect.isclass(make) else make
    keywords = bind(function, rollout.engine_settings, f"engine {rollout.engine}").keywords
    known = inspect.signature(function).parameters
    if given.get("record_experts") and ("record_experts" not in known or "record_experts" in rollout.engine_settings):
        raise ConfigError(
            f"algorithm.router_replay: engine {rollout.engine} does not tell which experts it chose; use native, vllm "
            "or sglang, without record_experts in rollout.engine_settings"
        )
    given = {"longest": max_prompt_tokens + rollout.max_tokens, **given}
    if keywords.get("shared") and (asynchronous or "device" in given):
        what = "answers while the policy learns" if asynchronous else "has devices of its own"
        raise ConfigError(f"rollout.engine_settings.shared: the engine {what}; leave it out")
    keywords = {**{name: value for name, value in given.items() if name in known}, **keywords}
    if (asynchronous or dtype is not None) and inspect.isclass(make) and issubclass(make, NativeEngine):
        own = {name: value for name, value in keywords.items() if name != "own_weights"}
        return partial(make.copy_of, dtype=dtype, **own)
    return partial(make, **keywords)


def place_of_policy(rollout: RolloutSettings, device: str) -> str:
    """Where the policy of an engine in a process of its own stands: in host memory if it is only sent on."""
    return "cpu" if _is_served(rollout) else device


def keeps_adapters(rollout: RolloutSettings) -> bool:
    """Whether the policy of an engine in a process of its own has adapters as the trainer's has, for servers that may
    apply them by themselves; else it gets them merged."""
    return _is_served(rollout) and rollout.engine_settings.get("adapters") != "merged"


def _is_served(rollout: RolloutSettings) -> bool:
    make: Any = resolve(ENGINES, rollout.engine, "engine")
    return inspect.isclass(make) and issubclass(make, ServedEngine)


def weights_for(engine: Engine, policy: Policy) -> Iterable[tuple[str, Tensor]]:
    """The weights of a policy that an engine takes over at a publish."""
    if isinstance(engine, NativeEngine):
        return policy.model.named_parameters()
    return served_weights(policy.model, engine.adapters if isinstance(engine, ServedEngine) else None)


class WeightCheck:
    """Compares an engine with the trainer when it is made, and after every `rollout.check_every` publishes; a
    difference ends the run. The native engine computes with the trainer's own tensors and needs none."""

    def __init__(self, engine: Engine, policy: Policy, encoder: Encoder, rollout: RolloutSettings) -> None:
        self._engine, self._policy, self._encoder = engine, policy, encoder
        self._temperature = rollout.temperature
        self._every = 0 if isinstance(engine, NativeEngine) else rollout.check_every
        self._published = 0
        if self._every:
            self._check()

    def after_publish(self) -> dict[str, float]:
        """Metrics of the check, where one is due."""
        self._published += 1
        if not self._every or self._published % self._every:
            return {}
        return {"engine/check": self._check()}

    def _check(self) -> float:
        return check_engine(self._engine, self._policy, self._encoder, self._temperature, self._engine.version)
