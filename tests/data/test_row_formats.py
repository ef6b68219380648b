"""Rows as people have them, for every stage: loaded without a mapping, or refused with the line to type, which works.
No prompt holds an answer: it is rendered as the model reads it, and looked through."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foveate.api.inputs import data_files
from foveate.cli.options import columns_of, recipe_of
from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.data.demos import MAKE_PAIRS, check_answered, check_pair, check_response
from foveate.data.table import open_tasks
from foveate.encoding.dataset import build_encoder, read_checked
from foveate.errors import DataError
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.registry import name_of
from foveate.rewards.build import truth_check

ANSWER, WORSE, ASKED = "a green heron", "an old crow", "Which bird?"
ROWS = 3


def own_reward(answer, ground_truth, **columns):
    return float(answer == ground_truth) + 0 * len(columns)


CHECKS = {
    "rl by name": lambda: truth_check("exact"),
    "rl by function": lambda: truth_check(name_of(own_reward)),
    "sft": lambda: check_response,
    "mpo": lambda: check_pair,
}


def png() -> bytes:
    buffer = BytesIO()
    PIL.Image.new("RGB", (40, 30), "green").save(buffer, "PNG")
    return buffer.getvalue()


def user(content: Any = ASKED) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(text: str = ANSWER) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": ANSWER}]


# -------------------------------------------------------------------------------------------------------------- files


def parquet(folder: Path, row: dict[str, Any], name: str = "rows.parquet", images: str = "images") -> Path:
    """Rows as `datasets` writes them: images are {bytes, path}, and the schema says so in its metadata."""
    image = {"bytes": png(), "path": None}
    row = {**row, images: [image] if images == "images" else image}
    table = pa.Table.from_pylist([row] * ROWS)
    feature = {"_type": "Image"} if images == "image" else {"feature": {"_type": "Image"}, "_type": "Sequence"}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {images: feature}}})})
    (folder / name).parent.mkdir(exist_ok=True)
    pq.write_table(table, folder / name)
    return folder / name


def jsonl(folder: Path, row: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * ROWS)
    return folder / "rows.jsonl"


def array(folder: Path, row: dict[str, Any]) -> Path:
    (folder / "rows.json").write_text(json.dumps([row] * ROWS, indent=2))
    return folder / "rows.json"


def packed(folder: Path, row: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(folder, row).read_bytes()))
    return path


def delimited(folder: Path, row: dict[str, Any], suffix: str, delimiter: str) -> Path:
    text = StringIO()
    writer = csv.DictWriter(text, [*row], delimiter=delimiter)
    writer.writeheader()
    writer.writerows([row] * ROWS)
    path = folder / f"rows{suffix}"
    path.write_text(text.getvalue())
    return path


def arrow(folder: Path, row: dict[str, Any]) -> Path:
    """What `datasets.Dataset.save_to_disk` writes."""
    table = pa.Table.from_pylist([{**row, "image": {"bytes": png(), "path": None}}] * ROWS)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as to,
    ):
        to.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


def splits(folder: Path, row: dict[str, Any]) -> Path:
    for split in ("train", "test"):
        parquet(folder, row, f"data/{split}-00000-of-00001.parquet")
    return folder / "data"


QUESTION = {"question": ASKED, "image": "a.png", "answer": ANSWER}
INLINE = [{"type": "image"}, {"type": "text", "text": ASKED}]
PAIR = {"prompt": ASKED, "image": "a.png", "chosen": ANSWER, "rejected": WORSE}

Format = tuple[Callable[[Path], Path], str]
FORMATS: dict[str, Format] = {
    "verl parquet": (
        lambda folder: parquet(folder, {
            "data_source": "birds", "prompt": [user(f"<image>\n{ASKED}")], "ability": "birds",
            "reward_model": {"style": "rule", "ground_truth": ANSWER}, "extra_info": {"index": 3, "split": "train"},
        }), "answer",
    ),
    "TRL text": (lambda folder: jsonl(folder, {"prompt": ASKED, "image": "a.png", "solution": ANSWER}), "answer"),
    "TRL messages": (lambda folder: parquet(folder, {"prompt": [user(INLINE)], "solution": ANSWER}), "answer"),
    "TRL prompt and completion": (
        lambda folder: parquet(folder, {"prompt": [user()], "completion": reply()}), "response"
    ),
    "EasyR1 parquet": (lambda folder: parquet(folder, {"problem": f"<image>{ASKED}", "answer": ANSWER}), "answer"),
    "LLaVA json": (
        lambda folder: array(folder, {"id": "0", "image": "a.png", "conversations": turns(f"<image>\n{ASKED}")}),
        "response",
    ),
    "ShareGPT json": (
        lambda folder: array(folder, {"images": ["a.png"], "messages": [user(f"<image>{ASKED}"), *reply()]}),
        "response",
    ),
    "InternVL jsonl": (
        lambda folder: jsonl(folder, {
            "id": 0, "image": "a.png", "width": 40, "height": 30, "conversations": turns(f"<image>\n{ASKED}"),
        }), "response",
    ),
    "Image features": (lambda folder: parquet(folder, {"question": ASKED, "answer": ANSWER}, images="image"), "answer"),
    "RefCOCO": (lambda folder: jsonl(folder, {"image": "a.png", "sent": "the heron", "bbox": [4, 3, 20, 15]}), "box"),
    "pairs as text": (lambda folder: jsonl(folder, PAIR), "pair"),
    "pairs as messages": (
        lambda folder: parquet(folder, {"prompt": [user()], "chosen": reply(), "rejected": reply(WORSE)}), "pair"
    ),
    "pairs as conversations": (
        lambda folder: parquet(folder, {"chosen": [user(), *reply()], "rejected": [user(), *reply(WORSE)]}), "pair"
    ),
    "csv": (lambda folder: delimited(folder, QUESTION, ".csv", ","), "answer"),
    "tsv": (lambda folder: delimited(folder, QUESTION, ".tsv", "\t"), "answer"),
    "json array": (lambda folder: array(folder, QUESTION), "answer"),
    "gzip": (lambda folder: packed(folder, QUESTION), "answer"),
    "folder with splits": (lambda folder: splits(folder, {"question": ASKED, "answer": ANSWER}), "answer"),
    "save_to_disk": (lambda folder: arrow(folder, {"question": ASKED, "answer": ANSWER}), "answer"),
}  # fmt: skip
"""How each form of rows is written, and what of an answer it holds."""


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def demo():
    return inspect_model_folder("demo")


def read(demo: Any, path: str, stage: str, columns: dict[str, str] | None = None) -> Iterator[tuple[Any, str]]:
    """The tasks of a file as a stage takes them, each with its prompt as text."""
    data = DataSettings(train=(path,), columns=columns or {})
    encoder = build_encoder(demo.tokenizer, demo.family, ModelSettings(path="demo"), data)
    table, _ = read_checked(data.train, data, encoder, CHECKS[stage]())
    for task in table:
        yield task, demo.tokenizer.decode(encoder(task).token_ids)


def type_what_it_says(demo: Any, path: str, stage: str) -> tuple[list[tuple[Any, str]], list[str]]:
    """The rows, and the lines that had to be typed before they were read."""
    columns: dict[str, str] = {}
    typed: list[str] = []
    while True:
        try:
            return list(read(demo, path, stage, columns)), typed
        except DataError as error:
            said = str(error)
        option = re.search(r"--column (\S+=[^\s;]+)", said)
        split = re.search(r"ask for one of them: (\S+)", said)
        assert option or split, said
        if split:
            path = split[1].replace("@test", "@train")
            typed.append("split")
        else:
            columns |= columns_of([option[1]]) or {}
            typed.append(option[1])
        assert len(typed) < 3, typed


@pytest.mark.parametrize("stage", CHECKS)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_loaded_or_refused_with_the_line_that_loads_them(name, stage, demo, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    write, holds = FORMATS[name]
    path = str(write(tmp_path))
    if stage == "mpo" and holds != "pair":
        path = f"{path}@train" if name == "folder with splits" else path
        with pytest.raises(DataError, match=re.escape(MAKE_PAIRS)):
            list(read(demo, path, stage))
        return
    rows, typed = type_what_it_says(demo, path, stage)
    assert len(rows) == ROWS
    needed = {
        "answer": {"sft": "response"},
        "pair": {"rl by name": "answer", "rl by function": "answer", "sft": "response"},
    }
    target = needed.get(holds, {}).get(stage)
    assert [line.split("=")[0] for line in typed if line != "split"] == ([target] if target else [])
    assert ("split" in typed) == (name == "folder with splits")
    for task, prompt in rows:
        assert ("the heron" if name == "RefCOCO" else ASKED) in prompt
        assert len(task.images) == prompt.count("<img>") == 1
        for answer in (ANSWER, WORSE, str(task.answer), task.meta.get("response", ANSWER)):
            assert answer not in prompt
        if name != "RefCOCO":
            given = {"sft": task.meta.get("response"), "mpo": task.meta.get("chosen")}.get(stage, task.answer)
            assert given == ANSWER


def test_the_verbs_that_train_take_the_line():
    recipe = recipe_of("rl", "shapes_gspo", None, None, None, ["answer=extra_info.label", "source==own"])
    assert recipe.settings.data.columns == {"answer": "extra_info.label", "source": "=own"}


def only_row(path, columns=None, **row):
    path.write_text(json.dumps(row))
    return open_tasks(path, columns=columns)[0]


def test_a_target_that_is_nearly_a_known_one_is_an_error_and_others_are_fields(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(DataError, match=r"data\.columns: anser is no target; did you mean answer"):
        only_row(path, {"anser": "level"}, prompt="Q", answer="a", level=3)
    assert only_row(path, {"hard": "level"}, prompt="Q", answer="a", level=3).meta["hard"] == 3


def test_a_row_without_an_answer_is_a_task_that_only_some_rewards_take(tmp_path):
    for row in ({"prompt": "Q"}, {"prompt": "Q", "answer": None}, {"prompt": "Q", "answer": float("nan")}):
        task = only_row(tmp_path / "r.jsonl", **row)
        assert task.answer is None
        assert truth_check("repetition") is None
        for check in (truth_check("exact"), truth_check(name_of(own_reward)), check_answered):
            assert check is not None
            assert [field for field, _ in check(task)] == ["reward_model.ground_truth"]


def test_a_prompt_of_messages_in_trls_column_is_conversational_and_no_other(tmp_path):
    path = tmp_path / "r.jsonl"
    assert only_row(path, prompt=[user()], answer="a").conversational
    assert only_row(path, {"prompt": "chat"}, chat=[user()], answer="a").conversational
    assert not only_row(path, prompt=ASKED, answer="a").conversational
    assert not only_row(path, conversations=turns(ASKED), answer="a").conversational
    verl = {"data_source": "s", "prompt": [user()], "reward_model": {"ground_truth": "a"}}
    assert not only_row(path, **verl).conversational


def test_an_image_in_the_parts_of_a_message_may_be_one_of_python(tmp_path):
    image = PIL.Image.new("RGB", (40, 30), "green")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": ASKED}]
    [file] = data_files([{"prompt": [user(parts)], "answer": "a"}] * 2, tmp_path / "rows.parquet")
    task = open_tasks(file)[1]
    assert [(one.width, one.height) for one in task.images] == [(40, 30)]
    assert task.messages[0].content == f"<image>\n{ASKED}"
