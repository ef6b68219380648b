"""Connections of the native server: how long one may say nothing, and how many there may be."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from foveate.serve.protocol import Refused

logger = logging.getLogger(__name__)

HEADERS_S, KEEP_ALIVE_S, STALLED_S, REFUSED_S = 10.0, 60, 60.0, 10.0
"""Seconds for the headers of a request, between two requests, for a client that does not take its reply, and for one
that still sends a body which was refused."""
RESERVE = 32
"""Connections over the limit, for `/health` alone."""
BACKLOG = 128
"""Connections that are taken in at a time. Each holds a file until it is counted."""
_LOG_EVERY_S = 60.0


def most_connections(wanted: int) -> int:
    """The limit on connections: `wanted`, or what the limit of the process on open files leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - RESERVE - 2 * BACKLOG))


class Connection(H11Protocol):
    """uvicorn's connection with limits. Where there are more than `most`, one without a request makes room; where all
    have requests, only `/health` is answered on further ones."""

    most = 1000
    _logged = 0.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._since = time.monotonic()
        self._headers: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._refused: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers = self.loop.call_later(HEADERS_S, self.transport.abort)
        others = [other for other in self.connections if other is not self and not other.transport.is_closing()]
        if len(others) >= self.most:
            self._make_room([other for other in others if isinstance(other, Connection)])

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers, self._stalled, self._refused):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._refused is not None and self.conn.their_state is not h11.SEND_BODY:
            self._refused.cancel()
            self._refused = None
        if self.conn.their_state is not h11.IDLE and self._headers is not None:
            self._headers.cancel()
            self._headers = None
        elif self.conn.their_state is h11.IDLE and self._headers is None:  # the next request has begun
            self._headers = self.loop.call_later(HEADERS_S, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = time.monotonic()
        if self.conn.their_state is h11.SEND_BODY:  # most clients send all of it before they look for the reply
            self._refused = self.loop.call_later(REFUSED_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self, others: list[Connection]) -> None:
        idle = [other for other in others if other.is_idle]
        if idle:
            min(idle, key=lambda other: other._since).transport.abort()
        elif len(others) < self.most + RESERVE:
            self.app = only_health(self.app)
        else:
            self.transport.abort()
        if time.monotonic() - Connection._logged > _LOG_EVERY_S:
            Connection._logged = time.monotonic()
            logger.warning("%d connections, which is the limit; others make room or are refused", self.most)


def only_health(app: Any) -> ASGIApp:
    """An application for a connection over the limit."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            return await app(scope, receive, send)
        body = json.dumps(Refused(503, "the server has as many connections as it can", code="server_busy").body)
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        return await send({"type": "http.response.body", "body": body.encode()})

    return answer
