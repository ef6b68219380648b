"""VLMEvalKit: its configuration for our models, our rows as its TSV, and its predictions as our answers.

Written for the releases whose `run.py` takes `--config` (2025 on) and for `ms-vlmeval`. Its files are plain; nothing of
it is imported.
"""

from __future__ import annotations

import base64
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foveate.data.answers import GeneratedAnswer, GeneratedRow, prompt_fields
from foveate.data.demos import check_answered
from foveate.data.table import TaskTable, open_tasks
from foveate.data.validate import validate
from foveate.data.videos import refuse_videos
from foveate.encoding.chat import IMAGE_MARK
from foveate.errors import ConfigError, DataError
from foveate.evaluate.generate import REQUEST, GenerateRequest, RowsRequest
from foveate.evaluate.shards import AnswerStore
from foveate.files import atomic_path, atomic_write_text
from foveate.models.checkpoint.formats import read_config
from foveate.models.families import family_class
from foveate.records import SamplingParams, Task
from foveate.rewards.text import jsonable, options, question

NEW_TOKENS = 32_768
DATASETS = {
    "RefCOCO": "RefCOCODataset",
    "MMMU_DEV_VAL": "MMMUDataset",
    "MathVista_MINI": "MathVista",
    "MathVision": "MathVision",
    "MathVerse_MINI_Vision_Only": "MathVerse",
    "WeMath": "WeMath",
    "LogicVista": "LogicVista",
}
"""Datasets of its own, with the class that its configuration must name."""
MCQ, VQA = "CustomMCQDataset", "CustomVQADataset"
"""Its classes for your own files: with options, which it grades; and without, for which it only infers."""


def checkpoint_models(folder: Path, name: str) -> dict[str, Any]:
    """The entries of a checkpoint, without and with thinking, as its own list has InternVL3.5.

    Raises ConfigError for one that is not in the GitHub format, the only one that its class loads."""
    model_type = read_config(folder)["model_type"]
    if model_type != family_class(model_type).github_type:
        raise ConfigError(
            f"{folder} is not in InternVL's GitHub format, which VLMEvalKit's InternVLChat needs; run "
            f"`foveate convert {folder} OUT --to chat` and give --model OUT, or serve it and give --endpoint"
        )
    plain = {"class": "InternVLChat", "model_path": str(folder), "version": "V2.0"}
    thinking = {"use_lmdeploy": True, "max_new_tokens": NEW_TOKENS, "cot_prompt_version": "r1", "do_sample": True}
    return {name: plain, f"{name}-Thinking": {**plain, **thinking}}


def endpoint_models(url: str, model: str, name: str, max_tokens: int) -> dict[str, Any]:
    """The entry of a served model. The key stays in the environment, where VLMEvalKit reads OPENAI_API_KEY."""
    address = f"{url.rstrip('/')}/chat/completions"
    served = {"class": "GPT4V", "model": model, "api_base": address, "temperature": 0, "max_tokens": max_tokens}
    return {name: {**served, "img_detail": "high", "retry": 3}}


def write_config(path: Path, models: dict[str, Any], datasets: Sequence[str], tsv: Path | None) -> None:
    """The file for `--config`: its own datasets by name, and one of ours by its TSV."""
    data: dict[str, Any] = {}
    for given in datasets:
        name, _, cls = given.partition("=")
        if not cls and name not in DATASETS:
            raise ConfigError(f"--dataset {name}: write {name}=CLASS, or one of {', '.join(DATASETS)}")
        data[name] = {"class": cls or DATASETS[name], "dataset": name}
    if tsv is not None:
        with tsv.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file, delimiter="\t"))
        data[tsv.stem] = {"class": MCQ if {"A", "B"} <= set(columns) else VQA, "dataset": tsv.stem}
    atomic_write_text(path, json.dumps({"model": models, "data": data}, indent=2, ensure_ascii=False) + "\n")


def write_tsv(path: Path, source: RowsRequest) -> int:
    """Our rows as a TSV for `$LMUData`: index, question, answer, image (base64), and A, B, ... where every row has
    options. The answer to a question with options is their letter. Returns the number of rows."""
    table = _table(source)
    letters = sorted({letter for task in table for letter in options(task)}) if all(map(options, table)) else []
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "id", "question", "answer", "image", *letters])
        for index, task in enumerate(table):
            writer.writerow([index, task.id, *_cells(task), *(options(task).get(letter, "") for letter in letters)])
    return len(table)


def import_predictions(predictions: Path, source: RowsRequest, out: Path) -> int:
    """Its predictions (`PRED_FORMAT=tsv`) as a folder like those of `foveate generate`, for `foveate eval --generated`.

    Rows that lack an answer, or that failed there, stay without one. Returns the rows taken. Raises DataError for a
    file without the columns index and prediction, an index that is no row, and a folder that has answers already.
    """
    if predictions.suffix != ".tsv":
        raise DataError(f"{predictions}: run VLMEvalKit with PRED_FORMAT=tsv; other formats are not read")
    table = _table(source)
    request = GenerateRequest(source, out, SamplingParams(1, NEW_TOKENS, 0.0), model=f"VLMEvalKit {predictions.name}")
    with AnswerStore(out, request.shard_rows) as store:
        if store.done:
            raise DataError(f"{out}: has answers already; choose another folder")
        for index, text in _predicted(predictions, len(table)):
            answers = (GeneratedAnswer(text, "stop", None),)
            cost: dict[str, Any] = {"prompt_tokens": None, "answer_tokens": None, "seconds": 0.0, "tries": 1}
            asked = prompt_fields(table[index])
            store.write(GeneratedRow(**asked, answers=answers, index=index, **cost, server="VLMEvalKit"))
        identity = request.identity(table, [])
        atomic_write_text(out / REQUEST, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        return len(store.done)


def _predicted(path: Path, rows: int) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(sys.maxsize)  # images stand in the cells
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        if not {"index", "prediction"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path}: has the columns {reader.fieldnames}; needed are index and prediction")
        for line in reader:
            if not line["index"].isdecimal() or int(line["index"]) >= rows:
                raise DataError(f"{path}: index {line['index']!r} is none of the {rows} rows of the data")
            if line["prediction"] and not line["prediction"].startswith("Failed to obtain answer"):
                yield int(line["index"]), line["prediction"]


def _table(source: RowsRequest) -> TaskTable:
    root = Path(source.image_root) if source.image_root else None
    table = open_tasks(source.data, image_root=root, columns=source.columns)
    kept, _ = validate(table, on_bad_row=source.on_bad_row, check=check_answered)
    return table.select(kept)


def _cells(task: Task) -> tuple[str, str, str]:
    """Question, answer and image of a row; several images are a list, as VLMEvalKit reads them."""
    refuse_videos(task, "VLMEvalKit's table")
    answer = jsonable(task.answer)
    pictures = [
        base64.b64encode(image.path.read_bytes() if image.path else image.data or b"").decode() for image in task.images
    ]
    text = task.messages[-1].content if len(task.messages) == 1 else question(task)
    asked = text.replace(IMAGE_MARK, "").strip()
    picture = pictures[0] if len(pictures) == 1 else json.dumps(pictures) if pictures else ""
    return asked, answer if isinstance(answer, str) else json.dumps(answer), picture
