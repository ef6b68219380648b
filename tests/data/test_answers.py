"""Rows of answers on disk: written and read alike by all who need them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_run import a_row, an_answer
from PIL import Image

from foveate.data.answers import (
    GeneratedAnswer,
    GeneratedRow,
    ScoredAnswer,
    ScoredRow,
    answers_by_id,
    prompt_fields,
    read_answers,
    row_line,
    score_fields,
    write_answers,
)
from foveate.environments import observation
from foveate.errors import DataError
from foveate.records import Message, Score, Task
from foveate.rewards.build import FAILED
from foveate.rewards.text import question


def a_generated_row(task: Task, text: str = "yes", index: int = 0) -> GeneratedRow:
    answers = (GeneratedAnswer(text, "stop", 2, (("y", -0.5), ("es", -0.25))), GeneratedAnswer("", "length", None))
    cost = {"prompt_tokens": None, "answer_tokens": 4, "seconds": 0.5, "tries": 1, "server": "here"}
    return GeneratedRow(**prompt_fields(task), answers=answers, index=index, **cost)


def test_rows_are_read_as_they_were_written(tmp_path, make_task, make_image):
    generated = a_generated_row(make_task("<image>\nwhat?", make_image(30, 20, 1)))
    scored = a_row(tags={"relation": "left"}, sampled=(an_answer("x", 0.5, 0.4, False, rank=-1.5, advantage=-0.1),))
    for row in (generated, scored):
        write_answers(tmp_path / "rows.jsonl", [row, row])
        assert list(read_answers(tmp_path / "rows.jsonl", type(row))) == [row, row]


def test_fields_at_their_default_take_no_room():
    [greedy] = json.loads(row_line(a_row(box=None)))["answers"]
    assert set(greedy) == {"text", "finish", "tokens", "score", "parts", "note", "greedy"}


def test_a_prompt_is_described_with_any_ground_truth(make_task):
    task = make_task("what?")
    for truth, expected in ((np.array([1, 2]), [1, 2]), ({"a": np.float64(0.5)}, {"a": 0.5}), (Path("x"), "x")):
        fields = prompt_fields(Task("id", "s", (Message("system", "be brief"),), (), truth, {}, "file, row 3"))
        assert (fields["ground_truth"], fields["where"], fields["question"]) == (expected, "file, row 3", "")
    assert prompt_fields(task)["prompt"] == tuple({"role": m.role, "content": m.content} for m in task.messages)
    assert score_fields(Score(1, {"hit": True}, "n")) == {"score": 1.0, "parts": {"hit": 1.0}, "note": "n"}


def test_half_of_a_surrogate_pair_does_not_break_a_file(tmp_path, make_task):
    write_answers(tmp_path / "rows.jsonl", [a_generated_row(make_task("?"), "a\ud83d")])
    [row] = read_answers(tmp_path / "rows.jsonl", GeneratedRow)
    assert row.answers[0].text == "a?"


def test_a_torn_last_line_is_left_out_only_of_a_file_that_grows(tmp_path, make_task):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row_line(a_generated_row(make_task("?"))) + b'{"id": ')
    assert len(list(read_answers(path, GeneratedRow, appending=True))) == 1
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: no GeneratedRow of this version"):
        list(read_answers(path, GeneratedRow))


def test_answers_that_are_not_graded_are_no_scored_answers(tmp_path, make_task):
    write_answers(tmp_path / "step_000001.jsonl", [a_generated_row(make_task("?"))])
    with pytest.raises(DataError, match=r"row 1, field answers\.0\.score: no ScoredRow"):
        answers_by_id([tmp_path])


def test_sampled_answers_count_before_the_greedy_one_and_failed_ones_never(tmp_path):
    failed = ScoredAnswer("?", "stop", 1, score=None, parts={}, note=f"{FAILED}: X")
    write_answers(
        tmp_path / "step_000001.jsonl",
        [a_row("a", sampled=(an_answer("drawn", 0.5), failed)), a_row("b", text="greedy")],
    )
    found = answers_by_id([tmp_path])
    assert {key: [one.text for one in answers] for key, answers in found.items()} == {"a": ["drawn"], "b": ["greedy"]}


def test_a_word_image_is_written_as_the_word_that_it_is(tmp_path):
    words = observation("user", "what is <image>?", Image.new("RGB", (4, 4)))
    task = Task("id", "s", (Message("user", words.content),), words.images, "1", {}, "file, row 3")
    fields = prompt_fields(task)
    assert fields["prompt"][0]["content"] == fields["question"] == "<image>\nwhat is <image>?"
    assert question(task) == "what is <image>?"
    write_answers(tmp_path / "a.jsonl", [ScoredRow(**fields, answers=())])
    assert "\ufdd0" not in (tmp_path / "a.jsonl").read_text()
