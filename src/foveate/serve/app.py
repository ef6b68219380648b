"""The HTTP routes: `/v1/chat/completions`, `/v1/models` and `/health`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Collection, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from foveate.encoding.encode import Encoder
from foveate.records import SamplingParams
from foveate.serve.answering import Answering
from foveate.serve.batcher import Batcher
from foveate.serve.hosts import is_known_host
from foveate.serve.limits import Budget, ServeLimits
from foveate.serve.preparing import Preparing
from foveate.serve.protocol import ChatRequest, Refused
from foveate.serve.replies import EventStream, Reply

logger = logging.getLogger(__name__)

OWNER = "foveate"
"""The owner of a model that is served here, in `/v1/models`; clients know by it that `verbatim` is understood."""
RETRY_AFTER_S = 1
"""Seconds after which a client may try again what was refused for lack of room."""
_Result = TypeVar("_Result")


class Chat:
    """The state of the routes: a named model behind a batcher. `key` None lets everybody in; `max_tokens` ends
    answers; `hosts` are the names by which the server may be called besides addresses and localhost, None: any."""

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        batcher: Batcher,
        max_tokens: int,
        key: str | None,
        hosts: Collection[str] | None = (),
        limits: ServeLimits | None = None,
    ) -> None:
        self.name, self.encoder, self.batcher, self.max_tokens, self.key = name, encoder, batcher, max_tokens, key
        self.started = int(time.time())
        self.limits = limits or ServeLimits()
        self._hosts = hosts
        self._held = Budget(self.limits.held_bytes)
        self._preparing = Preparing(encoder, batcher.token_budget, self.limits)
        self._stopping = asyncio.Event()

    def app(self) -> ASGIApp:
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", _Endpoint(self._complete), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {Refused: _refusal, HTTPException: _http_error, Exception: _failure}
        app = Starlette(routes=routes, exception_handlers=handlers)

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            said = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
            if self._hosts is None or scope["type"] != "http" or is_known_host(said, self._hosts):
                return await app(scope, receive, send)
            what = f"this server is not called {said[:100]!r}; use its address, or foveate serve --allow-host NAME"
            return await _refused(Refused(403, what, code="unknown_host"))(scope, receive, send)

        return checked

    def stop(self) -> None:
        """Answer what is under way, and what still comes, with an error."""
        self._stopping.set()

    def close(self) -> None:
        """End the threads of the routes."""
        self._preparing.close()

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.name})

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _model(self, request: Request) -> Response:
        self._admit(request)
        self._require_known(request.path_params["name"])
        return JSONResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": OWNER}

    def _require_known(self, model: str) -> None:
        if model != self.name:
            what = f"there is no model {model[:100]!r} here; this server has {self.name!r}"
            raise Refused(404, what, "model", "model_not_found")

    def _admit(self, request: Request) -> None:
        if self.key is None:
            return
        said = request.headers.get("authorization", "")
        if not secrets.compare_digest(said.encode(), f"Bearer {self.key}".encode()):
            what = "the API key is missing or wrong; send it as `Authorization: Bearer <key>`"
            raise Refused(401, what, code="invalid_api_key")

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a request and reply to it; what is still to be done for it ends with its connection."""
        request = Request(scope, receive)
        self._admit(request)
        held: list[int] = []
        try:
            asked = await self._until(self._read(request, held))
            events = EventStream(send)
            try:
                if asked.stream:
                    await self._until(self._stream(asked, events), _disconnected(receive))
                else:
                    reply = await self._until(self._whole(asked), _disconnected(receive))
                    await JSONResponse(reply)(scope, receive, send)
            except Refused as error:
                if not events.begun:
                    raise
                await events.fail(error.body)
        except ClientDisconnect:
            return
        finally:
            self._held.give_back(sum(held))

    async def _until(self, work: Coroutine[Any, Any, _Result], gone: Awaitable[None] | None = None) -> _Result:
        """The result of `work`, which is cancelled when the client goes and when the server stops. Raises
        ClientDisconnect and Refused for these."""
        doing = asyncio.ensure_future(work)
        ends = [asyncio.ensure_future(end) for end in (gone, self._stopping.wait()) if end is not None]
        try:
            await asyncio.wait([doing, *ends], return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            if self._stopping.is_set():
                raise Refused(503, "the server is stopping; ask another one, or this one later", code="server_stopping")
            raise ClientDisconnect
        finally:
            for task in (doing, *ends):
                task.cancel()
            await asyncio.wait([doing, *ends])

    async def _read(self, request: Request, held: list[int]) -> ChatRequest:
        """The request in the body, which is refused as soon as it is known to be too long: by its header, or as it
        comes. `held` grows by the bytes that were taken from the budget."""
        parts, size = [], 0
        limits = self.limits
        too_large = f"the request is larger than {limits.body_bytes / 2**20:g} MiB; send smaller images"
        told = request.headers.get("content-length", "")
        if told.isdecimal() and (len(told) > 18 or int(told) > limits.body_bytes):
            raise Refused(413, too_large, code="request_too_large")
        stream, now = request.stream(), asyncio.get_running_loop().time
        end = now() + limits.whole_body_s
        try:
            while part := await asyncio.wait_for(anext(stream, b""), min(limits.body_s, end - now())):
                size += len(part)
                if size > limits.body_bytes:
                    raise Refused(413, too_large, code="request_too_large")
                if not self._held.take_at_once(len(part)):
                    raise Refused(429, "the server holds as many requests as it can; try again", code="server_busy")
                held.append(len(part))
                parts.append(part)
        except TimeoutError:
            late = f"no byte of the body came for {limits.body_s:g} s"
            if now() >= end:
                late = f"the body was not complete after {limits.whole_body_s:g} s"
            raise Refused(408, late, code="request_timeout") from None
        body = b"".join(parts)
        parts.clear()
        return await self._preparing.request(body)

    def _answering(self, asked: ChatRequest) -> tuple[Answering, SamplingParams]:
        self._require_known(asked.model)
        return Answering(asked, self.encoder), asked.sampling(self.max_tokens)

    async def _whole(self, asked: ChatRequest) -> dict[str, Any]:
        answering, sampling = self._answering(asked)
        async with self._preparing.prompt(asked, sampling) as (prompt, sampling):
            with _engine_failures():
                answers = await self.batcher.answer(answering.job(prompt, sampling))
        return Reply(self.name, len(prompt)).whole(answers, answering.texts(answers), answering.entries(answers))

    async def _stream(self, asked: ChatRequest, events: EventStream) -> None:
        answering, sampling = self._answering(asked)
        async with self._preparing.prompt(asked, sampling) as (prompt, sampling):
            reply = Reply(self.name, len(prompt), asked.includes_usage)
            answers = asyncio.ensure_future(self.batcher.answer(answering.job(prompt, sampling)))
            answers.add_done_callback(lambda _: answering.pieces.put_nowait(None))
            try:
                for index in range(asked.n):
                    await events.write(reply.event(index, {"role": "assistant", "content": "", "refusal": None}))
                while (piece := await answering.pieces.get()) is not None:
                    await events.write(reply.event(piece.answer, {"content": piece.text}, entries=piece.entries))
                with _engine_failures():
                    done = await answers
            finally:
                answers.cancel()
        for index, answer in enumerate(done):
            if rest := answering.rest(index):
                await events.write(reply.event(index, {"content": rest.text}, entries=rest.entries))
            await events.write(reply.event(index, {}, answer.finish))
        if asked.includes_usage:
            await events.write(reply.usage_event(sum(map(len, done))))
        await events.end()


class _Endpoint:
    """A function of ASGI as an endpoint of a route: it does not return a response but sends it."""

    def __init__(self, function: ASGIApp) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.contextmanager
def _engine_failures() -> Any:
    """An engine's error, which is already in the log with its traceback, as the reply to its client."""
    try:
        yield
    except Exception as error:
        raise Refused(500, f"the engine failed: {type(error).__name__}: {error}") from error


def _refused(error: Refused) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    return JSONResponse(error.body, error.status, headers)


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _refused(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return JSONResponse(Refused(error.status_code, what).body, error.status_code, error.headers)


async def _failure(_: Request, error: Exception) -> Response:
    """An error that nobody expected; Starlette raises it again, into the log."""
    return _refused(Refused(500, f"the server failed: {type(error).__name__}"))
