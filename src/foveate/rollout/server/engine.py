"""An engine that is one or several server processes: routing, streaming, publishing, and starting them again."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.errors import EngineError
from foveate.models.policy import Policy
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Observe, Request, in_order
from foveate.rollout.server.adapters import SeparateAdapters
from foveate.rollout.server.launch import require_place, sent_from, visible_devices
from foveate.rollout.server.process import HOST, Counts, Server, ServerLostError
from foveate.rollout.server.routes import routes
from foveate.rollout.server.turns import GroupTurns, StreamEnd, unbegun
from foveate.rollout.server.weights import TRANSFER_S, Sender, WeightsFile, frozen_weights

logger = logging.getLogger(__name__)

_PER_SERVER = 256
"""Requests under way at one server; it queues what it cannot compute at once."""
_LOOK = 0.1
"""Seconds after which a pause is noticed at the latest."""
_RESTARTS = 2
"""Starts of one server without a single finished group in between, after which the run ends."""


class ServedEngine(ABC):
    """Groups go to servers over HTTP, a whole group to one, equal prompts to the same one, unless it is far busier.

    A server that dies, or that has work and makes no token for `stall_s`, is killed and started again, gets the
    weights of the last `publish`, and answers again what it had not finished: a group counts when all of it has arrived
    in one response. What differs between kinds of servers is in the abstract methods, and in `command` and
    `environment`, which a kind sets before it calls `start`.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    adapters: SeparateAdapters | None = None  # what is published as adapters; frozen weights go once then

    def __init__(
        self,
        kind: str,
        policy: Policy,
        decode: Callable[[tuple[int, ...]], str],
        *,
        servers: int,
        start_s: float,
        stall_s: float,
        tensor_parallel: int = 1,
        devices: list[str] | None = None,
        shared: bool = False,
        transfer: str = "broadcast",
        bucket_mb: int = 64,
        logs: str | None = None,
    ) -> None:
        """`kind`: the name of the logs; the others are those of `foveate.rollout.vllm.engine.VLLMEngine`."""
        require_place(policy, shared, devices, servers * tensor_parallel, transfer)
        self._devices = visible_devices(devices, servers)
        self._kind, self._policy, self._decode, self._transfer = kind, policy, decode, transfer
        self._bucket, self._workers = bucket_mb << 19, tensor_parallel  # two buckets are in memory at a time
        self._senders: dict[Server, Sender] = {}
        self.version = -1
        self._shared, self._sleeps = shared, False
        self.counts = Counts()
        self._start_s, self._stall_s = start_s, stall_s
        self._folder = tempfile.TemporaryDirectory(prefix="foveate-engine-")
        self.folder = Path(self._folder.name)
        self._logs = Path(logs) if logs else self.folder
        self._weights: list[tuple[str, Tensor]] = []
        self._file = WeightsFile(self.folder / "weights")
        self._pool = ThreadPoolExecutor(max_workers=_PER_SERVER * servers, thread_name_prefix="engine")
        self.servers: list[Server] = []
        self._fails = [0] * servers
        self._paused = threading.Event()
        self._close = weakref.finalize(self, _end, self.servers, self._pool, self._folder)

    # -------------------------------------------------------------------------------- how kinds of servers differ

    @abstractmethod
    def ask(self, server: Server, request: Request, sampling: SamplingParams) -> tuple[Answer, ...]:
        """All answers to one request, each stamped with the version that the server says; nothing of it is begun yet.
        Raises ServerLostError where an answer has ended in a way that is not in `finishes`."""

    @abstractmethod
    def read(self, server: Server, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt as the server's model reads it."""

    @abstractmethod
    def send(self, server: Server, version: int, weights: list[tuple[str, Tensor]]) -> None:
        """Bring weights into a server: afterwards it computes with them alone, with nothing old in any cache. With
        `adapters` those that are not among them stay, but no other adapter does."""

    @abstractmethod
    def sleep_server(self, server: Server) -> None:
        """Give back the memory of weights and caches, whose contents are void then."""

    @abstractmethod
    def wake_server(self, server: Server, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of either again."""

    @abstractmethod
    def connect(self, server: Server) -> None:
        """Let a server that has just started meet the trainer."""

    @abstractmethod
    def abort(self, server: Server) -> None:
        """Abort what the server is generating."""

    @abstractmethod
    def tokens_made(self, server: Server) -> float:
        """The server's own count of tokens so far, which grows while it works."""

    @abstractmethod
    def tokens_cached(self, server: Server) -> float:
        """The tokens of prompts so far that the server has found in its cache of prefixes, by its own count."""

    # -------------------------------------------------------------------------------------------------- the engine seam

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> list[tuple[Answer, ...]]:
        return in_order(self.stream(requests, sampling, observe), requests)

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams, observe: Observe | None = None
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        self._require_awake()
        pending: dict[Future[tuple[Answer, ...]], tuple[int, int, int]] = {}
        progress = [(time.monotonic(), -1.0)] * len(self.servers)
        look = time.monotonic() + self._stall_s / 4
        ended, begun = StreamEnd(self._paused), dict[int, list[Answer]]()

        def submit(index: int, number: int) -> None:
            server, request = self.servers[number], requests[index]
            if not request.partial_answers and observe is None:
                future = self._pool.submit(self.ask, server, request, sampling)
            else:
                own = [*request.partial_answers] or unbegun(self.version, sampling.samples)
                turns = GroupTurns(
                    index, request, begun.setdefault(index, own), partial(self._ask_one, server), self._decode,
                    () if observe is None else self._policy.family.stop_ids, observe, ended,
                    lambda: progress.__setitem__(number, (time.monotonic(), progress[number][1])),
                )  # fmt: skip
                future = self._pool.submit(turns.finish, sampling)
            pending[future] = index, number, server.starts

        try:
            for index, number in enumerate(routes([request.prompt for request in requests], len(self.servers))):
                if not self._paused.is_set():
                    submit(index, number)
            while pending:
                if self._paused.is_set():
                    yield from self._interrupt(pending, begun)
                    return
                done, _ = wait(pending, timeout=min(self._stall_s / 4, _LOOK), return_when=FIRST_COMPLETED)
                if time.monotonic() > look:
                    self._kill_stalled({number for _, number, _ in pending.values()}, progress)
                    look = time.monotonic() + self._stall_s / 4
                for future in done:
                    index, number, starts = pending.pop(future)
                    try:
                        group = future.result()
                    except ServerLostError as error:
                        self._revive(number, starts, error)
                        progress[number] = time.monotonic(), -1.0
                        self.counts.regenerated += 1
                        submit(index, number)
                        continue
                    self._fails[number] = 0
                    self.counts.groups += 1
                    self.counts.tokens += sum(len(answer) for answer in group)
                    yield index, group
        finally:
            ended.close()
            self._drop(pending)

    def pause(self) -> None:
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    @property
    def finishes(self) -> tuple[str, ...]:
        """How answers may end now."""
        return ("stop", "length", "abort") if self._paused.is_set() else ("stop", "length")

    def _ask_one(self, server: Server, request: Request, sampling: SamplingParams) -> Answer:
        [answer] = self.ask(server, request, sampling)
        return answer

    def _interrupt(
        self, pending: dict[Future[tuple[Answer, ...]], tuple[int, int, int]], begun: Mapping[int, Sequence[Answer]]
    ) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """End what is under way; the groups of which there is something, as far as they were `begun` where a server is
        lost."""
        self._drop(pending)
        while pending:
            future, (index, number, starts) = pending.popitem()
            if future.cancelled():
                continue
            try:
                group = future.result()
            except ServerLostError as error:
                self._revive(number, starts, error)
                self.counts.regenerated += 1
                group = tuple(begun.get(index, ()))
            if any(len(answer) for answer in group):
                yield index, group

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]] = ()) -> dict[str, float]:
        """As `Engine.publish`; of a policy with `adapters` the weights are those of `served_weights` with these."""
        started = time.monotonic()
        self._weights = []  # the former ones go before there are new ones
        self._weights, self.version = list(weights), version
        if self._sleeps and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainer has freed and PyTorch holds
        self._each(self._publish_one)
        self._sleeps = False
        self.counts.publishes += 1
        self.counts.publish_seconds += time.monotonic() - started
        self.counts.publish_bytes = sum(tensor.nbytes for _, tensor in self._weights)
        return {"engine/publish_bytes": float(self.counts.publish_bytes)}

    def sleep(self) -> None:
        if self._shared and not self._sleeps:
            self._sleeps = True
            self._each(self._sleep_one)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """As `Engine.prompt_ids`; a server that is lost meanwhile is started again and asked again."""
        self._require_awake()
        while True:
            starts = self.servers[0].starts
            try:
                return self.read(self.servers[0], prompt)
            except ServerLostError as error:
                self._revive(0, starts, error)

    def healthy(self) -> bool:
        return all(server.healthy() for server in self.servers)

    def statistics(self) -> dict[str, float]:
        made = cached = 0.0
        for server in self.servers:
            with suppress(ServerLostError):  # it is started again when it is asked next
                made += self.tokens_made(server)
                cached += self.tokens_cached(server)
        return {**asdict(self.counts), "server_tokens": made, "cached_tokens": cached}

    def close(self) -> None:
        self._close()

    # --------------------------------------------------------------------------------------------------------- servers

    def start(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Start every server with these weights. Raises EngineError where one does not start or takes them."""
        self._weights, self.version = list(weights), version
        self.servers += map(self.new_server, range(len(self._devices)))
        try:
            self._each(self._start_one)
        except ServerLostError as error:
            words = "\n".join(server.last_words() for server in self.servers)
            raise EngineError(f"a server was lost with its first weights ({error}); {words}") from error

    def new_server(self, number: int, **environment: str) -> Server:
        """A server of this kind, not started yet; `environment`: more variables for this one."""
        variables = {**self.environment, **self._devices[number], **environment}
        return Server(self.command, variables, self._logs / f"{self._kind}-{number}.log", "/health")

    def new_sender(self, server: Server) -> Sender:
        """The trainer's end of a new group with the workers of a server, in place of an earlier one."""
        if server in self._senders:
            self._senders.pop(server).close()
        device = sent_from(self._policy, self._devices)
        self._senders[server] = sender = Sender(HOST, 1 + self._workers, device, TRANSFER_S)
        return sender

    def _each(self, action: Callable[[int], None]) -> None:
        """Do something to all servers at once; an error is raised when all are done."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            done = [pool.submit(action, number) for number in range(len(self.servers))]
        for future in done:
            future.result()

    def _start_one(self, number: int) -> None:
        server = self.servers[number]
        server.start(self._start_s)
        self.connect(server)
        once = () if self.adapters is None else frozen_weights(self._policy.model, self.adapters)
        self.send(server, self.version, [*once, *self._weights])

    def _publish_one(self, number: int) -> None:
        """A server that sleeps takes the memory of its caches when it has let go of what a transfer takes."""
        server = self.servers[number]
        starts = server.starts
        try:
            if self._sleeps:
                self.wake_server(server, "weights")
            self.send(server, self.version, self._weights)
            if self._sleeps:
                self.wake_server(server, "kv_cache")
        except ServerLostError as error:
            self._revive(number, starts, error)

    def _require_awake(self) -> None:
        if self._sleeps:
            raise EngineError("the engine was asked while it sleeps; publish comes first")

    def _sleep_one(self, number: int) -> None:
        """One that cannot is ended, which frees its memory, too; the next `publish` starts it again."""
        try:
            self.sleep_server(self.servers[number])
        except (ServerLostError, EngineError) as error:
            logger.warning("engine server %d does not give its memory back (%s); it is ended", number, error)
            self.servers[number].kill()

    def _revive(self, number: int, starts: int, error: Exception) -> None:
        """Start a server again that was lost when it had been started `starts` times, unless it has been meanwhile."""
        server = self.servers[number]
        while server.starts == starts:
            self._fails[number] += 1
            if self._fails[number] > _RESTARTS:
                raise EngineError(
                    f"the server was lost {self._fails[number]} times without a finished group between ({error}); "
                    f"{server.last_words()}"
                ) from error
            logger.warning("engine server %d is lost (%s); starting it again", number, error)
            self.counts.restarts += 1
            try:
                self._start_one(number)
            except (ServerLostError, EngineError) as again:  # the first start has shown that it can
                error, starts = again, server.starts

    def _kill_stalled(self, numbers: set[int], progress: list[tuple[float, float]]) -> None:
        """Kill servers that have work and whose own count of tokens has not grown for `stall_s`; the requests that
        wait for them end with an error, as if they had died. `progress` holds (when it grew, count) per server."""
        for number in numbers:
            server = self.servers[number]
            try:
                made = self.tokens_made(server)
            except (ServerLostError, EngineError):
                made = progress[number][1]
            if made != progress[number][1]:
                progress[number] = time.monotonic(), made
            elif time.monotonic() - progress[number][0] > self._stall_s:
                logger.warning("engine server %d has made no token for %g s", number, self._stall_s)
                server.kill()

    def _drop(self, pending: dict[Future[Any], tuple[int, int, int]]) -> None:
        """Abort what is under way, and wait until nothing is. A request may still be on its way to the server when that
        aborts the others, so that it is told again."""
        for future in pending:
            future.cancel()
        left = {future: number for future, (_, number, _) in pending.items() if not future.done()}
        give_up = time.monotonic() + self._stall_s
        while left:
            for number in set(left.values()):
                if time.monotonic() > give_up:
                    logger.warning("engine server %d has not stopped for %g s", number, self._stall_s)
                    self.servers[number].kill()
                    continue
                try:
                    self.abort(self.servers[number])
                except (ServerLostError, EngineError) as error:
                    logger.warning("engine server %d could not be told to stop (%s)", number, error)
                    self.servers[number].kill()
            wait(left, timeout=0.5)
            left = {future: number for future, number in left.items() if not future.done()}


def _end(servers: list[Server], pool: ThreadPoolExecutor, folder: tempfile.TemporaryDirectory[str]) -> None:
    for server in servers:
        server.kill()
    pool.shutdown(wait=True, cancel_futures=True)
    folder.cleanup()
