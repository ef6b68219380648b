"""`foveate serve`: OpenAI's interface over the native engine, and the servers of other projects."""

from __future__ import annotations

import json
import signal
import socket
import sys
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import openai
import pytest
from serving import served
from starlette.testclient import TestClient

from foveate.errors import ConfigError, EngineError
from foveate.records import SamplingParams
from foveate.rewards.remote import data_url
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.serve.app import Chat
from foveate.serve.batcher import Batcher
from foveate.serve.engines import EngineRequest, command, serve_engine
from foveate.serve.native import ServeRequest, serve_native

KEY = {"Authorization": "Bearer secret"}


@contextmanager
def routes(policy, encode):
    """A client of the routes over a model, with key, model name "tiny" and 16 tokens at most."""
    batcher = Batcher(NativeEngine(policy, encode.decode))
    chat = Chat("tiny", encode, batcher, 16, "secret")
    with TestClient(chat.app(), base_url="http://localhost") as http:
        yield http
    chat.close()
    batcher.close()


@pytest.fixture
def client(tiny_policy, encode):
    with routes(tiny_policy, encode) as http:
        yield http


def body(*content, **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **fields}


def text(words):
    return {"type": "text", "text": words}


def picture(image):
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def said_in(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def test_a_reply_is_what_the_engine_says_in_this_process(client, tiny_policy, encode, make_task, make_image):
    image = make_image(90, 60)
    task = make_task("<image>\nwhat is this?", image)
    [[expected, _]] = NativeEngine(tiny_policy, encode.decode).generate(
        [Request(encode(task), 7)], SamplingParams(2, 8, 0.9, 0.8, 50)
    )
    asked = body(picture(image), text("what is this?"), n=2, max_tokens=8, temperature=0.9, top_p=0.8, seed=7)
    reply = client.post("/v1/chat/completions", json=asked | {"logprobs": True, "top_k": 50}, headers=KEY).json()
    first = reply["choices"][0]
    assert first["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert [entry["logprob"] for entry in first["logprobs"]["content"]] == pytest.approx(expected.logprobs, abs=1e-6)
    assert first["finish_reason"] == expected.finish
    assert reply["usage"]["prompt_tokens"] == len(encode(task))


@pytest.mark.parametrize(
    "words", ["<image>what?", "<image>\nwhat?", "before <image> after", "<image>\n<image>\n\nboth?"]
)
def test_verbatim_requests_keep_the_prompt_of_the_task(client, encode, make_task, make_image, words):
    images = [make_image(60, 60, seed) for seed in range(words.count("<image>"))]
    pieces = words.split("<image>")
    parts = [text(pieces[0])]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [picture(image), text(piece)]
    reply = client.post("/v1/chat/completions", json=body(*parts, max_tokens=1, verbatim=True), headers=KEY).json()
    assert reply["usage"]["prompt_tokens"] == len(encode(make_task(words, *images)))


def test_a_streamed_reply_holds_the_same_answer(client):
    asked = body(text("what?"), max_tokens=6, seed=3)
    whole = client.post("/v1/chat/completions", json=asked, headers=KEY).json()["choices"][0]
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = client.post("/v1/chat/completions", json=asked, headers=KEY).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert said_in(chunks) == whole["message"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert (set(finishes[:-1]), finishes[-1]) == ({None}, whole["finish_reason"])


@pytest.mark.parametrize("more", [{}, {"skip_special_tokens": True}, {"stop": ["nowhere"]}])
def test_an_answer_goes_on_behind_stop_tokens_where_asked(tiny_policy, encode, make_task, more):
    prompt = encode(make_task("what?"))
    [[known]] = NativeEngine(tiny_policy, encode.decode).generate([Request(prompt, 3)], SamplingParams(1, 9))
    early, last = known.token_ids[4], known.token_ids[8]
    family = replace(tiny_policy.family, stop_ids=(early, last))
    asked = body(text("what?"), max_tokens=9, seed=3)
    with routes(replace(tiny_policy, family=family), replace(encode, family=family)) as client:
        plain = client.post("/v1/chat/completions", json=asked, headers=KEY).json()
        asked |= more | {"ignore_eos": True}
        whole = client.post("/v1/chat/completions", json=asked, headers=KEY).json()
        streamed = client.post("/v1/chat/completions", json=asked | {"stream": True}, headers=KEY).text
    assert (plain["choices"][0]["finish_reason"], plain["usage"]["completion_tokens"]) == ("stop", 5)
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 9)
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n\n")[:-2]]
    assert said_in(chunks) == whole["choices"][0]["message"]["content"]


REFUSED = {
    "no json": (b"{", 400, "not JSON"),
    "a list": (b"[]", 400, "not a JSON object"),
    "other model": (body(text("a"), model="gpt"), 404, "'tiny'"),
    "unknown field": (body(text("a"), tempreature=1), 400, "tempreature"),
    "tools": (body(text("a"), tools=[{"type": "function"}]), 400, "tools is not supported"),
    "hot": (body(text("a"), temperature=3), 400, "temperature"),
    "too many tokens": (body(text("a"), max_tokens=17), 400, "at most 16"),
    "no messages": ({"model": "tiny", "messages": []}, 400, "messages"),
    "a url": (body({"type": "image_url", "image_url": {"url": "http://host/a.png"}}), 400, "not from http:"),
    "a file": (body({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), 400, "not from file:"),
    "no picture": (
        body({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        400,
        "the image cannot be read",
    ),
    "too long": (body(text("red " * 2000)), 400, "the limit is 1024"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_with_a_reason(client, name):
    sent, status, said = REFUSED[name]
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    reply = client.post("/v1/chat/completions", content=content, headers=KEY)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")
    assert said in reply.json()["error"]["message"]


def test_only_health_is_open_without_the_key(client):
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.post("/v1/chat/completions", json=body(text("a")), headers=headers).status_code == 401
    assert client.get("/v1/models", headers=KEY).json()["data"][0]["owned_by"] == "foveate"


def test_the_command_answers_openais_client_and_stops_cleanly(tiny_folder):
    with served(tiny_folder, "--port", 0, "--threads", 1, "--name", "mine") as (address, key, process):
        assert address.startswith("http://127.0.0.1:")
        with openai.OpenAI(base_url=address, api_key=key) as client:
            assert [model.id for model in client.models.list()] == ["mine"]
            said = client.chat.completions.create(
                model="mine", messages=[{"role": "user", "content": "a"}], max_tokens=3
            )
            assert said.usage is not None
            assert said.usage.completion_tokens <= 3
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == "stopped\n"


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        request = ServeRequest(str(tmp_path / "no model"), "m", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1 port .* choose another --port"):
            serve_native(request, print)


# ------------------------------------------------------------------------------------------------ vLLM and SGLang

FAKE_ENGINE = """
import http.server, os, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments.get("--model") == "broken": sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/end": os._exit(5)
    def log_message(self, *_): pass
http.server.HTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def engine_python(tmp_path):
    """An interpreter that has a module vllm, which answers /health as the real one does."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE_ENGINE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_an_engine_is_started_waited_for_and_its_end_is_told(engine_python):
    seen = []

    def ready(address):
        seen.append(address)
        urllib.request.urlopen(address.removesuffix("/v1") + "/end").close()

    request = EngineRequest("vllm", "folder", "m", engine_python, port=free_port())
    with pytest.raises(EngineError, match="vllm ended by itself with code 5"):
        serve_engine(request, ready)
    assert seen == [f"http://127.0.0.1:{request.port}/v1"]


def test_an_interrupted_server_takes_its_engine_with_it(engine_python):
    addresses = []

    def ready(address):
        addresses.append(address)
        raise KeyboardInterrupt

    serve_engine(EngineRequest("vllm", "folder", "m", engine_python, port=free_port()), ready)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(addresses[0].removesuffix("/v1") + "/health")


def test_an_engine_that_cannot_start_is_told_with_what_to_do(engine_python):
    with pytest.raises(EngineError, match="vllm ended with code 3 while it started"):
        serve_engine(EngineRequest("vllm", "broken", "m", engine_python, port=free_port()), print)
    with pytest.raises(ConfigError, match=r"sglang is not installed .*pip install 'sglang\[all\]'.* --engine native"):
        serve_engine(EngineRequest("sglang", "folder", "m", engine_python), print)
    with pytest.raises(ConfigError, match="--engine-python /nowhere/python cannot be run"):
        serve_engine(EngineRequest("vllm", "folder", "m", "/nowhere/python"), print)


def test_command_lines_name_model_address_and_context():
    vllm = command(
        EngineRequest("vllm", "folder", "m", "py", port=81, key="s", tensor_parallel=2, more=("--seed", "1"))
    )
    assert vllm[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    assert vllm[-2:] == ["--seed", "1"]
    assert "s" not in vllm, "vLLM reads its key from the environment"
    sglang = command(EngineRequest("sglang", "folder", "m", "py", port=81, key="s", context=9000))
    flags = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert (flags["--model-path"], flags["--context-length"], flags["--api-key"]) == ("folder", "9000", "s")
