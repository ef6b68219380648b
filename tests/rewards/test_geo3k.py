from __future__ import annotations

import re

import numpy as np
import pytest
from geo3k_answers import ANSWERS

from foveate.errors import DataError
from foveate.records import Task
from foveate.rewards.geo3k import geo3k, has_form


def geometry(answer):
    return Task("t", "hiyouga/geometry3k", (), (), answer, {}, "geo3k.parquet, row 7")


@pytest.mark.parametrize(("answer", "truth", "published", "by_value"), ANSWERS)
def test_an_answer_in_the_box_is_right_or_wrong(answer, truth, published, by_value):
    text = f"<think>Look at the figure.</think> So it is \\boxed{{{answer}}}."
    assert geo3k(text, geometry(truth)).value == pytest.approx(0.9 * published + 0.1)
    assert geo3k(text, geometry(truth), grader="math_verify").value == pytest.approx(0.9 * by_value + 0.1)


@pytest.mark.parametrize("grader", ["mathruler", "math_verify"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>\\boxed{5}", 1.0),
        ("<think>a\nb</think>\nThe answer is \\boxed{5}.\n", 1.0),
        ("<think></think>\\boxed{5}", 1.0),
        ("<think>\\boxed{4}</think> first \\boxed{6}, no, \\boxed{5}", 1.0),
        ("<think>a</think> first \\boxed{5}, no, \\boxed{6}", 0.1),
        ("<think>\\boxed{5}</think> five", 0.9),
        (" <think>a</think>\\boxed{5}", 0.9),
        ("The answer is \\boxed{5}", 0.9),
        ("<think>a \\boxed{5}", 0.9),
        ("<think>a</think> 5", 0.0),
        ("<think>a</think>\\boxed{\\frac{10}{2}", 0.1),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_nine_tenths_are_for_the_last_box_and_one_tenth_for_the_form(text, value, grader):
    assert geo3k(text, geometry("5"), grader=grader).value == pytest.approx(value)


def test_the_format_weight_shifts_value_from_accuracy_to_form():
    score = geo3k("\\boxed{5}", geometry("5"), format_weight=0.25)
    assert (score.value, dict(score.parts)) == (0.75, {"accuracy": 1.0, "format": 0.0})


def test_the_form_is_the_published_pattern():
    pattern = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
    pieces = ["<think>", "</think>", "\\boxed{", "}", " x\n"]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(pieces, generator.integers(1, 9))) for _ in range(3000)]
    texts += ["<think>" + text for text in texts]
    matched = [bool(pattern.fullmatch(text)) for text in texts]
    assert 100 < sum(matched) < len(texts) - 100
    assert [has_form(text) for text in texts] == matched


def test_numbers_arrays_and_lists_are_ground_truths_of_which_any_is_right():
    text = "<think>a</think>\\boxed{5}"
    for truth in (5, 5.0, np.float64(5), np.array(["4", "5"]), ["4", "5"], ("5",)):
        assert geo3k(text, geometry(truth)).value == 1.0
    assert geo3k(text, geometry(["4", "6"])).value == pytest.approx(0.1)
    with pytest.raises(DataError, match=r"^geo3k\.parquet, row 7, field reward_model\.ground_truth: None is no answer"):
        geo3k(text, geometry(None))
