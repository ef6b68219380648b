from __future__ import annotations

import re

import numpy as np
import pytest

from foveate.records import DataError, Task
from foveate.rewards.geo3k import geo3k, has_form

# Answer in the box, ground truth, whether the published grader accepts it, whether it is accepted by value.
ANSWERS = [
    # whole numbers and decimals
    ("5", "5", True, True),
    ("6", "5", False, False),
    ("-5", "5", False, False),
    ("5.0", "5", True, True),
    ("05", "5", True, True),
    ("10/2", "5", False, True),
    ("2+3", "5", False, True),
    ("4.9", "5", False, False),
    ("5.0000001", "5", False, True),
    ("1,000", "1000", True, True),
    ("1,00", "100", False, False),
    ("1.5e3", "1500", True, True),
    ("1.5 \\times 10^3", "1500", False, True),
    ("0.333", "1/3", False, False),
    ("0.333333", "\\frac{1}{3}", False, True),
    ("3.14", "\\pi", False, False),
    (".5", "0.5", True, True),
    # fractions
    ("\\frac{1}{2}", "0.5", True, True),
    ("1/2", "\\frac{1}{2}", True, True),
    ("\\dfrac{1}{2}", "\\frac{1}{2}", True, True),
    ("\\frac12", "\\frac{1}{2}", True, True),
    ("2/4", "1/2", False, True),
    ("\\frac{1}{3}", "\\frac{1}{2}", False, False),
    ("7\\frac{1}{2}", "7.5", True, True),
    ("7 1/2", "7.5", True, True),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", True, True),
    # roots, powers and pi
    ("2\\sqrt{2}", "\\sqrt{8}", True, True),
    ("2\\sqrt2", "2\\sqrt{2}", True, True),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", True, True),
    ("16 \\sqrt { 3 }", "16\\sqrt{3}", True, True),
    ("\\sqrt{3}", "\\sqrt{2}", False, False),
    ("25\\pi", "25\\pi", True, True),
    ("25π", "25\\pi", False, True),
    ("78.54", "25\\pi", False, False),
    # units and degrees
    ("5 cm", "5", True, True),
    ("5\\text{ cm}", "5", True, True),
    ("5", "5\\text{ cm}", True, True),
    ("12 cm^2", "12", True, True),
    ("5\\text{ m}", "5\\text{ cm}", True, False),
    ("500 cm", "5 m", False, True),
    ("60^\\circ", "60", True, True),
    ("60^{\\circ}", "60", True, True),
    ("60°", "60", False, True),
    ("60 degrees", "60", True, True),
    ("61^\\circ", "60", False, False),
    # percent and money
    ("50\\%", "50", True, True),
    ("50%", "50\\%", True, True),
    ("50\\%", "0.5", False, True),
    ("5\\%", "0.5", False, False),
    ("\\$5", "5", True, True),
    ("5 dollars", "5", False, True),
    # letters
    ("A", "A", True, True),
    ("a", "A", True, True),
    ("(A)", "A", True, True),
    ("\\text{A}", "A", True, True),
    ("A. 5 cm", "A", False, True),
    ("B", "A", False, False),
    # equations, intervals, sets, tuples
    ("x=5", "5", True, True),
    ("x=6", "5", False, False),
    ("[0,1)", "[0, 1)", True, True),
    ("(0,1]", "[0,1)", False, False),
    ("(1, 2)", "(1,2)", True, True),
    ("(2,1)", "(1,2)", False, False),
    ("\\{2,1\\}", "\\{1,2\\}", False, True),
    ("(x+1)^2", "x^2+2x+1", True, True),
    ("x^2+1", "x^2+2x+1", False, False),
    # malformed
    ("", "5", False, False),
    ("\\frac{1}{", "0.5", False, False),
    ("\\frac{}{2}", "0.5", False, False),
    ("\\sqrt", "2", False, False),
    ("5 5", "5", False, False),
    ("5 or 6", "5", False, False),
    ("no idea", "5", False, False),
]


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
