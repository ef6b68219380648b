"""The processes that grade end with their run, whatever they do and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slow_cases import slow_but

from foveate.processes import end_with, lifeline
from foveate.records import Task
from foveate.rewards.pool import Graders

GRADER = """
import os, pathlib, signal, subprocess, sys, time

def score(text, task, *, log: str):
    child = subprocess.Popen(["sleep", "600"])
    session = subprocess.Popen(["sleep", "600"], start_new_session=True, env={})
    daemon = subprocess.run(["setsid", "sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], stdout=-1, text=True)
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {child.pid} {session.pid} {daemon.stdout.strip()}\\n")
    if text == "c":
        (9 ** 9 ** 8) ** 9  # never comes back to Python
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(600)
"""

RUN = """
import sys
from foveate.records import Task
from foveate.rewards.pool import Graders
if __name__ == "__main__":
    task = Task("0", "s", (), (), 0, {}, "row 0")
    with Graders(sys.argv[1], {"log": sys.argv[2]}, workers=4, time_limit=600.0) as graders:
        graders.grade_many([(text, task) for text in ("c", "sleep", "c", "sleep")])
"""


DAEMONS = """
import os, pathlib, subprocess, sys, time

def score(text, task, *, log: str):
    started = subprocess.run(["setsid", "sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], stdout=-1, text=True)
    with open(log, "a") as file:
        file.write(started.stdout)
    if text == "dies":
        os.abort()
    if text == "hangs":
        time.sleep(600)
    return 1.0
"""

LOUD = """
import os, sys

def score(text, task):
    print("\\x1b[2Jhello" if text == "short" else "x" * 10_000_000, flush=True)
    print("and so on", file=sys.stderr, flush=True)
    os.system("echo from a child")
    return 1.0
"""


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_graders_and_what_they_started_end_with_the_run(tmp_path, number):
    (tmp_path / "grader.py").write_text(GRADER)
    (tmp_path / "run.py").write_text(RUN)
    log = tmp_path / "log"
    run = subprocess.Popen([sys.executable, tmp_path / "run.py", f"{tmp_path}/grader.py:score", log])
    try:
        assert wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 4, 120)
        pids = [int(pid) for pid in log.read_text().split()]
        assert all(map(is_alive, pids))
    finally:
        run.send_signal(number)
        run.wait(60)
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_a_process_that_starts_after_its_owner_ended_ends_at_once():
    owner, kept = lifeline()
    child = os.fork()
    if child == 0:
        kept.close()
        time.sleep(0.2)
        end_with(owner)
        os._exit(0)
    kept.close()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (1, -signal.SIGIO)


@pytest.mark.parametrize("how", slow_but(["dies", "ends"], ["dies", "hangs", "ends"]))
def test_daemons_of_a_grader_end_with_its_process(tmp_path, how):
    (tmp_path / "grader.py").write_text(DAEMONS)
    log = tmp_path / "log"
    task = Task("0", "s", (), (), 0, {}, "row 0")
    with Graders(f"{tmp_path}/grader.py:score", {"log": str(log)}, workers=1, time_limit=5.0) as graders:
        value = graders(how, task).value
        [pid] = map(int, log.read_text().split())
        assert is_alive(pid) == (how == "ends") == (value == 1.0)
    assert wait_until(lambda: not is_alive(pid))


def test_a_grader_prints_in_measure_and_obeys_no_terminal(tmp_path):
    (tmp_path / "grader.py").write_text(LOUD)
    run = f"""
from foveate.records import Task
from foveate.rewards.pool import Graders
with Graders({f"{tmp_path}/grader.py:score"!r}, {{}}, workers=1) as graders:
    for text in ("short", "long", "long"):
        print(graders(text, Task("0", "s", (), (), 0, {{}}, "row 0")).value)
"""
    ended = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1.0"] * 3
    err = ended.stderr
    assert err.startswith("\\x1b[2Jhello\nand so on\nfrom a child\nxxx")
    assert err.endswith("... (a worker prints more than 20,000 bytes in 60 s)\n")
    assert len(err) < 21_000
