"""Datasets of the field, and datasets made from a model's answers, in the parquet schema."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_tasks
from video_cases import write_video

import foveate
from foveate.config.recipe import load_recipe
from foveate.config.runs import MPOSettings
from foveate.data.answers import CorrectnessRule
from foveate.data.demos import check_pair, pair_of
from foveate.data.table import open_tasks
from foveate.data.validate import ReadOptions
from foveate.datasets.filter import Limits, prepare_filter
from foveate.datasets.geo3k import INSTRUCTION, prepare_geo3k
from foveate.datasets.grounding import Buckets, HardSet, prepare_grounding, prepare_validation, take_hard, take_share
from foveate.datasets.mmpr import prepare_mmpr, prepare_mmpr_tiny
from foveate.datasets.pairs import prepare_pairs
from foveate.datasets.prepared import prepare_rows
from foveate.errors import DataError
from foveate.records import Message


@pytest.fixture
def pictures(tmp_path):
    """A folder with a.png of 40 x 20 and b.png of 20 x 40 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a", (40, 20)), ("b", (20, 40))):
        PIL.Image.new("RGB", size).save(folder / f"{name}.png")
    return folder


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# --------------------------------------------------------------------------------------------------------- grounding


def referring(pictures, count, **changed):
    rows = [{"image": str(pictures / "a.png"), "sent": f"thing {i}", "bbox": [2, 2, 20, 12]} for i in range(count)]
    return [row | {name: values[i] for name, values in changed.items()} for i, row in enumerate(rows)]


def test_the_hard_set_keeps_all_negatives_and_as_many_positives_by_bucket():
    rng = np.random.default_rng(0)
    iou = [0.1] * 40 + [0.55] * 4 + [0.5] + [0.65] * 20 + [0.75] * 20 + [0.85] * 20 + [1.0] * 20 + [0.2] * 5
    teacher = [0.9] * 125 + [0.5] * 5
    rows, counts = take_hard(iou, teacher, Buckets(), rng)
    values = np.array(iou)[rows]
    assert sorted(rows)[:40] == list(range(40))
    assert (values < 0.5).sum() == 40
    # Of 40: 15, 20, 20, 20 and the remaining 25 percent. The first bucket has 5, and no other one fills its place.
    assert np.histogram(values, [0.5, 0.6, 0.7, 0.8, 0.9, 2])[0].tolist() == [5, 8, 8, 8, 10]
    assert list(counts.values()) == [40, 5, 8, 8, 8, 10]
    assert rows != sorted(rows)


def test_the_hard_set_of_files_is_the_same_for_the_same_seed(tmp_path, pictures):
    iou = [0.1, 0.2, 0.3, 0.4, *np.linspace(0.5, 1, 16).tolist()]
    rows = referring(pictures, 20, iou_2b=iou, **{"241b_model_iou": [0.9] * 3 + [0.4] + [0.9] * 16})
    source = jsonl(tmp_path / "x.jsonl", rows)
    for name in ("one", "two"):
        made = prepare_grounding(source, tmp_path / name, hard=HardSet("iou_2b"), test_fraction=0, seed=42)
    assert made.counts["hard negatives"] == 3
    assert (tmp_path / "one" / "train.parquet").read_bytes() == (tmp_path / "two" / "train.parquet").read_bytes()
    assert manifest_of(tmp_path / "one")["hard"]["iou_key"] == "iou_2b"
    names = {task.meta["question"] for task in open_tasks(tmp_path / "one" / "train.parquet")}
    assert {"thing 0", "thing 1", "thing 2"} <= names
    assert "thing 3" not in names


def test_a_row_without_the_iou_that_is_asked_for_is_refused_by_field(tmp_path, pictures):
    source = jsonl(tmp_path / "x.jsonl", referring(pictures, 2, iou_2b=[0.3, "high"], **{"241b_model_iou": [1, 1]}))
    with pytest.raises(DataError, match=r"row 1 \(line 2\), field iou_2b: must be a number from 0 to 1, not 'high'"):
        prepare_grounding(source, tmp_path / "out", hard=HardSet("iou_2b"))


