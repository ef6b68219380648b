"""An engine that is one or several server processes: routing, streaming, publishing, and starting them again."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import EngineError
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request, in_order
from foveate.rollout.seeds import seed_of
from foveate.rollout.server.process import Replica, ReplicaLostError
from foveate.rollout.server.routes import routes

logger = logging.getLogger(__name__)

_PER_REPLICA = 256
"""Requests under way at one server; it queues what it cannot compute at once."""
_LOOK = 0.1
"""Seconds after which a pause is noticed at the latest."""
_RESTARTS = 2
"""Starts of one replica without a single finished group in between, after which the run ends."""
TRANSFER_S = 600.0
"""Patience of both ends of a transfer of weights, in seconds; a server that dies breaks it off at once."""
BAN = -100.0
"""Added to the logits of tokens that may not be sampled: e**-100 of their probability is left."""


@dataclass(slots=True)
class Counts:
    """What happened since the engine was made."""

    groups: int = 0
    tokens: int = 0
    regenerated: int = 0
    restarts: int = 0
    publishes: int = 0
    publish_seconds: float = 0.0


class ServedEngine(ABC):
    """Groups go to replicas over HTTP, a whole group to one, equal prompts to the same one, unless it is far busier.

    A replica that dies, or that has work and makes no token for `stall_s`, is killed and started again, gets the
    weights of the last `publish`, and answers again what it had not finished: a group counts when all of it has arrived
    in one response. What differs between kinds of servers is in the abstract methods.
    """

    _decode: Callable[[tuple[int, ...]], str]

    def __init__(self, replicas: int, *, start_s: float, stall_s: float, shared: bool = False) -> None:
        """`shared`: the trainer computes on the same device, by turns."""
        self.version = -1
        self._shared, self._sleeps = shared, False
        self.counts = Counts()
        self._start_s, self._stall_s = start_s, stall_s
        self._folder = tempfile.TemporaryDirectory(prefix="foveate-engine-")
        self.folder = Path(self._folder.name)
        self._weights: list[tuple[str, Tensor]] = []
        self._writing, self._written = threading.Lock(), -1
        self._pool = ThreadPoolExecutor(max_workers=_PER_REPLICA * replicas, thread_name_prefix="engine")
        self.replicas = [self.new_replica(number) for number in range(replicas)]
        self._fails = [0] * replicas
        self._paused = threading.Event()
        self._close = weakref.finalize(self, _end, self.replicas, self._pool, self._folder)

    # ---------------------------------------------------------------------------------- what kinds of servers differ in

    @abstractmethod
    def new_replica(self, number: int) -> Replica:
        """A server of this kind, not started yet."""

    @abstractmethod
    def ask(self, replica: Replica, request: Request, sampling: SamplingParams) -> tuple[Answer, ...]:
        """All answers to one request, each stamped with the version that the server says; nothing of it is begun yet.
        Raises ReplicaLostError where an answer has ended in a way that is not in `finishes`."""

    @abstractmethod
    def read(self, replica: Replica, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt as the server's model reads it."""

    @abstractmethod
    def send(self, replica: Replica, version: int, weights: list[tuple[str, Tensor]]) -> None:
        """Bring weights into a server: afterwards it computes with them alone, with nothing old in any cache."""

    @abstractmethod
    def sleep_server(self, replica: Replica) -> None:
        """Give back the memory of weights and caches, whose contents are void then."""

    @abstractmethod
    def wake_server(self, replica: Replica, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of either again."""

    @abstractmethod
    def connect(self, replica: Replica) -> None:
        """What a server needs once after its start."""

    @abstractmethod
    def abort(self, replica: Replica) -> None:
        """Drop whatever the server is generating."""

    @abstractmethod
    def tokens_made(self, replica: Replica) -> float:
        """The server's own count of tokens so far, which grows while it works."""

    # -------------------------------------------------------------------------------------------------- the engine seam

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[tuple[Answer, ...]]:
        return in_order(self.stream(requests, sampling), requests)

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        self._require_awake()
        pending: dict[Future[tuple[Answer, ...]], tuple[int, int, int]] = {}
        progress = [(time.monotonic(), -1.0)] * len(self.replicas)
        look = time.monotonic() + self._stall_s / 4

        def submit(index: int, number: int) -> None:
            replica = self.replicas[number]
            future = self._pool.submit(self._answer, replica, requests[index], sampling)
            pending[future] = index, number, replica.incarnation

        try:
            for index, number in enumerate(routes([request.prompt for request in requests], len(self.replicas))):
                if not self._paused.is_set():
                    submit(index, number)
            while pending:
                if self._paused.is_set():
                    yield from self._interrupt(pending)
                    return
                done, _ = wait(pending, timeout=min(self._stall_s / 4, _LOOK), return_when=FIRST_COMPLETED)
                if time.monotonic() > look:
                    self._kill_stalled({number for _, number, _ in pending.values()}, progress)
                    look = time.monotonic() + self._stall_s / 4
                for future in done:
                    index, number, incarnation = pending.pop(future)
                    try:
                        group = future.result()
                    except ReplicaLostError as error:
                        self._revive(number, incarnation, error)
                        progress[number] = time.monotonic(), -1.0
                        self.counts.regenerated += 1
                        submit(index, number)
                        continue
                    self._fails[number] = 0
                    self.counts.groups += 1
                    self.counts.tokens += sum(len(answer) for answer in group)
                    yield index, group
        finally:
            self._drop(pending)

    def pause(self) -> None:
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    @property
    def finishes(self) -> tuple[str, ...]:
        """How answers may end now."""
        return ("stop", "length", "abort") if self._paused.is_set() else ("stop", "length")

    def _answer(self, replica: Replica, request: Request, sampling: SamplingParams) -> tuple[Answer, ...]:
        """All answers to one request; those that were begun go on side by side, each by a request of its own."""
        unfinished = [i for i, before in enumerate(request.partial_answers) if before.finish == "abort"]
        if not request.partial_answers:
            return self.ask(replica, request, sampling)
        with ThreadPoolExecutor(max(1, len(unfinished))) as pool:
            more = pool.map(lambda i: self._go_on(replica, request, i, sampling), unfinished)
            found = dict(zip(unfinished, more, strict=True))
        return tuple(found.get(i, before) for i, before in enumerate(request.partial_answers))

    def _go_on(self, replica: Replica, request: Request, number: int, sampling: SamplingParams) -> Answer:
        """The answer of this number with what follows on its tokens, which are part of the prompt now."""
        before, prompt = request.partial_answers[number], request.prompt
        ids = before.token_ids
        longer = replace(prompt, token_ids=prompt.token_ids + ids, engine_ids=prompt.engine_ids + ids)
        seed = seed_of("go on", request.seed, number, len(ids))
        rest = replace(sampling, samples=1, max_tokens=sampling.max_tokens - len(ids))
        [more] = self.ask(replica, Request(longer, seed), rest)
        return before.continued_by(more, self._decode(ids + more.token_ids))

    def _interrupt(
        self, pending: dict[Future[tuple[Answer, ...]], tuple[int, int, int]]
    ) -> Iterator[tuple[int, tuple[Answer, ...]]]:
        """End what is under way; the groups of which there is something."""
        self._drop(pending)
        while pending:
            future, (index, number, incarnation) = pending.popitem()
            if future.cancelled():
                continue
            try:
                group = future.result()
            except ReplicaLostError as error:
                self._revive(number, incarnation, error)
                self.counts.regenerated += 1
                continue
            if any(len(answer) for answer in group):
                yield index, group

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        started = time.monotonic()
        self._weights = []  # the former ones go before there are new ones
        self._weights, self.version = list(weights), version
        if self._sleeps and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainer has freed and PyTorch holds
        self._each(self._publish_one)
        self._sleeps = False
        self.counts.publishes += 1
        self.counts.publish_seconds += time.monotonic() - started

    def sleep(self) -> None:
        if self._shared and not self._sleeps:
            self._sleeps = True
            self._each(self._sleep_one)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """As `Engine.prompt_ids`; a server that is lost meanwhile is started again and asked again."""
        self._require_awake()
        while True:
            incarnation = self.replicas[0].incarnation
            try:
                return self.read(self.replicas[0], prompt)
            except ReplicaLostError as error:
                self._revive(0, incarnation, error)

    def healthy(self) -> bool:
        return all(replica.healthy() for replica in self.replicas)

    def statistics(self) -> dict[str, float]:
        made = 0.0
        for replica in self.replicas:
            with suppress(ReplicaLostError):  # it is started again when it is asked next
                made += self.tokens_made(replica)
        return {**asdict(self.counts), "server_tokens": made}

    def close(self) -> None:
        self._close()

    # --------------------------------------------------------------------------------------------------------- replicas

    def start(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Start every replica with these weights. Raises EngineError where one does not start or takes them."""
        self._weights, self.version = list(weights), version
        try:
            self._each(self._start_one)
        except ReplicaLostError as error:
            words = "\n".join(replica.last_words() for replica in self.replicas)
            raise EngineError(
                f"a server was lost with its first weights ({error}); the end of its log:\n{words}"
            ) from error

    def on_disk(self, weights: list[tuple[str, Tensor]]) -> Path:
        """The folder with the weights of this version in one file, written once for all replicas. `weights`: those of
        the last publish by the names that the servers know."""
        folder = self.folder / "weights"
        with self._writing:
            if self._written != self.version:
                folder.mkdir(exist_ok=True)
                new = folder / "new"
                save_file({name: tensor.detach().contiguous() for name, tensor in weights}, new)
                new.replace(folder / "model.safetensors")
                self._written = self.version
        return folder

    def _each(self, action: Callable[[int], None]) -> None:
        """Do something to all replicas at once; the first error is raised when all are done."""
        errors: list[BaseException] = []

        def guarded(number: int) -> None:
            try:
                action(number)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(len(self.replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _start_one(self, number: int) -> None:
        replica = self.replicas[number]
        replica.start(self._start_s)
        self.connect(replica)
        self.send(replica, self.version, self._weights)

    def _publish_one(self, number: int) -> None:
        """A replica that sleeps takes the memory of its caches when it has let go of what a transfer takes."""
        replica = self.replicas[number]
        incarnation = replica.incarnation
        try:
            if self._sleeps:
                self.wake_server(replica, "weights")
            self.send(replica, self.version, self._weights)
            if self._sleeps:
                self.wake_server(replica, "kv_cache")
        except ReplicaLostError as error:
            self._revive(number, incarnation, error)

    def _require_awake(self) -> None:
        if self._sleeps:
            raise EngineError("the engine was asked while it sleeps; publish comes first")

    def _sleep_one(self, number: int) -> None:
        """One that cannot is ended, which frees its memory, too; the next `publish` starts it again."""
        try:
            self.sleep_server(self.replicas[number])
        except (ReplicaLostError, EngineError) as error:
            logger.warning("engine server %d does not give its memory back (%s); it is ended", number, error)
            self.replicas[number].kill()

    def _revive(self, number: int, incarnation: int, error: Exception) -> None:
        """Start a replica again that was lost in the given incarnation, unless that has happened meanwhile."""
        replica = self.replicas[number]
        while replica.incarnation == incarnation:
            self._fails[number] += 1
            if self._fails[number] > _RESTARTS:
                raise EngineError(
                    f"the server was lost {self._fails[number]} times without a finished group between ({error}); the "
                    f"end of {replica.log}:\n{replica.last_words()}"
                ) from error
            logger.warning("engine server %d is lost (%s); starting it again", number, error)
            self.counts.restarts += 1
            try:
                self._start_one(number)
            except (ReplicaLostError, EngineError) as again:  # the first start has shown that it can
                error, incarnation = again, replica.incarnation

    def _kill_stalled(self, numbers: set[int], progress: list[tuple[float, float]]) -> None:
        """Kill replicas that have work and whose own count of tokens has not grown for `stall_s`; the requests that
        wait for them end with an error, as if they had died. `progress` holds (when it grew, count) per replica."""
        for number in numbers:
            replica = self.replicas[number]
            try:
                made = self.tokens_made(replica)
            except (ReplicaLostError, EngineError):
                made = progress[number][1]
            if made != progress[number][1]:
                progress[number] = time.monotonic(), made
            elif time.monotonic() - progress[number][0] > self._stall_s:
                logger.warning("engine server %d has made no token for %g s", number, self._stall_s)
                replica.kill()

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
                    self.replicas[number].kill()
                    continue
                try:
                    self.abort(self.replicas[number])
                except (ReplicaLostError, EngineError) as error:
                    logger.warning("engine server %d could not be told to stop (%s)", number, error)
                    self.replicas[number].kill()
            wait(left, timeout=0.5)
            left = {future: number for future, number in left.items() if not future.done()}


def _end(replicas: list[Replica], pool: ThreadPoolExecutor, folder: tempfile.TemporaryDirectory[str]) -> None:
    for replica in replicas:
        replica.kill()
    pool.shutdown(wait=True, cancel_futures=True)
    folder.cleanup()
