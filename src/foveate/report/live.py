"""`foveate view`: the report of a run over HTTP on this machine, made anew from the files when they have changed."""

from __future__ import annotations

import asyncio
import html
import socket
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from foveate.errors import ConfigError, UserError, one_line
from foveate.report.page import INPUTS, render_report
from foveate.serve.hosts import is_known_host

REQUEST_S, REPLY_S = 10.0, 60.0
"""Seconds for a request to come, and for its reply to be taken."""
MOST_CONNECTIONS = 400
"""More are closed as they come."""
_REQUEST_BYTES = 16 * 2**10


class ReportServer:
    """Answers requests for `/` with the report of `folder`; nothing else is served, and nothing is written. One thread
    has all connections, each for one request, and another makes the page."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self._state: object = None
        self._page = b""
        self._making = asyncio.Lock()
        self._connections = 0
        self._ending, self._ended = threading.Event(), threading.Event()

    def __enter__(self) -> ReportServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def serve_forever(self, poll_interval: float = 0.2) -> None:
        """Serve until `shutdown` is called from another thread, which is looked for every so many seconds."""
        try:
            asyncio.run(self._serve(poll_interval))
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """Have `serve_forever` return."""
        self._ending.set()
        self._ended.wait()

    def page(self) -> bytes:
        """The report as the files are now; what keeps it from being made is said in its place."""
        state = _state_of(self.folder)
        if state != self._state:
            try:
                self._page = render_report(self.folder).encode()
            except Exception as error:  # the files are not ours alone; the server goes on
                known = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
                return f"<!doctype html><title>foveate</title><p>{html.escape(known)}".encode()
            self._state = state
        return self._page

    async def _serve(self, poll_interval: float) -> None:
        server = await asyncio.start_server(self._connected, sock=self._listener, limit=_REQUEST_BYTES, backlog=128)
        async with server:
            while not self._ending.is_set():
                await asyncio.sleep(poll_interval)

    async def _connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MOST_CONNECTIONS:
                request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
                writer.write(await self._reply(request.decode("latin-1")))
                await asyncio.wait_for(writer.drain(), REPLY_S)
                writer.close()
                await asyncio.wait_for(writer.wait_closed(), REPLY_S)
        except (TimeoutError, EOFError, OSError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # the client has gone, or is too slow, or asks for too much; or the server ends
        finally:
            self._connections -= 1
            writer.transport.abort()

    async def _reply(self, request: str) -> bytes:
        first, *lines = request.split("\r\n")
        fields = dict(line.lower().split(":", 1) for line in lines if ":" in line)
        method, _, rest = first.partition(" ")
        if not is_known_host(fields.get("host", "").strip(), ()):
            status = HTTPStatus.FORBIDDEN
        elif method not in ("GET", "HEAD"):
            status = HTTPStatus.METHOD_NOT_ALLOWED
        else:
            status = HTTPStatus.OK if rest.split(" ")[0] == "/" else HTTPStatus.NOT_FOUND
        page = f"<!doctype html><title>foveate</title><p>{status.value} {status.phrase}".encode()
        if status is HTTPStatus.OK:
            async with self._making:
                page = await asyncio.to_thread(self.page)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/html; charset=utf-8\r\n"
            f"Content-Length: {len(page)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else page)


def serve_report(folder: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Raises ConfigError for a port in use, DataError for a folder with nothing to report."""
    render_report(folder)
    try:
        server = ReportServer(folder, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on port {port}: {error.strerror or error}; choose another --port") from error
    with server:
        ready(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def _state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that a report is made of."""
    files = [path for name in INPUTS for path in ((folder / name), *sorted((folder / name).glob("*")))]
    abouts = [(path, path.stat()) for path in files if path.is_file()]
    return [(str(path), about.st_size, about.st_mtime_ns) for path, about in abouts]
