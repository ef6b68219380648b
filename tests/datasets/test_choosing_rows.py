"""Rows chosen and changed by what a model answered: pass@N less pass@1, and hints; Vero's rows; drawn mixtures."""

from __future__ import annotations

import io
import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.data.overlap import EvaluationSet, overlaps
from foveate.data.table import open_tasks
from foveate.datasets.filter import Limits, gap_of, prepare_filter
from foveate.datasets.hints import HintRule, prepare_hints
from foveate.datasets.mixed import MIXED_SOURCES, REWARD_OF_SOURCE, mixed_rows, prepare_mixed
from foveate.datasets.vero import prepare_vero
from foveate.errors import DataError
from foveate.rewards.build import build_reward, truth_check


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def asked(i, **extra):
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"{i} + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"id": f"s{i}", **extra},
    }


@pytest.fixture
def rollouts(tmp_path):
    """Answers to s0 (0 of 4 right), s1 (1 of 4), s2 (3 of 4) and s3 (all)."""
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    rows = []
    for key, right in enumerate((0, 1, 3, 4)):
        answers = [
            {"text": "a", "tokens": 1, "score": float(i < right), "parts": {}, "finish": "stop", "note": ""}
            for i in range(4)
        ]
        prompt = [{"role": "user", "content": "?"}]
        row = {"id": f"s{key}", "source": "sums", "where": "", "question": "?", "prompt": prompt, "images": []}
        rows.append(row | {"ground_truth": "2", "answers": answers})
    jsonl(folder / "step_000001.jsonl", rows)
    return tmp_path / "run"


def ids(path):
    return [task.id for task in open_tasks(path)]


def test_rows_are_kept_by_what_there_is_to_gain_by_the_best_of_n(tmp_path, rollouts):
    assert [gap_of(accuracy) for accuracy in (0, 0.25, 0.75, 1)] == [0.0, 0.75, 0.25, 0.0]
    rows = jsonl(tmp_path / "rows.jsonl", [asked(i) for i in range(5)])
    made = prepare_filter([rows], tmp_path / "out", Limits(gap=(0.2, 1.0)), rollouts=[rollouts])
    assert ids(made.folder / "train.parquet") == ["s1", "s2"]
    assert made.counts["too small a gap"] == 2
    both = Limits(gap=(0.2, 1.0), accuracy=(0.5, 1.0))
    assert ids(prepare_filter([rows], tmp_path / "both", both, rollouts=[rollouts]).folder / "train.parquet") == ["s2"]
    with pytest.raises(DataError, match="a limit on accuracy or gap needs the rollouts"):
        prepare_filter([rows], tmp_path / "out", Limits(gap=(0.2, 1.0)))


def test_rows_that_are_never_solved_get_their_hint_and_no_others(tmp_path, rollouts):
    rows = jsonl(tmp_path / "rows.jsonl", [asked(i, hint=f" add {i} ") for i in range(5)])
    made = prepare_hints([rows], tmp_path / "out", HintRule(), rollouts=[rollouts])
    table = list(open_tasks(made.folder / "train.parquet"))
    assert [task.messages[-1].content for task in table[:2]] == ["0 + 1?\nHint: add 0", "1 + 1?"]
    assert [task.meta["hinted"] for task in table] == [1, 0, 0, 0, 0]
    assert made.counts == {"rows with a hint": 1, "unsolved rows without a hint": 0}
    easier = prepare_hints([rows], tmp_path / "more", HintRule(at_most=0.5, form="({hint})"), rollouts=[rollouts])
    assert [task.meta["hinted"] for task in open_tasks(easier.folder / "train.parquet")] == [1, 1, 0, 0, 0]


def test_a_mark_of_an_image_in_a_hint_is_a_word(tmp_path, rollouts):
    rows = jsonl(tmp_path / "rows.jsonl", [asked(i, hint="see <image>") for i in range(5)])
    made = prepare_hints([rows], tmp_path / "out", HintRule(), rollouts=[rollouts])
    assert next(iter(open_tasks(made.folder / "train.parquet"))).messages[-1].content == "0 + 1?\nHint: see image"


