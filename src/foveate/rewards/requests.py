"""Requests of rewards to servers: many under way at once, and each reply kept by the content of its request.

A reward that asks a server has a `fetch` (`foveate.rewards.build.Reward`), which runs in the event loop of a
`RequestThread`; what it gives is handed to the reward's function, wherever that runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from foveate.config.base import is_http_address
from foveate.errors import ConfigError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MOST_REPLIES, KEPT_CHARACTERS = 100_000, 2**14
"""Replies that are kept, where they are not longer; the one that was used least recently goes first."""
MOST_BYTES = 4 * 2**20
"""Bytes of a reply that are read."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two tries of a server that is down: each pause is twice the one before."""


class ReplyTooLarge(ValueError):
    """A reply of more bytes than are read, or one that unfolds to more."""


def bounded_http(most: int) -> dict[str, Any]:
    """Arguments for openai's asynchronous client, by which it reads replies of `most` bytes at most, and none that is
    compressed: a small one of these can unfold to any size."""
    import openai

    async def bound(response: Any) -> None:
        coding = response.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise ReplyTooLarge(f"its reply is compressed ({coding[:20]!r}), which was not asked for")
        response.stream = _stream_class(type(response).__module__.partition(".")[0])(response.stream, most)

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [bound]})
    return {"http_client": http, "default_headers": {"Accept-Encoding": "identity"}}


def is_too_large(error: BaseException | None) -> ReplyTooLarge | None:
    """The ReplyTooLarge among the causes of an error."""
    while error is not None and not isinstance(error, ReplyTooLarge):
        error = error.__cause__ or error.__context__
    return error


@cache
def _stream_class(library: str) -> type:
    """The class of streams that are bounded, of the library that openai has built its client on: httpx or another."""
    base: Any = vars(import_module(library))["AsyncByteStream"]

    class BoundedStream(base):
        def __init__(self, stream: Any, most: int) -> None:
            self._stream, self._left, self._most = stream, most, most

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in self._stream:
                self._left -= len(part)
                if self._left < 0:
                    raise ReplyTooLarge(f"its reply has more than {self._most:,} bytes")
                yield part

        async def aclose(self) -> None:
            await self._stream.aclose()

    return BoundedStream


