"""Rows as people have them: which column is what is known by its name, and nothing is dropped without a word."""

from __future__ import annotations

import base64
import csv
import gzip
import json
from io import BytesIO

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_tasks

from foveate.data.demos import check_answered, check_pair, check_response
from foveate.data.table import open_tasks
from foveate.data.validate import RowInspection, inspect_rows
from foveate.errors import DataError
from foveate.records import Message

ANSWER = "a green heron"


def png(width=12, height=8):
    buffer = BytesIO()
    PIL.Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png(20, 10))
    return tmp_path


def lines(folder, *rows, name="x.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def task_of(folder, row):
    return open_tasks(lines(folder, row))[0]


def problems_of(folder, row):
    return open_tasks(lines(folder, row)).inspect(0)[1]


def ask(role="role", content="content", user="user", text="Which bird?"):
    return {role: user, content: text}


def reply(role="role", content="content", assistant="assistant", text=ANSWER):
    return {role: assistant, content: text}


SHAREGPT = {"role": "from", "content": "value"}
PARTS = [{"type": "image"}, {"type": "text", "text": "Which bird?"}]
INLINE = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which bird?"}]
OPENAI = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}},
    {"type": "text", "text": "Which bird?"},
]

FORMATS = {
    "verl": {
        "data_source": "birds", "prompt": [ask(text="<image>\nWhich bird?")], "images": ["a.png"],
        "reward_model": {"style": "rule", "ground_truth": ANSWER}, "extra_info": {"index": 3},
    },
    "TRL text": {"prompt": "Which bird?", "image": "a.png", "solution": ANSWER},
    "TRL messages": {"prompt": [ask()], "images": ["a.png"], "answer": ANSWER},
    "TRL parts": {"prompt": [ask(text=PARTS)], "images": ["a.png"], "solution": ANSWER},
    "Qwen inline parts": {"prompt": [ask(text=INLINE)], "answer": ANSWER},
    "OpenAI parts": {"messages": [ask(text=OPENAI), reply()]},
    "EasyR1": {"problem": "<image>Which bird?", "answer": ANSWER, "images": ["a.png"]},
    "LLaVA": {
        "id": "0", "image": "a.png",
        "conversations": [ask(**SHAREGPT, user="human", text="<image>\nWhich bird?"),
                          reply(**SHAREGPT, assistant="gpt")],
    },
    "LLaVA, its mark behind the question": {
        "image": "a.png",
        "conversations": [ask(**SHAREGPT, user="human", text="Which bird?\n<image>"),
                          reply(**SHAREGPT, assistant="gpt")],
    },
    "ShareGPT messages": {"images": ["a.png"], "messages": [ask(text="<image>Which bird?"), reply()]},
    "TRL prompt and completion": {"prompt": [ask()], "completion": [reply()], "image": "a.png", "answer": ANSWER},
    "question and answer": {"question": "Which bird?", "image": "a.png", "answer": ANSWER},
    "instruction": {"instruction": "Which", "input": "bird?", "output": ANSWER, "image": "a.png", "answer": ANSWER},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_read_without_a_mapping_and_its_answer_is_not_in_the_prompt(folder, name):
    task = task_of(folder, FORMATS[name])
    said = " ".join(message.content for message in task.messages)
    assert "bird?" in said
    assert ANSWER not in said
    assert said.count("<image>") == len(task.images) == 1
    assert task.answer == ANSWER
    assert all(message.role != "assistant" for message in task.messages)


def test_a_column_source_says_the_source_and_stays_a_field(folder):
    task = task_of(folder, {"question": "Which bird?", "image": "a.png", "answer": ANSWER, "source": "birds"})
    assert (task.source, task.meta["source"]) == ("birds", "birds")
    both = {"question": "Which bird?", "answer": ANSWER, "source": "https://a.b", "data_source": "birds"}
    assert (task_of(folder, both).source, task_of(folder, both).meta["source"]) == ("birds", "https://a.b")


def test_a_column_that_is_mapped_and_not_there_is_named(folder):
    table = open_tasks(lines(folder, {"question": "Which?", "answer": "a"}), columns={"source": "origin"})
    assert "field data_source: the row has no column origin, which data.columns" in str(table.inspect(0)[1][0])


def test_a_question_beside_a_data_source_needs_no_marks(folder):
    task = task_of(folder, {"question": "Which bird?", "image": "a.png", "answer": ANSWER, "data_source": "birds"})
    assert (task.messages[0].content.count("<image>"), task.source) == (1, "birds")
    verl = {**FORMATS["verl"], "prompt": [ask(text="Which bird?")]}
    assert "0 <image> marks" in str(problems_of(folder, verl)[0])


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if {"conversations", "messages"} & {*row}])
def test_the_last_turn_is_the_response_and_the_ground_truth(folder, name):
    task = task_of(folder, FORMATS[name])
    assert (task.meta["response"], task.answer) == (ANSWER, ANSWER)
    assert check_response(task) == []


