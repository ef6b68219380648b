"""The end of an answer: verdicts, lists, sequences, abbreviations, segments; each with what stays wrong."""

from __future__ import annotations

import pytest

from foveate.records import Message, Task
from foveate.rewards.math import math_reward


def is_right(answer, truth, asked):
    task = Task("t", "s", (Message("user", asked),), (), truth, {}, "row 0")
    return math_reward(answer, task, extraction="text").value == 1.0


SIMILAR = "Are the two triangles similar?"
EQUAL = "Is it true that the angles are not equal?"


@pytest.mark.parametrize(
    ("asked", "answer", "said", "other"),
    [
        (SIMILAR, "All ratios are 2.\n\n**Yes, they are similar.**", "yes", "no"),
        (SIMILAR, "All ratios are 2. So yes, the triangles are similar.", "yes", "no"),
        (SIMILAR, "The ratios are 2 and 3.\n\n**No, they are not similar.**", "no", "yes"),
        (SIMILAR, "The ratios are 2 and 3. No, they aren't.", "no", "yes"),
        (SIMILAR, "The ratios are 2 and 3.\n\nNo, the ratios differ.", "no", "yes"),
        (SIMILAR, "All ratios are 2. **Yes. They are similar by SSS.**", "yes", "no"),
        (SIMILAR, "All ratios are 2.\nYes - the triangles are similar.", "yes", "no"),
        (SIMILAR, r"All ratios are 2: \boxed{\text{Yes, they are similar}}", "yes", "no"),
        (SIMILAR, r"All ratios are 2: \boxed{\text{Yes}}", "yes", "no"),
        (SIMILAR, "Are they similar? Yes, they are similar.", "yes", "no"),
        ("这两个三角形相似吗？", "三边之比都是 2。\n\n**是的，它们相似。**", "是", "否"),
        ("这两个三角形相似吗？", "三边之比都是 2。是的，相似。", "是", "否"),
        ("这两个三角形相似吗？", "三边之比不等。\n**否，它们不相似。**", "否", "是"),
        (EQUAL, "They are 30° and 40°. **Yes, they are not equal.**", "yes", "no"),
    ],
)
def test_a_last_sentence_with_the_claim_is_the_verdict_at_its_start(asked, answer, said, other):
    assert is_right(answer, said, asked)
    assert not is_right(answer, other, asked)


@pytest.mark.parametrize(
    "answer",
    [
        "All ratios are 2.\n\n**Yes, they are not similar.**",
        "All ratios are 2. Are all angles equal? Yes, the angles are equal.",
        "All ratios are 2. Yes, we see that the sides are parallel.",
        "All ratios are 2.\n\n**Yes, but only if the angles are equal.**",
        "All ratios are 2.\n\n**Yes, or maybe they are similar.**",
        "Is this yes or no? **They are similar, yes, no**",
    ],
)
def test_a_sentence_that_contradicts_its_verdict_or_answers_something_else_is_none(answer):
    assert not is_right(answer, "yes", SIMILAR)
    assert not is_right(answer, "no", SIMILAR)


def test_a_no_does_not_go_with_the_claim_that_is_asked_for():
    assert not is_right("All ratios are 2.\n\n**No, they are similar.**", "no", SIMILAR)


POSTULATE = "Which postulate proves the triangles congruent?"


@pytest.mark.parametrize(
    ("answer", "truth", "other"),
    [
        ("So they are congruent by the **SAS (Side-Angle-Side)** postulate.", "SAS", "ASA"),
        ("So they are congruent by the SAS (Side-Angle-Side) postulate.", "SAS", "ASA"),
        ("The triangles are congruent by SAS.", "SAS", "ASA"),
        ("The triangles are congruent by Angle-Side-Angle.", "ASA", "SAS"),
        ("**Side-Side-Side (SSS)**", "SSS", "SAS"),
        ("**HL (Hypotenuse-Leg) theorem**", "HL", "LL"),
        (r"\boxed{\text{Side-Angle-Side}}", "SAS", "SSA"),
        (r"\boxed{\text{AAS (Angle-Angle-Side)}}", "AAS", "ASA"),
        ("SAS congruence", "Side-Angle-Side", "Angle-Side-Angle"),
    ],
)
def test_an_abbreviation_may_have_its_words_beside_it(answer, truth, other):
    assert is_right(answer, truth, POSTULATE)
    assert not is_right(answer, other, POSTULATE)


@pytest.mark.parametrize(
    "answer",
    [
        "They are congruent by the **ASA (Side-Angle-Side)** postulate.",
        "They cannot be proved congruent by SAS.",
        "They are congruent by SAS or ASA.",
        "Angle-Side-Side",
    ],
)
def test_an_abbreviation_with_other_words_or_a_denial_is_none(answer):
    assert not is_right(answer, "SAS", POSTULATE)
    assert not is_right(answer, "ASA", POSTULATE)


def test_a_denied_reason_behind_the_given_one_is_none():
    assert not is_right("They are congruent by ASA, not by SAS.", "SAS", POSTULATE)