@pytest.mark.parametrize(
    ("edges", "shares", "what"),
    [
        ((0.5, 0.8), (), "one edge more than shares"),
        ((0.8, 0.5), (0.5,), "the edges must grow"),
        ((0.5, 1.0), (0.5,), "within 0..1"),
        ((0.5, 0.8), (1.5,), "add up to 0..1"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(edges, shares, what):
    with pytest.raises(DataError, match=what):
        Buckets(edges, shares)


def test_validation_takes_a_share_of_each_file_and_joins_them(tmp_path, pictures):
    names = ("refcoco_val", "refcoco+_testA", "others")
    sources = [jsonl(tmp_path / f"{name}.jsonl", referring(pictures, 25)) for name in names]
    made = prepare_validation(sources, tmp_path / "out", fraction=0.1)
    assert made.rows == {"test_refcoco_val": 2, "test_refcoco+_testA": 2, "test_others": 2, "test": 6}
    joined = list(open_tasks(tmp_path / "out" / "test.parquet"))
    assert {(task.source, task.meta["dataset"]) for task in joined} == {
        ("refcoco_val", "refcoco_val"),
        ("refcoco+_testA", "refcoco+_testA"),
        ("grounding", "others"),
    }
    assert {task.meta["split"] for task in joined} == {"test"}
    again = prepare_validation(sources, tmp_path / "again", fraction=0.1)
    assert manifest_of(again.folder)["sha256"] == manifest_of(made.folder)["sha256"]
    with pytest.raises(DataError, match="have the same name"):
        prepare_validation([sources[0], sources[0]], tmp_path / "out")


def test_a_share_is_at_least_one_row():
    assert len(take_share(3, 0.1, 42)) == 1
    assert len(take_share(39, 0.1, 42)) == 3


def test_amodal_boxes_may_pass_the_edge_and_modal_ones_are_chosen_by_field(tmp_path, pictures):
    row = {"image": str(pictures / "a.png"), "sent": "x", "bbox": [-10, 5, 50, 15], "modal_bbox": [4, 5, 20, 15]}
    source = jsonl(tmp_path / "x.jsonl", [row])
    for options, box, ask in (
        ({"prompt_form": "amodal"}, [0, 250, 1000, 750], "amodal bounding box"),
        ({"prompt_form": "qwen_amodal"}, [0, 250, 1000, 750], "Locate x amodally"),
        ({"box_field": "modal_bbox"}, [100, 250, 500, 750], "the bounding box"),
    ):
        prepare_grounding(source, tmp_path / "out", test_fraction=0, **options)
        task = open_tasks(tmp_path / "out" / "train.parquet")[0]
        assert task.answer == box
        assert ask in task.messages[0].content
    with pytest.raises(DataError, match=r"field bbox: .* lies outside the image"):
        prepare_grounding(source, tmp_path / "out")


def test_pixels_survive_the_way_to_thousandths_and_back_within_one_unit(tmp_path):
    rng = np.random.default_rng(0)
    rows, sizes = [], []
    for number in range(12):
        width, height = (int(side) for side in rng.integers(5, 2500, 2))
        PIL.Image.new("L", (width, height)).save(tmp_path / f"{number}.png")
        for _ in range(20):
            (x1, x2), (y1, y2) = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in (width, height))
            rows.append({"image": f"{number}.png", "sent": "x", "bbox": [x1, y1, x2, y2]})
            sizes.append((width, height))
    source = jsonl(tmp_path / "x.jsonl", rows)
    prepare_grounding(source, tmp_path / "out", test_fraction=0)
    table = open_tasks(tmp_path / "out" / "train.parquet")
    for task, row, (width, height) in zip(table, rows, sizes, strict=True):
        sides = np.array([width, height] * 2)
        pixels = np.array(row["bbox"])
        assert np.abs(np.array(task.answer) * sides / 1000 - pixels).max() < 1e-6
        answered = np.round(task.answer)  # as a model writes it
        assert np.abs(answered - pixels * 1000 / sides).max() <= 0.5 + 1e-6
        assert (np.abs(answered * sides / 1000 - pixels) <= np.maximum(1, sides / 1000)).all()


# ------------------------------------------------------------------------------------------------- geo3k, MMPR, own


def test_geo3k_becomes_one_file_per_split_with_the_published_prompt(tmp_path, pictures):
    data = (pictures / "a.png").read_bytes()
    for split, count in (("train", 3), ("test", 1)):
        rows = {
            "images": [[{"bytes": data, "path": None}]] * count,
            "problem": ["<image>Find x."] * count,
            "answer": ["3"] * count,
        }
        (tmp_path / "geo").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "geo" / f"{split}-00000-of-00001.parquet")
    made = prepare_geo3k(str(tmp_path / "geo"), tmp_path / "out")
    assert made.rows == {"test": 1, "train": 3}
    row = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()[2]
    assert row["prompt"] == [{"role": "user", "content": f"<image>Find x. {INSTRUCTION}"}]
    assert (row["data_source"], row["ability"]) == ("hiyouga/geometry3k", "math")
    assert row["reward_model"] == {"style": "rule", "ground_truth": "3"}
    info = row["extra_info"]
    assert (info["split"], info["index"], info["answer"], info["question"]) == ("train", 2, "3", "<image>Find x.")
    assert open_tasks(tmp_path / "out" / "test.parquet")[0].images[0].data == data


def test_geo3k_that_is_not_there_is_a_clear_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such file or folder, and no name of a dataset \(owner/name\)"):
        prepare_geo3k("/no/such/folder", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hiyouga/geometry3k: no such folder here, .* cannot be downloaded \(no conn"):
        prepare_geo3k("hiyouga/geometry3k", tmp_path)


def test_mmpr_tiny_finds_its_pictures_below_the_folder_of_its_name(tmp_path, pictures):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    pictures.rename(folder / "images")
    asked = [[{"role": "user", "content": "<image>" * n + "Why?"}] for n in (2, 0, 1)]
    images = [
        [{"path": "MMPR-Tiny/images/a.png"}, {"path": "MMPR-Tiny/images/b.png"}],
        None,
        [{"path": "images/b.png"}],
    ]
    truths = [{"style": "rule", "ground_truth": answer} for answer in ("B", "\\frac{1}{2}", "7")]
    rows = {"data_source": ["odd"] * 3, "prompt": asked, "images": images, "reward_model": truths}
    pq.write_table(pa.table(rows), folder / "mmpr_tiny.parquet")
    prepare_mmpr_tiny(folder / "mmpr_tiny.parquet", tmp_path / "out")
    table = list(open_tasks(tmp_path / "out" / "train.parquet"))
    assert [[image.width for image in task.images] for task in table] == [[40, 20], [], [20]]
    assert [task.answer for task in table] == ["B", "\\frac{1}{2}", "7"]
    assert {(task.source, task.meta["original_source"]) for task in table} == {("mmpr_tiny", "odd")}


def mmpr(tmp_path, pictures, **changed):
    """A small MMPR: 4 pairs with a picture, taken one and a half times, and 2 without one."""
    assert pictures.parent == tmp_path
    jsonl(
        tmp_path / "with.jsonl",
        [
            {"image": "a.png", "question": f"Q{i}?", "chosen": "yes", "rejected": "no", "system_prompt": "Think."}
            for i in range(4)
        ],
    )
    jsonl(tmp_path / "without.jsonl", [{"question": "T?", "chosen": "good", "rejected": "bad"}] * 2)
    meta = {
        "with": {"root": "pictures", "annotation": "with.jsonl", "repeat_time": 1.5, "data_augment": False},
        "without": {"root": "pictures", "annotation": "without.jsonl"},
    }
    meta["with"] |= changed
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "meta.json"


def test_mmpr_becomes_pairs_with_pictures_in_front_and_repetitions(tmp_path, pictures):
    made = prepare_mmpr(mmpr(tmp_path, pictures), tmp_path / "out", seed=1)
    assert made.rows == {"pairs": 8}
    assert made.counts == {"with": 6, "without": 2, "ids that got a number": 2}
    tasks = list(read_tasks(tmp_path / "out" / "pairs.parquet", check=check_pair)[0])
    assert tasks[0].messages == (Message("system", "Think."), Message("user", "<image>\nQ0?"))
    assert tasks[-1].messages == (Message("user", "T?"),)
    assert (tasks[0].source, tasks[0].answer, len(tasks[0].images)) == ("mmpr/with", None, 1)
    pair = pair_of(tasks[-1])
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    prepare_mmpr(tmp_path / "meta.json", tmp_path / "again", seed=1)
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == (tmp_path / "again" / "pairs.parquet").read_bytes()


def test_the_recipes_for_mpo_read_the_file_that_prepare_mmpr_writes(tmp_path, pictures):
    [written] = prepare_mmpr(mmpr(tmp_path, pictures), tmp_path / "data" / "mmpr").rows
    recipes = sorted((Path(foveate.__file__).parent / "recipes").glob("internvl*_mpo.yaml"))
    assert len(recipes) == 8
    for recipe in recipes:
        [train] = load_recipe(recipe, [], MPOSettings).data.train
        assert train == f"data/mmpr/{written}.parquet"


@pytest.mark.parametrize("image", ["", None, []])
def test_an_mmpr_pair_with_an_empty_image_is_text(tmp_path, pictures, image):
    meta = mmpr(tmp_path, pictures)
    jsonl(tmp_path / "without.jsonl", [{"image": image, "question": "T?", "chosen": "good", "rejected": "bad"}])
    prepare_mmpr(meta, tmp_path / "out")
    last = list(open_tasks(tmp_path / "out" / "pairs.parquet"))[-1]
    assert (last.messages, last.images) == ((Message("user", "T?"),), ())


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"video": "v.mp4", "question": "<video>\nWhat?"}, r"field videos \(column video\): no such file: v.mp4"),
        ({"videos": ["v.mp4", "w.mp4"], "question": "What?"}, "no such file: v.mp4"),
        ({"video_path": "v.mp4", "question": "What?"}, "field video_path: looks like videos"),
        ({"question": "<video>\nWhat?"}, "<video> marks"),
        ({"pictures_of_it": ["a.png"], "question": "What?"}, "field pictures_of_it: looks like images"),
    ],
)
def test_a_video_or_another_field_of_an_mmpr_pair_is_told(tmp_path, pictures, row, what):
    meta = mmpr(tmp_path, pictures)
    jsonl(tmp_path / "without.jsonl", [{**row, "chosen": "good", "rejected": "bad"}])
    with pytest.raises(DataError, match=what):
        prepare_mmpr(meta, tmp_path / "out")


