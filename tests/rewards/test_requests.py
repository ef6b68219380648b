"""Rewards that ask servers: many requests at once, equal ones once, and a server that comes back."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest
from quiet_server import QuietServer

from foveate.records import Message, Task
from foveate.rewards.pool import Graders


class Scorer(QuietServer):
    """Scores an answer by its length, in `meet` requests at a time: none is answered before so many are there."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, meet=1, refuse=0, never=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.barrier = threading.Barrier(meet)
        self.never = never
        self.lock, self.refuse, self.bodies, self.now, self.most = threading.Lock(), refuse, [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
            refused = len(server.bodies) <= server.refuse or body["solution_str"] == server.never
        server.barrier.wait(30)
        with server.lock:
            server.now -= 1
        said = json.dumps(len(body["solution_str"])).encode()
        self.send_response(503 if refused else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


@contextmanager
def scoring(**settings):
    with Scorer(**settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


TASK = Task("t", "vqa", (Message("user", "How many?"),), (), "seven", {}, "r.parquet, row 5")


def answers(count):
    return [("x" * (1 + number), TASK) for number in range(count)]


def test_as_many_requests_are_under_way_as_concurrency_says():
    with scoring(meet=8) as server, Graders("endpoint", {"url": server.url, "concurrency": 8}) as graders:
        scores = graders.grade_many(answers(32))
    assert [score.value for score in scores] == [1.0 + number for number in range(32)]
    assert server.most == 8


def test_equal_requests_are_sent_once_and_counted():
    with scoring() as server, Graders("endpoint", {"url": server.url}) as graders:
        fetches = graders.prefetch(answers(3) * 2)
        assert [score.value for score in graders.grade_many(answers(3) * 2, fetches)] == [1.0, 2.0, 3.0] * 2
        metrics, later = graders.metrics(), graders.metrics()
    assert len(server.bodies) == 3
    assert (metrics["reward/requests"], metrics["reward/requests_cached"]) == (3, 3 / 6)
    assert metrics["reward/request_seconds"] > 0
    assert later["reward/requests"] == 0


def test_a_server_that_comes_back_within_its_patience_costs_no_answer(monkeypatch):
    monkeypatch.setattr("foveate.rewards.requests.FIRST_PAUSE", 0.01)
    with scoring(refuse=5) as server, Graders("endpoint", {"url": server.url, "retries": 0}) as graders:
        scores = graders.grade_many(answers(4))
    assert [score.value for score in scores] == [1.0, 2.0, 3.0, 4.0]
    assert len(server.bodies) == 9


def test_an_answer_whose_request_fails_is_not_graded_and_asked_again_later():
    settings = {"retries": 0, "patience": 0.0, "concurrency": 1}
    with scoring(refuse=1) as server, Graders("endpoint", {"url": server.url, **settings}) as graders:
        first, second = graders.grade_many(answers(2))
        again = graders.grade_many(answers(1))
    assert (first.value, second.value, again[0].value) == (None, 2.0, 1.0)
    assert "replied 503" in first.note
    assert graders.failures == {"raised": 1}


def test_patience_with_one_request_ends_whatever_others_get(monkeypatch):
    monkeypatch.setattr("foveate.rewards.requests.FIRST_PAUSE", 0.01)
    with scoring(never="xxx") as server:
        settings = {"url": server.url, "retries": 0, "patience": 0.3, "concurrency": 2}
        with Graders("endpoint", settings) as graders:
            fetches = graders.prefetch(answers(3)[2:])
            others = [graders.grade_many([("y" * (4 + number), TASK)])[0].value for number in range(20)]
            [score] = graders.grade_many(answers(3)[2:], fetches)
    assert None not in others
    assert score.value is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sum_asks_for_its_parts_at_once_and_grades_the_others_in_workers(workers):
    with scoring(meet=2) as server:
        urls = {"settings": {"endpoint": {"url": server.url}}}
        weights = {"endpoint": 1.0, "exact": 10.0}
        with Graders("weighted_sum", {"weights": weights, **urls}, workers=workers) as graders:
            scores = graders.grade_many([("seven", TASK), ("eight!", TASK)])
    assert [score.value for score in scores] == [15.0, 6.0]
    assert scores[0].parts.items() >= {"endpoint": 5.0, "exact": 1.0}.items()


def test_a_source_without_a_server_asks_none():
    with scoring() as server:
        rewards = {"vqa": "exact", "*": "endpoint"}
        settings = {"rewards": rewards, "settings": {"*": {"url": server.url}}}
        other = Task("u", "web", TASK.messages, (), "seven", {}, "r.parquet, row 6")
        with Graders("by_source", settings) as graders:
            scores = graders.grade_many([("seven", TASK), ("seven", other)])
    assert [score.value for score in scores] == [1.0, 5.0]
    assert len(server.bodies) == 1
