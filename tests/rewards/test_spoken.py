from __future__ import annotations

import pytest

from foveate.records import Message, Task
from foveate.rewards.math import math_reward, same_answer
from foveate.rewards.plain_text import unwrapped


@pytest.mark.parametrize(
    ("answer", "truth", "other"),
    [
        ("the square root of 6", r"\sqrt{6}", r"\sqrt[3]{6}"),
        ("the cube root of 6", r"\sqrt[3]{6}", r"\sqrt{6}"),
        ("4 times the square root of 6", r"4\sqrt6", r"6\sqrt4"),
        ("4 root 6", r"4\sqrt{6}", r"\sqrt{10}"),
        ("4*sqrt(6)", r"4\sqrt{6}", r"\sqrt{24}"),
        ("4**3", "64", "12"),
        ("x**2 + 9*x", "x^2 + 9x", "2x + 9x"),
        ("4 to the power of 3", "4^3", "3^4"),
        ("plus or minus 4", r"\pm 4", "4"),
        ("lg 6", r"\log_{10} 6", r"\ln 6"),
        ("arcsin (1/6)", r"\arcsin\frac{1}{6}", r"\frac{1}{6}"),
        ("6 choose 4", r"\binom{6}{4}", r"\binom{6}{3}"),
        ("6C4", "15", "20"),
        ("x is at least 4", r"[4, \infty)", r"(4, \infty)"),
        ("all real numbers x such that x < 4", r"(-\infty, 4)", r"(-\infty, 4]"),
        ("]4, 6]", "(4, 6]", "[4, 6]"),
        ("[4; 6[", "[4, 6)", "[4, 6]"),
        ("4 degrees below zero", "-4°C", "4°C"),
        ("2h30m", "2.5 hours", "2.3 hours"),
        ("4 R 6", "4 remainder 6", "6 R 4"),
        ("quotient 4, remainder 6", "4 R 6", "46"),
        ("110_2", "110 (base two)", "110_3"),
        ("4 and 1/2", "4.5", "2"),
        ("4 x 6", r"4 \times 6", r"4 \times 5"),
        ("NE", "northeast", "northwest"),
        ("It increases.", "increasing", "decreasing"),
        ("USA", "the United States", "the United Kingdom"),
        ("2, 4 & 6", "2, 4, 6", "2, 4"),
        ("2 4 6", "2, 4, 6", "246"),
        ("only II and IV", "II and IV", "II and III"),
        ("a 4 in 6 chance", "2/3", "3/2"),
        ("6 km, or 6000 m, long", "6 km", "600 m"),
        ("6 km = 6000 m", "6 km", "6 m"),
        (r"\int 6x\,dx = 3x^2 + C", "3x^2 + C", "6x + C"),
        ("x^2 - 4 = (x-2)(x+2)", "(x-2)(x+2)", "(x-2)(x-2)"),
        ("x = 4\ny = 6", "(4, 6)", "(6, 4)"),
        ("### 6", "6", "4"),
    ],
)
def test_what_is_said_in_words_is_its_value_and_no_other(answer, truth, other):
    for wanted, value in ((truth, 1.0), (other, 0.0)):
        task = Task("t", "s", (Message("user", "What is it?"),), (), wanted, {}, "row 0")
        assert math_reward(answer, task, extraction="text").value == value, wanted


@pytest.mark.parametrize(
    ("asked", "answer", "truth", "same"),
    [
        ("Which country has the lowest bar?", "Peru has the lowest bar.", "Peru", True),
        ("Which country has the lowest bar?", "Peru has the highest bar.", "Peru", False),
        ("Which country has the lowest bar?", "Peru does not have the lowest bar.", "Peru", False),
        ("Which has more, red or blue?", "Red has more or blue has more.", "Red", False),
        ("Which bar is not blue?", "Peru is blue.", "Peru", False),
        ("How many birds are in the tree?", "6 birds are in the tree.", "6", True),
        ("How many birds are not in the tree?", "6 birds are in the tree.", "6", False),
        ("What part is shaded?", r"So $\frac{4}{6}$ is shaded.", "2/3", True),
        ("What part is shaded?", r"So $\frac{4}{6}$ is unshaded.", "2/3", False),
    ],
)
def test_a_sentence_may_say_the_question_again(asked, answer, truth, same):
    task = Task("t", "s", (Message("user", asked),), (), truth, {}, "row 0")
    assert bool(math_reward(answer, task, extraction="text").value) is same


@pytest.mark.parametrize(
    ("text", "bare"),
    [("x**2", "x^2"), ("**2**", "2"), ("the **2** of them", "the 2 of them"), ("2**3 and **4**", "2 3 and 4")],
)
def test_two_stars_are_a_power_or_bold(text, bare):
    assert " ".join(unwrapped(text).split()) == bare


def test_a_label_is_no_month():
    assert not same_answer("6", "July 6")
    assert same_answer("6", "length 6")


@pytest.mark.parametrize(
    ("asked", "answer", "truth", "same"),
    [
        ("Find the area.", "The perimeter is 16 and the area is 12.", "12", True),
        ("Find the area.", "The perimeter is 16 and the area is 12.", "16", False),
        ("Find the area.", "The area is 12, while the perimeter is 16.", "12", True),
        ("Find the area.", "The area is 12, while the perimeter is 16.", "16", False),
        ("Find it.", "It was 16 in 2010 and 12 in 2011.", "16", False),
        ("Find it.", "Could it be 16?", "16", False),
        ("Find it.", "It cannot be 16.", "16", False),
        ("Find it.", "12 = 16", "16", False),
        ("Find it.", "none of the 16", "16", False),
        ("Find it.", "x is equal to 16", "16", True),
        ("Find it.", "x is not equal to 16", "16", False),
        ("Find it.", "x isn't equal to 16", "16", False),
        ("Find it.", "It is close to 16.", "16", False),
        ("Find it.", "We reject 16.", "16", False),
        ("Find it.", "4 squared", "16", True),
        ("Find it.", "16 squared", "16", False),
        ("Find it.", "16 below zero", "16", False),
    ],
)
def test_of_several_values_of_a_sentence_that_which_is_asked_for_counts(asked, answer, truth, same):
    task = Task("t", "s", (Message("user", asked),), (), truth, {}, "row 0")
    assert bool(math_reward(answer, task, extraction="text").value) is same
