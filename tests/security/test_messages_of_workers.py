"""Whatever the code of a grader or an environment writes to its pipe, its owner goes on in time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time

import pytest

from foveate.environments.pool import Environments
from foveate.environments.protocol import EnvironmentFailure
from foveate.processes import BadMessage, _Incoming, send_by
from foveate.records import Message, Task
from foveate.rewards.pool import Graders

TASK = Task("0", "s", (Message("user", "q"),), (), ["a"], {"k": ["v"]}, "row 0")
WRITE = """
import os, signal, sys, time

def write(data):
    for file in os.listdir("/proc/self/fd"):
        try:
            if "socket" in os.readlink("/proc/self/fd/" + file):
                os.write(int(file), data)
        except OSError:
            pass

DATA = {
    "half": b"\\x00\\x00\\x10\\x00", "long": b"\\x7f\\xff\\xff\\xff", "huge": b"\\xff\\xff\\xff\\xff" + b"\\x7f" * 8,
    "no pickle": b"\\x00\\x00\\x00\\x05AAAAA", "another": b"\\x00\\x00\\x00\\x05\\x80\\x04K\\x01.", "empty": bytes(4),
}

def act(text):
    if text == "trickle":
        write(b"\\x7f\\xff\\xff\\xff")
        while True:
            write(b"a")
            time.sleep(0.05)
    if text in DATA:
        write(DATA[text])
        time.sleep(60)
"""
GRADER = (
    WRITE
    + """
def score(text, task):
    act(text)
    task.answer.append(1)
    task.meta["k"].append(1)
    return float(len(task.answer) + len(task.meta["k"]))
"""
)
ENVIRONMENT = (
    WRITE
    + """
from foveate.environments import Environment, Step, observation

class Bad(Environment):
    def reset(self, task, seed):
        return [observation("user", "Go")]

    def step(self, answer):
        act(answer)
        return Step((observation("user", "a"),), reward=1.0, done=True)
"""
)
WRITTEN = ["half", "long", "huge", "no pickle", "another", "empty", "trickle"]


def test_a_grader_that_writes_to_its_pipe_costs_one_answer(tmp_path):
    (tmp_path / "g.py").write_text(GRADER)
    began = time.monotonic()
    with Graders(f"{tmp_path}/g.py:score", {}, workers=4, time_limit=1.0) as graders:
        scores = graders.grade_many([(text, TASK) for text in ["fine", *WRITTEN, "fine"]])
    assert [score.value for score in scores] == [4.0, *[None] * len(WRITTEN), 4.0]
    assert sum(graders.failures[kind] for kind in ("died", "timed_out")) == len(WRITTEN)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("workers", [0, 1])
def test_a_grader_that_changes_its_task_changes_no_later_score(tmp_path, workers):
    (tmp_path / "g.py").write_text(GRADER)
    with Graders(f"{tmp_path}/g.py:score", {}, workers=workers) as graders:
        assert [score.value for score in graders.grade_many([("fine", TASK)] * 3)] == [4.0] * 3
    assert (TASK.answer, TASK.meta) == (["a"], {"k": ["v"]})


def test_an_environment_that_writes_to_its_pipe_costs_one_answer(tmp_path):
    (tmp_path / "e.py").write_text(ENVIRONMENT)
    with Environments(f"{tmp_path}/e.py:Bad", {}, workers=2, time_limit=1.0) as pool:
        texts = ["fine", *WRITTEN, "fine"]
        for key, _ in enumerate(texts):
            pool.open(TASK, 1, key).result(30)
        steps = [pool.step(key, text) for key, text in enumerate(texts)]
        found = [step.result(60) for step in steps]
    assert [isinstance(one, EnvironmentFailure) for one in found] == [False, *[True] * len(WRITTEN), False]


def test_messages_arrive_as_they_were_sent_and_half_of_one_is_none():
    ours, theirs = multiprocessing.Pipe()
    incoming = _Incoming(ours)
    assert incoming.take() == []
    for message in (None, {"a": [1, 2.5]}, b"x" * 100_000):
        theirs.send(message)
        assert incoming.take() == [message]
    body = pickle.dumps("whole")
    framed = len(body).to_bytes(4, "big") + body
    for byte in framed[:-1]:
        os.write(theirs.fileno(), bytes([byte]))
        assert incoming.take() == []
    os.write(theirs.fileno(), framed[-1:] + framed)
    assert incoming.take() == ["whole"]
    assert incoming.take() == ["whole"]
    os.write(theirs.fileno(), b"\xff" * 4 + len(body).to_bytes(8, "big") + body)
    assert incoming.take() == ["whole"]
    os.write(theirs.fileno(), b"\xff" * 12)
    with pytest.raises(BadMessage):
        incoming.take()
    theirs.close()
    with pytest.raises(EOFError):
        _Incoming(ours).take()


def test_a_process_that_reads_nothing_holds_up_nobody():
    ours, theirs = multiprocessing.Pipe()
    send_by(ours, ("short", 1), time.monotonic() + 1)
    assert theirs.recv() == ("short", 1)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        send_by(ours, b"x" * 10_000_000, began + 0.2)
    assert time.monotonic() - began < 2
    theirs.close()
    with pytest.raises(OSError, match=r"[Pp]ipe|reset"):
        send_by(ours, b"x" * 10_000_000, time.monotonic() + 1)
