"""The engine of one rank of training, which gets the weights of all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Concatenate, Protocol

from torch import Tensor

from foveate.cluster.base import WorkerGroup
from foveate.cluster.local import R
from foveate.cluster.weights import Outgoing, Packet, PacketForm
from foveate.config.model import ModelSettings
from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError
from foveate.models.flash_routes import routed_prompts
from foveate.models.policy import Policy, load_policy
from foveate.models.sharded import allocate, meta_policy
from foveate.parallel.ranks import Ranks
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.build import WeightCheck, weights_for
from foveate.rollout.engine import Engine, Observe, Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.rounds import stream_in_rounds
from foveate.rollout.server.weights import served_weights


class RankEngine:
    """Holds the engine of a rank that trains `policy`. There is none before `start`."""

    def __init__(self, policy: Policy, model: ModelSettings, ranks: Ranks | None) -> None:
        """`ranks`: None where this rank is the only one."""
        self._policy, self._model, self._ranks = policy, model, ranks
        self._engine: Engine | None = None
        self._asynchronous = False
        self._check: WeightCheck | None = None
        self._outgoing = Outgoing(policy.model, keeps=ranks is None or ranks.is_first)

    def start(self, new_engine: Callable[..., Any], encoder: Encoder, rollout: RolloutSettings, version: int) -> None:
        """Make the engine of this rank. One that is alone may read the very weights that are trained."""
        if self._ranks is None:
            self._engine = engine = new_engine(self._policy, encoder.decode, version=version)
            if not isinstance(engine, Engine):
                raise ConfigError(f"engine {rollout.engine}: it lacks a method of foveate.rollout.engine.Engine")
            self._asynchronous = rollout.staleness > 0
            if self._asynchronous:
                self.publish(version)
            self._check = WeightCheck(engine, self._policy, encoder, rollout)
            return
        computed = self._ranks.cluster.dtype or self._model.dtype
        own = meta_policy(self._model.path, attention=self._model.attention, dtype=computed)
        allocate(own, own.model, self._ranks.cluster.kind)  # what it holds comes with the first publish
        own.model.requires_grad_(False)
        self._engine = new_engine(own, encoder.decode, version=version, own_weights=True)
        self.publish(version)

    @property
    def _started(self) -> Engine:
        assert self._engine is not None, "start comes first"
        return self._engine

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[tuple[Answer, ...]]:
        return self._started.generate(requests, sampling) if requests else []

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """As `Engine.stream`; turn by turn where the engine does not say that it knows `observe`."""
        engine = self._started
        if observe is None:
            return engine.stream(requests, sampling)
        if "observe" in inspect.signature(engine.stream).parameters:
            return engine.stream(requests, sampling, observe)
        return stream_in_rounds(engine.stream, requests, sampling, observe, self._policy.family.stop_ids)

    def pause(self) -> None:
        self._started.pause()

    def resume(self) -> None:
        self._started.resume()

    def sleep(self) -> None:
        self._started.sleep()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self._started.prompt_ids(prompt)

    def routed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return routed_by(self._started, prompts)

    def publish(self, version: int) -> dict[str, float]:
        """Let the engine of this rank take over the weights of all; its metrics, and those of a check of it, if one is
        due."""
        weights = self._published() if self._ranks is None else served_weights(self._policy.model)
        found = self._started.publish(version, weights) or {}
        return {**found, **(self._check.after_publish() if self._check is not None else {})}

    def packet(self, first: bool, form: PacketForm) -> Packet | None:
        """For engines elsewhere, the next part of the weights, or the `first` one: all ranks gather it together, and
        the first rank has it. None behind the last one."""
        return self._outgoing.packet(first, form)

    def _published(self) -> Iterable[tuple[str, Tensor]]:
        """The weights for the engine. One that answers while the policy trains gets copies: should it die and start
        again, the policy's own tensors have changed."""
        weights = weights_for(self._started, self._policy)
        if not self._asynchronous or isinstance(self._engine, NativeEngine):
            return weights
        return ((name, tensor.detach().clone()) for name, tensor in weights)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def routed_by(engine: Engine, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts of a Flash model, routed by the weights that an engine samples with. Raises ConfigError for an engine
    that does not have them in this process."""
    if not isinstance(engine, NativeEngine):
        raise ConfigError(
            f"rollout.engine: {type(engine).__name__} does not say which tiles of a Flash model it compresses; use "
            "native"
        )
    return routed_prompts(engine.policy, prompts)


class HasEngine(Protocol):
    """A worker with an engine."""

    @property
    def engine(self) -> RankEngine: ...


class RankEngines:
    """The engines of all workers, called as workers are (`WorkerGroup[RankEngine]`). Each works on its own, so that no
    two share a row of tokens."""

    row = 1

    def __init__(self, workers: WorkerGroup[HasEngine]) -> None:
        self.size, self._workers = workers.size, workers

    def call(
        self, method: Callable[Concatenate[RankEngine, ...], R], per_rank_arguments: Sequence[tuple[Any, ...]]
    ) -> list[R]:
        """As `WorkerGroup.call`. Arguments that are one object stay one, so that they travel once."""
        extended = {id(arguments): (method, *arguments) for arguments in per_rank_arguments}
        return self._workers.call(_of_engine, [extended[id(arguments)] for arguments in per_rank_arguments])


def _of_engine(worker: HasEngine, method: Callable[Concatenate[RankEngine, ...], R], *arguments: Any) -> R:
    return method(worker.engine, *arguments)


class InferenceWorker:
    """A rank that trains nothing: an engine with a model of its own."""

    def __init__(self, model: ModelSettings, device: str) -> None:
        how = {"attention": model.attention, "dtype": model.dtype, "device": device}
        policy = load_policy(model.path, **how, quantization=model.quantization)
        self.engine = RankEngine(policy, model, None)
