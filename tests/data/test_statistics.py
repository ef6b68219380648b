"""The rows of a dataset in numbers."""

from __future__ import annotations

import json

import PIL.Image
import pyarrow.parquet as pq
import pytest
from reading import read_tasks
from typer.testing import CliRunner

from foveate.cli.data import data
from foveate.data.statistics import shared_lines
from foveate.data.table import open_tasks
from foveate.data.validate import RowInspection, inspect_rows
from foveate.datasets.prepared import prepare_rows
from foveate.encoding.dataset import warn_if_shared


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    for name, size in {"a": (30, 20), "b": (60, 40), "c": (9, 7)}.items():
        PIL.Image.new("RGB", size).save(tmp_path / f"{name}.png")
    return [
        {"question": "What?", "image": ["a.png", "b.png"], "answer": "one"},
        {"question": "What is that?", "image": "c.png", "answer": "seven"},
        {"question": "2 + 2?", "answer": "4"},
        {"question": "What?", "image": "gone.png", "answer": "1"},
        {"question": "", "answer": "1"},
    ]


def test_rows_images_and_lengths_are_counted_and_what_is_dropped_is_said(tmp_path, rows):
    found = inspect_rows(open_tasks(write(tmp_path / "x.jsonl", rows)), RowInspection())
    assert found.lines() == [
        "rows: 3 of 5 can be used; 2 cannot (images (column image) 1, prompt (column question) 1)",
        "images: 3 in 2 rows, up to 2 in one; 1 rows without; 9 x 7 to 60 x 40 pixels, median 30 x 20",
        "prompts: 6 to 21 characters, median 21",
        "answers: 1 to 5 characters, median 3",
    ]


def test_parts_of_a_table_have_the_numbers_of_their_rows(tmp_path, rows):
    whole = inspect_rows(open_tasks(write(tmp_path / "x.jsonl", rows[:3])), RowInspection()).statistics
    part = inspect_rows(open_tasks(write(tmp_path / "y.jsonl", rows[1:3])), RowInspection()).statistics
    assert whole.select([1, 2]).lines() == part.lines()
    assert whole.select([2]).lines()[0] == "images: none in 1 rows"


def test_rows_and_images_of_two_parts_are_counted_where_they_are_shared(tmp_path, rows):
    train, test = (
        inspect_rows(open_tasks(write(tmp_path / name, some)), RowInspection()).statistics
        for name, some in (("train.jsonl", rows[:2]), ("test.jsonl", [rows[1], rows[2], {**rows[0], "answer": "two"}]))
    )
    assert shared_lines({"train": train, "test": test}) == [
        "shared: 1 of 3 rows and 3 of 3 images of test are also in train"
    ]
    assert shared_lines({"train": train, "test": test.select([1])}) == []


def test_rows_that_stand_twice_and_ids_that_do_are_counted(tmp_path, rows):
    twice = [{**rows[0], "id": 1}, {**rows[0], "id": 2}, {**rows[1], "id": 2}]
    found = inspect_rows(open_tasks(write(tmp_path / "x.jsonl", twice)), RowInspection())
    assert found.lines()[-2:] == ["twice: 1 rows equal another row", "twice: 1 rows have the id of another row"]


def test_data_check_tells_the_numbers_and_what_its_sources_share(tmp_path, rows):
    paths = [str(write(tmp_path / name, rows[:3])) for name in ("train.jsonl", "test.jsonl")]
    result = CliRunner().invoke(data, ["check", *paths])
    assert result.exit_code == 0
    assert "prompts: 6 to 21 characters" in result.output
    assert "shared: 3 of 3 rows and 3 of 3 images of" in " ".join(result.output.split())


def test_ids_are_unique_in_what_is_prepared(tmp_path, rows):
    twice = [{**row, "id": "same"} for row in rows[:3]]
    made = prepare_rows([write(tmp_path / "x.jsonl", twice)], tmp_path / "out")
    assert made.counts == {"ids that got a number": 2}
    assert [task.id for task in open_tasks(tmp_path / "out" / "train.parquet")] == ["same", "same-2", "same-3"]
    assert any(line.startswith("images: 3 in 2 rows") for line in made.summary())


def test_a_split_that_shares_images_is_told(tmp_path, rows):
    same = [{**rows[1], "question": f"What {i}?"} for i in range(10)]
    made = prepare_rows([write(tmp_path / "x.jsonl", same)], tmp_path / "out", test_fraction=0.3)
    assert "shared: 1 of 1 images of test are also in train" in made.summary()
    assert pq.read_table(tmp_path / "out" / "test.parquet").num_rows == 3


def test_a_run_is_told_that_training_and_test_rows_are_shared(tmp_path, rows, caplog):
    table, _ = read_tasks(write(tmp_path / "x.jsonl", rows[:3]))
    warn_if_shared(table.select([0, 1]), table.select([1, 2]))
    assert "1 of 2 rows and 1 of 1 images of data.test are also in data.train" in caplog.text
    caplog.clear()
    warn_if_shared(table.select([0]), table.select([1]))
    assert not caplog.text
