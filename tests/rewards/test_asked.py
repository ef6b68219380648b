"""What the question makes of an answer: counts, verdicts, intercepts, constants, pairs; each with what stays wrong."""

from __future__ import annotations

import pytest

from foveate.rewards.math import same_answer

HOW_MANY = "How many real solutions does the equation have?"
INTEGRAL = r"Find \int 6x dx."


@pytest.mark.parametrize(
    ("asked", "answer", "truth", "same"),
    [
        (HOW_MANY, "no real solutions", "0", True),
        (HOW_MANY, "none", "0", True),
        ("Solve the equation.", "no real solutions", "0", False),
        (HOW_MANY, "no more than 3", "0", False),
        ("How many birds are there?", "no birds", "0", True),
        ("How many birds are there?", "no cats", "0", False),
        ("How many birds are there?", "no solution", "0", False),
        ("图中有几个圆？", "没有圆", "0", True),
        ("Is the claim true?", "true", "yes", True),
        ("Is the claim false?", "true", "yes", False),
        ("Do they meet?", "true", "yes", False),
        ("判断：两圆相似。（对/错）", "正确", "对", True),
        ("判断：两圆相似。（对/错）", "不正确", "对", False),
        ("判断：两圆相似。（对/错）", "错误", "错", True),
        ("Find the y-intercept.", "(0, -7)", "-7", True),
        ("Find the y-intercept.", "(-7, 0)", "-7", False),
        ("Find the $x$-intercepts.", "(2, 0), (5, 0)", "2, 5", True),
        ("Find the x-intercept and the y-intercept.", "(0, -7)", "-7", False),
        ("Where is the vertex?", "(0, -7)", "-7", False),
        (INTEGRAL, "3x^2 + c", "3x^2 + C", True),
        (INTEGRAL, "3x^2 + K", "3x^2 + C", True),
        (INTEGRAL, "6x + c", "3x^2 + C", False),
        (INTEGRAL, "3x^2", "3x^2 + C", False),
        (r"Find \int kx dx.", r"\frac{kx^2}{2} + k", r"\frac{kx^2}{2} + C", False),
        ("Which polynomial is it?", "3x^2 + K", "3x^2 + C", False),
        ("Which lines are parallel?", r"m \parallel l", "l and m", True),
        ("In which quadrant is it?", "third", "III", True),
        ("In which quadrant is it?", "second", "III", False),
        (HOW_MANY, "infinite", "infinitely many solutions", True),
        (HOW_MANY, "many", "infinitely many", False),
        ("Compare: 3 ___ 2", "3 > 2", ">", True),
        ("Compare: 3 ___ 2", "less than", ">", False),
        ("Which is true?", "3 > 2", ">", False),
        ("Which lines are parallel?", r"m \perp l", "l and m", False),
        ("Which lines are perpendicular?", r"m \parallel l", "l and m", False),
    ],
)
def test_a_question_lets_an_answer_take_another_form(asked, answer, truth, same):
    assert same_answer(answer, truth, asked=asked) is same
    assert same_answer(truth, answer, asked=asked) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("(x, y) = (4, 9)", "x = 4, y = 9", True),
        ("(x, y) = (9, 4)", "x = 4, y = 9", False),
        ("(y, x) = (9, 4)", "x = 4 and y = 9", True),
        ("r = 4 and the centre is at (2,-3)", "center (2, -3), radius 4", True),
        ("r = 3 and the centre is at (2,-3)", "center (2, -3), radius 4", False),
        ("radius 4, center (2,-3)", "center (2, -3), radius 4", True),
        ("length 9, width 4", "width 4, length 9", True),
        ("length 4, width 9", "width 4, length 9", False),
        ("shorter leg 4, longer leg 9", "longer leg 9, shorter leg 4", True),
        ("shorter leg 9, longer leg 4", "longer leg 9, shorter leg 4", False),
        ("mean 4, median 9", "median 9, mean 4", True),
        ("y = 9, x = 4", "x = 9", False),
        ("mean 9, median 4", "median 9, mean 4", False),
    ],
)
def test_parts_are_compared_by_their_labels(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("x = 9, y = 4", "4", False),
        ("x = 9", "x = 9, y = 4", False),
        ("4", "x = 9, y = 4", False),
        ("x = 4, x = 9", "9, 4", True),
        ("x_1 = 4, x_2 = 9", "9, 4", True),
        ("y = 4 and x = 9", "x = 9, y = 4", True),
    ],
)
def test_several_values_are_not_one_of_them(answer, truth, same):
    assert same_answer(answer, truth) is same
