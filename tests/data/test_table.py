from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_tasks

from foveate.data.demos import check_answered
from foveate.data.sources import RowGroups
from foveate.data.table import BOX, open_tasks, row_schema, write_rows
from foveate.data.validate import RowInspection, inspect_rows, validate
from foveate.errors import DataError, DiskError
from foveate.records import Message
from foveate.rewards.boxes import check_box

PHOTOS = Path(__file__).parent.parent / "data" / "refphotos"
SCHEMA = row_schema(BOX, {"split": pa.string(), "id": pa.string()})


def encoded(width=8, height=6, fmt="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


PICTURE = encoded()


def row(content="<image>\nWhere?", images=(PICTURE,), truth=(100.0, 200.0, 300.0, 400.0), **extra):
    return {
        "data_source": "grounding",
        "prompt": [{"role": "user", "content": content}],
        "images": list(images),
        "ability": "grounding",
        "reward_model": {"style": "rule", "ground_truth": list(truth)},
        "extra_info": extra,
    }


def raw_parquet(path, **columns):
    """A parquet file as other tools write it: any columns, any types."""
    pq.write_table(pa.table(columns), path)
    return path


def columns(count=1, **changed):
    usual = {
        "data_source": ["geo"] * count,
        "prompt": [[{"role": "user", "content": "<image> Why?"}]] * count,
        "images": [[{"bytes": encoded(), "path": None}]] * count,
        "reward_model": [{"style": "rule", "ground_truth": "42"}] * count,
    }
    return {**usual, **changed}


def test_rows_come_back_as_the_tasks_that_were_written(tmp_path):
    path = tmp_path / "t.parquet"
    assert write_rows(path, (row(truth=(i, 2, 900, 4), id=f"r{i}") for i in range(150)), SCHEMA) == 150
    table = open_tasks(path)
    assert len(table) == 150
    for index in (0, 63, 64, 149, 5):
        task = table[index]
        assert (task.id, task.answer) == (f"r{index}", [index, 2, 900, 4])
        assert task.messages == (Message("user", "<image>\nWhere?"),)
        assert (task.images[0].data, task.images[0].width, task.images[0].height) == (encoded(), 8, 6)
        assert task.where == f"{path}, row {index}"
        assert task.meta == {"ability": "grounding", "id": f"r{index}"}


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_rows(tmp_path / name, (row(id=str(i)) for i in range(70)), SCHEMA)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "t.parquet"
    write_rows(path, [row()], SCHEMA)
    before = path.read_bytes()

    def rows():
        yield from (row() for _ in range(200))
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_rows(path, rows(), SCHEMA)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


@contextmanager
def files_limited_to(size):
    """Writing beyond `size` bytes of a file fails within the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind_and_is_said_in_one_line(tmp_path):
    rows = [row(images=[encoded(99, 99, seed=seed)]) for seed in range(99)]
    with files_limited_to(100_000), pytest.raises(DiskError) as raised:
        write_rows(tmp_path / "t.parquet", rows, SCHEMA)
    assert str(raised.value).startswith(f"cannot write {tmp_path / 't.parquet'}: ")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path):
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".t.parquet.{killed.stdout.strip()}.tmp").write_bytes(b"half a file")
    write_rows(tmp_path / "t.parquet", [row()], SCHEMA)
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]
    assert len(open_tasks(tmp_path / "t.parquet")) == 1


def test_a_row_that_does_not_fit_the_schema_is_refused_when_it_is_written(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match=r"t\.parquet, row 1: fields colour do not fit"):
        write_rows(path, [row(), row(colour="red")], SCHEMA)
    with pytest.raises(DataError, match=r"t\.parquet, rows 0\.\.1: "):
        write_rows(path, [row(), row(id=[1])], SCHEMA)
    assert not path.exists()


def test_images_may_be_paths_bytes_or_structs_one_several_or_none(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(5, 4))
    (tmp_path / "b.png").write_bytes(encoded(7, 3))
    prompts = [[{"role": "user", "content": "<image>" * n}] for n in (1, 1, 2, 0)]
    paths = raw_parquet(
        tmp_path / "paths.parquet",
        **columns(4, prompt=prompts, images=[["a.png"], ["b.png"], ["a.png", "b.png"], None]),
    )
    assert [[image.width for image in task.images] for task in open_tasks(paths)] == [[5], [7], [5, 7], []]
    single = raw_parquet(tmp_path / "single.parquet", **columns(1, images=["a.png"]))
    blobs = raw_parquet(tmp_path / "blobs.parquet", **columns(1, images=[[encoded(5, 4)]]))
    both = raw_parquet(tmp_path / "both.parquet", **columns(1, images=[[{"bytes": encoded(5, 4), "path": "gone.png"}]]))
    for file in (single, blobs, both):
        assert (open_tasks(file)[0].images[0].width, open_tasks(file)[0].images[0].height) == (5, 4)


def test_a_file_without_an_images_column_holds_tasks_of_text(tmp_path):
    plain = columns(1, prompt=[[{"role": "user", "content": "2 + 2?"}]])
    del plain["images"]
    task = open_tasks(raw_parquet(tmp_path / "t.parquet", **plain))[0]
    assert (task.images, task.answer, task.id) == ((), "42", "t-0")


def test_relative_paths_are_sought_in_the_root_then_beside_the_file_then_here(tmp_path, monkeypatch):
    for number, folder in enumerate(("root", "data", "here"), start=1):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(encoded(number, 1))
    monkeypatch.chdir(tmp_path / "here")
    file = raw_parquet(tmp_path / "data" / "t.parquet", **columns(1, images=[["a.png"]]))
    for folder, width in (("root", 1), ("data", 2), ("here", 3)):
        assert open_tasks(file, image_root=tmp_path / "root")[0].images[0].width == width
        (tmp_path / folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"field images: no such file: a\.png \(looked in .*root, .*data, .*here\)"):
        open_tasks(file, image_root=tmp_path / "root")[0]


def damaged(name):
    """Bytes that are no whole image, by what is wrong with them."""
    jpeg, png, webp = encoded(64, 64, "JPEG"), encoded(64, 64), encoded(64, 64, "WEBP")
    return {
        "empty": b"",
        "text": b"not a picture at all",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "a JPEG without its end": jpeg[:-2],
        "half a PNG": png[: len(png) // 2],
        "a PNG without IEND": png[:-12],
        "half a WebP": webp[: len(webp) // 2],
        "a PNG header": png[:20],
    }[name]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("empty", "is empty"),
        ("text", "is not an image of a known format"),
        ("half a JPEG", "is truncated"),
        ("a JPEG without its end", "is truncated"),
        ("half a PNG", "is truncated"),
        ("a PNG without IEND", "is truncated"),
        ("half a WebP", "is damaged or truncated"),
        ("a PNG header", "is damaged or truncated"),
    ],
)
def test_a_damaged_image_is_refused_by_row_without_decoding(tmp_path, name, what):
    (tmp_path / "bad.img").write_bytes(damaged(name))
    write_rows(tmp_path / "t.parquet", [row(), row(images=["bad.img"])], SCHEMA)
    with pytest.raises(DataError, match=rf"^\S*t\.parquet, row 1, field images: \S*bad\.img {what}"):
        read_tasks(tmp_path / "t.parquet")


def test_a_whole_jpeg_with_bytes_behind_its_end_is_taken(tmp_path):
    write_rows(tmp_path / "t.parquet", [row(images=[encoded(64, 64, "JPEG") + b"trailer of the camera"])], SCHEMA)
    assert read_tasks(tmp_path / "t.parquet")[0][0].images[0].width == 64


def test_a_missing_image_is_refused_by_row(tmp_path):
    write_rows(tmp_path / "t.parquet", [row(), row(images=[str(tmp_path / "gone.png")])], SCHEMA)
    with pytest.raises(DataError, match=r"t\.parquet, row 1, field images: no such file: \S*gone\.png; fix"):
        read_tasks(tmp_path / "t.parquet")


@pytest.mark.parametrize(("content", "marks"), [("Where?", 0), ("<image><image>", 2)])
def test_marks_and_images_must_be_equally_many(tmp_path, content, marks):
    write_rows(tmp_path / "t.parquet", [row(content=content)], SCHEMA)
    with pytest.raises(DataError, match=f"row 0, field images: the prompt has {marks} <image> marks for 1 images"):
        read_tasks(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("truth", "what"),
    [
        ((1, 2, 3), "four finite numbers"),
        ((1, 2, 3, float("nan")), "four finite numbers"),
        ((500, 2, 300, 4), "no area"),
        ((500, 2, 1300, 4), "outside the image"),
    ],
)
def test_a_truth_that_is_no_box_in_the_picture_is_refused_by_row(tmp_path, truth, what):
    write_rows(tmp_path / "t.parquet", [row(), row(), row(truth=truth)], SCHEMA)
    with pytest.raises(DataError, match=rf"t\.parquet, row 2, field reward_model\.ground_truth: .*{what}"):
        read_tasks(tmp_path / "t.parquet", check=check_box)
    table, problems = read_tasks(tmp_path / "t.parquet", check=check_box, on_bad_row="skip")
    assert (len(table), len(problems)) == (2, 1)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[{"role": "robot", "content": "<image>"}]]}, "prompt"),
        ({"prompt": [[{"role": "user", "content": 5}]]}, "prompt"),
        ({"images": [[7]]}, "images"),
        ({"data_source": [3]}, "data_source"),
        ({"extra_info": ["none"]}, "extra_info"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_row_and_field(tmp_path, changed, field):
    path = raw_parquet(tmp_path / "t.parquet", **columns(1, **changed))
    with pytest.raises(DataError, match=rf"^\S*t\.parquet, row 0, field {field}: "):
        read_tasks(path)


@pytest.mark.parametrize("model", ["42", {"style": "rule", "ground_truth": None}])
def test_rows_of_which_none_has_a_ground_truth_lack_it_as_a_column(tmp_path, model):
    path = raw_parquet(tmp_path / "t.parquet", **columns(1, reward_model=[model]))
    with pytest.raises(DataError, match=r"^\S*t\.parquet: no column holds the answer .* --column answer=COLUMN "):
        read_tasks(path, check=check_answered)


def test_all_problems_are_found_in_one_pass_and_the_first_is_raised(tmp_path):
    bad = [row(), row(content="x", images=["gone.png"]), row(images=[b"text"]), row()]
    write_rows(tmp_path / "t.parquet", bad, SCHEMA)
    kept, problems = validate(open_tasks(tmp_path / "t.parquet"), on_bad_row="skip")
    assert kept == [0, 3]
    assert [problem.where[-5:] for problem in problems] == ["row 1", "row 1", "row 2"]
    assert {problem.field for problem in problems} == {"images"}
    with pytest.raises(DataError) as raised:
        read_tasks(tmp_path / "t.parquet")
    message = str(raised.value)
    assert message.startswith(str(problems[0]))
    assert "and 2 more problems" in message
    assert "--on-bad-row skip" in message
    assert "\n" not in message


def test_a_table_of_good_rows_keeps_their_places(tmp_path):
    write_rows(tmp_path / "a.parquet", [row(content="x"), row(id="a1")], SCHEMA)
    write_rows(tmp_path / "b.parquet", [row(id="b0"), row(content="x"), row(id="b2")], SCHEMA)
    paths, calls = [tmp_path / "a.parquet", tmp_path / "b.parquet"], []
    table, problems = read_tasks(paths, on_bad_row="skip")
    assert [task.id for task in table] == ["a1", "b0", "b2"]
    assert table[2].where.endswith("b.parquet, row 2")
    assert [problem.where[-14:] for problem in problems] == ["parquet, row 0", "parquet, row 1"]
    inspect_rows(open_tasks(paths), RowInspection(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 5) for n in range(1, 6)]


def test_skipping_every_row_is_an_error(tmp_path):
    write_rows(tmp_path / "t.parquet", [row(content="x")] * 3, SCHEMA)
    with pytest.raises(DataError, match=r"none of the 3 rows can be used; the first problem: .*row 0"):
        read_tasks(tmp_path / "t.parquet", on_bad_row="skip")


def test_what_to_do_with_bad_rows_is_error_or_skip(tmp_path):
    write_rows(tmp_path / "t.parquet", [row()], SCHEMA)
    with pytest.raises(DataError, match="setting on_bad_row: must be error or skip, not 'ignore'"):
        read_tasks(tmp_path / "t.parquet", on_bad_row="ignore")  # pyright: ignore[reportArgumentType]


def test_files_that_cannot_be_opened_are_refused_by_name(tmp_path):
    write_rows(tmp_path / "none.parquet", [], SCHEMA)
    (tmp_path / "none.jsonl").write_text("\n\n")
    (tmp_path / "text.parquet").write_text("hello")
    (tmp_path / "rows.csv").write_text("question,answer")
    (tmp_path / "rows.xlsx").write_text("a,b")
    no_prompt = columns()
    del no_prompt["prompt"]
    raw_parquet(tmp_path / "less.parquet", **no_prompt)
    for name, what in {
        "none.parquet": "the dataset has no rows",
        "none.jsonl": "the dataset has no rows",
        "text.parquet": "cannot be read as parquet",
        "rows.csv": "the dataset has no rows",
        "rows.xlsx": r"unknown kind of file '\.xlsx'; allowed: \.parquet, \.arrow, \.jsonl",
        "gone.parquet": "no such file",
        "less.parquet": "column prompt is missing; the file has data_source, images, reward_model",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: {what}"):
            open_tasks(tmp_path / name)


def test_a_table_of_the_schema_is_opened_without_reading_any_row(tmp_path, monkeypatch):
    monkeypatch.setattr(RowGroups, "read", lambda *_: pytest.fail("a row group was read"))
    assert write_rows(tmp_path / "t.parquet", [row()] * 3, SCHEMA) == len(open_tasks(tmp_path / "t.parquet")) == 3


def test_a_damaged_row_group_is_an_error_of_its_rows(tmp_path):
    path = tmp_path / "t.parquet"
    write_rows(path, (row(images=[encoded(64, 64, seed=i)]) for i in range(128)), SCHEMA)
    first = pq.ParquetFile(path).metadata.row_group(0).num_rows
    data = bytearray(path.read_bytes())
    data[5000:200_000] = bytes(195_000)
    path.write_bytes(data)
    kept, problems = validate(open_tasks(path), on_bad_row="skip")
    assert 0 < first < 128
    assert (kept, len(problems)) == (list(range(first, 128)), first)
    assert "row group 0 cannot be read" in str(problems[0])


def test_jsonl_rows_of_the_schema_are_read_too(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(5, 4))
    line = {**row(images=["a.png"]), "extra_info": {"id": 7}}
    (tmp_path / "t.jsonl").write_text("\n" + json.dumps(line) + "\n")
    task = open_tasks(tmp_path / "t.jsonl")[0]
    assert (task.id, task.images[0].width, task.where) == ("7", 5, f"{tmp_path / 't.jsonl'}, row 0 (line 2)")


def test_invalid_json_is_refused_by_row_and_line(tmp_path):
    lines = (PHOTOS / "refphotos.jsonl").read_text().splitlines()[:2]
    path = tmp_path / "t.jsonl"
    for broken, what in (('{"image": ', "is not valid JSON"), ("[1]", "must hold one JSON object, not list")):
        path.write_text("\n".join([lines[0], "", broken, lines[1]]))
        with pytest.raises(DataError, match=rf"t\.jsonl, row 1 \(line 3\): {what}"):
            read_tasks(path, image_root=PHOTOS)
        assert len(read_tasks(path, image_root=PHOTOS, on_bad_row="skip")[0]) == 2


def test_refcoco_style_rows_are_read_directly():
    table, problems = read_tasks(PHOTOS / "refphotos.jsonl", check=check_box)
    assert (len(table), problems) == (9, [])
    assert table[0].answer == [180 / 0.512, 60 / 0.512, 262 / 0.512, 185 / 0.512]
    assert (table[8].images[0].width, table[8].meta["height"]) == (451, 300)


def test_rows_are_taken_from_each_source_by_turns(tmp_path):
    names = ["a", "a", "a", "b", "c", "c"]
    rows = [{"question": "?", "answer": str(i), "data_source": name} for i, name in enumerate(names)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = open_tasks(tmp_path / "x.jsonl")
    taken = [[task.answer for task in table.of_each_source(count)] for count in (1, 3, 5, None)]
    assert taken == [["0"], ["0", "3", "4"], ["0", "1", "3", "4", "5"], [str(i) for i in range(6)]]