def test_ids_of_pairs_that_are_repeated_are_unique(tmp_path, pictures):
    prepare_mmpr(mmpr(tmp_path, pictures, repeat_time=3), tmp_path / "out")
    ids = [task.id for task in open_tasks(tmp_path / "out" / "pairs.parquet")]
    assert len(set(ids)) == len(ids) == 14


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"annotation": "gone.jsonl"}, "with, field annotation: nothing at"),
        ({"root": None}, "with, field root: is None; must be a path"),
        ({"repeat_time": "twice"}, "with, field repeat_time: is 'twice'"),
        ({"annotation": "one.jsonl", "repeat_time": 0.5}, "no pair is left of any entry; raise repeat_time"),
    ],
)
def test_a_wrong_meta_json_is_refused_by_entry_and_field(tmp_path, pictures, changed, what):
    meta = mmpr(tmp_path, pictures, **changed)
    if "one.jsonl" in changed.values():
        jsonl(tmp_path / "one.jsonl", [{"question": "T?", "chosen": "good", "rejected": "bad"}])
        meta.write_text(json.dumps({"with": json.loads(meta.read_text())["with"]}))
    with pytest.raises(DataError, match=rf"meta\.json[,:] {what}"):
        prepare_mmpr(meta, tmp_path / "out")


