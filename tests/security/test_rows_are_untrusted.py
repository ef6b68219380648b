"""Files of rows are not trusted: what they unpack to, how long and how deep a row is, and what it names."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest

from foveate.data import text_rows
from foveate.data.table import open_tasks
from foveate.errors import DataError

ROW = {"question": "Why?", "answer": "x"}


def refusal(path):
    """The first problem of a file, or of its first row."""
    try:
        return str(open_tasks(path).inspect(0)[1][0])
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_packed_file_is_not_unpacked_without_bound(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text_rows, "SANE_BYTES", 2**20)
    text = b"[" * (suffix == ".json") + b" " * 2**22
    path = tmp_path / f"x{suffix}.gz"
    path.write_bytes(gzip.compress(text))
    assert "unpacks to more than" in refusal(path)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_packed_file_that_is_damaged_is_refused_by_name(tmp_path, damage):
    whole = gzip.compress(json.dumps(ROW).encode() * 2000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"hello")
    assert "x.jsonl.gz: cannot be read" in refusal(tmp_path / "x.jsonl.gz")


def test_an_unpacked_file_goes_with_its_table(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    rows = text_rows.open_text(tmp_path / "x.jsonl.gz", ".jsonl")
    again = pickle.loads(pickle.dumps(rows))
    places = {rows._text, again._text}
    assert len(places) == 2
    assert [*again.block(0, 1)] == [ROW]
    del rows, again
    assert not any(place.exists() for place in places)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_a_row_that_is_too_long_is_refused_and_the_others_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_rows, "MAX_ROW_BYTES", 1000)
    rows = [ROW, {"question": "y" * 2000, "answer": "x"}, ROW]
    if name == "x.csv":
        lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]
        (tmp_path / name).write_text("\n".join(lines))
        assert "x.csv, line 3: has more than 1000 bytes" in refusal(tmp_path / name)
        return
    separator, around = ("\n", "{}") if name == "x.jsonl" else (",", "[{}]")
    (tmp_path / name).write_text(around.replace("{}", separator.join(map(json.dumps, rows))))
    table = open_tasks(tmp_path / name)
    assert "rows of at most 1000 are read" in str(table.inspect(1)[1][0])
    assert table[2].answer == "x"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"question": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"question": ' + "9" * 10_000 + ', "answer": 1}',
        '[{"question": ' + "{" * 100_000,
        '{"question": "' + "[(" * 50_000 + '", "answer": 1, "options": "' + "[(" * 50_000 + ']"}',
        '{"question": "[' + "[" * 9000 + ']", "answer": 1}',
        "\x00" * 1000,
        '{"question": "\\ud800", "answer": 1}',
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_deep_long_and_odd_text_is_taken_or_refused_in_one_line(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    try:
        found = open_tasks(tmp_path / name).inspect(0)[1]
    except DataError as error:
        found = [error]
    assert all("\n" not in str(one) and len(str(one)) < 1500 for one in found)


@pytest.mark.parametrize(
    "name", ["question", "prompt", "messages", "conversations", "chosen", "images", "bbox", "answer"]
)
@pytest.mark.parametrize(
    "value", [None, 7, "", [], {}, [[]], [{}], [None], {"a": 1}, [7], "[", "[]", "[{}]", True, 1e400]
)
def test_a_value_of_any_kind_in_any_column_is_taken_or_refused(tmp_path, name, value):
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.png", "sent": "it", **ROW, name: value}))
    task, problems = open_tasks(tmp_path / "x.jsonl").inspect(0)
    assert task is not None or problems
    (tmp_path / "y.jsonl").write_text(json.dumps({**ROW, name: value}))
    task, problems = open_tasks(tmp_path / "y.jsonl").inspect(0)
    assert task is not None or problems
