from __future__ import annotations

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from PIL import Image as Picture
from quiet_server import QuietServer

from foveate.records import Image, Message, Task
from foveate.registry import ConfigError
from foveate.rewards.build import build_reward
from foveate.rewards.pool import Graders
from foveate.rewards.remote import data_url


@pytest.fixture
def server(monkeypatch):
    """A server that keeps what it is sent and answers with its `replies` in turn: (status, JSON value)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.received.append((self.path, {key.title(): said for key, said in self.headers.items()}, body))
            status, value = http.replies.pop(0)
            said = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    class Server(QuietServer):
        received: list = []  # noqa: RUF012
        replies: list = []  # noqa: RUF012

    with Server(("127.0.0.1", 0), Handler) as http:
        http.received, http.replies = [], []
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        http.url = f"http://127.0.0.1:{http.server_port}"
        yield http
        http.shutdown()
        thread.join()


def asked(answer="seven", images=()):
    return Task(
        "t", "vqa", (Message("user", "<image>\nHow many?"),), images, answer, {"index": np.int64(3)}, "r.parquet, row 5"
    )


def chat(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_a_judge_is_asked_and_its_last_score_counts(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    json_reply = chat('{"REASONING": "fine", "SCORE": "4"}')
    server.replies = [
        chat("score: 2? On reflection\n**Score:** 7.5"),
        chat("score = 12"),
        chat("score: -3"),
        json_reply,
    ]
    settings = {"url": server.url + "/v1/", "model": "judge-7b", "api_key_variable": "JUDGE_KEY"}
    reward = build_reward("judge", settings)
    assert [reward("It is {truth} 7.", asked()).value for _ in range(4)] == [0.75, 1.0, 0.0, 0.4]
    path, headers, body = server.received[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("judge-7b", 0.0)
    content = body["messages"][0]["content"]
    assert "Question:\nHow many?" in content
    assert "Reference answer:\nseven" in content
    assert "Answer to grade:\nIt is {truth} 7." in content
    assert "to 10 (right)" in content


def test_a_judge_can_see_the_pictures(server, tmp_path):
    file = tmp_path / "a.png"
    Picture.new("RGB", (3, 2)).save(file)
    server.replies = [chat("score: 1")]
    settings = {"url": server.url, "model": "m", "images": True, "scale": 1.0, "prompt": "{answer}!"}
    images = (Image(file, None, 3, 2), Image(None, file.read_bytes(), 3, 2))
    assert build_reward("judge", settings)("x", asked(images=images)).value == 1.0
    first, second, text = server.received[0][2]["messages"][0]["content"]
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    assert first == second == {"type": "image_url", "image_url": {"url": url}}
    assert text == {"type": "text", "text": "x!"}
    assert data_url(images[0]) == url


def test_a_judge_without_a_verdict_gives_no_grade_and_a_note(server):
    server.replies = [chat("I cannot tell.")]
    score = build_reward("judge", {"url": server.url, "model": "m"})("x", asked())
    assert score.value is None
    assert score.note == "grader failed: ValueError: the judge wrote no `score: N`: 'I cannot tell.'"


def test_a_reply_of_a_judge_that_was_cut_gives_no_grade(server):
    choice = {"finish_reason": "length", "message": {"role": "assistant", "content": "score: 1? The unit is"}}
    server.replies = [(200, {"choices": [choice]}), (200, {"choices": [{**choice, "finish_reason": "stop"}]})]
    judge = build_reward("judge", {"url": server.url, "model": "m", "max_tokens": 9})
    cut, whole = judge("x", asked()), judge("x", asked())
    assert (cut.value, whole.value) == (None, 0.1)
    assert cut.note == "grader failed: ValueError: the judge's reply was cut at max_tokens=9"


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": []}, {"choices": None}, {"error": "busy"}, [1], "score: 3", {"choices": [None]},
        {"choices": [{"message": None}]}, {"choices": [{"message": {"content": [{"text": "score: 3"}]}}]},
    ],
)  # fmt: skip
def test_a_reply_of_a_judge_that_is_none_says_so(server, reply):
    server.replies = [(200, reply)]
    score = build_reward("judge", {"url": server.url, "model": "m"})("x", asked())
    assert score.value is None
    assert score.note.startswith("grader failed: ValueError: the judge's reply is no chat completion with a text")


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 3}, {"prompt_tokens": "a", "completion_tokens": None}])
def test_a_judge_need_not_count_its_tokens(server, usage):
    server.replies = [(200, {**chat("score: 5")[1], "usage": usage})]
    with Graders("judge", {"url": server.url, "model": "m"}) as graders:
        assert graders("x", asked()).value == 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("score: 8/10", 0.8), ("Score: 8 / 10.", 0.8), ("score: +8", 0.8), ("score: .5", 0.05), ("score：8", 0.8),
        ("score: 1e1!", 1.0), ("score: 7, of 10", 0.7), ("(score: 7.)", 0.7), ("score: 2 or score: N", 0.2),
        ("`score: 8`", 0.8), ("score: 8</done>", 0.8), ("score: 8分。", 0.8), ("score: 1e1", 1.0),
        ("score: 80%", None), ("score: 7,5", None), ("score: 8/100", None), ("score: 0.9.1", None),
        ("score: 1_0", None), ("score: 0x10", None), ("score: 5 / 5", None), ("score: 8/ten", None),
    ],
)  # fmt: skip
def test_a_score_is_a_whole_number_of_the_scale_or_none(server, text, value):
    server.replies = [chat(text)]
    assert build_reward("judge", {"url": server.url, "model": "m"})("x", asked()).value == value


def test_a_reply_without_content_is_asked_for_again(server):
    server.replies = [(200, {"choices": []}), chat("score: 5")]
    with Graders("judge", {"url": server.url, "model": "m"}) as graders:
        assert [graders("x", asked()).value for _ in range(3)] == [None, 0.5, 0.5]
    assert len(server.received) == 2


def test_an_endpoint_gets_the_row_and_gives_a_number_or_a_mapping(server):
    server.replies = [(200, 0.25), (200, {"score": 1, "recall": 0.5, "why": "fine"})]
    reward = build_reward("endpoint", {"url": server.url + "/score"})
    assert reward("7", asked(np.array([1, 2]))).value == 0.25
    score = reward("7", asked())
    assert (score.value, score.parts) == (1.0, {"recall": 0.5})
    path, headers, body = server.received[0]
    assert path == "/score"
    assert "Authorization" not in headers
    assert body == {
        "data_source": "vqa", "question": "How many?", "solution_str": "7", "ground_truth": [1, 2],
        "extra_info": {"index": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        {"code": 500},
        {"Status": 503, "accuracy": 1.0},
        {"detail": 1},
        {"error": 2},
        {"status_code": 422, "score": None},
        {"message": "busy"},
    ],
)
def test_an_error_that_a_server_sends_as_a_reply_is_no_score(server, error):
    server.replies = [(200, error), (200, 0.5)]
    reward = build_reward("endpoint", {"url": server.url})
    refused = reward("7", asked())
    assert refused.value is None
    assert f"{server.url} replied with an error: {json.dumps(error)}" in refused.note
    assert reward("7", asked()).value == 0.5  # the error was not kept


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ({"score": 0.5, "code": 200, "message": "ok", "error": None}, 0.5),
        ({"overall": 0.5, "status": 1, "error": 0.25}, 0.5),
        ({"error": "no such row", "score": 0.0}, 0.0),
        ({"code": 1.0, "format": 0.0}, 1.0),
        ({"accuracy": 1.0, "format": 0.5}, 1.5),
    ],
)
def test_a_score_beside_fields_of_errors_counts(server, reply, value):
    server.replies = [(200, reply)]
    assert build_reward("endpoint", {"url": server.url})("7", asked()).value == value


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server):
    server.replies = [(503, "busy"), (429, "busy"), (200, 1.0), (400, "bad row")]
    reward = build_reward("endpoint", {"url": server.url, "retries": 2, "patience": 0.0})
    assert reward("7", asked()).value == 1.0
    refused = reward("7", asked())
    assert refused.value is None
    assert f'{server.url} replied 400 Bad Request: "bad row"' in refused.note
    server.replies = [(503, "busy")] * 3
    assert "replied 503" in reward("7", asked()).note
    assert len(server.received) == 7


@pytest.mark.usefixtures("server")
def test_a_server_that_is_gone_gives_no_grade_and_a_note():
    gone = build_reward("endpoint", {"url": "http://127.0.0.1:9", "retries": 1, "patience": 0.0})("7", asked())
    assert gone.value is None
    assert "http://127.0.0.1:9 does not answer" in gone.note
    assert gone.trace == ""  # the note says all


@pytest.mark.usefixtures("server")
def test_a_server_that_never_replies_is_said_to():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {
            "retries": 0,
            "patience": 0.0,
            "timeout": 0.05,
            "url": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        assert build_reward("endpoint", settings)("7", asked()).note.endswith("does not answer: Request timed out.")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("endpoint", {"url": "localhost:80"}, "url must begin with http"),
        ("judge", {"url": "http://x", "model": "m", "prompt": "?"}, r"prompt must contain \{answer\}"),
        ("judge", {"url": "http://x", "model": "m", "scale": 0.0}, "scale must be a finite number greater than 0"),
        ("judge", {"url": "http://x", "model": "m", "scale": float("inf")}, "scale must be a finite number"),
        ("judge", {"url": "http://x"}, "setting 'model' is missing"),
        ("endpoint", {"url": "http://x", "concurrency": 0}, "concurrency must be at least 1"),
    ],
)
def test_wrong_settings_of_a_remote_reward_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_reward(name, settings)
