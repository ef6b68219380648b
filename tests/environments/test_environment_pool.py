from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from foveate.data.images import load_image
from foveate.environments import instances
from foveate.environments.pool import Environments
from foveate.environments.protocol import EnvironmentFailure, EnvironmentRecord, Opened, with_opening
from foveate.errors import ConfigError, DataError
from foveate.records import Message, Task

ENVIRONMENT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
from foveate.environments.observe import observation
from foveate.environments.protocol import Environment, Observation, Step

class Counter(Environment):
    def __init__(self, *, start: int = 0, log: str = ""):
        self.total, self.log = start, log

    def reset(self, task, seed):
        self.draws = seed
        return [observation("user", f"count from {self.total}, seed {seed}")]

    def step(self, answer):
        if self.log:
            with open(self.log, "a") as file:
                file.write(answer + "\\n")
        match answer.split():
            case ["sleep", seconds]: time.sleep(float(seconds))
            case ["kill"]: os.kill(os.getpid(), signal.SIGKILL)
            case ["os_exit"]: os._exit(3)
            case ["exit"]: sys.exit(3)
            case ["raise"]: raise RuntimeError("no such thing")
            case ["memory"]: bytearray(64 << 30)
            case ["fork"]: os.fork()
            case ["long"]: return Step((observation("user", "x" * (100 << 20)),))
            case ["images"]: return Step((observation("user", "", *[Image.new("RGB", (4, 4))] * 50),))
            case ["large"]: return Step((observation("user", "", Image.new("RGB", (4000, 4000))),))
            case ["garbage"]: return {"reward": 1}
            case ["marks"]: return Step((Observation("user", "<image>"),))
            case ["role"]: return Step((Observation("assistant", "hm"),))
            case ["half"]: return Step((Observation("user", "\\ud800"),))
            case ["numpy"]: return Step(reward=np.float32(0.5))
            case ["numpy_bool"]: return Step(reward=np.bool_(True))
            case ["array"]: return Step(reward=np.zeros(2))
            case ["torch"]: return Step(reward=__import__("torch").tensor(0.25))
            case ["text"]: return Step(reward="1")
            case ["nan"]: return Step(reward=float("nan"))
            case ["info"]: return Step(info={"a": object()})
            case ["secret"]: return Step((observation("user", f"{os.getpid()}"),))
            case ["pid"]: return Step((), None, False, {"pid": os.getpid()})
            case ["done"]: return Step((), 1.0, True)
            case [number]: self.total += int(number)
        return Step((observation("user", f"{self.total}"),), reward=float(self.total))

class Remembering(Counter):
    def state(self):
        return {"total": self.total}

    def restore(self, state):
        self.total = state["total"]
