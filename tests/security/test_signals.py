"""A run that is asked to leave, by whatever signal, saves its step first; one that is asked twice leaves at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from toy import make_data, rl_settings

from foveate.cluster.local import LocalWorkers
from foveate.config.recipe import to_yaml
from foveate.errors import DiskError
from foveate.log import read_metrics
from foveate.train.checkpoint import checkpoints
from foveate.train.session import GracefulShutdown

NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Saving:
    def finish_saving(self) -> None:
        pass


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = {number: signal.getsignal(number) for number in NUMBERS if number != signal.SIGINT}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == {number: before[number] for number in after}


def shutdown(worker=None):
    return GracefulShutdown(LocalWorkers(worker or Saving()))


def left(before, *after, worker=None):
    """Signals that come before and after the first step begins."""
    with shutdown(worker) as leaving:
        for number in before:
            signal.raise_signal(number)
        leaving.begin()
        for number in after:
            signal.raise_signal(number)
        assert leaving.is_asked
        leaving.check()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_lets_the_step_end(monkeypatch, number):
    monkeypatch.setattr("foveate.train.session.Worker", Saving)
    with pytest.raises(SystemExit) as end:
        left([], number, signal.SIGHUP)  # a terminal that closes sends several
    assert end.value.code == 128 + number


@pytest.mark.parametrize("first", NUMBERS)
def test_a_second_ctrl_c_leaves_at_once(monkeypatch, first):
    monkeypatch.setattr("foveate.train.session.Worker", Saving)
    with pytest.raises(SystemExit) as end:
        left([], first, signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT


class Interrupted:
    """Saves for so long that Ctrl-C is pressed once more."""

    def finish_saving(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("earlier", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_ctrl_c_during_the_clean_up_leaves_too(monkeypatch, caplog, earlier):
    monkeypatch.setattr("foveate.train.session.Worker", Interrupted)
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        left([], *earlier, worker=Interrupted())
    assert end.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is former
    assert sum("leaving at once" in record.message for record in caplog.records) == 1


def test_ctrl_c_leaves_at_once_while_there_is_nothing_to_save(monkeypatch):
    monkeypatch.setattr("foveate.train.session.Worker", Saving)
    with pytest.raises(SystemExit) as end:
        left([signal.SIGINT])
    assert end.value.code == 128 + signal.SIGINT


@pytest.mark.slow
def test_a_script_that_is_left_at_once_ends_in_one_line(tmp_path, tiny_folder):
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    script = f"""
import logging, os, signal, time, foveate as fv

told = []

class Told(logging.StreamHandler):
    def emit(self, record):
        super().emit(record)
        told.append(record)

def reward(answer, ground_truth, **columns):
    for _ in range(0 if told else 2):
        before = len(told)
        os.kill(os.getpid(), signal.SIGINT)
        while len(told) == before:
            time.sleep(0.01)
    return 1.0

logging.getLogger("foveate").addHandler(Told())
fv.train_rl(
    {str(tiny_folder)!r}, [{str(data / "train.parquet")!r}], reward, run_dir={str(run)!r}, max_prompt_tokens=128,
    **{{"reward.workers": 0, "rollout.samples": 2, "rollout.max_tokens": 2, "train.prompts_per_step": 2,
        "train.steps": 5}},
)
"""
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + script
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].endswith("Ctrl-C: leaving at once, with what was saved before")


def test_other_signals_before_the_first_step_end_the_run_before_it(monkeypatch):
    monkeypatch.setattr("foveate.train.session.Worker", Saving)
    with pytest.raises(SystemExit) as end:
        left([signal.SIGTERM], signal.SIGINT)
    assert end.value.code == 128 + signal.SIGTERM


def test_what_is_ignored_stays_ignored(monkeypatch):
    """As nohup has it."""
    monkeypatch.setattr("foveate.train.session.Worker", Saving)
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with shutdown() as leaving:
            leaving.begin()
            signal.raise_signal(signal.SIGHUP)
            assert not leaving.is_asked
    finally:
        signal.signal(signal.SIGHUP, former)


class Failing:
    def finish_saving(self) -> None:
        raise DiskError("the disk is full")


def test_an_error_is_not_hidden_by_a_checkpoint_that_fails_after_it(monkeypatch):
    monkeypatch.setattr("foveate.train.session.Worker", Failing)
    with pytest.raises(ZeroDivisionError), shutdown(Failing()):
        raise ZeroDivisionError
    with pytest.raises(DiskError), shutdown(Failing()):
        pass


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_run_saves_what_it_has_done_before_it_leaves(tmp_path, tiny_folder, number):
    train = {"steps": 100_000, "save_every": 0}
    settings = rl_settings(
        tmp_path / "run", tiny_folder, make_data(tmp_path / "data"), train=train, eval={"every": 0, "gallery": 0}
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings))
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command += "from foveate.cli.app import main; main()"
    run = subprocess.Popen(
        [sys.executable, "-c", command, "rl", tmp_path / "recipe.yaml"], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(1200):
        if run.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
            break
        time.sleep(0.1)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + number, said
    assert "saving after this step, then leaving; the same command continues the run" in said
    assert "Traceback" not in said
    [(step, _)] = checkpoints(tmp_path / "run" / "checkpoints")
    assert step == read_metrics(metrics)[-1]["step"] > 1