@pytest.mark.parametrize(
    ("answer", "truth", "other"),
    [
        ("x + 2 = 9, 2y = 6.\n\nTherefore:\n- **x = 7**\n- **y = 3**", "x=7, y=3", "x=3, y=7"),
        ("We solve.\n\n* $x = 7$\n* $y = 3$", "x=7, y=3", "x=7"),
        ("We solve.\n1. x = 7\n2. y = 3", "y=3, x=7", "x=7, y=4"),
        ("We solve.\n• x = 7;\n• y = 3.", "x=7, y=3", "x=3, y=7"),
        ("Therefore:\nx = 7\ny = 3", "x=7, y=3", "x=3, y=7"),
        ("So x = 7; y = 3", "x=7, y=3", "x=3, y=7"),
        ("It has:\n- **Length:** 9 cm\n- **Width:** 4 cm", "length 9 cm, width 4 cm", "length 4 cm, width 9 cm"),
        ("We solve.\n- ∠A = 50°\n- ∠B = 60°", r"\angle A = 50°, \angle B = 60°", r"\angle A = 60°, \angle B = 50°"),
        ("因此：\n- x = 7\n- y = 3", "x=7, y=3", "x=3, y=7"),
    ],
)
def test_lines_at_the_end_that_name_their_values_are_a_list(answer, truth, other):
    assert is_right(answer, truth, "Find x and y.")
    assert not is_right(answer, other, "Find x and y.")


@pytest.mark.parametrize(
    "answer",
    [
        "The values are not:\n- x = 7\n- y = 3",
        "We must reject:\n- x = 7\n- y = 3",
        "- x = 7\n- y = 3\n\nThese fail, so there is no solution.",
        "- x = 7\n- y = 3\n- z = 4",
        "- x = 7\n- y = 3 is not possible",
    ],
)
def test_lines_that_are_denied_or_more_are_no_such_list(answer):
    assert not is_right(answer, "x=7, y=3", "Find x and y.")


ORDER = "Order the steps shown in the diagram."


@pytest.mark.parametrize(
    "answer",
    [
        "Final answer: **B → D → A → C**",
        "The steps are B -> D -> A -> C",
        r"\boxed{B \rightarrow D \rightarrow A \rightarrow C}",
        r"\boxed{B \Rightarrow D \Rightarrow A \Rightarrow C}",
        "B, then D, then A, then C",
        "The order is:\n1. B\n2. D\n3. A\n4. C",
        "B, D, A, C",
        "B；D；A；C",
        "B; D; A; C",
    ],
)
def test_a_sequence_by_arrows_or_numbers_is_the_list_in_its_order(answer):
    assert is_right(answer, "B, D, A, C", ORDER)
    for other in ("B, D, C, A", "C, A, D, B", "B, D, A", "B, D, A, C, E"):
        assert not is_right(answer, other, ORDER)


def test_arrows_keep_their_order_whatever_the_question_is():
    assert is_right("seed → sprout → plant", "seed, sprout, plant", "What happens?")
    assert not is_right("plant → sprout → seed", "seed, sprout, plant", "What happens?")
    assert not is_right("A → B", "A, B", "Which sets are finite?")
    assert not is_right("B, D, A, C", "B → D → C → A", "What happens?")


def test_in_order_to_asks_for_no_order():
    assert is_right("3, 2", "2, 3", "Find x in order to solve the puzzle.")
    assert is_right("3, 2", "2, 3", "Solve it. Give all solutions.")
    assert not is_right("3, 2", "2, 3", "Give the solutions in order.")


@pytest.mark.parametrize(
    "asked",
    [
        "Which is the longest side of the triangle?",
        "Name the segment that is the chord through point M.",
        "In circle O, name a diameter.",
        "Identify the hypotenuse of the right triangle.",
        "Which radius is drawn to the point of tangency?",
        "Name an edge of the cube that is parallel to plane ABC.",
        "A ray of light enters the box. Which diagonal is shown?",
        "Which triangle side is the shortest?",
        "图中最长的边是哪一条？",
        "写出圆的一条弦。",
    ],
)
def test_a_segment_that_is_asked_for_has_its_ends_in_either_order(asked):
    for answer in (r"It lies opposite: $\boxed{CB}$", "The longest one is CB.", "It is segment CB.\n\n**CB**", "CB"):
        assert is_right(answer, "BC", asked), answer
    for answer in (r"\boxed{CA}", "The longest one is AC.", r"\overrightarrow{CB}", "ray CB", "CBA"):
        assert not is_right(answer, "BC", asked), answer


@pytest.mark.parametrize(
    "asked",
    [
        "Name the ray that bisects the angle.",
        "Which vector is opposite to side AD?",
        "Name the arc that is cut off by chord PQ.",
        "Which ray contains the segment PQ?",
        "Name a directed segment of the path.",
        "Name a segment or a ray.",
        "Which angle lies opposite side PQ?",
        "A circle in which a chord is drawn. Which arc is minor?",
        "Which polygon has side PQ?",
        "What is AB times CD?",
        "写出图中的射线。",
        "The sides are drawn. What is the code?",
        "",
    ],
)
def test_where_no_segment_is_asked_for_the_letters_keep_their_order(asked):
    assert not is_right(r"\boxed{CB}", "BC", asked)
    assert is_right(r"\boxed{BC}", "BC", asked)


def test_polygons_keep_the_order_of_their_vertices_where_a_side_is_asked_for():
    assert not is_right("CBA", "ABC", "Which side is it?")
    assert not is_right("DCBA", "ABCD", "Which side is it?")


def test_sides_in_an_order_are_each_named_in_either_order():
    asked = "List the sides in order from shortest to longest."
    assert is_right("BA, CB, AC", "AB, BC, CA", asked)
    assert not is_right("CB, BA, AC", "AB, BC, CA", asked)
