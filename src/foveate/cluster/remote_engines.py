"""Engines in processes of their own, as one: given requests and weights, checked, and started again when they die."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from foveate.cluster.base import WorkerGroup, broadcast
from foveate.cluster.engine_process import EngineCall, EngineLostError, EngineProcess, EngineProcesses
from foveate.cluster.local import P, R
from foveate.cluster.rank_engine import HasEngine, RankEngine, RankEngines
from foveate.cluster.weights import PacketForm
from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.errors import RankLost
from foveate.models.policy import Policy
from foveate.parallel.balance import balance
from foveate.records import Answer, PackedGroup, Prompt, SamplingParams
from foveate.rollout.check import compare_engine
from foveate.rollout.engine import Observe, Request, Weights, in_order
from foveate.rollout.rounds import stream_in_rounds

logger = logging.getLogger(__name__)

Groups = Generator[tuple[int, tuple[Answer, ...]]]

_LOOK = 2.0
"""Seconds after which an engine says that nothing has finished."""
_STARTS = 2
"""Starts of an engine without a finished group in between; then the whole run goes back to its last checkpoint."""


@dataclass(slots=True)
class _Share:
    """The requests that one engine answers, with their indices among all, those that are missing (their places in the
    share), and when the last group came."""

    requests: list[Request]
    indices: list[int]
    missing: set[int]
    heard: float


class RemoteEngines:
    """The `Engine` of a run whose engines have processes of their own.

    One that dies, or finishes no group for `timeout` seconds, is started again, gets the weights of the last publish
    and answers what is missing of its share: no group is lost or doubled. Its weights come from the trainers; where
    these train meanwhile (`asynchronous`), from another engine, and without one the run goes back to its last
    checkpoint.
    """

    def __init__(
        self,
        processes: EngineProcesses,
        workers: WorkerGroup[HasEngine],
        load: Callable[[], Policy],
        logprobs: Callable[[list[PackedGroup]], list[Tensor]],
        *,
        timeout: float,
        asynchronous: bool,
        dtype: torch.dtype,
        adapters: bool = False,
    ) -> None:
        """`load` makes the policy on which an engine stands; `logprobs` are those of the trainers, one vector for each
        group; `dtype` is the coarsest that engines and trainers compute in; `adapters`: that policy has the adapters
        of the trainers, and gets what training changes alone when it has had all."""
        self.version = -1
        self._processes, self._ranks, self._load = processes, RankEngines(workers), load
        self._logprobs = logprobs
        self._forms: tuple[PacketForm, PacketForm] = ("separate", "changing") if adapters else ("merged", "merged")
        self._timeout, self._asynchronous, self._dtype = timeout, asynchronous, dtype
        self._every = range(processes.size)
        self._fails = [0] * processes.size
        self._losses = self._publishes = self._ticket = self._bytes = 0
        self._is_paused = False
        self._reviving = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._processes.close()

    # -------------------------------------------------------------------------------------------------- the engine seam

    def start(self, new_engine: Callable[..., Any], encoder: Encoder, rollout: RolloutSettings, version: int) -> None:
        """Start all engines, each made by `new_engine`, with the trainers' weights, and prove that they have them."""
        self._build = partial(EngineProcess, self._load, new_engine, encoder.decode)
        self._encoder, self._rollout = encoder, rollout
        started = [self._processes.start(number, self._build) for number in self._every]
        lost = self._failing(dict(zip(self._every, started, strict=True)))
        self._publish(version, lost, self._forms[0])
        if rollout.check_every:
            self._prove()

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> list[tuple[Answer, ...]]:
        return in_order(self.stream(requests, sampling, observe), requests)

    def stream(self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None) -> Groups:
        """Groups as they finish, turn by turn. Answers do not depend on who gives them."""
        if observe is not None:
            return stream_in_rounds(self.stream, requests, sampling, observe, self._encoder.family.stop_ids)
        costs = [len(request.prompt) + float(sampling.samples * sampling.max_tokens) for request in requests]
        return self._answers(requests, balance(costs, self._processes.size), sampling)

    def pause(self) -> None:
        self._tell(EngineProcess.pause, paused=True)

    def resume(self) -> None:
        self._tell(EngineProcess.resume, paused=False)

    def sleep(self) -> None:
        """Nothing: their devices are their own."""

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self._prompt_ids_of(0, prompt)

    def routed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts of a Flash model with the tiles compressed that its router chooses, by the published weights."""
        return self._answer(0, EngineProcess.routed, prompts)

    def publish(self, version: int, _weights: Weights = (), /) -> dict[str, float]:
        """Every engine takes over the trainers' weights. Metrics: how many engines were lost so far, the bytes that
        each engine got, and those of a check, if one is due."""
        self._publish(version, {}, self._forms[1])
        self._publishes += 1
        due = self._rollout.check_every and self._publishes % self._rollout.check_every == 0
        found = {"engine/lost": float(self._losses), "engine/publish_bytes": float(self._bytes)}
        return {**found, **({"engine/check": self._prove()} if due else {})}

    def _tell(self, method: Callable[[EngineProcess], None], *, paused: bool) -> None:
        """An engine that is lost does not matter here: another one is told when it has been started."""
        with self._reviving:
            self._is_paused = paused
            wait([self._processes.ask(number, method) for number in self._every], self._timeout)

    # ---------------------------------------------------------------------------------------------------------- answers

    def _answers(self, requests: Sequence[Request], dealt: Sequence[list[int]], sampling: SamplingParams) -> Groups:
        now = time.monotonic()
        shares = {
            number: _Share([requests[i] for i in own], own, {*range(len(own))}, now)
            for number, own in enumerate(dealt)
            if own
        }
        self._ticket = ticket = self._ticket + 1
        asked = {self._begin(number, share, sampling): number for number, share in shares.items()}
        try:
            while asked:
                done, _ = wait(asked, timeout=_LOOK, return_when=FIRST_COMPLETED)
                self._end_hung({number: shares[number] for number in asked.values()})
                for future in done:
                    number = asked.pop(future)
                    share = shares[number]
                    try:
                        groups, ended = future.result()
                    except EngineLostError as error:
                        self._revive(number, error, self._source(number))
                        share.heard = time.monotonic()
                        asked[self._begin(number, share, sampling)] = number
                        continue
                    fresh = [(place, group) for place, group in groups if place in share.missing]
                    share.missing.difference_update(place for place, _ in fresh)
                    if fresh:
                        share.heard, self._fails[number] = time.monotonic(), 0
                    if share.missing and not ended:  # those that a pause left out are not begun
                        asked[self._processes.ask(number, EngineProcess.more, _LOOK)] = number
                    yield from ((share.indices[place], group) for place, group in fresh)
        finally:
            for number in asked.values():
                self._processes.ask(number, EngineProcess.stop, ticket)

    def _begin(self, number: int, share: _Share, sampling: SamplingParams) -> Future[Any]:
        return self._processes.ask(
            number, EngineProcess.begin, self._ticket, share.requests, sampling, sorted(share.missing)
        )

    def _end_hung(self, shares: dict[int, _Share]) -> None:
        for number, share in shares.items():
            if time.monotonic() - share.heard > self._timeout:
                logger.error("engine %d has finished no group for %g s (cluster.timeout)", number, self._timeout)
                self._processes.end(number)
                share.heard = time.monotonic()

    # ---------------------------------------------------------------------------------------------------------- weights

    def _publish(self, version: int, lost: dict[int, EngineLostError], form: PacketForm) -> None:
        """Weights of the trainers to all engines, which are at rest; those that are `lost` are started again first."""
        self.version = version
        source = partial(self._trainers, form=form)
        lost = lost | self._send([number for number in self._every if number not in lost], source)
        for number, error in lost.items():
            self._revive(number, error, self._trainers)

    def _send(self, numbers: Sequence[int], source: Callable[[bool], Any]) -> dict[int, EngineLostError]:
        """Packet by packet, the next one gathered while one is taken in. Returns the engines that were lost."""
        lost: dict[int, EngineLostError] = {}
        packet, self._bytes = source(True), 0
        while packet is not None:
            self._bytes += packet.data.nbytes
            shared = self._processes.share(packet)
            taken = {
                number: self._processes.ask(number, EngineProcess.take, shared)
                for number in numbers
                if number not in lost
            }
            del packet, shared
            packet = source(False)
            lost |= self._failing(taken)
        told = {n: self._processes.ask(n, EngineProcess.publish, self.version) for n in numbers if n not in lost}
        return lost | self._failing(told)

    def _trainers(self, first: bool, form: PacketForm | None = None) -> Any:
        """A packet of the trainers, of all that an engine needs unless `form` says otherwise."""
        return broadcast(self._ranks, RankEngine.packet, first, form or self._forms[0])[0]

    def _source(self, number: int) -> Callable[[bool], Any]:
        """Who has the weights of the last publish when an engine has been lost while it answered."""
        if not self._asynchronous:
            return self._trainers
        others = [other for other in self._every if other != number]
        if not others:
            raise RankLost(f"engine {number} died, and its weights with it, since the trainers have learned on")
        return partial(self._answer, others[0], EngineProcess.packet)

    def _answer(self, number: int, method: EngineCall[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
        """Ask one engine; if it dies now, the run goes back to its last checkpoint."""
        try:
            return self._result(number, self._processes.ask(number, method, *arguments, **keywords))
        except EngineLostError as error:
            raise RankLost(f"engine {number} died in {method.__name__} ({error})") from error

    def _revive(self, number: int, error: Exception, source: Callable[[bool], Any]) -> None:
        """Start an engine again, with the weights of `source`."""
        with self._reviving:
            self._start_again(number, error, source)

    def _start_again(self, number: int, error: Exception, source: Callable[[bool], Any]) -> None:
        while True:
            self._fails[number] += 1
            self._losses += 1
            if self._fails[number] > _STARTS:
                raise RankLost(
                    f"engine {number} was lost {self._fails[number]} times without a finished group: {error}"
                )
            logger.warning("engine %d is lost (%s); starting it again", number, error)
            lost = self._failing({number: self._processes.start(number, self._build)})
            lost = lost or self._send([number], source)
            if not lost and self._is_paused:
                lost = self._failing({number: self._processes.ask(number, EngineProcess.pause)})
            if not lost:
                return
            error = lost[number]

    def _failing(self, futures: dict[int, Future[Any]]) -> dict[int, EngineLostError]:
        """Those engines that were lost instead of answering, when all have done either."""
        lost: dict[int, EngineLostError] = {}
        for number, future in futures.items():
            try:
                self._result(number, future)
            except EngineLostError as error:
                lost[number] = error
        return lost

    def _result(self, number: int, future: Future[R]) -> R:
        try:
            return future.result(self._timeout)
        except TimeoutError as error:
            self._processes.end(number)
            raise EngineLostError(f"it did not answer for {self._timeout:g} s (cluster.timeout)") from error

    # ------------------------------------------------------------------------------------------------------------ check

    def _prove(self) -> float:
        """Compare every engine with the trainers; the largest mean difference of log-probs, nats."""
        rest = self._logprobs, self._encoder, self._dtype, self._rollout.temperature, self.version
        return max(
            compare_engine(partial(self._generate_on, number), partial(self._prompt_ids_of, number), *rest)
            for number in self._every
        )

    def _generate_on(
        self, number: int, requests: Sequence[Request], sampling: SamplingParams
    ) -> list[tuple[Answer, ...]]:
        """All answers from one engine."""
        shares = [[*range(len(requests))] if n == number else [] for n in self._every]
        return in_order(self._answers(requests, shares, sampling), requests)

    def _prompt_ids_of(self, number: int, prompt: Prompt) -> tuple[int, ...]:
        return self._answer(number, EngineProcess.prompt_ids, prompt)
