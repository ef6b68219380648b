"""Rows are checked before a run, in one process or in several, with the same result."""

from __future__ import annotations

import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from foveate.data.demos import MAKE_PAIRS, check_pair, check_response
from foveate.data.table import open_tasks
from foveate.data.validate import RowInspection, inspect_rows, validate
from foveate.encoding.dataset import AnswerLimits, RowCheck
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.records import Task
from foveate.rewards.build import truth_check
from foveate.rewards.text import check_answer


def rows_of_text(path, count, **changed):
    """JSONL rows without pictures; `changed` maps a row to the fields that differ."""
    with path.open("w") as file:
        for i in range(count):
            row = {
                "data_source": "text",
                "prompt": [{"role": "user", "content": f"Row {i}?"}],
                "reward_model": {"style": "rule", "ground_truth": f"answer {i}"},
            }
            file.write(json.dumps(row | changed.get(f"row_{i}", {})) + "\n")
    return path


def length_of(task: Task) -> int:
    return len(task.messages[0].content)


def die(task: Task) -> int:
    if task.where.endswith("(line 300)"):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.slow
def test_worker_processes_find_what_one_process_finds_in_the_same_order(tmp_path, encode):
    path = rows_of_text(
        tmp_path / "x.jsonl",
        600,
        row_3={"prompt": []},
        row_299={"reward_model": {"ground_truth": {"x": 1}}},
        row_555={"data_source": 5, "prompt": None},
    )
    look = RowInspection(RowCheck(check_answer, encode), length_of)
    calls: list[tuple[int, int]] = []
    one = inspect_rows(open_tasks(path), look, workers=1)
    two = inspect_rows(open_tasks(path), look, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert two == one
    assert [(p.where.split(", ")[1].split(" (")[0], p.field) for p in two.problems] == [
        ("row 3", "prompt"),
        ("row 299", "reward_model.ground_truth"),
        ("row 555", "data_source"),
        ("row 555", "prompt"),
    ]
    assert len(two.kept) == 597 == len(two.measures)
    assert two.measures[-1] == len("Row 599?")
    assert calls[-1] == (600, 600)


def test_a_prompt_that_is_too_long_is_a_fault_whatever_counts_it(tmp_path, encode):
    long = {"prompt": [{"role": "user", "content": "word " * 2000}], "reward_model": {"ground_truth": {"x": 1}}}
    table = open_tasks(rows_of_text(tmp_path / "x.jsonl", 2, row_1=long))
    checked = inspect_rows(table, RowInspection(RowCheck(check_answer, encode)))
    counted = inspect_rows(table, RowInspection(check_answer, length=encode.checked_length))
    assert [problem.field for problem in checked.problems] == ["reward_model.ground_truth", "prompt"]
    assert (counted.kept, counted.problems) == (checked.kept, checked.problems)
    assert counted.statistics.rows_R5[0, 1] == encode.length(table[0])


def test_the_prompt_of_a_row_is_tokenised_once(tmp_path, encode, monkeypatch):
    counted: list[str] = []
    length = Encoder.length
    monkeypatch.setattr(Encoder, "length", lambda self, task: counted.append(task.id) or length(self, task))
    answered = {"extra_info": {"response": "yes"}}
    table = open_tasks(rows_of_text(tmp_path / "x.jsonl", 2, row_0=answered, row_1=answered))
    limits = AnswerLimits(("response",), 1024, None)
    for look in (RowInspection(RowCheck(None, encode, limits)), RowInspection(length=encode.checked_length)):
        counted.clear()
        assert inspect_rows(table, look).kept == [0, 1]
        assert counted == ["x-0", "x-1"]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(tmp_path):
    path = rows_of_text(tmp_path / "x.jsonl", 600)
    with pytest.raises(DataError, match="a process that checked rows was killed"):
        inspect_rows(open_tasks(path), RowInspection(None, die), workers=2)


def test_a_check_that_cannot_be_sent_to_workers_runs_here(tmp_path, caplog):
    path = rows_of_text(tmp_path / "x.jsonl", 20)
    with caplog.at_level("INFO", logger="foveate"):
        kept, problems = validate(open_tasks(path), check=lambda _: [], workers=2)
    assert (len(kept), problems) == (20, [])
    assert "checked in one process" in caplog.text


def test_the_first_problems_are_logged_when_there_are_several(tmp_path, caplog):
    picture = [{"role": "user", "content": "<image>"}]
    bad = {f"row_{i}": {"prompt": picture, "images": [f"gone{i}.png"]} for i in range(30)}
    path = rows_of_text(tmp_path / "x.jsonl", 40, **bad)
    with pytest.raises(DataError, match="and 29 more problems"):
        validate(open_tasks(path))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 20
    assert ", row 19 (line 20), field images: no such file: gone19.png" in lines[19]


def test_a_fault_that_many_rows_share_is_told_once(tmp_path, caplog):
    path = rows_of_text(tmp_path / "x.jsonl", 40, **{f"row_{i}": {"prompt": []} for i in range(30)})
    with pytest.raises(
        DataError, match=r"row 0 \(line 1\), field prompt: must be .* \(and in 29 more rows\) \(fix the"
    ):
        validate(open_tasks(path))
    assert not caplog.records


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize(
    ("check", "role", "need"),
    [
        (check_response, "response", "supervised training needs the answer as text"),
        (
            check_pair,
            "chosen",
            f"a preference pair needs both answers as text; {MAKE_PAIRS} makes them from the answers of a run",
        ),
    ],
)
def test_a_missing_column_is_one_line_with_the_line_to_type(tmp_path, caplog, name, check, role, need):
    path = tmp_path / name
    rows_of_text(tmp_path / "x.jsonl", 18)
    if name.endswith("parquet"):
        pq.write_table(
            pa.Table.from_pylist([json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]), path
        )
    column = {"response": "reward_model.ground_truth"}.get(role, "COLUMN")
    with pytest.raises(DataError) as raised:
        validate(open_tasks(path), check=check)
    assert str(raised.value) == (
        f"{path}: no column holds the {role} ({need}); the columns are data_source, prompt, reward_model; name the one "
        f"that does: --column {role}={column} (in a recipe data.columns: {{{role}: {column}}})"
    )
    assert not caplog.records


def test_a_box_beside_a_question_is_named_where_the_ground_truth_is_missing(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "Where?", "image": "a.png", "bbox": [1, 2, 3, 4]}) + "\n")
    with pytest.raises(DataError, match="--column answer=bbox"):
        validate(open_tasks(tmp_path / "x.jsonl"), check=truth_check("grounding"))


def test_a_column_that_only_some_rows_fill_is_reported_by_row(tmp_path):
    path = rows_of_text(tmp_path / "x.jsonl", 3, row_1={"response": "yes"})
    with pytest.raises(
        DataError, match=r"row 0 \(line 1\), field extra_info.response: is None; .* \(and in 1 more row\)"
    ):
        validate(open_tasks(path), check=check_response)
