"""The engines of all workers as one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Self

from foveate.cluster.base import WorkerGroup, broadcast, scatter_gather
from foveate.cluster.rank_engine import HasEngine, RankEngine, RankEngines
from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Observe, Request, Weights, in_order
from foveate.rollout.rounds import stream_in_rounds


class ColocatedEngines:
    """The `Engine` of a run whose workers have an engine each. Answers do not depend on who gives them."""

    def __init__(self, workers: WorkerGroup[HasEngine]) -> None:
        self.version = -1
        self._engines = RankEngines(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or self._engines.size == 1:  # several ranks end with their processes, which may be gone already
            self.close()

    def close(self) -> None:
        broadcast(self._engines, RankEngine.close)

    def start(self, new_engine: Callable[..., Any], encoder: Encoder, rollout: RolloutSettings, version: int) -> None:
        """Each worker makes its engine by `new_engine` and checks that it has the weights of `version`."""
        broadcast(self._engines, RankEngine.start, new_engine, encoder, rollout, version)
        self.version, self._stop_ids = version, encoder.family.stop_ids

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> list[tuple[Answer, ...]]:
        if observe is not None:
            return in_order(self.stream(requests, sampling, observe), requests)
        costs = [len(request.prompt) + float(sampling.samples * sampling.max_tokens) for request in requests]
        return scatter_gather(self._engines, RankEngine.generate, requests, costs, sampling)

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        """Groups as they finish, of a cluster of one rank: its engine may answer while its worker trains. Those of
        several ranks come all at once, turn by turn."""
        if self._engines.size > 1:
            if observe is not None:
                yield from stream_in_rounds(self.stream, requests, sampling, observe, self._stop_ids)
            else:
                yield from enumerate(self.generate(requests, sampling))
            return
        [groups] = self._engines.call(RankEngine.stream, [(requests, sampling, observe)])
        yield from groups

    def pause(self) -> None:
        broadcast(self._engines, RankEngine.pause)

    def resume(self) -> None:
        broadcast(self._engines, RankEngine.resume)

    def sleep(self) -> None:
        broadcast(self._engines, RankEngine.sleep)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return broadcast(self._engines, RankEngine.prompt_ids, prompt)[0]

    def routed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts of a Flash model with the tiles compressed that its router chooses, by the published weights."""
        return scatter_gather(self._engines, RankEngine.routed, prompts, [float(len(one)) for one in prompts])

    def publish(self, version: int, _weights: Weights = (), /) -> dict[str, float]:
        """Every worker's engine takes over the weights of its worker. The metrics of a check, if one is due."""
        checked = broadcast(self._engines, RankEngine.publish, version)[0]
        self.version = version
        return checked