"""

TASK = Task("t", "s", (Message("user", "?"),), (), None, {}, "x.parquet, row 1")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "counting.py"
    path.write_text(ENVIRONMENT)
    return str(path)


def opened(pool, *keys, seed=3):
    results = [pool.open(TASK, seed, key) for key in keys]
    return [result.result(60) for result in results]


def said(step):
    assert not isinstance(step, EnvironmentFailure), step
    return step.messages[0].content


def test_each_answer_has_an_environment_of_its_own(file):
    with Environments(f"{file}:Counter", {"start": 5}, workers=2) as pool:
        first, second, _ = opened(pool, "a", "b", "c")
        assert first == second
        assert first.messages[0].content == "count from 5, seed 3"
        steps = [pool.step(key, answer) for key, answer in (("a", "1"), ("b", "10"), ("c", "100"))]
        assert [said(step.result(60)) for step in steps] == ["6", "15", "105"]
        step = pool.step("a", "1").result(60)
        assert (said(step), step.reward, step.done) == ("7", 7.0, False)
        assert pool.step("b", "done").result(60).done
        assert not pool.failures
        assert not pool.rebuilt


FAULTS = [
    ("kill", "died", "its process died (signal SIGKILL)"),
    ("os_exit", "died", "its process died (exit status 3)"),
    ("exit", "raised", "SystemExit: 3"),
    ("raise", "raised", "RuntimeError: no such thing"),
    ("memory", "raised", "MemoryError: "),
    ("long", "limit", "a step has 104,857,600 characters; at most 20,000 are taken (setting max_text)"),
    ("images", "limit", "a step has 50 images; at most 4 are taken (setting max_images)"),
    ("large", "limit", "16,000,000 pixels of an image; at most 4,194,304 are taken (setting max_pixels)"),
    ("garbage", "invalid", "step returned dict {'reward': 1}; it must return a Step"),
    ("marks", "invalid", "a message with 0 images must have one <image> in its text for each"),
    ("role", "invalid", "a message has the role 'assistant'; allowed: system, user, tool"),
    ("half", "invalid", "the text of a message is not valid Unicode: "),
    ("nan", "invalid", "the reward of a step is nan; it must be a finite number or None"),
    ("array", "invalid", "the reward of a step is array([0., 0.]); it must be"),
    ("text", "invalid", "the reward of a step is '1'; it must be"),
    ("info", "invalid", "info must hold what JSON can hold"),
]


def test_a_bad_environment_costs_its_answer_and_no_other(file):
    with Environments(f"{file}:Counter", {}, workers=2, time_limit=60.0) as pool:
        opened(pool, "good", "other")
        total = 0
        for number, (answer, kind, note) in enumerate(FAULTS):
            opened(pool, number)
            failed, good, other = pool.step(number, answer), pool.step("good", "1"), pool.step("other", "1")
            failure, total = failed.result(60), total + 1
            assert isinstance(failure, EnvironmentFailure), (answer, failure)
            assert (failure.kind, note in failure.note, "\n" in failure.note) == (kind, True, False), failure
            assert said(good.result(60)) == said(other.result(60)) == str(total)
            assert pool.step(number, "1").result(60) == failure
            pool.close(number)
            assert said(pool.step("good", "0").result(60)) == str(total)
        assert sum(pool.failures.values()) == len(FAULTS)


def test_a_number_of_numpy_or_torch_is_a_reward(file):
    with Environments(f"{file}:Counter", {}, workers=0) as pool:
        opened(pool, "a")
        found = [pool.step("a", what).result().reward for what in ("numpy", "torch", "numpy_bool")]
        assert found == [0.5, 0.25, 1.0]
        assert all(type(reward) is float for reward in found)


def test_an_environment_that_hangs_costs_its_answer_and_no_other(file):
    with Environments(f"{file}:Counter", {}, workers=1, time_limit=0.5) as pool:
        opened(pool, "a", "b")
        hanging, other = pool.step("a", "sleep 1000"), pool.step("b", "1")
        assert hanging.result(60).note == "timed out after 0.5 s"
        assert said(other.result(60)) == "1"
        assert pool.failures == {"timed_out": 1}


def test_those_that_a_lost_process_takes_along_are_rebuilt_by_replaying_their_answers(file, tmp_path):
    log = str(tmp_path / "log")
    with Environments(f"{file}:Counter", {"log": log}, workers=1) as pool:
        opened(pool, "a", "b")
        for answer in ("1", "2"):
            pool.step("a", answer).result(60)
        assert pool.step("b", "kill").result(60).kind == "died"
        assert said(pool.step("a", "3").result(60)) == "6"
        assert pool.rebuilt == 2
    assert Path(log).read_text().split() == ["1", "2", "kill", "kill", "1", "2", "3"]


def test_one_that_waits_behind_many_that_end_their_process_is_not_counted_among_them(file):
    with Environments(f"{file}:Counter", {}, workers=1) as pool:
        opened(pool, *range(7))
        killers = [pool.step(key, "kill") for key in range(6)]
        assert said(pool.step(6, "1").result(60)) == "1"
        assert [killer.result(60).kind for killer in killers] == ["died"] * 6


@pytest.mark.slow
def test_twenty_kills_of_processes_lose_no_answer(file):
    rng = random.Random(0)
    with Environments(f"{file}:Counter", {}, workers=3) as pool:
        keys = range(12)
        opened(pool, *keys)
        totals = dict.fromkeys(keys, 0)
        for kill in range(20):
            numbers = {key: rng.randrange(100) for key in keys}
            steps = {key: pool.step(key, str(number)) for key, number in numbers.items()}
            worker = pool._workers[rng.randrange(len(pool._workers))]
            if kill % 2:
                steps[0].result(60)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker._process.pid, signal.SIGKILL)
            for key, step in steps.items():
                totals[key] += numbers[key]
                assert said(step.result(60)) == str(totals[key])
            if kill % 7 == 6:
                for key in keys:
                    pool.close(key)
                opened(pool, *keys)
                totals = dict.fromkeys(keys, 0)
        assert not pool.failures
        assert pool.rebuilt


def test_a_state_is_restored_in_the_place_of_a_replay(file, tmp_path):
    log = str(tmp_path / "log")
    with Environments(f"{file}:Remembering", {"log": log}, workers=1) as pool:
        opened(pool, "a", "b")
        pool.step("a", "4").result(60)
        pool.step("b", "kill").result(60)
        assert said(pool.step("a", "3").result(60)) == "7"
        record = pool.state("a")
        assert record.state == {"total": 7}
        assert record.answers == ("4", "3")
    assert Path(log).read_text().split() == ["4", "kill", "kill", "3"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_goes_on_in_another_pool_from_its_record(file, workers):
    with Environments(f"{file}:Counter", {}, workers=workers) as pool:
        opened(pool, "a")
        pool.step("a", "4").result(60)
        record = pool.state("a")
    with Environments(f"{file}:Counter", {}, workers=workers) as pool:
        assert isinstance(pool.restore(TASK, record, "x").result(60), Opened)
        assert said(pool.step("x", "3").result(60)) == "7"
        fresh = pool.restore(TASK, EnvironmentRecord(9, (), ()), "y").result(60)
        assert fresh.messages[0].content.endswith("seed 9")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_replay_that_shows_other_things_starts_the_answer_again(file, workers):
    with Environments(f"{file}:Counter", {}, workers=workers) as pool:
        opened(pool, "a")
        pool.step("a", "secret").result(60)
        record = pool.state("a")
        altered = EnvironmentRecord(3, ("1",), record.digests)
        failure = pool.restore(TASK, altered, "b").result(60)
        assert failure.kind == "start_again"
        assert pool.failures == {"start_again": 1}
        assert isinstance(pool.open(TASK, 3, "b").result(60), Opened)


def test_a_limit_on_turns_ends_the_answer_without_a_failure(file):
    with Environments(f"{file}:Counter", {"max_turns": 2}, workers=0) as pool:
        assert pool.max_turns == 2
        opened(pool, "a")
        assert not pool.step("a", "1").result().done
        last = pool.step("a", "1").result()
        assert last.done
        assert last.info == {"turn_limit": True}
        assert last.reward == 2.0


def test_no_call_waits_for_an_environment(file):
    with Environments(f"{file}:Counter", {}, workers=1) as pool:
        opened(pool, "a", "b")
        release = threading.Event()
        begun = time.monotonic()
        slow = pool.step("a", "sleep 0.2")
        slow.add_done_callback(lambda _: release.set())
        assert time.monotonic() - begun < 0.2 or release.is_set()
        assert said(slow.result(60)) == "0"


def test_those_behind_a_command_of_half_of_its_time_move_to_another_process(file):
    with Environments(f"{file}:Counter", {}, workers=1, time_limit=600.0) as pool:
        opened(pool, "a", "b", "c")
        pool.step("b", "5").result(60)
        hanging = pool.step("a", "sleep 1000")
        waiting = pool.step("b", "1")
        worker = pool._workers[0]
        while worker.job is None or worker.job.future is not hanging:
            time.sleep(0.001)
        pool._call(lambda: pool._workers[0].__setattr__("deadline", time.monotonic() + 299.0))
        pool._call(lambda: pool._relieve(pool._workers[0]))
        assert said(waiting.result(60)) == "6"
        assert said(pool.step("c", "2").result(60)) == "2"
        assert not hanging.done()
        pool.close("a")
        with pytest.raises(CancelledError):
            hanging.result(60)
        assert len(pool._workers) == 2


def test_closing_ends_what_waits_and_frees_the_key(file):
    with Environments(f"{file}:Counter", {}, workers=1) as pool:
        opened(pool, "a")
        running, waiting = pool.step("a", "sleep 0.2"), pool.step("a", "1")
        pool.close("a")
        assert opened(pool, "a")[0].digest
        assert said(pool.step("a", "1").result(60)) == "1"
        assert running.cancelled()
        assert waiting.cancelled()
        assert not pool.failures


def test_a_group_shares_the_prompt_of_its_environments(file):
    with Environments(f"{file}:Counter", {}, workers=0) as pool:
        task = with_opening(TASK, opened(pool, "a", "b"))
        assert task.messages == (Message("user", "count from 0, seed 3"),)
        with pytest.raises(DataError, match="row 1: the environment began with different messages"):
            with_opening(TASK, [*opened(pool, "c"), *opened(pool, "d", seed=4)])


def test_an_environment_that_no_process_can_make_is_one_error(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import os\nfrom foveate.environments.protocol import Environment\n"
        f"if os.getpid() != {os.getpid()}:\n    raise OSError('only here')\n"
        "class Bad(Environment): ...\n"
    )
    with Environments(f"{tmp_path / 'bad.py'}:Bad", {}, workers=1) as pool:
        waiting = pool.open(TASK, 0, "a")
        with pytest.raises(DataError, match="cannot be built in a worker process: OSError: only here"):
            waiting.result(60)
        with pytest.raises(DataError, match="cannot be built"):
            pool.open(TASK, 0, "b").result(60)


def test_a_process_that_does_not_start_is_one_error(file, monkeypatch):
    start = instances.EnvironmentWorker.__init__

    def dying(worker, *arguments):
        start(worker, *arguments)
        worker._process.kill()

    monkeypatch.setattr(instances.EnvironmentWorker, "__init__", dying)
    with Environments(f"{file}:Counter", {}, workers=1) as pool, pytest.raises(DataError, match="did not start: its"):
        pool.open(TASK, 0, "a").result(60)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("counter", {}, "unknown environment 'counter'"),
        ("Counter", {"begin": 1}, "unknown setting 'begin'; its settings: start, log"),
        ("Counter", {"start": "1"}, "start must be a whole number, found '1'"),
        ("Counter", {"max_turns": 0}, "max_turns must be at least 1, found 0"),
        ("Step", {}, "must be a subclass of foveate.environments.Environment"),
        (
            "Environment",
            {"start": 1},
            "unknown setting 'start'; its settings: max_turns, max_text, max_images, max_pixels",
        ),
        (
            "Counter",
            {"max_turn": 1},
            "unknown setting 'max_turn'; did you mean 'max_turns'. Its settings: start, log, max",
        ),
    ],
)
def test_settings_are_refused_when_a_run_starts(file, name, settings, message):
    path = name if name == "counter" else f"{file}:{name}"
    with pytest.raises(ConfigError, match=message):
        Environments(path, settings, workers=0)


OTHERS = """
from pathlib import Path
from foveate.environments import Environment, Observation, Step, observation
from foveate.records import Image

