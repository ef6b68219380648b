"""Hostile requests to the server: bounded before they are read, refused in one line, forgotten when abandoned."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import tracemalloc

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from foveate.cli.app import app as command_line
from foveate.rewards.remote import data_url
from foveate.rollout.native.engine import NativeEngine
from foveate.serve.app import Chat
from foveate.serve.batcher import Batcher
from foveate.serve.limits import ServeLimits
from foveate.serve.protocol import Refused, read_request


@pytest.fixture
def make_chat(tiny_policy, encode):
    """make_chat(**limits) -> the routes over the tiny model with those limits."""
    made = []

    def make(hosts=(), **limits):
        batcher = Batcher(NativeEngine(tiny_policy, encode.decode), 2048)
        chat = Chat("tiny", encode, batcher, 512, None, hosts, ServeLimits(**limits))
        made.append((chat, batcher))
        return chat

    yield make
    for chat, batcher in made:
        chat.close()
        batcher.close()


@pytest.fixture
def post(make_chat):
    """post(body, headers) -> the response to a body, bytes or JSON."""
    with TestClient(make_chat().app(), base_url="http://localhost", raise_server_exceptions=False) as http:

        def send(body, **headers):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return http.post("/v1/chat/completions", content=content, headers=headers)

        yield send


def chat_body(text="a", **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}


def raw(fields):
    """A body with fields that are not written by json.dumps."""
    return json.dumps(chat_body()).encode()[:-1] + b", " + fields + b"}"


BODIES = {
    "half a surrogate pair": (raw(b'"user": "\\ud83d"'), 400, "surrogate"),
    "a lone low surrogate": (json.dumps(chat_body("a\udc00")).encode(), 400, "not JSON"),
    "bytes that are no text": (raw(b'"user": "\xff\xfe"'), 400, "not JSON"),
    "deep nesting": (b"[" * 50_000, 400, "not JSON"),
    "deep nesting inside": (raw(b'"metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000), 400, "not JSON"),
    "a number of 5,000 digits": (raw(b'"seed": ' + b"9" * 5000), 400, ""),
    "a large exponent": (raw(b'"temperature": 1e999'), 400, ""),
    "not a number": (raw(b'"top_p": NaN'), 400, "not JSON"),
    "not a number, as text": (chat_body(top_p="nan"), 400, "top_p"),
    "infinity": (raw(b'"temperature": Infinity'), 400, "not JSON"),
    "a tiny temperature": (chat_body(temperature=1e-30), 400, "use 0 .* or 0.01 to 2"),
    "a subnormal temperature": (chat_body(temperature=5e-324), 400, "use 0"),
    "a million brackets": (raw(b'"metadata": [' + b"[]," * 2**20 + b"[]]"), 413, "more than 262,144 values"),
    "100,000 empty messages": (raw(b'"messages": [' + b"{}," * 100_000 + b"{}]"), 413, "100,001 messages"),
    "80,000 unknown keys": (raw(b",".join(b'"k%d": 1' % i for i in range(80_000))), 400, "k0: is not a field"),
    "a message of keys": (chat_body(messages=[{f"k{i}": 1 for i in range(80_000)}]), 400, r"messages\[0\].k0: is not"),
    "60,000 images": (chat_body([{"type": "image_url", "image_url": {"url": "a"}}] * 60_000), 400, "60,000 images"),
    "an image of blanks": (chat_body([{"type": "image_url", "image_url": {"url": "aa " * 10**5}}]), 400, "image"),
    "a huge n": (chat_body(n=10**9), 400, "n:"),
    "a huge top_k": (chat_body(top_k=10**30), 400, "top_k"),
    "too many tokens": (chat_body(max_tokens=99_999_999), 400, "at most 512"),
    "too many in all": (chat_body(n=128, max_tokens=100), 400, "exceed the 2,048 tokens"),
    "a long text": (chat_body("a" * 2_000_000), 400, "2,000,000 characters"),
    "a long text in parts": (chat_body([{"type": "text", "text": "a" * 500_000}] * 4), 400, "2,000,000 characters"),
    "a long stop text": (chat_body(stop="a" * 10_000), 400, "stop"),
    "many stop texts": (chat_body(stop=["a"] * 1000), 400, "stop"),
    "an empty stop text": (chat_body(stop=""), 400, "stop"),
    "content of another kind": (chat_body({"a": [1]}), 400, "must be a text or a list of parts, not dict"),
    "a part that is none": (chat_body([[]]), 400, r"messages\[0\].content\[0\]"),
    "a part without its text": (chat_body([{"type": "text"}]), 400, "must be"),
    "messages that are none": ({"model": "tiny", "messages": [5, None]}, 400, "messages"),
    "an endless name": (chat_body(model="m" * 10**6), 404, "there is no model"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_strange_body_is_refused_in_one_short_line(post, name):
    body, status, reason = BODIES[name]
    reply = post(body)
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 400
    assert "\n" not in error["message"]
    assert re.search(reason, error["message"]), error["message"]


def test_texts_are_measured_before_they_become_tokens(make_chat, monkeypatch):
    chat = make_chat()
    monkeypatch.setattr(type(chat.encoder), "length", lambda *_: pytest.fail("it was tokenised"))
    with TestClient(chat.app(), base_url="http://localhost") as http:
        reply = http.post("/v1/chat/completions", json=chat_body("a " * 1_000_000))
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("piece", ["aa ", "%aa", "%2B", "a%0A", "\n", "é"])
def test_an_address_of_an_image_takes_a_few_times_its_size_whatever_is_in_it(piece):
    url = piece * 2**20
    request = read_request(json.dumps(chat_body([{"type": "image_url", "image_url": {"url": url}}])).encode())
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(Refused, match="image"):
        request.task("request")
    took, most = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * len(url.encode())
    assert took < 2


def test_a_body_that_trickles_has_an_end(make_chat):
    chat = make_chat(body_s=5.0, whole_body_s=0.3)

    async def drip():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def ask():
        sent = []
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [(b"host", b"localhost")]}

        async def send(message):
            sent.append(message)

        await chat.app()({**scope, "query_string": b""}, drip, send)
        return sent

    first, second = asyncio.run(asyncio.wait_for(ask(), 5))
    assert first["status"] == 408
    assert b"not complete after 0.3 s" in second["body"]


def test_other_names_than_its_own_are_refused(make_chat):
    with TestClient(make_chat(("mine.lan",)).app(), base_url="http://localhost") as http:
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            for path in ("/health", "/v1/models", "/"):
                assert http.get(path, headers={"Host": host}).status_code == 403
        for host in ("localhost:8000", "127.0.0.1:9", "[::1]:8000", "mine.lan:80", "MINE.lan"):
            assert http.get("/health", headers={"Host": host}).status_code == 200


def test_bodies_are_bounded_alone_and_in_sum(make_chat):
    with TestClient(make_chat(body_bytes=1000).app(), base_url="http://localhost") as http:
        reply = http.post("/v1/chat/completions", json=chat_body("a" * 2000))
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    chat = make_chat(held_bytes=1000)
    with TestClient(chat.app(), base_url="http://localhost") as http:
        reply = http.post("/v1/chat/completions", json=chat_body("a" * 2000))
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(reply.headers["Retry-After"]) > 0
        for _ in range(5):
            assert http.post("/v1/chat/completions", json=chat_body("a" * 500)).status_code == 200, "it is given back"


@pytest.mark.parametrize("length", [b"1001", b"9" * 18, b"9" * 5000])
def test_a_body_that_is_too_large_by_its_header_is_not_read(make_chat, length):
    chat = make_chat(body_bytes=1000)
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"a" * 2000, "more_body": True}

    async def ask():
        status, body = await one_of(chat.app(), b"", headers=[(b"content-length", length)], receive=receive)
        assert (status, json.loads(body)["error"]["code"], read) == (413, "request_too_large", [])
        status, _ = await one_of(chat.app(), b"", headers=[(b"transfer-encoding", b"chunked")], receive=receive)
        assert (status, read) == (413, [1]), "no more than shows that it is too large"

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", True), ("max_tokens", "2"), ("max_tokens", 2.5), ("n", True), ("n", "1"), ("seed", False),
        ("seed", "3"), ("top_k", True), ("temperature", "0.5"), ("temperature", True), ("top_p", "1"),
        ("stream", "yes"), ("stream", 1), ("logprobs", "true"), ("logprobs", 0), ("verbatim", 1),
        ("skip_special_tokens", "no"), ("stop", 5), ("stop", [1]), ("model", 5),
        ("messages", {"role": "user", "content": "a"}), ("messages", [{"role": 5, "content": "a"}]),
        ("stream_options", [True]),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(post, field, value):
    reply = post(chat_body(**{field: value}) if field != "model" else {**chat_body(), "model": value})
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    assert error["param"].startswith(field)
    assert error["code"].startswith("invalid_")


def test_whole_numbers_stand_for_fractions(post):
    assert post(chat_body(temperature=1, top_p=1)).status_code == 200


def test_images_are_decoded_one_after_the_other_where_they_are_large(make_chat, make_image, monkeypatch):
    chat = make_chat(decoded_pixels=90 * 60)
    now, most, lock = [0], [0], threading.Lock()
    encode = type(chat.encoder).__call__

    def counting(self, task):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            return encode(self, task)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(type(chat.encoder), "__call__", counting)
    part = {"type": "image_url", "image_url": {"url": data_url(make_image(90, 60))}}
    body = json.dumps(chat_body([part])).encode()
    replies = asyncio.run(all_of(chat.app(), [body] * 8))
    assert [status for status, _ in replies] == [200] * 8
    assert most[0] == 1


async def all_of(app, bodies):
    """(status, body) of requests that are sent together."""
    return await asyncio.gather(*(one_of(app, body) for body in bodies))


async def one_of(app, body, gone=None, headers=(), receive=None):
    """A request over ASGI. Its client leaves when `gone` is set; `receive` stands for the client."""
    parts, status = [], []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_body():
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        parts.append(message.get("body", b""))
        status.extend([message["status"]] if "status" in message else [])

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost"), *headers],
    }  # fmt: skip
    await app(scope, receive or receive_body, send)
    return (status[0] if status else None), b"".join(parts)


@pytest.mark.parametrize("stream", [False, True])
def test_an_abandoned_request_is_cancelled_at_once(make_chat, stream):
    chat = make_chat()
    engine = chat.batcher._engine

    async def run():
        gone = asyncio.Event()
        body = json.dumps(chat_body(max_tokens=500, n=3, stream=stream, seed=1)).encode()
        asking = asyncio.ensure_future(one_of(chat.app(), body, gone))
        while engine.stats.decode_steps < 5:
            await asyncio.sleep(0.001)
        gone.set()
        await asyncio.wait_for(asking, 5)
        steps = engine.stats.decode_steps
        status, _ = await one_of(chat.app(), json.dumps(chat_body(max_tokens=2)).encode())
        return status, engine.stats.decode_steps - steps

    status, steps = asyncio.run(run())
    assert status == 200
    assert steps < 10, "the abandoned answers were sampled on"
    assert chat._held.used == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--max-tokens", "99999999"],
        ["--max-prompt-tokens", "99999999"],
        ["--max-tiles", "1000000000"],
        ["--threads", "100000"],
        ["--port", "70000"],
        ["--token-budget", "0"],
    ],
)
def test_limits_of_the_server_have_limits(options):
    result = CliRunner().invoke(command_line, ["serve", "demo", *options])
    assert result.exit_code == 2
    assert options[0] in result.output


def test_more_tokens_than_the_engine_holds_are_refused_at_the_start(tiny_folder):
    result = CliRunner().invoke(command_line, ["serve", str(tiny_folder), "--port", "0", "--token-budget", "1000"])
    assert "--max-tokens 4096 is more than the 1000 tokens that the engine holds" in str(result.exception)
