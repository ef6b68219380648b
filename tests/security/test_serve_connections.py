"""Connections that say nothing, or too little: closed in time, and never in the way of others."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import threading
import time

import pytest
import uvicorn

from foveate.report import live
from foveate.report.live import ReportServer
from foveate.serve import connections
from foveate.serve.connections import Connection


async def application(scope, receive, send):
    """Answers at once, without the body, but for `/slow`, which waits for its client to go."""
    if scope["path"] == "/slow":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    if scope["path"] == "/refused":  # before its body is read
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"2")]})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def listening(most=1000):
    """The port of a server of `application` with at most so many connections."""
    kind = type("Few", (Connection,), {"most": most})
    config = uvicorn.Config(
        application, lifespan="off", log_config=None, access_log=False, http=kind, ws="none", timeout_keep_alive=60,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def connect(port, said=b""):
    one = socket.create_connection(("127.0.0.1", port), timeout=10)
    one.sendall(said)
    return one


def is_closed(one):
    """Waits until the server has closed a connection."""
    try:
        return one.recv(100) == b""
    except ConnectionResetError:
        return True


def reply_of(one):
    reply = b""
    while not reply.endswith(b"ok"):
        reply += one.recv(1000)
    return reply


def get(port, path):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as client:
        client.request("GET", path)
        return client.getresponse().status


@pytest.mark.parametrize("said", [b"", b"GET /health HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n"])
def test_headers_that_do_not_come_close_the_connection(monkeypatch, said):
    monkeypatch.setattr(connections, "HEADERS_S", 0.1)
    with listening() as port, connect(port, said) as one:
        assert is_closed(one)


def test_the_next_request_of_a_kept_connection_has_as_long_for_its_headers(monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_S", 0.1)
    with listening() as port, connect(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") as one:
        reply_of(one)
        one.sendall(b"GET / HT")
        assert is_closed(one)


def test_a_request_under_way_is_not_closed_for_its_headers(monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_S", 0.05)
    with listening() as port, connect(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n") as one:
        one.settimeout(0.3)
        with pytest.raises(TimeoutError):
            one.recv(1)


def test_a_refused_body_is_answered_at_once_and_may_come_for_a_while(monkeypatch):
    head = b"POST /refused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n"
    with listening() as port, connect(port, head) as one:
        assert b" 413 " in reply_of(one), "nothing of the body was sent yet"
        one.sendall(b"a" * 300_000 + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in reply_of(one), "the connection is kept"
    monkeypatch.setattr(connections, "REFUSED_S", 0.1)
    with listening() as port, connect(port, head + b"a") as one:
        reply_of(one)
        assert is_closed(one)


def test_idle_connections_make_room_for_requests():
    with listening(most=5) as port, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(port, b"GET ")) for _ in range(40)]
        for _ in range(3):
            assert get(port, "/") == 200
        assert is_closed(idle[0])


def test_health_is_answered_when_all_connections_have_requests(caplog):
    Connection._logged = -1e9
    with listening(most=5) as port, contextlib.ExitStack() as stack, caplog.at_level(logging.WARNING):
        for _ in range(5):
            stack.enter_context(connect(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        time.sleep(0.1)
        for _ in range(20):
            assert get(port, "/health") == 200
            assert get(port, "/") == 503
    assert len([record for record in caplog.records if "which is the limit" in record.message]) == 1
    assert len(caplog.records) < 5, "no flood"


def test_the_limit_leaves_files_for_what_is_not_a_connection(monkeypatch):
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1024, 4096))
    assert connections.most_connections(1000) < 1024 - connections.RESERVE
    assert connections.most_connections(100) == 100


# -------------------------------------------------------------------------------------------------------- the report


@contextlib.contextmanager
def viewing(folder):
    with ReportServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield int(server.address.rsplit(":", 1)[1].strip("/"))
        finally:
            server.shutdown()
            thread.join()


def test_idle_viewers_of_a_report_have_no_threads(tmp_path):
    with viewing(tmp_path) as port, contextlib.ExitStack() as stack:
        before = threading.active_count()
        for number in range(200):
            stack.enter_context(connect(port, b"GET / HTTP/1.1\r\n" if number % 2 else b""))
        assert get(port, "/") == 200
        assert threading.active_count() <= before + 1


def test_a_viewer_who_says_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "REQUEST_S", 0.1)
    with viewing(tmp_path) as port, connect(port, b"GET / HTTP/1.1\r\n") as one:
        assert is_closed(one)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost:8700\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8700\r\n\r\n", b"200"),
        (b"HEAD / HTTP/1.1\r\nHost: [::1]\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\n\r\n", b"403"),
        (b"GET /etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
        (b"\xff\x00\r\n\r\n", b"403"),
    ],
)
def test_a_report_is_shown_under_the_names_of_this_machine_only(tmp_path, said, status):
    with viewing(tmp_path) as port, connect(port, said) as one:
        assert one.recv(1000).split(b" ")[1] == status


def test_a_request_to_a_report_has_a_length(tmp_path):
    with viewing(tmp_path) as port, connect(port) as one, contextlib.suppress(OSError):
        for _ in range(100):
            one.sendall(b"X-A: " + b"a" * 1000 + b"\r\n")
        assert is_closed(one)
