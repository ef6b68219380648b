from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import foveate.rewards.pool
from foveate.errors import DataError
from foveate.records import Task
from foveate.registry import ConfigError
from foveate.rewards import pool
from foveate.rewards.pool import Graders, Waiting

GRADER = """
import math, os, signal, sys, time
from foveate.records import Score

def score(text, task, *, scale: float = 1.0):
    if text == "sleep":
        time.sleep(1e6)
    if text == "spin":
        while True:
            pass
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "exit":
        sys.exit(3)
    if text == "memory":
        return Score(float(len(bytearray(64 << 30))))
    if text == "raise":
        raise RuntimeError("no such thing")
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "fork":
        os.fork()
        return Score(7.0)
    if text == "nan":
        return Score(math.nan)
    if text == "word":
        return "right"
    if text == "pid":
        return Score(float(os.getpid()))
    return Score(scale * float(text), {"of": float(task.answer)})
"""

TASKS = [Task(str(i), "s", (), (), i, {}, f"x.parquet, row {i}") for i in range(4)]


@pytest.fixture
def grader(tmp_path):
    file = tmp_path / "grader.py"
    file.write_text(GRADER)
    return f"{file}:score"


def test_scores_come_in_the_order_of_the_answers(grader):
    answers = [(str(i), TASKS[i // 100]) for i in range(400)]
    with Graders(grader, {"scale": 2.0}, workers=2) as graders:
        scores = graders.grade_many(answers)
        assert [score.value for score in scores] == [2.0 * i for i in range(400)]
        assert [score.parts["of"] for score in scores] == [i // 100 for i in range(400)]
        assert graders("3", TASKS[1]).value == 6.0
        assert graders.grade_many([]) == []
        assert not graders.failures


@pytest.mark.parametrize(
    ("bad", "reason", "note"),
    [
        ("sleep", "timed_out", "timed out after 0.5 s"),
        ("spin", "timed_out", "timed out after 0.5 s"),
        ("kill", "died", "its process died (signal SIGKILL)"),
        ("exit", "died", "its process died (exit status 3)"),
        ("memory", "raised", "MemoryError: "),
        ("raise", "raised", "RuntimeError: no such thing"),
        ("interrupt", "raised", "KeyboardInterrupt: "),
        ("nan", "not_finite", "gave nan"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_answer_is_not_graded_and_the_others_are(grader, bad, reason, note, workers):
    with Graders(grader, {}, workers=workers, time_limit=0.5) as graders:
        for rounds in (1, 2):
            scores = graders.grade_many([(text, TASKS[0]) for text in ("1", bad, "2", "3")])
            assert [score.value for score in scores] == [1.0, None, 2.0, 3.0]
            assert scores[1].note == f"grader failed: {note}"
            assert dict(graders.failures) == {reason: rounds}


def test_a_grader_that_forks_scores_every_answer_once(grader):
    with Graders(grader, {}, workers=1) as graders:
        for _ in range(3):
            assert [score.value for score in graders.grade_many([(t, TASKS[0]) for t in ("1", "fork", "2")])] == [
                1,
                7,
                2,
            ]
        assert not graders.failures


def test_a_worker_keeps_to_a_task_and_shares_the_longest_when_none_is_left():
    one, two, three = TASKS[:3]
    waiting = Waiting([one] * 3 + [two] * 5 + [three] * 2, workers=3)
    assert [waiting.take(worker) for worker in (0, 1, 0, 2, 1, 0)] == [0, 3, 1, 8, 4, 2]
    assert [waiting.take(worker) for worker in (2, 2, 0, 1, 0)] == [9, 7, 6, 5, None]
    assert Waiting([], workers=1).take(0) is None


SLOW_TO_IMPORT = 2.5
SLOW_GRADER = f"import time\ntime.sleep({SLOW_TO_IMPORT})\n{GRADER}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_grader_that_sleeps_for_ever_delays_a_batch_by_no_more_than_its_limit(workers, tmp_path):
    """What a new worker needs to start does not come on top: one that began at the limit would end later than this. Nor
    do the limits of several: as many hang as there are workers."""
    file = tmp_path / "grader.py"
    file.write_text(SLOW_GRADER)
    limit = 2.5 * SLOW_TO_IMPORT
    with Graders(f"{file}:score", {}, workers=workers, time_limit=limit) as graders:
        graders.grade_many([("1", TASKS[0])] * 20 * workers)
        texts = [*["sleep"] * workers, *"0123456789"]
        begin = time.monotonic()
        scores = graders.grade_many([(text, TASKS[0]) for text in texts])
        assert limit <= time.monotonic() - begin < limit + 0.9 * SLOW_TO_IMPORT
        assert [score.value for score in scores] == [None] * workers + [float(i) for i in range(10)]
        assert dict(graders.failures) == {"timed_out": workers}


@pytest.mark.slow
def test_the_answers_behind_one_that_sleeps_are_graded_before_its_limit(tmp_path):
    """By a second worker, for which nobody waits until the first one is ended."""
    file = tmp_path / "grader.py"
    log = tmp_path / "log"
    file.write_text(
        f"{GRADER}\n\ndef logged(text, task):\n"
        f"    open({str(log)!r}, 'a').write(text + '\\n')\n    return score(text, task)\n"
    )
    with Graders(f"{file}:logged", {}, workers=1, time_limit=4.0) as graders:
        seen = []
        give_up = pool._Worker.give_up

        def noted(worker):
            seen.append(log.read_text().split())
            return give_up(worker)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool._Worker, "give_up", noted)
            graders.grade_many([(text, TASKS[0]) for text in ("1", "sleep", "2", "3")])
    assert seen == [["1", "sleep", "2", "3"]]


@pytest.mark.slow
def test_an_answer_that_takes_more_than_half_of_its_limit_counts(tmp_path):
    file = tmp_path / "grader.py"
    file.write_text(
        "import time\nfrom foveate.records import Score\n\n"
        "def score(text, task):\n    time.sleep(float(text))\n    return Score(float(text))\n"
    )
    with Graders(f"{file}:score", {}, workers=1, time_limit=3.0) as graders:
        for _ in range(2):
            assert [s.value for s in graders.grade_many([(t, TASKS[0]) for t in ("1.6", "0", "0.1")])] == [1.6, 0, 0.1]
            assert len(graders._workers) == 1
            assert not graders._late
        assert not graders.failures


def test_a_worker_that_was_killed_while_idle_costs_no_answer(grader):
    with Graders(grader, {}, workers=1) as graders:
        pid = int(graders("pid", TASKS[0]).value)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.01)
        assert graders("5", TASKS[0]).value == 5.0
        assert not graders.failures


def test_a_worker_in_the_place_of_a_lost_one_may_be_lost_at_its_start(grader, monkeypatch):
    with Graders(grader, {}, workers=1) as graders:
        assert graders("5", TASKS[0]).value == 5.0
        start, lost = foveate.rewards.pool._Worker.__init__, []

        def dying(worker, *arguments):
            start(worker, *arguments)
            if len(lost) < 2:
                lost.append(worker)
                worker._process.kill()

        monkeypatch.setattr(foveate.rewards.pool._Worker, "__init__", dying)
        assert graders("kill", TASKS[0]).value is None
        assert graders("6", TASKS[0]).value == 6.0
        assert len(lost) == 2


def test_workers_stay_and_end_with_the_block(grader):
    with Graders(grader, {}, workers=1) as graders:
        pids = {graders("pid", TASKS[0]).value for _ in range(3)}
    assert len(pids) == 1
    assert not Path(f"/proc/{int(pids.pop())}").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_returns_no_score_ends_the_run(grader, workers):
    with Graders(grader, {}, workers=workers) as graders:
        with pytest.raises(DataError, match=r"score returned str 'right'; it must return"):
            graders.grade_many([("1", TASKS[0]), ("word", TASKS[0]), ("2", TASKS[0])])
        assert graders("4", TASKS[0]).value == 4.0


def test_a_reward_is_checked_before_any_worker_starts(grader):
    with pytest.raises(ConfigError, match="unknown setting 'scael'; did you mean 'scale'"):
        Graders(grader, {"scael": 1.0})
    for settings in ({"workers": -1}, {"time_limit": 0.0}, {"memory_limit": -1.0}):
        with pytest.raises(ConfigError, match="must be greater than 0"):
            Graders("exact", {}, **settings)


def test_relative_paths_hold_in_the_workers(grader, monkeypatch):
    file, name = grader.rsplit(":", 1)
    monkeypatch.chdir(Path(file).parent)
    with Graders(f"{Path(file).name}:{name}", {}, workers=1) as graders:
        assert graders("1", TASKS[0]).value == 1.0


def test_a_quick_reward_is_graded_in_this_process():
    with Graders("exact", {}) as graders:
        assert (
            graders.grade_many([("a", Task("t", "s", (), (), "a")), ("b", Task("t", "s", (), (), None))])[0].value
            == 1.0
        )
        assert dict(graders.failures) == {"raised": 1}
        assert graders._workers == []


def test_an_expression_that_never_ends_is_timed_out():
    task = Task("t", "math", (), (), "5", {}, "m.parquet, row 1")
    with Graders("math", {}, workers=1, time_limit=3.0) as graders:
        scores = graders.grade_many(
            [("\\boxed{5}", task), ("\\boxed{9^{9^{9^{9}}}}", task), ("\\boxed{\\frac{10}{2}}", task)]
        )
        assert [score.value for score in scores] == [1.0, None, 1.0]
