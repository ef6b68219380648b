from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
from reading import read_tasks

from foveate.data.referring import GroundingRows
from foveate.data.table import open_tasks
from foveate.data.validate import ReadOptions
from foveate.datasets.grounding import prepare_grounding
from foveate.errors import DataError
from foveate.rewards.boxes import check_box

PHOTOS = Path(__file__).parent.parent / "data" / "refphotos"
SOURCE = PHOTOS / "refphotos.jsonl"
ASK = "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"


def jsonl(folder, *rows):
    """A JSONL file beside a picture a.png of 200 x 100 pixels; rows are changes to one good row."""
    PIL.Image.new("RGB", (200, 100)).save(folder / "a.png")
    usual = {"image": "a.png", "sent": "the dog", "bbox": [20, 10, 100, 60], "width": 200, "height": 100}
    lines = [{key: value for key, value in {**usual, **row}.items() if value is not None} for row in rows]
    (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "r.jsonl"


def chat(question, reply):
    return {
        "sent": None,
        "bbox": None,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}],
    }


def only_task(path):
    return read_tasks(path, check=check_box)[0][0]


def test_photos_become_rows_of_the_schema(tmp_path):
    prepared = prepare_grounding(SOURCE, tmp_path / "out", test_fraction=0.5)
    assert sorted(prepared.rows.values()) == [3, 6]
    tasks = [task for name in ("train", "test") for task in open_tasks(tmp_path / "out" / f"{name}.parquet")]
    source = {row["id"]: row for row in map(json.loads, SOURCE.read_text().splitlines())}
    assert {task.id for task in tasks} == set(source)
    for task in tasks:
        row = source[task.id]
        assert task.source == "grounding"
        assert task.messages[0].content == ASK.format(row["sent"])
        sides = [row["width"], row["height"]] * 2
        assert task.answer == [value * 1000 / side for value, side in zip(row["bbox"], sides, strict=True)]
        assert task.images[0].path == (PHOTOS / row["image"]).resolve()
        assert {name: task.meta[name] for name in ("height", "width", "question")} == {
            "height": row["height"],
            "width": row["width"],
            "question": row["sent"],
        }
        assert check_box(task) == []


@pytest.mark.parametrize("split_by", ["image", "row"])
def test_splits_share_no_picture_or_no_row(tmp_path, split_by):
    prepared = prepare_grounding(SOURCE, tmp_path, test_fraction=0.4, split_by=split_by)
    train, test = (list(open_tasks(tmp_path / f"{name}.parquet")) for name in ("train", "test"))
    assert len(train) + len(test) == 9
    assert not {task.id for task in train} & {task.id for task in test}
    pictures = {task.images[0].path for task in train} & {task.images[0].path for task in test}
    assert bool(pictures) == (split_by == "row")
    assert prepared.rows["test"] == (4 if split_by == "row" else len(test))
    assert [task.meta["index"] for task in test] == list(range(len(test)))
    assert {task.meta["split"] for task in test} == {"test"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_grounding(SOURCE, tmp_path / name, split_by="row", test_fraction=0.5, seed=seed)
    for file in ("train.parquet", "test.parquet", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    ids = [{task.id for task in open_tasks(tmp_path / name / "test.parquet")} for name in "ac"]
    assert ids[0] != ids[1]


def test_the_manifest_tells_what_was_made_from_what(tmp_path):
    prepare_grounding(SOURCE, tmp_path, prompt_form="qwen", seed=9)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["prompt_form"], sum(manifest["rows"].values())) == (9, "qwen", 9)
    assert manifest["sources"] == {str(SOURCE): hashlib.sha256(SOURCE.read_bytes()).hexdigest()}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_a_folder_with_copied_images_works_from_elsewhere(tmp_path):
    shutil.copytree(PHOTOS, tmp_path / "photos")
    prepare_grounding(tmp_path / "photos" / "refphotos.jsonl", tmp_path / "out", test_fraction=0, copy_images=True)
    shutil.rmtree(tmp_path / "photos")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    table, _ = read_tasks(tmp_path / "elsewhere" / "train.parquet")
    assert len({task.images[0].path for task in table}) == 2
    assert len(list((tmp_path / "elsewhere" / "images").iterdir())) == 2


def test_preparing_again_with_another_split_leaves_no_stale_file(tmp_path):
    prepare_grounding(SOURCE, tmp_path, test_fraction=0.5)
    prepare_grounding(SOURCE, tmp_path, test_fraction=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "train.parquet"]


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("internvl", ASK.format("the dog")),
        ("amodal", ASK.replace("bounding", "amodal bounding").format("the dog")),
        ("qwen", "<image>\nLocate the dog, output its bbox coordinates using JSON format"),
    ],
)
def test_prompt_forms_are_those_of_the_recipes(tmp_path, form, content):
    table = open_tasks(jsonl(tmp_path, {}), parser=GroundingRows(form))
    assert table[0].messages[0].content == content


