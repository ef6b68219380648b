"""A server of chat completions that misbehaves as it is told to, for tests of clients.

The answer to a request is a hash of its messages, so that it does not matter when and how often one comes.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from quiet_server import QuietServer

Fault = Callable[[int], str | None]
"""From the number of a request (0, 1, ...) to what is wrong with it: see `Handler.do_POST`."""


def answer_to(messages: object) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:12]


class Server(QuietServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int, fault: Fault, delay: float) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.fault, self.delay, self.seen, self.lock = fault, delay, 0, threading.Lock()
        self.bodies: list[dict] = []
        self.gone = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number, self.server.seen = self.server.seen, self.server.seen + 1
            self.server.bodies.append(body)
        fault = "cut" if self.server.gone else self.server.fault(number)
        time.sleep(self.server.delay)
        if fault == "hang":
            time.sleep(2)
        elif fault == "cut":
            self.close_connection = True
            return
        elif fault is not None and fault.isdecimal():
            self._send(int(fault), {"error": {"message": f"told to say {fault}"}})
            return
        reply = self._reply(body)
        if fault == "empty":
            reply["choices"] = []
        elif fault == "null":
            reply["choices"][0]["message"]["content"] = None
        elif fault == "abort":
            reply["choices"][0]["finish_reason"] = "abort"
        elif fault == "other":
            reply = {"hello": "world"}
        content = json.dumps(reply).encode()
        if fault == "malformed":
            content = content[: len(content) // 2]
        if fault == "html":
            self._raw(200, b"<html>busy</html>", "text/html")
        elif fault == "half":
            self._raw(200, content[:20], "application/json", len(content))
            self.close_connection = True
        else:
            self._raw(200, content, "application/json")

    def _reply(self, body: dict) -> dict:
        text = answer_to(body["messages"])
        choices = [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": f"{text} {i}"}}
            for i in range(body.get("n", 1))
        ]
        usage = {"prompt_tokens": 5, "completion_tokens": 3 * len(choices), "total_tokens": 5 + 3 * len(choices)}
        return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}

    def _send(self, status: int, content: dict) -> None:
        self._raw(status, json.dumps(content).encode(), "application/json")

    def _raw(self, status: int, content: bytes, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def faulty(fault: Fault = lambda _: None, *, port: int = 0, delay: float = 0.0) -> Iterator[Server]:
    """A server that lives until the block ends; afterwards its port refuses."""
    server = Server(port, fault, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.gone = True  # also for those who keep a connection
        server.shutdown()
        server.server_close()
        thread.join()