def test_a_conversation_of_several_turns_keeps_all_but_its_last(folder):
    turns = [("human", "<image>\n<image>\nCompare."), ("gpt", "Two."), ("human", "Why?"), ("gpt", "Because.")]
    row = {"image": ["a.png", "b.png"], "conversations": [{"from": role, "value": text} for role, text in turns]}
    task = task_of(folder, row)
    assert [message.content for message in task.messages] == [text for _, text in turns[:3]]
    assert (task.meta["response"], [image.width for image in task.images]) == ("Because.", [12, 20])


def test_an_answer_of_its_own_goes_before_the_last_turn(folder):
    row = {"messages": [ask(), reply(text="It is a heron.")], "answer": "heron"}
    task = task_of(folder, row)
    assert (task.answer, task.meta["response"]) == ("heron", "It is a heron.")


def test_a_response_that_is_not_the_last_turn_is_a_contradiction(folder):
    row = {"messages": [ask(), reply()], "response": "something else"}
    assert "another one as the last turn" in str(problems_of(folder, row)[0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which?", "chosen": "good", "rejected": "bad"},
        {"question": "Which?", "chosen": "good", "rejected": "bad"},
        {"prompt": [ask(text="Which?")], "chosen": [reply(text="good")], "rejected": [reply(text="bad")]},
        {"prompt": "Which?", "chosen": [ask(text="Which?"), reply(text="good")],
         "rejected": [ask(text="Which?"), reply(text="bad")]},
        {"chosen": [ask(text="Which?"), reply(text="good")], "rejected": [ask(text="Which?"), reply(text="bad")]},
        {"conversations": [ask(**SHAREGPT, user="human", text="Which?")],
         "chosen": reply(**SHAREGPT, assistant="gpt", text="good"),
         "rejected": reply(**SHAREGPT, assistant="gpt", text="bad")},
        {"data_source": "x", "prompt": [ask(text="Which?")], "reward_model": None,
         "extra_info": {"chosen": [reply(text="good")], "rejected": [reply(text="bad")]}},
    ],
)  # fmt: skip
def test_a_pair_is_read_as_text_or_as_messages(folder, row):
    task = task_of(folder, row)
    assert [message.content for message in task.messages] == ["Which?"]
    assert (task.meta["chosen"], task.meta["rejected"], check_pair(task)) == ("good", "bad", [])


def test_an_answer_of_several_turns_is_no_answer_of_a_pair(folder):
    row = {"prompt": "Which?", "chosen": [reply(), ask(), reply()], "rejected": "bad"}
    assert "field extra_info.chosen (column chosen): is a conversation" in str(problems_of(folder, row)[0])


def test_parts_stand_where_they_stood(folder):
    parts = [{"type": "text", "text": "Left: "}, {"type": "image"}, {"type": "text", "text": "right: "},
             {"type": "image", "image": "b.png"}, {"type": "text", "text": "which?"}]  # fmt: skip
    task = task_of(folder, {"prompt": [ask(text=parts)], "images": ["a.png"], "answer": 1})
    assert task.messages[0].content == "Left: <image>\nright: <image>\nwhich?"
    assert [image.width for image in task.images] == [12, 20]


def test_parts_of_parquet_with_nulls_are_read(folder):
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    columns = {
        "prompt": pa.array([[{"role": "user", "content": PARTS}]], pa.list_(message)),
        "image": pa.array([{"bytes": png(), "path": None}]),
        "solution": [ANSWER],
    }
    pq.write_table(pa.table(columns), folder / "x.parquet")
    task = open_tasks(folder / "x.parquet")[0]
    assert task.messages == (Message("user", "<image>\nWhich bird?"),)
    assert task.images[0].data == png()


