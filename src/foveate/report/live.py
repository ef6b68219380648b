"""`foveate view`: the report of a run over HTTP on this machine, made anew from the files when they have changed."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from foveate.errors import ConfigError, UserError
from foveate.report.page import INPUTS, render_report

logger = logging.getLogger(__name__)


class ReportServer(ThreadingHTTPServer):
    """Answers every request for `/` with the report of `folder`; nothing else is served, and nothing is written."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self._state: object = None
        self._page = b""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def page(self) -> bytes:
        """The report as the files are now; what keeps it from being made is said in its place."""
        state = _state_of(self.folder)
        if state != self._state:
            try:
                self._page = render_report(self.folder).encode()
            except UserError as error:
                return f"<!doctype html><title>foveate</title><p>{html.escape(str(error))}".encode()
            self._state = state
        return self._page


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
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        if self.path != "/":
            self.send_error(404)
            return
        page = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)


def _state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that a report is made of."""
    files = [path for name in INPUTS for path in ((folder / name), *sorted((folder / name).glob("*")))]
    abouts = [(path, path.stat()) for path in files if path.is_file()]
    return [(str(path), about.st_size, about.st_mtime_ns) for path, about in abouts]
