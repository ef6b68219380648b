"""The rules of published benchmarks, on constructed answers that were held against the official code."""

from __future__ import annotations

import pytest

from foveate.evaluate.evaluate_models import TASKS
from foveate.records import Task
from foveate.rewards.benchmarks import edit_distance
from foveate.rewards.build import build_reward, truth_check


def task(answer, **meta):
    return Task("t", "s", (), (), answer, meta, "c.parquet, row 4")


CHOICES = {"choices": ["3/11", "8/11", "6/11", "3/5"]}
WHOLE = {"answer_type": "integer"}
CASES = {
    "mathvista": [
        (1, "(B) 8/11", "8/11", CHOICES),
        (1, "B", "8/11", CHOICES),
        (1, "8 / 11", "8/11", CHOICES),  # the nearest
        (0, "C", "8/11", CHOICES),
        (1, "\\boxed{14}", "14", WHOLE),
        (1, "14.7", "14", WHOLE),
        (1, "14 cm", "14", WHOLE),
        (1, "fourteen", "14", WHOLE),
        (0, "many", "14", WHOLE),
        (1, "1.449", "1.4", {"answer_type": "float", "precision": 1}),
        (0, "1.46", "1.4", {"answer_type": "float", "precision": 1}),
        (1, "[2007, 2008]", "[2007, 2008]", {"answer_type": "list"}),
        (1, "Paris", "Paris", {"answer_type": "text"}),
        (0, "paris", "Paris", {"answer_type": "text"}),
    ],
    "mmmu": [
        (1, "The answer is B", "B", {"options": ["a cat", "a dog"]}),
        (1, "It is a dog.", "B", {"options": ["a cat", "a dog"]}),
        (0, "A", "B", {"options": ["a cat", "a dog"]}),
        (1, "So the result is 3.141", "3.14", {}),
        (1, "Thus x = 1,200", "1200", {}),
        (1, "The capital is Paris.", ["Paris", "paris, france"], {}),
        (0, "The value is 3.2", "3.14", {}),
        (0, "London", "Paris", {}),
    ],
    "chartqa": [
        (1, "52", "50", {}),
        (0, "53", "50", {}),
        (1, "50%", "0.5", {}),
        (0, "50", "50%", {}),
        (1, "yes", "Yes", {}),
        (0, "$50", "50", {}),
        (0, "0.0", "0", {}),
    ],
    "ocrbench": [
        (1, "It says STOP here", "stop", {}),
        (0, "It says SLOP", "stop", {}),
        (1, "\\frac { 1 } { 2 }", "\\frac{1}{2}", {"dataset": "HME100k"}),
        (0, "X ^ 2", "x^2", {"dataset": "HME100k"}),
        (1, "ＡＢＣ", "abc", {}),
        (1, "dog", ["cat", "dog"], {}),
    ],
    "countbench": [(1, "There are 3.", 3, {}), (0, "13", 3, {}), (1, "three", "3", {})],
    "screenspot": [(1, "[150, 250]", [100, 200, 200, 300], {}), (0, "[50, 250]", [100, 200, 200, 300], {})],
}


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_scores_as_its_rule_says(name):
    reward, settings = TASKS[name]
    function, check = build_reward(reward, settings), truth_check(reward, settings)
    for value, text, truth, meta in CASES[name]:
        row = task(truth, **meta, width=1000, height=1000)
        assert function(text, row).value == value, (name, text, truth)
        assert check is not None
        assert check(row) == []


def test_mathverse_is_scored_as_mathematics():
    assert TASKS["mathverse"] == ("math", {"extraction": "text"})


def test_faults_of_mathvista_rows_are_told_by_field():
    check = truth_check("mathvista")
    assert check is not None
    assert "is none of the options" in check(task("9", **CHOICES))[0][1]
    assert check(task("9", answer_type="real"))[0][0] == "extra_info.answer_type"


def test_the_edit_distance_counts_single_characters():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("a", "a"), ("ab", "ba"))] == [
        3,
        3,
        0,
        2,
    ]