@pytest.mark.parametrize("empty", ["", None, [], {"bytes": None, "path": None}, {"path": ""}])
def test_an_image_that_is_empty_is_no_image(folder, empty):
    task = task_of(folder, {"image": empty, "question": "2 + 2?", "answer": "4"})
    assert (task.messages[0].content, task.images) == ("2 + 2?", ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("imagse", ["a.png"]),
        ("imags", "a.png"),
        ("Pictrue", "a.png"),
        ("photo", "a.png"),
        ("image_1", "a.png"),
        ("scan", "figure.jpg"),
        ("file_name", ["figure.WEBP"]),
        ("blob", base64.b64encode(png()).decode()),
        ("feature", {"bytes": base64.b64encode(png()).decode(), "path": "x"}),
        ("vidoes", ["v.mp4"]),
        ("audio", "a.wav"),
    ],
)
def test_a_column_that_looks_like_images_and_is_read_by_nobody_is_an_error(folder, name, value):
    row = {"question": "Which bird?", "answer": ANSWER, name: value}
    [problem] = problems_of(folder, row)
    assert f"field {name}: looks like " in str(problem)
    assert not problem.warning
    assert f"--column {name}={name}" in problem.what
    kept = open_tasks(lines(folder, row), columns={name: name})[0]  # said to be a field of its own
    assert kept.meta[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_id", 7), ("image_id", "COCO_7"), ("image_width", 640), ("has_image", True), ("topic", "imagery")],
)
def test_a_column_about_images_is_a_field_like_others(folder, name, value):
    table = open_tasks(lines(folder, {"question": "Which bird?", "answer": ANSWER, name: value}))
    assert (table.inspect(0)[1], table[0].meta[name]) == ([], value)


def test_a_second_column_of_images_or_answers_is_a_warning_once_a_file(folder):
    row = {"question": "Which bird?", "image": "a.png", "thumb": "b.png", "answer": ANSWER, "solution": "long"}
    found = inspect_rows(open_tasks(lines(folder, row, {**row, "id": "2"}, row)), RowInspection())
    assert (len(found.kept), found.problems) == (3, [])
    assert [problem.field for problem in found.warnings] == ["thumb", "solution"]
    assert list(found.warnings.values()) == [3, 3]
    assert "(and in 2 more rows)" in found.warning_lines()[0]


def test_an_answer_with_a_typo_is_named(folder):
    row = {"question": "Which bird?", "anwser": ANSWER}
    assert any("--column answer=anwser" in str(problem) for problem in problems_of(folder, row))
    [(_, fault)] = check_answered(open_tasks(lines(folder, row))[0])
    assert fault == "is missing; the row has no answer to be scored against"


def test_a_row_without_a_prompt_says_what_is_nearly_one(folder):
    assert "qestion is nearly question" in str(problems_of(folder, {"qestion": "Why?", "answer": "x"})[0])


@pytest.mark.parametrize("video", ["v.mp4", ["v.mp4"], {"path": "clip.webm"}])
def test_a_video_file_that_is_missing_is_told(folder, video):
    [problem, *_] = problems_of(folder, {"video": video, "question": "<video>\nWhat?", "answer": "x"})
    assert problem.field == "videos (column video)"
    assert "no such file" in problem.what


def test_a_mark_without_its_video_is_refused(folder):
    assert "<video>" in str(problems_of(folder, {"question": "<video>\nWhat?", "answer": "x"})[0])


def test_other_columns_are_kept_as_fields(folder):
    row = {"question": "Why?", "answer": "x", "level": 3, "empty": {}, "none": None, "meta": {"a": [1]}}
    assert task_of(folder, row).meta == {"level": 3, "meta": {"a": [1]}}


def test_a_second_column_of_a_role_is_kept_as_a_field(folder):
    row = {"prompt": "Why?", "messages": [ask()], "answer": "x", "solution": "long", "id": "a", "uid": "b"}
    task = task_of(folder, row)
    assert (task.id, task.answer) == ("a", "x")
    assert task.meta == {"id": "a", "messages": [ask()], "solution": "long", "uid": "b"}
    line = open_tasks(lines(folder, row)).described()[0]
    assert "kept: messages, solution, uid" in line


