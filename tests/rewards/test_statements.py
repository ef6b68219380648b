from __future__ import annotations

import pytest

from foveate.rewards.conditions import as_intervals
from foveate.rewards.math import same_answer
from foveate.rewards.statements import same_times, standard


@pytest.mark.parametrize(
    ("conditions", "union"),
    [
        ("x < 2 or x > 7", r"(-\infty,2) \cup (7,\infty)"),
        (r"2 \le x", r"[2,\infty)"),
        (r"2 < x \le 7", "(2,7]"),
        ("x > 2 and x < 7", "(2,7)"),
        ("x > 2, x < 7", "(2,7)"),
        ("x < 2, x > 7", r"(-\infty,2) \cup (7,\infty)"),
        (r"|x| \ge 2", r"(-\infty,-2] \cup [2,\infty)"),
        ("|x| < 2", "(-2,2)"),
        (r"x \ne 2", r"(-\infty,2) \cup (2,\infty)"),
        (r"x \ge -3 and x \ne 2", r"[-3,2) \cup (2,\infty)"),
        (r"x \ge -3, but x \ne 2 and x \ne 7", r"[-3,2) \cup (2,7) \cup (7,\infty)"),
        (r"x \ne \pm 2", r"(-\infty,-2) \cup (-2,2) \cup (2,\infty)"),
        (r"x \ne 7, 2", r"(-\infty,2) \cup (2,7) \cup (7,\infty)"),
        (r"2 \le x < 7 and x \ne 2", "(2,7)"),
        (r"x > 2 and x \ne 0", r"(2,\infty)"),
    ],
)
def test_conditions_on_a_variable_are_a_union_of_intervals(conditions, union):
    assert as_intervals(conditions) == ("x", union)


@pytest.mark.parametrize("text", ["7", "x", "x < 2 or y > 7", "x = 2", "(2,7)", "1 < 2", r"x > 2 and y \ne 3"])
def test_what_is_no_condition_on_one_variable_is_no_interval(text):
    assert as_intervals(text) is None


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("4 to 9", "4:9"),
        ("p > q > r", "r < q < p"),
        (r"\{t \mid t > 4\}", "t > 4"),
        ("9 May", "May 9"),
        ("May 9th", "May 9"),
        ("9 May 2021", "May 9 2021"),
        ("May 9, 2021", "May 9 2021"),
        ("second quadrant", "Quadrant II"),
        ("in the second quadrant", "Quadrant II"),
        ("l is parallel to m", r"l \parallel m"),
        ("triangles ABC and DEF are similar", r"ABC \sim DEF"),
        ("<4, 9>", r"\langle 4, 9\rangle"),
        (r"\begin{pmatrix}4\\9\end{pmatrix}", "(4, 9)"),
        (r"\begin{pmatrix}4&9\end{pmatrix}", r"\begin{pmatrix}4&9\end{pmatrix}"),
        ("the point (4,9)", "(4,9)"),
    ],
)
def test_a_statement_has_one_form(text, form):
    assert standard(text) == form


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("4:20 p.m.", "4:20 PM", True),
        ("4:20 pm", "16:20", True),
        ("4:20", "4:20 pm", True),
        ("4 am", "4 pm", False),
        ("12 am", "midnight", True),
        ("4:20", "4:20", None),
    ],
)
def test_a_time_of_day_may_leave_out_its_half(given, wanted, same):
    assert same_times(given, wanted) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("x=4, y=9", "(4, 9)", True),
        ("x=9, y=4", "(4, 9)", False),
        ("y=4, x=9", "(4, 9)", False),
        (r"4, \pm 9", "-9, 4, 9", True),
        (r"(\pm 4, 0)", "(4, 0), (-4, 0)", True),
        (r"(\pm 4, 0)", "(4, 0)", False),
        ("K(4, 9), L(0, 1)", "L(0, 1), K(4, 9)", True),
        ("K(4, 9), L(0, 1)", "K(0, 1), L(4, 9)", False),
    ],
)
def test_points_are_told_by_name_and_coordinate(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("question", "same"),
    [
        ("Arrange the numbers from least to greatest.", False),
        ("List them in descending order.", False),
        ("从大到小排列这些数。", False),
        ("Find the zeros in order to draw the graph.", True),
    ],
)
def test_a_list_has_an_order_where_the_question_asks_for_one(question, same):
    assert same_answer("9, 4, 6", "4, 6, 9", asked=question) is same
