"""Instruction following by IFEval's checks; skipped where the library is not installed."""

from __future__ import annotations

import json

import pytest

from foveate.records import Task
from foveate.rewards.build import FAILED, build_reward, truth_check

pytest.importorskip("if_verifiable")
pytestmark = pytest.mark.filterwarnings("ignore")


def task(answer):
    return Task("t", "s", (), (), answer, {}, "c.parquet, row 4")


TWO = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 3, "relation": "at least"}],
}
CLASSES = {
    "instructions": [{"class": "CommaChecker", "args": {}}, {"class": "KeywordChecker", "args": {"keywords": ["x"]}}]
}


def test_the_share_of_followed_instructions_counts():
    reward = build_reward("instruction_following", {})
    texts = ("one two three", "one two, three", "one, two", "")
    assert [reward(text, task(TWO)).value for text in texts] == [1.0, 0.5, 0.0, 0.0]
    every = build_reward("instruction_following", {"aggregate": "all"})
    assert [every(text, task(json.dumps(TWO))).value for text in texts[:2]] == [1.0, 0.0]
    assert reward("<think>a, b</think><answer>x</answer>", task(str(CLASSES))).value == 1.0


def test_loose_checks_try_the_answer_without_its_first_and_last_line():
    answer = task({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]})
    text = "Sure, here it is:\nno marks"
    assert build_reward("instruction_following", {})(text, answer).value == 0.0
    assert build_reward("instruction_following", {"loose": True})(text, answer).value == 1.0


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("be brief", "holds no instructions"),
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "did you mean 'punctuation:no_comma'"),
        ({"instructions": [{"class": "NumberOfWords", "args": {"num_words": None}}]}, "lacks its arguments num_words"),
        ({"instructions": [{"class": "CommaChecker", "args": {"n": 1}}]}, "has no arguments n"),
        (
            {"instructions": [{"class": "KeywordChecker", "args": {"keywords": "cat"}}]},
            "is a text; write a list of them",
        ),
    ],
)
def test_a_row_that_cannot_be_checked_is_a_fault(truth, message):
    [(field, fault)] = truth_check("instruction_following")(task(truth))
    assert field == "reward_model.ground_truth"
    assert message in fault
    assert build_reward("instruction_following", {})("a", task(truth)).note.startswith(FAILED)


def test_what_needs_data_of_nltk_is_a_fault_without_it(monkeypatch):
    import foveate.rewards.instructions as module

    monkeypatch.setattr(module, "_has_punkt", lambda: False)
    row = task({"instructions": [{"class": "NumberOfSentences", "args": {"num_sentences": 2, "relation": "at least"}}]})
    assert "python -m nltk.downloader punkt_tab" in module.check_instructions(row)[0][1]