class Careless(Environment):
    def reset(self, task, seed):
        task.meta.setdefault("seen", []).append(seed)
        task.answer.append("mine")
        return [observation("user", f"{task.meta} {task.answer}")]

    def step(self, answer):
        raise KeyboardInterrupt

class Overwriting(Environment):
    def __init__(self, *, folder: str):
        self.file = Path(folder) / "screen.png"

    def reset(self, task, seed):
        self.shade = 0
        return [observation("user", "look")]

    def step(self, answer):
        self.shade += 100
        made = observation("user", "", __import__("PIL.Image").Image.new("L", (4, 4), self.shade)).images[0]
        self.file.write_bytes(made.data)
        return Step((Observation("user", "<image>", (Image(self.file, None, 4, 4),)),))

class Holding(Environment):
    def reset(self, task, seed):
        self.held = object()
        return [observation("user", "go")]

    def close(self):
        del self.held

class Showing(Environment):
    def tools(self):
        return [{"name": "look"}]
"""


@pytest.fixture
def others(tmp_path):
    (tmp_path / "others.py").write_text(OTHERS)
    return str(tmp_path / "others.py")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_environment_changes_of_its_task_changes_no_other(others, workers):
    task = Task("t", "s", (Message("user", "?"),), (), ["truth"], {"size": 3})
    with Environments(f"{others}:Careless", {}, workers=workers) as pool:
        found = [pool.open(task, 1, key).result(60).messages[0].content for key in "ab"]
    assert found == ["{'size': 3, 'seen': [1]} ['truth', 'mine']"] * 2
    assert (task.answer, task.meta) == (["truth"], {"size": 3})


def test_an_interrupt_is_meant_for_the_run_where_environments_live_in_it(others):
    task = Task("t", "s", (Message("user", "?"),), (), [], {})
    with Environments(f"{others}:Careless", {}, workers=0) as pool:
        pool.open(task, 1, "a").result()
        with pytest.raises(KeyboardInterrupt):
            pool.step("a", "x")
    with Environments(f"{others}:Careless", {}, workers=1) as pool:
        pool.open(task, 1, "a").result(60)
        assert pool.step("a", "x").result(60).note == "KeyboardInterrupt: KeyboardInterrupt"


def test_an_image_of_a_file_is_what_the_file_held_when_it_was_shown(others, tmp_path):
    with Environments(f"{others}:Overwriting", {"folder": str(tmp_path)}, workers=0) as pool:
        opened(pool, "a")
        shown = [pool.step("a", "x").result().messages[0].images[0] for _ in range(2)]
    assert [load_image(image).getpixel((0, 0)) for image in shown] == [(100,) * 3, (200,) * 3]


def test_an_environment_that_was_never_reset_need_not_be_able_to_close(others):
    with Environments(f"{others}:Holding", {}, workers=0) as pool:
        assert opened(pool, "a")[0].messages[0].content == "go"


def test_schemas_that_are_none_are_refused_when_a_run_starts(others):
    with pytest.raises(ConfigError, match=r"tools\(\) gives \{'name': 'look'\}; it must give schemas of functions"):
        Environments(f"{others}:Showing", {}, workers=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_restores_another_state_starts_the_answer_again(file, workers):
    Path(file).write_text(ENVIRONMENT + "\nclass Forgetting(Remembering):\n    def restore(self, state): pass\n")
    with Environments(f"{file}:Forgetting", {}, workers=workers) as pool:
        opened(pool, "a")
        pool.step("a", "5").result(60)
        failure = pool.restore(TASK, pool.state("a"), "b").result(60)
    assert (failure.kind, "another state after restore" in failure.note) == ("start_again", True)
