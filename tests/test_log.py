from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

import foveate.files
from foveate import log
from foveate.errors import ConfigError, DiskFull
from foveate.log import MetricsWriter, print_result, progress, read_metrics, setup_logging


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("foveate")
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_metrics_are_one_line_per_step_and_there_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"reward": 0.5, "answers": 8})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "reward": 0.5, "answers": 8}\n'
    writer.write(1, {"reward": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 0, "reward": 0.5, "answers": 8},
        {"step": 1, "reward": 1.0},
    ]


def test_values_that_are_no_numbers_become_null_and_are_named_and_counted(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"a": float("nan"), "b": 1.0, "c": float("-inf")})
    writer.write(1, {"a": 2.0})
    assert read_metrics(writer.path) == [
        {"step": 0, "a": None, "b": 1.0, "c": None, "nonfinite": ["a", "c"]},
        {"step": 1, "a": 2.0},
    ]
    assert writer.nonfinite == 2


def test_a_continued_run_drops_the_steps_after_its_checkpoint_and_a_torn_line(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(5):
        writer.write(step, {"loss": 1e-7 * step, "name": "é"})
    whole = writer.path.read_text().splitlines(keepends=True)
    writer.path.write_text("".join(whole) + '{"step": 5, "lo')
    writer.truncate_after(2)
    assert writer.path.read_text() == "".join(whole[:3])
    writer.write(3, {"loss": 0.0})
    assert [record["step"] for record in read_metrics(writer.path)] == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_begins_an_empty_file(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.truncate_after(-1)
    assert read_metrics(writer.path) == []


def test_only_the_last_line_may_be_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1')
    assert read_metrics(path) == [{"step": 0}]
    for line in ("half", "[1]", '{"loss": 1}'):
        path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: not a JSON object with a step: .*delete this line"):
            read_metrics(path)


def test_a_metric_that_json_cannot_hold_is_an_error_and_writes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError):
        writer.write(0, {"a": object()})  # pyright: ignore[reportArgumentType]
    assert not writer.path.exists()


def test_log_lines_are_plain_and_on_standard_error_outside_a_terminal():
    code = (
        "import logging; from foveate.log import setup_logging; setup_logging(); setup_logging(); "
        "logging.getLogger('foveate.train').info('step [red]%d[/red]', 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.endswith(" INFO step [red]3[/red]")


def test_a_second_set_up_replaces_the_first(package_logger):
    setup_logging()
    setup_logging(logging.DEBUG)
    assert len(package_logger.handlers) == 1
    assert package_logger.level == logging.DEBUG


@pytest.mark.usefixtures("package_logger")
def test_advice_of_bitsandbytes_to_fetch_kernels_is_not_shown():
    setup_logging()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_progress_outside_a_terminal_logs_at_most_once_per_interval(caplog):
    with caplog.at_level(logging.INFO, "foveate"):
        with progress("scoring", 4, interval=0.0) as advance:
            advance(1)
            advance(3)
        with progress("short", 4) as advance:
            advance(4)
    assert [message.split(",")[0] for message in caplog.messages] == ["scoring: 1 of 4", "scoring: 4 of 4"]
    assert caplog.messages[1].endswith(" 0 s left")


def test_the_rate_leaves_out_what_was_done_before(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "foveate"), progress("asking", 120, interval=0.0, done=100) as advance:
        now[0] = 5.0
        advance(10)
    assert caplog.messages == ["asking: 110 of 120, 2.0/s, 5 s left"]


def test_progress_in_a_terminal_is_a_bar_and_may_be_nested(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=True, width=100))
    with progress("training", 2) as outer, progress("generating", 10) as inner:
        inner(10)
        outer(1)
    shown = screen.getvalue()
    assert "training" in shown
    assert "generating" in shown
    assert "1/2" in shown


def test_log_lines_in_a_terminal_go_above_the_bar(monkeypatch, package_logger):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=True, width=100))
    setup_logging()
    with progress("training", 2):
        package_logger.info("saved checkpoint")
    assert "saved checkpoint" in screen.getvalue()


def test_metrics_on_disk_are_json_for_every_reader(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"a": float("inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(writer.path.read_text(), parse_constant=refuse)


def test_a_line_waits_for_room_on_a_full_disk(tmp_path, monkeypatch):
    writer, tried = MetricsWriter(tmp_path / "metrics.jsonl"), []
    append = writer._append

    def full_at_first(line: str) -> None:
        tried.append(line)
        if len(tried) == 1:
            raise DiskFull("no room")
        append(line)

    monkeypatch.setattr(writer, "_append", full_at_first)
    with pytest.raises(DiskFull):
        writer.write(1, {"a": 1.0})
    tried.clear()
    monkeypatch.setattr(foveate.files, "_RETRY", 0.01)
    monkeypatch.setattr(foveate.files, "_disk_wait", 60.0)
    writer.write(1, {"a": 1.0})
    assert len(tried) == 2
    assert [row["step"] for row in read_metrics(writer.path)] == [1]


def test_a_full_disk_leaves_no_torn_line(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from foveate.errors import DiskError
from foveate.log import MetricsWriter
metrics = MetricsWriter(Path(sys.argv[1]))
metrics.write(1, {"loss": 0.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
try:
    metrics.write(2, {"loss": 0.25})
except DiskError as error:
    print(error)
"""
    path = tmp_path / "metrics.jsonl"
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert ended.stdout.startswith(f"cannot write {path}: "), ended.stderr
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_results_go_to_standard_output_as_they_are(capsys):
    text = "runs/[bold]/" + "very/" * 40 + "report.html"
    print_result(text)
    assert capsys.readouterr() == (text + "\n", "")


def test_a_step_is_told_with_its_reward_and_what_else_was_measured(caplog):
    metrics = {"reward/mean": 0.53125, "reward/hit": 0.5, "answer/length": 14.25, "answer/truncated": 0.0, "note": "x"}
    with caplog.at_level(logging.INFO, "foveate"), progress("training", 30, done=10) as advance:
        for step in range(20):
            advance(1, {**metrics, "loss/entropy": 0.25} if step else metrics)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("training: 11 of 30: reward 0.531, hits 50.0%, length 14.2, truncated 0%, ")
    assert ", entropy 0.250, " in last
    assert last.endswith("0 s left")


def test_a_step_is_told_with_the_reward_of_each_source(caplog):
    metrics = {"reward/mean": 0.5, "source/box/reward": 0.75, "source/count/reward": 0.25, "source/box/length": 3.0}
    with caplog.at_level(logging.INFO, "foveate"), progress("training", 2) as advance:
        advance(1, metrics)
        advance(1, {"reward/mean": 0.5})
    first, last = (record.getMessage() for record in caplog.records)
    assert "reward by source: box 0.750; count 0.250, " in first
    assert "source" not in last


def test_the_bar_of_training_shows_the_reward(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=True, width=100))
    with progress("training", 2) as advance:
        advance(1, {"reward/mean": 0.75})
    assert "training  reward 0.750" in screen.getvalue()