def test_a_pair_of_equal_or_empty_answers_is_refused_by_field(tmp_path, pictures):
    meta = mmpr(tmp_path, pictures)
    jsonl(tmp_path / "without.jsonl", [{"question": "T?", "chosen": "good", "rejected": "good"}])
    with pytest.raises(DataError, match=r"row 0 \(line 1\), field extra_info\.rejected: is the chosen answer"):
        prepare_mmpr(meta, tmp_path / "out")
    jsonl(tmp_path / "without.jsonl", [{"question": "T?", "chosen": " ", "rejected": "good"}])
    with pytest.raises(DataError, match=r"field extra_info\.chosen: is ' '; a preference pair needs both"):
        prepare_mmpr(meta, tmp_path / "out")


def test_own_rows_are_prepared_with_a_share_held_out(tmp_path, pictures):
    rows = [{"q": f"Q{i}?", "img": "a.png", "a": i, "level": i / 10} for i in range(10)]
    source = jsonl(tmp_path / "x.jsonl", rows)
    columns = {"prompt": "q", "images": "img", "answer": "a", "difficulty": "level"}
    reading = ReadOptions(image_root=pictures, columns=columns)
    made = prepare_rows([source], tmp_path / "out", test_fraction=0.3, seed=2, reading=reading)
    assert made.rows == {"train": 7, "test": 3}
    tasks = [task for name in ("train", "test") for task in open_tasks(tmp_path / "out" / f"{name}.parquet")]
    assert sorted(task.answer for task in tasks) == list(range(10))
    assert tasks[0].meta["difficulty"] == tasks[0].answer / 10
    assert manifest_of(tmp_path / "out")["columns"] == columns


