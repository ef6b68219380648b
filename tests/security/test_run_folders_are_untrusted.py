"""A run folder of somebody else gives away nothing outside of it, holds no reader up, and is refused in one line."""

from __future__ import annotations

import ast
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import PIL.Image
import pytest
from fake_run import make_run

import foveate.report
from foveate.errors import UserError
from foveate.evaluate.predictions import read_evaluations
from foveate.evaluate.shards import read_generated
from foveate.files import read_inside
from foveate.log import read_metrics
from foveate.report.page import render_report, write_report

SECRET = "the secret of somebody else"
READERS = ("read_text", "read_bytes", "open", "loads", "load")
"""Calls by which a file is read, or read as JSON, past the checks."""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run", steps=2, rows=3)


@pytest.fixture
def run(tmp_path, original):
    (tmp_path / "secret.txt").write_text(f"my: {SECRET}\n")
    PIL.Image.new("RGB", (50, 50), (1, 2, 3)).save(tmp_path / "private.jpg")
    return Path(shutil.copytree(original, tmp_path / "run"))


def refusal(run: Path) -> str:
    with pytest.raises(UserError) as raised:
        render_report(run)
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


NAMES = [
    "notes.txt", "config.yaml", "versions.json", "gallery.json", "skipped.txt", "warnings.jsonl", "summary.json",
    "stages.json", "metrics.jsonl", "predictions.jsonl", "evals/step_000009.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_a_run_folder_is_refused_and_a_pipe_holds_nothing_up(run, name):
    path = run / name
    path.unlink(missing_ok=True)
    path.symlink_to(run.parent / "secret.txt")
    said = refusal(run)
    assert "link out of" in said
    assert name in said
    assert SECRET not in said
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(run)


def test_pictures_that_are_links_out_are_refused(run):
    for path in (run / "gallery").iterdir():
        path.unlink()
        path.symlink_to(run.parent / "private.jpg")
    assert "link out of" in refusal(run)


def test_a_link_within_the_folder_is_read(run):
    (run / "elsewhere.txt").write_text("as it was")
    (run / "notes.txt").unlink(missing_ok=True)
    (run / "notes.txt").symlink_to("elsewhere.txt")
    assert "as it was" in render_report(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "[" * 100_000),
        ("metrics.jsonl", '{"step": Infinity}'),
        ("metrics.jsonl", '{"step": 1e400, "reward/mean": 1}'),
        ("metrics.jsonl", '{"step": 1.5}'),
        ("metrics.jsonl", '{"step": true}'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": 1e400}'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": NaN}'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": [1]}'),
        ("metrics.jsonl", '{"step": 1, "loss/total": {"a": 1}}'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": ' + "9" * 4000 + "}"),
        ("metrics.jsonl", '{"step": ' + "9" * 4000 + "}"),
        ("warnings.jsonl", '{"step": 1}'),
        ("warnings.jsonl", '{"step": 1, "text": [1]}'),
        ("gallery.json", "[" * 100_000),
        ("gallery.json", "[1]"),
        ("gallery.json", '[["a"]]'),
        ("versions.json", '{"a": ' + "9" * 4000 + "}"),
        ("summary.json", '{"models": [1]}'),
        ("summary.json", '{"models": {"a": {"rows": 1, "accuracy": 7}}}'),
        ("stages.json", '[{"name": 1, "step": [], "seconds": 0}]'),
        ("stages.json", "[" * 100_000),
    ],
)
def test_a_file_of_other_contents_is_one_line_that_names_it(run, name, text):
    (run / name).write_text(text + "\n")
    said = refusal(run)
    assert (f"{name}:1: " if name.endswith("l") else name) in said


def test_text_and_numbers_near_the_largest_are_left_out_of_charts(run):
    lines = [{"step": step, "reward/mean": 1e308, "loss/total": 10**299, "note": "text"} for step in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "reward/mean" in render_report(run)


def test_a_file_larger_than_any_of_a_run_is_refused(run):
    with (run / "notes.txt").open("wb") as file:
        file.truncate(2**30)
    assert "1,073,741,824 bytes" in refusal(run)


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    tracemalloc.start()
    assert read_inside(tmp_path / "a", tmp_path, 2**32) == b"text"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_answers_of_an_evaluation_and_shards_stay_in_their_folder(run, tmp_path):
    (run / "shards").mkdir()
    (run / "shards" / "answers_00000.jsonl").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="link out of"):
        list(read_generated(run))
    (run / "evals" / f"step_{'9' * 200}.jsonl").write_text("")
    with pytest.raises(UserError, match="does not end in a step"):
        read_evaluations(run)


def test_a_report_takes_the_place_of_a_link_and_not_of_its_target(run, tmp_path):
    page = run / "report.html"
    page.unlink(missing_ok=True)
    page.symlink_to(tmp_path / "secret.txt")
    write_report(run)
    assert SECRET in (tmp_path / "secret.txt").read_text()
    assert not page.is_symlink()


def test_metrics_beside_a_run_are_not_read(run, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n')
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="link out of"):
        read_metrics(run / "metrics.jsonl")


def test_reports_open_files_by_the_one_function_that_checks_them():
    room = Path(foveate.report.__path__[0])
    files = [*room.glob("*.py"), room.parent / "evaluate" / "predictions.py"]
    plain = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)) in READERS
    ]
    assert not plain, f"{plain}: foveate.files.read_inside and strict_json are for files of a run folder"
