"""Files as users have them: Arrow folders of `save_to_disk`, folders of parquet files, columns of one's own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foveate.data.folders import expand
from foveate.data.table import open_tasks
from foveate.errors import DataError
from foveate.records import Message

OWN = {"prompt": "question", "images": "image", "answer": "label"}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (20, 10)).save(path)
    return path


def own_rows(picture, count=3, **changed):
    columns = {
        "question": [f"What is {i}?" for i in range(count)],
        "image": [str(picture)] * count,
        "label": [f"answer {i}" for i in range(count)],
    }
    return pa.table(columns | changed)


def save_to_disk(folder, table, shards=1):
    """A folder as `Dataset.save_to_disk` writes it: Arrow streams named in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    each = -(-len(table) // shards)
    for i, name in enumerate(names):
        part = table.slice(i * each, each)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def answers(table):
    return [task.answer for task in table]


def test_a_folder_of_save_to_disk_is_read_and_so_is_one_with_splits(tmp_path, picture):
    expected = [f"answer {i}" for i in range(5)]
    folder = save_to_disk(tmp_path / "one", own_rows(picture, 5), shards=2)
    assert answers(open_tasks(folder, columns=OWN)) == expected
    for split in ("train", "test"):
        save_to_disk(tmp_path / "dict" / split, own_rows(picture, 5))
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        assert answers(open_tasks(tmp_path / f"dict@{split}", columns=OWN)) == expected
    with pytest.raises(DataError, match=r"holds several splits \(train, test\); ask for one of them: \S+dict@train"):
        open_tasks(tmp_path / "dict", columns=OWN)
    arrow = folder / "data-00001-of-00002.arrow"
    assert answers(open_tasks(arrow, columns=OWN)) == expected[3:]


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path, picture):
    for name in ("b", "a"):
        (tmp_path / "p" / name).mkdir(parents=True)
        pq.write_table(own_rows(picture, 1, label=[name]), tmp_path / "p" / name / "x.parquet")
    assert answers(open_tasks(tmp_path / "p", columns=OWN)) == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "a folder without files of rows"),
        ({"state.json": "{}"}, "not written by datasets.save_to_disk"),
        ({"state.json": '{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow": "text"}, "cannot be read as Arrow"),
        ({"x.parquet": "text"}, "cannot be read as parquet"),
    ],
)
def test_a_folder_that_holds_no_dataset_is_refused(tmp_path, files, what):
    (tmp_path / "d").mkdir()
    for name, text in files.items():
        (tmp_path / "d" / name).write_text(text)
    with pytest.raises(DataError, match=what):
        open_tasks(tmp_path / "d", columns=OWN)


def test_a_table_survives_pickling_whatever_its_files(tmp_path, picture):
    pq.write_table(own_rows(picture), tmp_path / "x.parquet")
    lines = own_rows(picture).to_pylist()
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = save_to_disk(tmp_path / "d", own_rows(picture))
    table = open_tasks([tmp_path / "x.parquet", tmp_path / "x.jsonl", folder], columns=OWN)
    again = pickle.loads(pickle.dumps(table.select([8, 3, 0])))
    assert list(again) == [table[8], table[3], table[0]]
    assert again.path_of.tolist() == [2, 1, 0]


def test_own_columns_become_a_task_with_its_marks_and_the_name_of_the_file(tmp_path, picture):
    pq.write_table(own_rows(picture), tmp_path / "clevr.parquet")
    task = open_tasks(tmp_path / "clevr.parquet", columns=OWN)[1]
    assert task.messages == (Message("user", "<image>\nWhat is 1?"),)
    assert (task.source, task.answer, task.images[0].width, task.id) == ("clevr", "answer 1", 20, "clevr-1")


def test_columns_may_be_fields_constants_conversations_and_fields_of_one_s_own(tmp_path):
    row = {
        "chat": [{"from": "human", "value": "2 + 2?"}],
        "meta": {"truth": 4, "level": 0.5},
        "sys": "Be brief.",
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    mapping = {"prompt": "chat", "answer": "meta.truth", "system": "sys", "source": "=sums", "difficulty": "meta.level"}
    table = open_tasks(tmp_path / "x.jsonl", columns=mapping)
    task = table[0]
    assert task.messages == (Message("system", "Be brief."), Message("user", "2 + 2?"))
    assert (task.source, task.answer, task.meta["difficulty"]) == ("sums", 4, 0.5)
    assert table.values("extra_info.difficulty") == [0.5]


def test_marks_that_are_there_stay_where_they_are(tmp_path, picture):
    row = {"question": "Is <image> red?", "image": [str(picture)], "label": "no"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert open_tasks(tmp_path / "x.jsonl", columns=OWN)[0].messages[0].content == "Is <image> red?"


def test_a_problem_names_the_column_of_the_user(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "Why?", "image": "gone.png", "label": None}))
    task, problems = open_tasks(tmp_path / "x.jsonl", columns=OWN).inspect(0)
    assert task is None
    fields = [problem.field for problem in problems]
    assert fields == ["images (column image)"]


@pytest.mark.parametrize(
    ("mapping", "what"),
    [
        ({"promt": "question", "answer": "label"}, "promt is no target; did you mean prompt"),
        ({"prompt": "question", "chosen": "label"}, "needs both chosen and rejected"),
        ({"prompt": "questions", "answer": "label"}, "column 'questions', named by data.columns as prompt, is missing"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused_before_any_row(tmp_path, picture, mapping, what):
    pq.write_table(own_rows(picture), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=what):
        open_tasks(tmp_path / "x.parquet", columns=mapping)


def test_values_of_a_field_are_read_without_looking_at_the_rows(tmp_path):
    lines = [{"prompt": 7, "extra_info": {"accuracy": 0.25 * i}} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {"data_source": ["x"] * 4, "prompt": ["broken"] * 4, "extra_info": [line["extra_info"] for line in lines]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet", row_group_size=3)
    for name in ("x.jsonl", "x.parquet"):
        table = open_tasks(tmp_path / name).select([3, 1])
        assert table.values("extra_info.accuracy") == [0.75, 0.25]
        assert table.values("extra_info.other") == [None, None]
        assert table.values("missing") == [None, None]


def test_a_folder_of_several_kinds_says_what_it_does_not_read(tmp_path, caplog):
    for name in ("a.jsonl", "b.csv", "c.tsv.gz"):
        (tmp_path / name).touch()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "d.parquet")
    assert [file.name for file in expand(tmp_path)] == ["d.parquet"]
    assert "read are its 1 .parquet file alone, and not a.jsonl, b.csv, c.tsv.gz; name files" in caplog.text


def test_the_scenes_of_the_demo_say_what_makes_them():
    with pytest.raises(DataError, match="`foveate demo` makes it, or `foveate prepare shapes --out runs/demo-data`"):
        expand(Path("runs/demo-data/train.parquet"))