def test_videos_are_prepared_by_path_or_embedded_where_they_were(tmp_path, pictures):
    pytest.importorskip("av", reason="needs foveate[video]")
    clip = write_video(tmp_path / "clip.mp4", 12)
    embedded = {"question": "<video>When?", "videos": [{"bytes": clip.read_bytes()}], "answer": "1", "id": "b"}
    pq.write_table(pa.Table.from_pylist([embedded]), tmp_path / "b.parquet")
    rows = [
        {"question": "<video>When?", "videos": ["clip.mp4"], "answer": "2", "id": "a"},
        {"question": "<image>What?", "images": [str(pictures / "a.png")], "answer": "3", "id": "c"},
    ]
    sources = [jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b.parquet"]
    made = prepare_rows(sources, tmp_path / "out")
    assert made.rows == {"train": 3}
    by_path, image, inside = open_tasks(tmp_path / "out" / "train.parquet")
    assert ([video.path for video in by_path.videos], by_path.videos[0].frames) == ([clip], 12)
    assert (len(image.images), image.videos) == (1, ())
    assert [video.data for video in inside.videos] == [clip.read_bytes()]

    asked = jsonl(tmp_path / "asked.jsonl", [scored("b", [answered("1", 1.0), answered("2", 0.0)])])
    prepare_pairs([tmp_path / "b.parquet"], tmp_path / "pairs", rollouts=[asked])
    [pair] = open_tasks(tmp_path / "pairs" / "pairs.parquet")
    assert (pair_of(pair).chosen, pair.videos[0].data) == ("1", clip.read_bytes())


def test_answers_of_different_types_are_refused(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"q": "?", "a": 1}, {"q": "?", "a": "one"}])
    reading = ReadOptions(columns={"prompt": "q", "answer": "a", "level": "l"})
    with pytest.raises(DataError, match=r"rows 0\.\.1, field reward_model\.ground_truth: values of different types"):
        prepare_rows([source], tmp_path / "out", reading=reading)
    jsonl(source, [{"q": "?", "a": 1, "l": 1}, {"q": "?", "a": 2, "l": 10**30}])
    with pytest.raises(DataError, match=r"field extra_info\.level: a whole number of more than 64 bits"):
        prepare_rows([source], tmp_path / "out", reading=reading)
    jsonl(source, [{"q": "?", "a": 1, "l": {"of": {}}}])
    with pytest.raises(DataError, match=r"field extra_info\.level\.of: is an empty mapping in every row"):
        prepare_rows([source], tmp_path / "out", reading=reading)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_somebody_else_s_manifest_is_not_touched(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"q": "?", "a": 1}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(DataError, match="not a manifest of foveate"):
        prepare_rows([source], tmp_path / "out", reading=ReadOptions(columns={"prompt": "q", "answer": "a"}))


def test_a_source_is_never_replaced_by_what_is_made_from_it(tmp_path, sums):
    made = prepare_rows([sums], tmp_path / "out")
    before = (made.folder / "train.parquet").read_bytes()
    for name in ("train", "other"):  # replaced by its name, or removed as what an earlier preparation left
        with pytest.raises(DataError, match=r"train\.parquet: is read, and would be replaced; write to another folder"):
            prepare_filter([made.folder / "train.parquet"], made.folder, Limits(), name=name)
    assert (made.folder / "train.parquet").read_bytes() == before
    assert manifest_of(made.folder)["rows"] == {"train": 5}


# -------------------------------------------------------------------------------------------------- filter and pairs


def answered(text, score, finish="stop", note="", **parts):
    return {"text": text, "tokens": 3, "score": score, "parts": parts, "finish": finish, "note": note}


def scored(row_id, answers):
    """A row of rollouts or predictions."""
    prompt = [{"role": "user", "content": "1 + 1?"}]
    row = {"id": row_id, "source": "sums", "where": "", "question": "1 + 1?", "prompt": prompt, "images": []}
    return row | {"ground_truth": "2", "answers": answers}


