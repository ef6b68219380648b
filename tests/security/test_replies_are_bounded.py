"""Replies of servers that rewards ask are read up to a size, whatever they are packed in."""

from __future__ import annotations

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest
from quiet_server import QuietServer

from foveate.records import Message, Task
from foveate.rewards import requests
from foveate.rewards.build import build_reward
from foveate.rewards.requests import ReplyTooLarge, is_too_large

TASK = Task("0", "s", (Message("user", "q"),), (), "a", {}, "row 0")
BODY = b'{"choices": [{"message": {"role": "assistant", "content": "score: 1"}}]}' + b" " * 2**20


@pytest.fixture
def server(monkeypatch):
    """serve(body, headers) -> the address of a server that replies so, and counts the bytes that it could send."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)
    monkeypatch.setattr(requests, "MOST_BYTES", 2**16)
    running = []

    def serve(body: bytes, headers: dict[str, str]):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                for name, value in {**headers, "Content-Type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        http = QuietServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((http, thread))
        return f"http://127.0.0.1:{http.server_port}"

    yield serve
    for http, thread in running:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.mark.parametrize("name", ["endpoint", "judge"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_reply_without_end_is_not_read_and_the_answer_is_not_graded(server, name, packed):
    body = gzip.compress(BODY) if packed else BODY
    url = server(body, {"Content-Encoding": "gzip"} if packed else {})
    reward = build_reward(name, {"url": url, "patience": 60.0, **({"model": "m"} if name == "judge" else {})})
    began = time.monotonic()
    score = reward("an answer", TASK)
    assert score.value is None
    assert ("compressed ('gzip')" if packed else "more than 65,536 bytes") in score.note
    assert time.monotonic() - began < 10


def test_the_cause_of_an_error_is_found():
    assert is_too_large(None) is None
    error = ConnectionError("y")
    error.__cause__ = ReplyTooLarge("x")
    assert is_too_large(error) is error.__cause__
