"""Odd rows, files, names and surroundings are told in one line, in bounded time."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foveate.cli import app as cli
from foveate.config.recipe import find_recipe
from foveate.data.folders import expand
from foveate.data.sources import SANE_ROWS
from foveate.data.table import open_tasks, row_schema, write_rows
from foveate.data.text_rows import JsonlRows
from foveate.datasets.prepared import infer_schema
from foveate.environments.observe import MOST_MESSAGES, checked_step, observation
from foveate.environments.protocol import EnvironmentLimits, Step
from foveate.errors import ConfigError, DataError
from foveate.files import atomic_path, atomic_write_text, require_file
from foveate.records import Message, Task
from foveate.registry import resolve
from foveate.rewards.matching import check_boxes
from foveate.run_folder import open_run

ROW = {"data_source": "s", "prompt": [], "images": [], "ability": "", "reward_model": {"ground_truth": "a"}}


@pytest.mark.parametrize("answer", ["9" * 5000, "[" * 100_000, "[" + "9" * 5000 + "]", "NaN"])
def test_text_that_is_no_list_of_boxes_is_a_fault_of_its_row(answer):
    task = Task("0", "s", (Message("user", "q"),), (), answer, {}, "row 0")
    [(field, fault), *_] = check_boxes(task)
    assert "no list of boxes" in fault
    assert field


@pytest.mark.parametrize("name", ["x\ud800", "\x1b[2J", "\u202e"])
def test_a_field_whose_name_is_no_text_is_refused_before_parquet(name):
    with pytest.raises(DataError, match="which is no text; rename it"):
        infer_schema([{**ROW, "extra_info": {name: 1}}])


def test_a_key_inside_a_field_that_is_no_text_is_refused():
    with pytest.raises(DataError, match=r"field extra_info\.x: "):
        infer_schema([{**ROW, "extra_info": {"x": {"\ud800": 1}}}])


@pytest.mark.parametrize("kind", [pa.month_day_nano_interval(), pa.uuid()])
def test_columns_that_parquet_cannot_hold_are_named(tmp_path, kind):
    value = (1, 2, 3) if kind == pa.month_day_nano_interval() else "a" * 16
    row = {"data_source": "s", "prompt": [{"role": "user", "content": "q"}], "images": [], "ability": ""}
    row |= {"reward_model": {"style": "rule", "ground_truth": "a"}, "extra_info": {"x": value}}
    with pytest.raises(DataError, match=r"x\.parquet"):
        write_rows(tmp_path / "x.parquet", [row], row_schema(pa.string(), {"x": kind}))
    assert not [*tmp_path.iterdir()]


def test_blank_lines_take_no_time_and_keep_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    text = b"\n" * 50_000_000 + b' {"question": "a"}\n \n\t\n{"question": "b"}'
    path.write_bytes(gzip.compress(text, 1))
    began = time.monotonic()
    rows = JsonlRows(path)
    assert [row["question"] for row in rows.block(0, len(rows))] == ["a", "b"]
    assert [rows.line(0), rows.line(1)] == [50_000_001, 50_000_004]
    assert time.monotonic() - began < 5
    (tmp_path / "blank.jsonl").write_bytes(b" \n\n\t")
    assert len(JsonlRows(tmp_path / "blank.jsonl")) == 0


def test_very_many_rows_of_nothing_are_refused(tmp_path):
    table = pa.table({"question": pa.nulls(SANE_ROWS + 1, pa.string())})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", row_group_size=2**24)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"4,194,305 rows in [\d,]+ bytes; rows of nothing"):
        open_tasks(tmp_path / "x.parquet")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["@", "@train", "a@", "nowhere/@"])
def test_a_split_of_nothing_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        expand(tmp_path.__class__(name))


NO_NAMES = [":", "a b:c", "foveate..x:y", "a\0b:c", ".:x", "x.py:", "\0.py:x", "os:", "a" * 5000 + ".py:x"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_of_code_that_are_none_are_refused(name):
    with pytest.raises(ConfigError):
        resolve({}, name, "reward")


def test_names_of_recipes_and_runs_that_no_file_has_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no recipe"):
        find_recipe("a" * 5000)
    with pytest.raises(ConfigError, match="control characters"), open_run(f"{tmp_path}/a\0b", None):  # pyright: ignore
        pass


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Step(tuple(observation("user", "") for _ in range(100_000)), 1.0, True), "100,000 messages"),
        (Step((observation("user", "a"),), 1.0, "no"), "done of a step is 'no'"),  # pyright: ignore
        (Step((observation("user", "a"),), 1.0, None), "done of a step is None"),  # pyright: ignore
    ],
)
def test_steps_with_very_many_messages_or_another_end_are_refused(step, said):
    with pytest.raises(DataError, match=said):
        checked_step(step, EnvironmentLimits())
    few = tuple(observation("user", "") for _ in range(MOST_MESSAGES))
    assert checked_step(Step(few, 1.0, np.bool_(True)), EnvironmentLimits()).done is True


# ------------------------------------------------------------------------------------------------- places to write


def test_a_file_takes_the_place_of_no_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"no place for a file \(a pipe\)"):
            atomic_write_text(path, "text")
    assert pipe.is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize("path", ["/dev/full", "/dev/new", "/dev/fd/1", "/proc/self/fd/1", "/sys/x"])
def test_devices_and_their_folders_are_no_places_for_files(tmp_path, path):
    (tmp_path / "dev").symlink_to("/dev")
    for place in (path, path.replace("/dev/", f"{tmp_path}/dev/")):
        with pytest.raises(ConfigError, match="no place for a file"):
            require_file(tmp_path.__class__(place))
    with pytest.raises(ConfigError), atomic_path(path):
        pass


# ------------------------------------------------------------------------------------------------------ surroundings


@pytest.mark.parametrize("columns", ["0", "-5", "1", "abc", "٣", "9" * 5000])
def test_what_is_printed_is_seen_whatever_columns_says(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["foveate", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("COLUMNS") in (None, "9" * 5000)
    capsys.readouterr()


def test_a_working_directory_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["foveate", "data", "check", "x.jsonl"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "the working directory was deleted" in capsys.readouterr().err


def test_a_key_that_is_empty_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FOVEATE_API_KEY", "")
    monkeypatch.setattr(sys, "argv", ["foveate", "serve", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "FOVEATE_API_KEY is set and empty" in capsys.readouterr().err


def test_graders_work_within_the_limits_of_the_process(tmp_path):
    (tmp_path / "g.py").write_text("def score(text, task):\n    return 1.0\n")
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))
from foveate.records import Task
from foveate.rewards.pool import Graders
with Graders({f"{tmp_path}/g.py:score"!r}, {{}}, workers=1, memory_limit=8.0) as graders:
    print(graders("a", Task("0", "s", (), (), "a", {{}}, "row 0")).value)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "1.0\n"
