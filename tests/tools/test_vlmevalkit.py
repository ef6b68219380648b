"""To and from VLMEvalKit's files. Run end to end against `ms-vlmeval` 0.0.20 by hand: see docs/log.md."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest

from foveate.errors import ConfigError, DataError
from foveate.evaluate.evaluate_models import EvalRequest, run_eval
from foveate.evaluate.generate import RowsRequest
from foveate.evaluate.shards import read_generated
from foveate.tools.vlmevalkit import checkpoint_models, endpoint_models, import_predictions, write_config, write_tsv


@pytest.fixture
def rows(tmp_path, make_image):
    """Four questions with two options and a picture."""
    lines = []
    for index in range(4):
        picture = make_image(20, 30, index).data
        (tmp_path / f"{index}.png").write_bytes(picture)
        lines.append(
            {"data_source": "mcq", "prompt": [{"role": "user", "content": "<image>\nWhich?\tThis?"}],
             "images": [f"{index}.png"], "reward_model": {"ground_truth": "AB"[index % 2]},
             "extra_info": {"id": f"m{index}", "choices": {"A": "red", "B": "blue"}}}
        )  # fmt: skip
    path = tmp_path / "mcq.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RowsRequest((str(path),))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_rows_become_a_table_with_pictures_and_options(tmp_path, rows):
    assert write_tsv(tmp_path / "mine.tsv", rows) == 4
    first = read(tmp_path / "mine.tsv")[0]
    assert {k: first[k] for k in ("index", "id", "question", "answer", "A", "B")} == {
        "index": "0", "id": "m0", "question": "Which?\tThis?", "answer": "A", "A": "red", "B": "blue",
    }  # fmt: skip
    assert base64.b64decode(first["image"]) == (tmp_path / "0.png").read_bytes()
    write_config(tmp_path / "config.json", {"m": {}}, ["RefCOCO", "New=ImageMCQDataset"], tmp_path / "mine.tsv")
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {name: entry["class"] for name, entry in config["data"].items()}
    assert classes == {"RefCOCO": "RefCOCODataset", "New": "ImageMCQDataset", "mine": "CustomMCQDataset"}
    with pytest.raises(ConfigError, match="--dataset Newer: write Newer=CLASS"):
        write_config(tmp_path / "config.json", {"m": {}}, ["Newer"], None)


def test_predictions_come_back_as_answers(tmp_path, rows):
    said = ["A", r"\boxed{B}", "Failed to obtain answer via API. ", "A"]
    with (tmp_path / "m_mine.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([["index", "prediction"], *([index, text] for index, text in enumerate(said))])
    assert import_predictions(tmp_path / "m_mine.tsv", rows, tmp_path / "back") == 3
    assert [row.answers[0].text for row in read_generated(tmp_path / "back")] == ["A", r"\boxed{B}", "A"]
    request = EvalRequest(
        (), (), tmp_path / "eval", "multiple_choice", generated=(tmp_path / "back",), missing="wrong",
        settings={"extraction": "text"},
    )  # fmt: skip
    run_eval(request)
    found = json.loads((tmp_path / "eval" / "summary.json").read_text())["models"]["back"]
    assert (found["accuracy"]["value"], found["missing"]) == (0.5, 1)
    with pytest.raises(DataError, match="has answers already"):
        import_predictions(tmp_path / "m_mine.tsv", rows, tmp_path / "back")


def test_predictions_that_do_not_fit_the_rows_are_refused(tmp_path, rows):
    (tmp_path / "a.tsv").write_text("index\tprediction\n4\tA\n")
    with pytest.raises(DataError, match="index '4' is none of the 4 rows"):
        import_predictions(tmp_path / "a.tsv", rows, tmp_path / "one")
    (tmp_path / "b.tsv").write_text("index\tanswer\n0\tA\n")
    with pytest.raises(DataError, match="needed are index and prediction"):
        import_predictions(tmp_path / "b.tsv", rows, tmp_path / "two")
    with pytest.raises(DataError, match="PRED_FORMAT=tsv"):
        import_predictions(tmp_path / "c.xlsx", rows, tmp_path / "three")


def test_a_checkpoint_is_named_with_and_without_thinking(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "internvl"}')
    with pytest.raises(ConfigError, match=r"run `foveate convert .* OUT --to chat`"):
        checkpoint_models(tmp_path, "mine")
    config.write_text('{"model_type": "internvl_chat"}')
    models = checkpoint_models(tmp_path, "mine")
    assert models["mine"] == {"class": "InternVLChat", "model_path": str(tmp_path), "version": "V2.0"}
    assert models["mine-Thinking"] == {
        **models["mine"], "use_lmdeploy": True, "max_new_tokens": 32768, "cot_prompt_version": "r1", "do_sample": True,
    }  # fmt: skip
    served = endpoint_models("http://127.0.0.1:8000/v1/", "m", "name", 64)["name"]
    assert (served["api_base"], served["model"]) == ("http://127.0.0.1:8000/v1/chat/completions", "m")
    assert "key" not in served