def test_a_column_of_numbers_is_no_images_whatever_its_name(folder):
    assert task_of(folder, {"question": "Why?", "answer": "x", "frames": [1, 2]}).meta == {"frames": [1, 2]}


def test_a_mapping_names_only_what_differs(folder):
    row = {"question": "Which bird?", "picture_of_it": "a.png", "label": ANSWER}
    path = lines(folder, row)
    task = open_tasks(path, columns={"images": "picture_of_it", "answer": "label"})[0]
    assert (task.messages[0].content, task.answer, len(task.images)) == ("<image>\nWhich bird?", ANSWER, 1)


def test_options_in_columns_or_lists_stand_under_the_question(folder):
    expected = "Which?\nA. cat\nB. dog"
    for more in ({"A": "cat", "B": "dog", "C": None}, {"choices": ["cat", "dog"]}, {"options": "['cat', 'dog']"}):
        task = task_of(folder, {"question": "Which?", "answer": "B", **more})
        assert task.messages[0].content == expected
        assert (task.meta.get("choices") or task.meta["options"]) == ["cat", "dog"]
    marked = task_of(folder, {"question": "Which?", "answer": "B", "options": ["A. cat", "B. dog"]})
    assert marked.messages[0].content == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("See <image 1>, then <image 2>.", ["a", "b"]),
        ("See <image 2>, then <image 1>.", ["b", "a"]),
        ("See <image 1>, <image 2>, and <image 1> again.", ["a", "b", "a"]),
    ],
)
def test_an_image_stands_where_its_number_is(folder, asked, expected):
    turns = [{"role": "user", "content": asked}, reply(text="It is <image 1>.")]
    text = asked.replace("<image 1>", "<image>").replace("<image 2>", "<image>")
    for row in ({"question": asked, "answer": ANSWER}, {"messages": turns}):
        task = task_of(folder, {**row, "images": ["a.png", "b.png"]})
        assert task.messages[0].content == text
        assert [image.path.stem for image in task.images] == expected
    assert task.meta["response"] == "It is <image 1>."


def test_numbered_marks_in_options_count(folder):
    row = {"question": "Which bird?", "answer": "B", "options": ["<image 1>", "<image 2>"]}
    task = task_of(folder, {**row, "images": ["a.png", "b.png"]})
    assert task.messages[0].content == "Which bird?\nA. <image>\nB. <image>"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("<image 1> or <image 3>?", "the marks <image 1>, <image 3> for 2 images"),
        ("<image 1>?", "the marks <image 1> for 2 images"),
        ("<image> or <image 2>?", "has <image> and numbered marks"),
    ],
)
def test_numbers_without_an_image_and_images_without_a_number_are_errors(folder, asked, said):
    [problem] = problems_of(folder, {"question": asked, "answer": ANSWER, "images": ["a.png", "b.png"]})
    assert not problem.warning
    assert said in str(problem)


def test_an_image_below_a_column_is_not_left_out_silently(folder):
    row = {"question": "Which bird?", "answer": ANSWER, "data": {"image": "a.png", "width": 12}}
    [problem] = problems_of(folder, row)
    assert "field data.image: looks like images and is read by nobody; map it: --column images=data.image" in str(
        problem
    )
    assert not problem.warning
    assert len(open_tasks(lines(folder, row), columns={"images": "data.image"})[0].images) == 1
    assert open_tasks(lines(folder, row), columns={"data": "data"})[0].images == ()


def test_rows_below_a_key_are_no_single_row(folder):
    rows = [{"question": "Which bird?", "answer": ANSWER}] * 3
    (folder / "x.json").write_text(json.dumps({"version": 1, "data": rows}))
    task, [problem] = open_tasks(folder / "x.json").inspect(0)
    assert task is None
    assert "data holds a list of 3 rows: a file is an array of rows, or has one a line" in str(problem)


def test_what_was_recognised_is_one_line(folder):
    [line] = open_tasks(lines(folder, {**FORMATS["LLaVA"], "model": "m"})).described()
    assert line == (
        "x.jsonl: conversations, as LLaVA, ShareGPT and InternVL have them: prompt from conversations, images from "
        "image, id from id, response, and answer where there is no other, from its last turn; kept: model"
    )


ROWS = [{"question": f"What is {i}?", "image": "a.png", "answer": f"{i}, or\nmore"} for i in range(5)]