def test_conversations_alone_give_question_and_box(tmp_path):
    question = "<image>\nFind <ref>the cat</ref> please."
    row = chat(question, "<ref>the cat</ref><box>[[100, 200, 300, 400]]</box>")
    task = only_task(jsonl(tmp_path, row))
    assert (task.messages[0].content, task.answer, task.meta["question"]) == (question, [100, 200, 300, 400], "the cat")
    qwen = open_tasks(jsonl(tmp_path, row), parser=GroundingRows("qwen"))[0]
    assert qwen.messages[0].content == "<image>\nLocate the cat, output its bbox coordinates using JSON format"


def test_a_box_half_a_pixel_beyond_the_edge_is_cut_there(tmp_path):
    assert only_task(jsonl(tmp_path, {"bbox": [-0.4, 50, 200.4, 100]})).answer == [0, 500, 1000, 1000]


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"image": "gone.png"}, "image", "no such file"),
        ({"image": None}, "image", "needs one image, not 0"),
        ({"image": ["a.png", "a.png"]}, "image", "needs one image, not 2"),
        ({"sent": "the <image> dog"}, "image", "2 <image> marks for 1 images"),
        ({"width": 100}, "width, height", "the row says 100 x 100 pixels, but the image is 200 x 100"),
        ({"bbox": [1, 2, 3]}, "bbox", "four finite numbers"),
        ({"bbox": "1,2,3,4"}, "bbox", "four finite numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox", "four finite numbers"),
        ({"bbox": [30, 2, 30, 4]}, "bbox", "no area"),
        ({"bbox": [20, 10, 100, 160]}, "bbox", "outside the image of 200 x 100"),
        ({"bbox": [200, 10, 200.3, 60]}, "bbox", "outside the image"),
        ({"bbox": None}, "conversations", "conversations must be"),
        ({"sent": ""}, "sent", "a text that is not empty"),
        ({"sent": None}, "sent", "neither sent nor conversations"),
        (chat("<image> where?", "here"), "conversations", "neither bbox nor a reply with <box>"),
        (chat("<image> where?", "<box>[1,2,3</box>"), "conversations", "is not [x1,y1,x2,y2]"),
        (chat("<image> where?", "<box>[1,2,3,1001]</box>"), "conversations", "outside the image"),
        (chat("where?", "<box>[1,2,3,4]</box>"), "image", "0 <image> marks for 1 images"),
    ],
)
def test_a_bad_row_is_refused_by_row_and_field_and_nothing_is_written(tmp_path, row, field, what):
    source = jsonl(tmp_path, {}, row)
    with pytest.raises(DataError) as raised:
        prepare_grounding(source, tmp_path / "out")
    assert str(raised.value).startswith(f"{source}, row 1 (line 2), field {field}: ")
    assert what in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_counted_and_listed(tmp_path):
    source = jsonl(tmp_path, {}, {"bbox": [1, 2, 3]}, {"sent": "the cat"}, {"image": "gone.png"})
    prepared = prepare_grounding(
        source, tmp_path / "out", split_by="row", test_fraction=0.5, reading=ReadOptions(on_bad_row="skip")
    )
    assert prepared.rows == {"train": 1, "test": 1}
    assert [problem.field for problem in prepared.problems] == ["bbox", "image"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"] == [str(problem) for problem in prepared.problems]


def test_one_picture_cannot_be_split_by_picture(tmp_path):
    with pytest.raises(DataError, match="one image cannot be split into train and test"):
        prepare_grounding(jsonl(tmp_path, {}, {}), tmp_path / "out")


def test_sources_must_be_text_so_that_no_output_is_its_own_source(tmp_path):
    prepare_grounding(SOURCE, tmp_path)
    with pytest.raises(DataError, match=r"train\.parquet: grounding data are prepared from files of text"):
        prepare_grounding(tmp_path / "train.parquet", tmp_path)
    assert (tmp_path / "train.parquet").exists()


def test_unknown_options_are_refused(tmp_path):
    for options in ({"prompt_form": "qwem"}, {"split_by": "scene"}, {"test_fraction": 1.5}):
        with pytest.raises(DataError, match=f"setting {next(iter(options))}: "):
            prepare_grounding(SOURCE, tmp_path / "out", **options)


def test_rows_that_name_no_expression_are_refused(tmp_path):
    jsonl(tmp_path, {})
    line = {
        "data_source": "x",
        "prompt": [{"role": "user", "content": "<image>"}],
        "images": ["a.png"],
        "reward_model": {"style": "rule", "ground_truth": [1, 2, 3, 4]},
    }
    (tmp_path / "s.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=r"s\.jsonl, row 0 \(line 1\), field prompt: this is no RefCOCO-style row"):
        prepare_grounding(tmp_path / "s.jsonl", tmp_path / "b")
