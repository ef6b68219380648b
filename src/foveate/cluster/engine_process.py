"""An engine in a process of its own, and how a cluster starts and calls such processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Concatenate, Protocol

from foveate.cluster.local import P, R
from foveate.cluster.rank_engine import routed_by
from foveate.cluster.weights import Incoming, Outgoing, Packet
from foveate.models.policy import Policy
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.build import weights_for
from foveate.rollout.engine import Engine, Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.adapters import all_adapters

EngineCall = Callable[Concatenate["EngineProcess", P], R]
"""A method of `EngineProcess`, such as `EngineProcess.publish`."""
Finished = tuple[list[tuple[int, tuple[Answer, ...]]], bool]
"""Groups with the indices of their requests, and whether they were the last ones."""


class EngineLostError(Exception):
    """The process of an engine died, or answers no more."""


class EngineProcesses(Protocol):
    """Processes, each with an `EngineProcess`, numbered from 0."""

    size: int

    def start(self, number: int, build: Callable[[], EngineProcess]) -> Future[Any]:
        """Start a process, in the place of an earlier one of this number if there was one."""
        ...

    def ask(self, number: int, method: EngineCall[P, R], *arguments: P.args, **keywords: P.kwargs) -> Future[R]:
        """Call a method of an engine. The future raises EngineLostError where its process is gone."""
        ...

    def share(self, packet: Any) -> Any:
        """A packet that several processes will be given, as an argument for `ask`."""
        ...

    def end(self, number: int) -> None:
        """Kill a process that does not answer; what it is doing goes to the log."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


class EngineProcess:
    """An engine beside a policy of its own, which takes the trainers' weights in.

    The engine stands on that policy as it would on the policy of a run in one process: the native one reads its very
    tensors, and a served one sends them on, also to servers that die and start again.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        new_engine: Callable[..., Any],
        decode: Callable[[tuple[int, ...]], str],
    ) -> None:
        self._policy = load()
        adapters = all_adapters(self._policy.model)
        if adapters is None:  # else what trains tells what travels
            self._policy.model.requires_grad_(False)
        self._make = partial(new_engine, self._policy, decode)
        self._engine: Engine | None = None
        self._incoming, self._outgoing = Incoming(self._policy.model, adapters), Outgoing(self._policy.model)
        self._current = 0, _Round()

    @property
    def _made(self) -> Engine:
        assert self._engine is not None, "publish comes first"
        return self._engine

    # --------------------------------------------------------------------------------------------------------- weights

    def take(self, packet: Packet) -> None:
        """Take weights in; what is being answered is aborted."""
        self._current[1].stop()
        self._incoming.take(packet)

    def publish(self, version: int) -> None:
        """The packets are all there: answer with them from now on. The engine is made when the first weights are."""
        self._incoming.finish()
        if self._engine is None:
            self._engine = self._make(version=version)
        else:
            self._engine.publish(version, weights_for(self._engine, self._policy))

    def packet(self, first: bool) -> Packet | None:
        """The weights of the last `publish`, for another engine that lost its own."""
        return self._outgoing.packet(first)

    # --------------------------------------------------------------------------------------------------------- answers

    def begin(
        self, ticket: int, requests: Sequence[Request], sampling: SamplingParams, missing: Sequence[int]
    ) -> Finished:
        """Begin to answer those requests whose indices are `missing`. The native engine answers all of them: then they
        are batched as they were before, and not a bit differs. Nothing has finished yet."""
        engine = self._made
        self._current[1].stop()
        chosen = [*range(len(requests))] if isinstance(engine, NativeEngine) else [*missing]
        self._current = ticket, _Round()
        self._current[1].begin(engine, [requests[i] for i in chosen], sampling, chosen)
        return [], False

    def more(self, patience: float) -> Finished:
        """The groups that finished since the last call; waits up to `patience` seconds for it. Raises what the engine
        raised."""
        return self._current[1].more(patience)

    def pause(self) -> None:
        self._made.pause()

    def resume(self) -> None:
        self._made.resume()

    def stop(self, ticket: int) -> None:
        """Abort what was begun with this ticket, and wait until that is done."""
        current, under_way = self._current  # another one may begin meanwhile
        if ticket == current:
            under_way.stop()

    # ------------------------------------------------------------------------------------------------------- the rest

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self._made.prompt_ids(prompt)

    def routed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return routed_by(self._made, prompts)

    def close(self) -> None:
        self._current[1].stop()
        if self._engine is not None:
            self._engine.close()


class _Round:
    """Requests that a thread has answered, until all are or it is stopped."""

    def __init__(self) -> None:
        self._found: queue.SimpleQueue[tuple[int, tuple[Answer, ...]] | BaseException | None] = queue.SimpleQueue()
        self._is_stopped = False
        self._starting = threading.Lock()  # the engine may be closed by another thread just then
        self._thread: threading.Thread | None = None

    def begin(
        self, engine: Engine, requests: Sequence[Request], sampling: SamplingParams, indices: Sequence[int]
    ) -> None:
        with self._starting:
            self._thread = threading.Thread(target=self._run, args=(engine, requests, sampling, indices), daemon=True)
            self._thread.start()

    def _run(
        self, engine: Engine, requests: Sequence[Request], sampling: SamplingParams, indices: Sequence[int]
    ) -> None:
        try:
            groups: Any = engine.stream(requests, sampling)
            try:
                for index, group in groups:
                    self._found.put((indices[index], group))
                    if self._is_stopped:
                        break
            finally:
                groups.close()
        except BaseException as error:
            self._found.put(error)
        else:
            self._found.put(None)

    def more(self, patience: float) -> Finished:
        groups: list[tuple[int, tuple[Answer, ...]]] = []
        try:
            found = self._found.get(timeout=patience)
            while True:
                if found is None:
                    return groups, True
                if isinstance(found, BaseException):
                    raise found
                groups.append(found)
                found = self._found.get_nowait()
        except queue.Empty:
            return groups, False

    def stop(self) -> None:
        self._is_stopped = True
        with self._starting:
            thread = self._thread
        if thread is not None:
            thread.join()
