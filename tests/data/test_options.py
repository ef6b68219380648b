"""Options beside a question: whatever form they have, the model is shown them, once."""

from __future__ import annotations

import json

import pytest

from foveate.data.options import options_of, shows
from foveate.data.table import open_tasks
from foveate.rewards.choices import options

LISTED = "Which?\nA. cat\nB. dog"
FORMS = {
    "list": {"choices": ["cat", "dog"]},
    "list with a null": {"choices": ["cat", "dog", None]},
    "upper case": {"Options": ["cat", "dog"]},
    "list as text": {"options": "['cat', 'dog']"},
    "mapping": {"options": {"A": "cat", "B": "dog"}},
    "mapping with nulls": {"options": {"A": "cat", "B": "dog", "C": None}},
    "mapping with marks": {"options": {"(A)": "cat", "b.": "dog"}},
    "mapping as text": {"choices": '{"A": "cat", "B": "dog"}'},
    "mapping as Python": {"choices": "{'A': 'cat', 'B': 'dog'}"},
    "two lists": {"choices": {"label": ["A", "B"], "text": ["cat", "dog"]}},
    "labels and texts": {"choices": [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}]},
    "keys and values": {"options": [{"key": "A", "value": "cat"}, {"key": "B", "value": "dog"}]},
    "texts alone": {"options": [{"text": "cat"}, {"text": "dog"}]},
    "marked lines": {"options": "A. cat\nB. dog"},
    "marked in a line": {"options": "(A) cat (B) dog"},
    "lines": {"choices": "cat\ndog"},
    "letters": {"A": "cat", "B": "dog"},
    "columns": {"option_A": "cat", "option_B": "dog", "option_C": None},
    "columns in small letters": {"choice_a": "cat", "choice_b": "dog"},
}


def task_of(folder, row):
    (folder / "x.jsonl").write_text(json.dumps(row))
    return open_tasks(folder / "x.jsonl")[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", ["question", "prompt", "problem", "messages", "conversations", "parts"])
def test_options_of_every_form_are_shown_under_every_form_of_a_question(tmp_path, form, question):
    asked = {
        "messages": {"messages": [{"role": "user", "content": "Which?"}]},
        "conversations": {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "B"}]},
        "parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]},
    }.get(question, {question: "Which?"})
    task = task_of(tmp_path, {**asked, "answer": "B", **FORMS[form]})
    assert task.messages[-1].content == LISTED
    found = options(task)
    assert dict(list(found.items())[:2]) == {"A": "cat", "B": "dog"}


def test_options_that_only_occur_in_the_question_are_listed_all_the_same(tmp_path):
    task = task_of(tmp_path, {"question": "Is there a cat or a dog?", "answer": "B", "options": ["cat", "dog"]})
    assert task.messages[0].content == "Is there a cat or a dog?\nA. cat\nB. dog"


@pytest.mark.parametrize(
    "question",
    [
        "Which?\nA. cat\nB. dog", "Which? (A) cat (B) dog", "Which? A: Cat, B: Dog", "Which?\n**A.** cat\n**B.** dog",
        "Which?\nA) a cat\nB) a dog", "Which?\na) cat\nb) dog",
    ],
)  # fmt: skip
def test_options_with_marks_in_the_question_are_not_listed_again(tmp_path, question):
    for asked in ({"prompt": question}, {"prompt": [{"role": "user", "content": question}]}):
        task = task_of(tmp_path, {**asked, "answer": "B", "options": {"A": "cat", "B": "dog"}})
        assert task.messages[0].content == question


def test_bare_letters_are_not_listed(tmp_path):
    task = task_of(tmp_path, {"question": "Which of the four?", "answer": "B", "options": ["A", "B", "C", "D"]})
    assert task.messages[0].content == "Which of the four?"


def test_marks_of_the_options_themselves_are_kept(tmp_path):
    task = task_of(tmp_path, {"question": "Which?", "answer": "B", "options": ["(A) cat", "(B) dog"]})
    assert task.messages[0].content == "Which?\n(A) cat\n(B) dog"


@pytest.mark.parametrize(
    "value", ["multiple-choice", 4, ["cat"], {"A": ["cat"], "B": ["dog"]}, "{{}}", "[{{}}]", "{[1]: 2}"]
)
def test_a_column_of_options_that_cannot_be_read_is_told(tmp_path, value):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "Which?", "answer": "B", "options": value}))
    task, [problem] = open_tasks(tmp_path / "x.jsonl").inspect(0)
    assert task.messages[0].content == "Which?"
    assert problem.warning
    assert "holds no options that can be read" in str(problem)


def test_an_article_is_no_mark():
    assert not shows("Is there a cat? b dog", options_of(["cat", "dog"]))