@pytest.fixture
def sums(tmp_path):
    """Five rows of text, s0 .. s4."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": "1 + 1?" + " please" * i}],
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"id": f"s{i}"},
        }
        for i in range(5)
    ]
    return jsonl(tmp_path / "sums.jsonl", rows)


@pytest.fixture
def rollouts(tmp_path):
    """Answers to s0 (none right), s1 (1 of 4), s2 (3 of 4, in two steps) and s3 (all right)."""
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    right, wrong = answered("two", 0.9, accuracy=1.0), answered("three", 0.1, accuracy=0.0)
    steps = {
        "step_000001": {"s0": [wrong] * 4, "s1": [right, wrong, wrong, wrong], "s2": [right, right]},
        "step_000002": {"s2": [right, wrong], "s3": [right] * 2, "s9": [right]},
    }
    for step, rows in steps.items():
        jsonl(folder / f"{step}.jsonl", [scored(key, answers) for key, answers in rows.items()])
    return tmp_path / "run"


def test_rows_are_kept_by_the_share_of_right_answers_over_all_steps(tmp_path, sums, rollouts):
    made = prepare_filter([sums], tmp_path / "out", Limits(accuracy=(0.2, 0.8)), rollouts=[rollouts])
    kept = {
        task.id: (task.meta["accuracy"], task.meta["answers"]) for task in open_tasks(made.folder / "train.parquet")
    }
    assert kept == {"s1": (0.25, 4), "s2": (0.75, 4)}
    assert made.counts == {"rows read": 5, "without enough answers": 1, "too hard": 1, "too easy": 1}
    assert len(manifest_of(made.folder)["rollouts"]) == 2


def test_what_is_right_may_be_the_score_or_a_part_of_it(tmp_path, sums, rollouts):
    lax = CorrectnessRule(part="accuracy", threshold=0.0)
    with pytest.raises(DataError, match="no row is within the limits"):
        prepare_filter([sums], tmp_path / "out", Limits(accuracy=(0, 0.8)), rollouts=[rollouts], correctness_rule=lax)
    with pytest.raises(DataError, match="an answer has no part 'iou'; it has accuracy"):
        prepare_filter(
            [sums],
            tmp_path / "out",
            Limits(accuracy=(0, 1)),
            rollouts=[rollouts],
            correctness_rule=CorrectnessRule("iou"),
        )


def test_predictions_of_an_evaluation_count_too_by_their_sampled_answers(tmp_path, sums):
    greedy, drawn = (
        answered("x", 0.0, hit=0.0) | {"greedy": True},
        [answered("x", hit / 2, hit=hit) for hit in (1.0, 0.0)],
    )
    rows = [scored(f"s{i}", [greedy, *drawn] if i < 2 else [greedy]) for i in range(5)]
    file = jsonl(tmp_path / "step_000000.jsonl", rows)
    made = prepare_filter([sums], tmp_path / "out", Limits(accuracy=(0.5, 0.5)), rollouts=[file])
    assert [task.id for task in open_tasks(made.folder / "train.parquet")] == ["s0", "s1"]


def test_rows_are_kept_by_prompt_length_and_by_the_size_of_pictures(tmp_path, pictures, sums, encode):
    lengths = [encode.length(task) for task in open_tasks(sums)]
    limits = Limits(prompt_tokens=lengths[2])
    made = prepare_filter([sums], tmp_path / "out", limits, length=encode.length)
    assert made.rows == {"train": 3}
    assert made.counts["prompt too long"] == 2
    both = referring(pictures, 2, image=[str(pictures / "a.png"), str(pictures / "b.png")])
    PIL.Image.new("RGB", (60, 30)).save(pictures / "b.png")
    source = jsonl(tmp_path / "x.jsonl", both)
    for limits, kept in ((Limits(short_side=25), "thing 1"), (Limits(long_side=50), "thing 0")):
        made = prepare_filter([source], tmp_path / "out", limits)
        assert [task.meta["question"] for task in open_tasks(made.folder / "train.parquet")] == [kept]


def test_limits_that_nothing_can_measure_are_refused(tmp_path, sums):
    with pytest.raises(DataError, match="needs the rollouts of a model"):
        prepare_filter([sums], tmp_path / "out", Limits(accuracy=(0.2, 0.8)))
    with pytest.raises(DataError, match="needs a model folder"):
        prepare_filter([sums], tmp_path / "out", Limits(prompt_tokens=10))
    with pytest.raises(DataError, match=r"setting name: '\.\./x' is no name of a file"):
        prepare_filter([sums], tmp_path / "out", Limits(), name="../x")
    with pytest.raises(DataError, match="two growing numbers"):
        Limits(accuracy=(0.8, 0.2))


def test_rollouts_that_are_none_are_refused_by_line(tmp_path, sums):
    file = jsonl(tmp_path / "step_000001.jsonl", [{"id": "s0"}])
    with pytest.raises(DataError, match=r"step_000001\.jsonl, row 1, field source: no ScoredRow of this version"):
        prepare_filter([sums], tmp_path / "out", Limits(accuracy=(0, 1)), rollouts=[file])
    with pytest.raises(DataError, match="no rollouts there"):
        prepare_filter([sums], tmp_path / "out", Limits(accuracy=(0, 1)), rollouts=[tmp_path / "pictures", tmp_path])


def test_ids_that_stand_for_two_rows_are_refused(tmp_path, sums, rollouts):
    with pytest.raises(DataError, match="the id 's0' is also that of"):
        prepare_filter([sums, sums], tmp_path / "out", Limits(accuracy=(0, 1)), rollouts=[rollouts])


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        ((1.0, 1.0), "s0", "nearly all are right; take harder prompts, .* answers right: 1, all answers wrong: 0"),
        ((0.0, 0.0), "s0", "nearly all are wrong; take a better start, .* answers right: 0, all answers wrong: 1"),
        ((1.0, 0.0), "x0", "the answers belong to other rows; .*without answers: 5"),
    ],
)
def test_a_model_without_pairs_is_told_why_and_what_to_change(tmp_path, sums, scores, ids, message):
    given = [answered(f"say {i}", score) for i, score in enumerate(scores)]
    (tmp_path / "r").mkdir()
    jsonl(tmp_path / "r" / "step_000001.jsonl", [scored(ids, given)])
    with pytest.raises(DataError, match=message):
        prepare_pairs([sums], tmp_path / "out", rollouts=[tmp_path / "r"])
    assert not (tmp_path / "out").exists()


def test_right_answers_that_were_all_cut_make_no_pairs_and_that_is_said(tmp_path, sums):
    given = [answered("endless", 1.0, finish="length"), answered("no", 0.0)]
    file = jsonl(tmp_path / "step_000001.jsonl", [scored("s0", given)])
    with pytest.raises(DataError, match=r"reached the token limit .* raise rollout\.max_tokens .*answers truncated: 1"):
        prepare_pairs([sums], tmp_path / "out", rollouts=[file])


def test_pairs_are_right_against_wrong_answers_at_most_k_per_prompt(tmp_path, sums):
    many = [answered(f"right {i}", 1.0) for i in range(5)] + [answered(f"wrong {i}", 0.0) for i in range(5)]
    odd = [
        answered("cut", 1.0, finish="length"),
        answered("no", 0.0),
        answered("no", 0.0),
        answered("?", 0.0, note="grader failed: X"),
    ]
    (tmp_path / "r").mkdir()
    jsonl(tmp_path / "r" / "step_000001.jsonl", [scored("s0", many), scored("s1", odd)])
    for name in ("one", "two"):
        made = prepare_pairs([sums], tmp_path / name, rollouts=[tmp_path / "r"], max_per_prompt=4, seed=3)
    assert made.counts == {
        "prompts": 5,
        "prompts with a right and a wrong answer": 1,
        "all answers right": 0,
        "all answers wrong": 0,
        "all right answers truncated": 1,
        "without answers": 3,
    }
    pairs = [pair_of(task) for task in read_tasks(tmp_path / "one" / "pairs.parquet", check=check_pair)[0]]
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == 4
    assert all(pair.chosen.startswith("right") and pair.rejected.startswith("wrong") for pair in pairs)
    assert [pair.task.id for pair in pairs] == ["s0-0", "s0-1", "s0-2", "s0-3"]
    assert (tmp_path / "one" / "pairs.parquet").read_bytes() == (tmp_path / "two" / "pairs.parquet").read_bytes()