def test_a_hint_that_nowhere_stands_is_told(tmp_path, rollouts):
    rows = jsonl(tmp_path / "rows.jsonl", [asked(i) for i in range(5)])
    with pytest.raises(DataError, match=r"no hint in extra_info\.clue of 1 rows that are never solved"):
        prepare_hints([rows], tmp_path / "out", HintRule("clue"), rollouts=[rollouts])
    with pytest.raises(DataError, match=r"must contain \{hint\}"):
        HintRule(form="Hint")


def test_rows_that_the_rollouts_do_not_name_are_told_with_both_ids(tmp_path, rollouts):
    rows = jsonl(tmp_path / "others.jsonl", [{"question": "1 + 1?", "answer": "2", "hint": "two"}])
    said = "no row has an answer in the rollouts; both name rows by id, here such as others-0, there s"
    with pytest.raises(DataError, match=said):
        prepare_hints([rows], tmp_path / "out", HintRule(), rollouts=[rollouts])
    with pytest.raises(DataError, match=said):
        prepare_filter([rows], tmp_path / "out", Limits(gap=(0.2, 1.0)), rollouts=[rollouts])


# ---------------------------------------------------------------------------------------------------------------- Vero


def png(seed=0, size=(40, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def vero_row(kind, truth, domain, **extra):
    return {
        "id": f"{kind}-1",
        "data_source": "tallyqa",
        "image": {"bytes": png(), "path": None},
        "prompt": [{"role": "user", "content": "How many?"}],
        "ability": domain,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"reward_type": kind, "tolerance": None, "question": "How many?", "answer": truth, **extra},
    }


def test_vero_rows_become_tasks_of_its_reward_by_domain(tmp_path):
    folder = tmp_path / "vero" / "tallyqa"
    folder.mkdir(parents=True)
    rows = [
        vero_row("counting", "7", "counting_grounding_search"),
        vero_row("grounding", '[{"bbox_2d": [10, 5, 30, 15], "label": "cat"}]', "counting_grounding_search"),
        vero_row("numeric", "3.5", "stem", tolerance=0.05),
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "val-00000-of-00001.parquet")
    made = prepare_vero(str(tmp_path / "vero"), tmp_path / "out")
    assert made.rows == {"train": 3, "validation": 1}
    tasks = list(open_tasks(tmp_path / "out" / "train.parquet"))
    assert [task.source for task in tasks] == ["counting_grounding_search"] * 2 + ["stem"]
    assert tasks[0].messages[0].content.startswith("<image>")
    assert tasks[0].meta["dataset"] == "tallyqa"
    assert json.loads(tasks[1].answer) == [[250, 250, 750, 750]]
    assert tasks[2].meta["tolerance"] == 0.05
    check, reward = truth_check("vero", {}), build_reward("vero", {})
    assert [check(task) for task in tasks] == [[], [], []]
    said = "<think>so</think><answer>{}</answer>"
    answers = ["\\boxed{7}", "[250, 250, 750, 750]", "\\boxed{3.6}"]
    assert [reward(said.format(a), task).value for a, task in zip(answers, tasks, strict=True)] == [1.0, 1.0, 1.0]


def test_vero_rows_of_another_form_are_told(tmp_path):
    pq.write_table(pa.Table.from_pylist([vero_row("numerik", "7", "stem")]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="'numerik' is no type of Vero's rows"):
        prepare_vero(str(tmp_path / "train.parquet"), tmp_path / "out")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match=r"column prompt, .* is missing; Vero's rows have image"):
        prepare_vero(str(tmp_path / "odd.parquet"), tmp_path / "out")
    pq.write_table(pa.Table.from_pylist([vero_row("counting", "7", "stem") | {"image": None}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"field image: is missing; every row of Vero has one"):
        prepare_vero(str(tmp_path / "a.parquet"), tmp_path / "out")


def test_vero_rows_may_come_from_its_own_script_and_in_all_forms_of_prompts(tmp_path):
    (tmp_path / "one.png").write_bytes(png())
    prompts = [
        [{"role": "user", "content": "How many?"}],
        {"role": ["user"], "content": ["<image>\nHow many?"]},
        [{"role": "user", "content": [{"type": "image", "image": "one.png"}, {"type": "text", "text": "\nHow many?"}]}],
        [{"role": "user", "content": ""}],
    ]
    boxes = '[{"bbox_2d": [-1, 5, 41, 15]}]'
    rows = [vero_row("grounding", boxes, "stem", tolerance="0.05") | {"prompt": prompt} for prompt in prompts]
    for row in rows:
        row["images"] = ["one.png"]
        del row["image"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_vero(str(tmp_path / "train.jsonl"), tmp_path / "out")
    tasks = list(open_tasks(tmp_path / "out" / "train.parquet"))
    assert {task.messages[0].content for task in tasks} == {"<image>\nHow many?"}
    assert [len(task.images) for task in tasks] == [1, 1, 1, 1]
    assert {json.dumps(json.loads(task.answer)) for task in tasks} == {"[[0.0, 250.0, 1000.0, 750.0]]"}
    assert {task.meta["tolerance"] for task in tasks} == {0.05}
    assert truth_check("vero", {})(tasks[0]) == []


# --------------------------------------------------------------------------------------------------------------- drawn


def test_demonstrations_of_all_six_sources_are_right_by_their_reward(tmp_path):
    prepare_mixed(tmp_path, {"train": 60, "test": 12}, side=64)
    for task in open_tasks(tmp_path / "train.parquet"):
        settings = {"extraction": "text"} if task.source == "choose" else {}
        name = REWARD_OF_SOURCE[task.source]
        check = truth_check(name)
        assert check is not None
        assert check(task) == []
        score = build_reward(name, settings)(str(task.meta["response"]), task)
        assert score.value == 1.0, (task.source, task.messages, task.answer, task.meta["response"])


def test_a_share_of_demonstrations_is_careless():
    flawed = {row["extra_info"]["id"]: row["extra_info"]["response"] for row in mixed_rows(0, "train", 120, 56, 0.5)}
    right = {row["extra_info"]["id"]: row["extra_info"]["response"] for row in mixed_rows(0, "train", 120, 56)}
    differ = [name.split("-")[1] for name in right if right[name] != flawed[name]]
    assert 40 <= len(differ) <= 80
    assert set(differ) == {*MIXED_SOURCES}


def test_a_mixture_has_its_sources_in_turn_and_no_scene_twice():
    train, test = ([*mixed_rows(1, split, 90, 56)] for split in ("train", "test"))
    assert [row["data_source"] for row in train[:6]] == [*MIXED_SOURCES]
    known = [row["extra_info"]["id"].rpartition("-")[2] for row in (*train, *test)]
    assert len(set(known)) == 180
    assert [*mixed_rows(1, "train", 90, 56)] == train


# ------------------------------------------------------------------------------------------------------------- overlap


def rows_with(tmp_path, name, pairs):
    rows = []
    for i, (data, question) in enumerate(pairs):
        (tmp_path / f"{name}{i}.png").write_bytes(data)
        row = {"data_source": "x", "prompt": [{"role": "user", "content": f"<image>\n{question}"}]}
        rows.append({**row, "images": [f"{name}{i}.png"], "reward_model": {"style": "rule", "ground_truth": "1"}})
    return jsonl(tmp_path / f"{name}.jsonl", rows)


def other_format(data):
    buffer = io.BytesIO()
    PIL.Image.open(io.BytesIO(data)).save(buffer, "BMP")
    return buffer.getvalue()


def test_training_rows_in_an_evaluation_set_are_found_by_pixels_and_words(tmp_path):
    questions = ["How many cats are there?", "What is it?", "Where is the red door?", "Which one of these is it?"]
    held = rows_with(tmp_path, "held", [(png(i), question) for i, question in enumerate(questions)])
    train = rows_with(
        tmp_path,
        "train",
        [
            (other_format(png(0)), "how MANY cats, are there"),  # both
            (png(1), "What is it?"),  # the image; the question is too short to say something
            (png(9), "Where is the red door"),  # the question
            (png(8), "What is it?"),
        ],
    )
    found = overlaps(open_tasks([train]), EvaluationSet.of(open_tasks([held])))
    assert [one.shared for one in found] == ["image and question", "image", "question"]
    result = CliRunner().invoke(app, ["data", "overlap", str(train), "--against", str(held)])
    assert result.exit_code != 0
    assert "3 of 4 rows stand in" in str(result.output) + str(result.exception)
