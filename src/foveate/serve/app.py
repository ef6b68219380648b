"""The HTTP routes: `/v1/chat/completions`, `/v1/models` and `/health`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.records import Answer
from foveate.rollout.engine import Request as PromptRequest
from foveate.serve.batcher import Batcher
from foveate.serve.protocol import ChatRequest, Refused, events, read_request, reply

BODY_LIMIT = 64 * 2**20
"""Bytes of a request, its pictures included."""
OWNER = "foveate"
"""What `/v1/models` says of a model that is served here; clients know by it that `verbatim` is understood."""


class Chat:
    """The state of the routes: a named model behind a batcher. `key` None lets everybody in; `max_tokens` ends
    answers."""

    def __init__(self, name: str, encoder: Encoder, batcher: Batcher, max_tokens: int, key: str | None) -> None:
        self.name, self.encoder, self.batcher, self.max_tokens, self.key = name, encoder, batcher, max_tokens, key
        self.started = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={Refused: _refusal})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.name})

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        entry = {"id": self.name, "object": "model", "created": self.started, "owned_by": OWNER}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _complete(self, request: Request) -> Response:
        self._admit(request)
        asked = read_request(await _body(request))
        if asked.model != self.name:
            raise Refused(404, f"there is no model {asked.model!r} here; this server has {self.name!r}", "model")
        sampling = asked.sampling(self.max_tokens)
        try:
            prompt = await run_in_threadpool(self.encoder, asked.task("the request"))
        except DataError as error:
            raise Refused(400, str(error), "messages") from None
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        try:
            answers = await self.batcher.answer(PromptRequest(prompt, seed), sampling)
        except Exception as error:  # already in the log, with its traceback
            raise Refused(500, f"the engine failed: {type(error).__name__}: {error}") from error
        whole = reply(self.name, prompt, answers, self._pieces(asked, answers))
        if not asked.stream:
            return JSONResponse(whole)
        stream = events(whole, asked.stream_options.include_usage)
        return StreamingResponse(stream, media_type="text/event-stream")

    def _admit(self, request: Request) -> None:
        if self.key is None:
            return
        said = request.headers.get("authorization", "")
        if not secrets.compare_digest(said.encode(), f"Bearer {self.key}".encode()):
            raise Refused(401, "the API key is missing or wrong; send it as `Authorization: Bearer <key>`")

    def _pieces(self, asked: ChatRequest, answers: Sequence[Answer]) -> list[list[str]] | None:
        if not asked.logprobs:
            return None
        return [self.encoder.pieces(answer.token_ids) for answer in answers]


async def _body(request: Request) -> bytes:
    """The body, refused as soon as it is known to be too long."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > BODY_LIMIT:
                raise Refused(413, f"the request is larger than {BODY_LIMIT // 2**20} MiB; send smaller pictures")
            parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "the request ended before its body did") from None
    return b"".join(parts)


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, status_code=error.status)