def cells(path, delimiter):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "image", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    "name",
    ["x.jsonl", "x.json", "one_line.json", "array.jsonl", "lines.json", "x.csv", "x.tsv", "x.parquet", "x.arrow",
     "x.jsonl.gz", "x.json.gz", "x.csv.gz", "x.tsv.gz"],
)  # fmt: skip
def test_the_same_rows_are_read_from_every_kind_of_file(folder, name):
    path, plain = folder / name, folder / name.removesuffix(".gz")
    if "csv" in name or "tsv" in name:
        cells(plain, "," if "csv" in name else "\t")
    elif name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "x.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as writer:
            writer.write_table(pa.Table.from_pylist(ROWS))
    elif name in ("x.jsonl", "lines.json", "x.jsonl.gz"):
        plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        plain.write_text("\ufeff" * (name == "x.json") + json.dumps(ROWS, indent=None if "one" in name else 1))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    table = open_tasks(path)
    assert [(task.messages[0].content, task.answer) for task in table] == [
        (f"<image>\nWhat is {i}?", f"{i}, or\nmore") for i in range(5)
    ]
    assert [task.id for task in table] == [f"{name.split('.')[0]}-{i}" for i in range(5)]
    assert table.values("answer")[2] == "2, or\nmore"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[{"question": "a"}, {"question": "b"}', "not closed"),
        ('[{"question": "a"} {"question": "b"}]', "where an object should begin"),
        ('[{"question": "a"}, 3]', "where an object should begin|', 3'"),
        ('["a", "b"]', "an entry that is no object"),
        ('[{"question": "a"}]\n[{"question": "b"}]', "behind the end of the array"),
    ],
)
def test_a_broken_array_is_refused_as_one_by_its_line(folder, text, what):
    (folder / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json, line \d+: begins with \[ and so must be one array .*({what})"):
        open_tasks(folder / "x.json")


def test_rows_of_an_array_are_named_by_their_line(folder):
    (folder / "x.json").write_text('[\n{"question": "a",\n "answer": "1"},\n\n{"question": 7, "answer": "2"}\n]')
    _, problems = read_tasks(folder / "x.json", on_bad_row="skip")
    assert "x.json, row 1 (line 5), field prompt" in str(problems[0])


def test_rows_of_cells_that_are_broken_are_refused_one_by_one(folder):
    (folder / "x.csv").write_bytes(b"question,answer\na,1\nb\nc,3,4\n\xff,5\n\nd,6\n")
    table, problems = read_tasks(folder / "x.csv", on_bad_row="skip")
    assert [task.answer for task in table] == ["1", "6"]
    assert [problem.where.split("x.csv, ")[1] for problem in problems] == [
        "row 1 (line 3)", "row 2 (line 4)", "row 3 (line 5)"
    ]  # fmt: skip


@pytest.mark.parametrize("names", [["train-0-of-1", "test-0-of-1"], ["train", "val"], ["a/train", "a/dev"]])
def test_a_folder_of_several_splits_is_read_one_split_at_a_time(folder, names):
    for number, name in enumerate(names):
        path = folder / "d" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"question": [f"{number}?"], "answer": ["x"]}), path)
    with pytest.raises(DataError, match=r"several splits \(.+\); ask for one of them: .+d@\w+"):
        open_tasks(folder / "d")
    assert [task.messages[0].content for task in open_tasks(folder / "d@train")] == ["0?"]
    assert [task.messages[0].content for task in open_tasks(folder / f"d@{names[1].split('/')[-1].split('-')[0]}")] == [
        "1?"
    ]
    with pytest.raises(DataError, match=r"d@other: no such split; the folder has "):
        open_tasks(folder / "d@other")


def test_files_of_one_split_are_read_together(folder):
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        pq.write_table(pa.table({"question": [name], "answer": ["x"]}), folder / f"{name}.parquet")
    assert len(open_tasks(folder)) == 2


def test_rows_of_files_with_the_same_name_have_ids_of_their_own(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        lines(folder / name, {"question": "?", "answer": "x"}, name="train.jsonl")
    paths = [folder / "a" / "train.jsonl", folder / "b" / "train.jsonl", folder / "b" / "train.jsonl"]
    assert open_tasks(paths)[0].id == "a/train-0"
    assert len({task.id for task in open_tasks(paths)}) == 3