@dataclass(frozen=True, slots=True)
class ServerReply:
    """The text of a reply, with the tokens that the server says it read and wrote (0 where it says nothing)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """A server that is asked for `name`, such as "reward judge", with the limits of its requests.

    api_key_variable: environment variable that holds the key, which is not sent where it is not set. retries: how often
    a request is repeated at once, with growing pauses, when the server is busy or does not answer. patience: seconds
    for which a server may be down until requests fail. timeout: seconds without a sign of the server in a request.
    concurrency: requests that are under way at once.

    Raises ConfigError for an address that is none, limits below 0, and where openai is not installed.
    """

    url: str
    name: str
    api_key_variable: str
    retries: int
    timeout: float
    concurrency: int
    patience: float

    def __post_init__(self) -> None:
        if not is_http_address(self.url):
            raise ConfigError(f"{self.name}: url must begin with http:// or https:// and a host, found {self.url!r}")
        if self.concurrency < 1 or self.retries < 0 or not (self.timeout > 0 and self.patience >= 0):
            raise ConfigError(
                f"{self.name}: concurrency must be at least 1, timeout greater than 0, and retries and patience "
                f"at least 0; found {self.concurrency}, {self.timeout:g}, {self.retries} and {self.patience:g}"
            )
        if find_spec("openai") is None:
            raise ConfigError(f"{self.name} needs openai; run pip install 'foveate[client]'")


ServerRequest = Callable[["AsyncOpenAI", dict[str, Any]], Awaitable[ServerReply]]
"""From a client and the headers of the request to the reply."""


class Session:
    """The connections of an event loop, replies by the content of their requests, and counts.

    counts: "requests" that were sent, "cached" ones that were not, "seconds" for which those that were sent took, from
    first to last try, and "tokens" that servers say they read and wrote.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._clients: dict[RemoteServer, tuple[AsyncOpenAI, asyncio.Semaphore]] = {}
        self._replies: OrderedDict[str, asyncio.Task[ServerReply]] = OrderedDict()
        self._down_since: dict[RemoteServer, float] = {}

    async def ask(self, server: RemoteServer, content: str, request: ServerRequest) -> ServerReply:
        """The reply to a request of that content: a known one, or one under way, or that to a new request. Raises
        ConnectionError where the server refuses, or is down for longer than its patience."""
        key = hashlib.sha256(f"{server.url}\0{content}".encode(errors="surrogatepass")).hexdigest()
        task = self._replies.get(key)
        self.counts["cached"] += task is not None
        if task is None:
            task = self._replies[key] = asyncio.ensure_future(self._sent(server, request))
            if len(self._replies) > MOST_REPLIES:
                self._replies.popitem(last=False)
        self._replies.move_to_end(key)
        try:
            reply = await asyncio.shield(task)
            if len(reply.text) > KEPT_CHARACTERS and self._replies.get(key) is task:
                del self._replies[key]
            return reply
        except Exception:
            if self._replies.get(key) is task:  # the next one who asks tries again
                del self._replies[key]
            raise

    async def _sent(self, server: RemoteServer, request: ServerRequest) -> ServerReply:
        client, room = self._client(server)
        headers = {} if client.api_key != _NO_KEY else {"Authorization": _omitted()}
        async with room:
            begin, pause = time.monotonic(), FIRST_PAUSE
            try:
                while True:
                    try:
                        reply = await request(client, headers)
                        break
                    except Exception as error:
                        await self._wait_or_raise(server, error, pause, begin)
                        pause = min(2 * pause, LONGEST_PAUSE)
            finally:
                self.counts["requests"] += 1
                self.counts["seconds"] += time.monotonic() - begin  # type: ignore[assignment]
        self._down_since.pop(server, None)
        self.counts["tokens"] += reply.prompt_tokens + reply.completion_tokens
        return reply

    async def _wait_or_raise(self, server: RemoteServer, error: Exception, pause: float, begin: float) -> None:
        """Wait where a server may come back. Raises ConnectionError where it refuses, or was down, or busy with the
        request since `begin`, for too long, and other errors as they are."""
        import openai

        if (too_large := is_too_large(error)) is not None:
            said, may_come_back = f"{server.url}: {too_large}", False
        elif isinstance(error, openai.APIStatusError):
            reply = error.response
            said = f"{server.url} replied {reply.status_code} {reply.reason_phrase}: {reply.text[:200]}"
            may_come_back = reply.status_code == 429 or reply.status_code >= 500
        elif isinstance(error, openai.APIConnectionError):
            said, may_come_back = f"{server.url} does not answer: {str(error.__cause__ or '') or error}", True
        else:
            raise error
        now = time.monotonic()
        since = min(self._down_since.setdefault(server, now), begin) if may_come_back else begin
        if not may_come_back or now - since + pause > server.patience:
            raise ConnectionError(said) from error
        await asyncio.sleep(pause)

    def _client(self, server: RemoteServer) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        if server not in self._clients:
            import openai

            key = os.environ.get(server.api_key_variable, "") or _NO_KEY
            client = openai.AsyncOpenAI(
                base_url=server.url,
                api_key=key,
                max_retries=server.retries,
                timeout=server.timeout,
                **bounded_http(MOST_BYTES),
            )
            self._clients[server] = client, asyncio.Semaphore(server.concurrency)
        return self._clients[server]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._replies.values():
            task.cancel()
        await asyncio.gather(*self._replies.values(), return_exceptions=True)
        for client, _room in self._clients.values():
            await client.close()


_NO_KEY = "none"


def _omitted() -> Any:
    import openai

    return openai.Omit()


class RequestThread:
    """A thread with an event loop and a session, in which fetches run. `close` ends those that are under way."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        self._session = Session()

    def submit(self, fetch: Callable[..., Awaitable[Any]], *arguments: Any) -> Future[Any]:
        """Run a fetch with the session and these arguments; the future has what it returns or raises."""

        async def run() -> Any:
            return await fetch(self._session, *arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def counts(self) -> Counter[str]:
        """The counts of the session since they were asked for last."""
        counts, self._session.counts = self._session.counts, Counter()
        return counts

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*others, return_exceptions=True)
        await self._session.__aexit__()
