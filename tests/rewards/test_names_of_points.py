from __future__ import annotations

import pytest

from foveate.rewards.math import same_answer
from foveate.rewards.names import has_words


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        (r"\angle RST", r"\angle TSR", True),
        (r"∠RST", r"\angle TSR", True),
        (r"m\angle RST", r"\angle RST", True),
        (r"\angle RTS", r"\angle RST", False),
        (r"\angle 4", r"\angle 4", True),
        (r"\angle 4", r"\angle 5", False),
        (r"\overline{GH}", r"\overline{HG}", True),
        ("GH", r"\overline{GH}", True),
        (r"\overline{GH}", r"\overrightarrow{GH}", False),
        (r"\overrightarrow{HG}", r"\overrightarrow{GH}", False),
        (r"\overset{\frown}{HG}", r"\widehat{GH}", True),
        ("circle O", r"\odot O", True),
        ("A_1B_1", "A_{1}B_{1}", True),
        ("B_1A_1", "A_1B_1", False),
        ("rectangle ABCD", "trapezoid ABCD", False),
    ],
)
def test_geometry_says_which_names_have_no_order(answer, truth, same):
    assert same_answer(answer, truth) is same


def test_a_triangle_has_no_order_where_the_question_asks_for_one_and_for_no_correspondence():
    assert same_answer(r"\triangle NLM", r"\triangle LMN", asked="Which triangle is larger?")
    assert not same_answer(r"\triangle NLO", r"\triangle LMN", asked="Which triangle is larger?")
    assert not same_answer(r"\triangle NLM", r"\triangle LMN", asked="Which triangle is similar to triangle PQR?")
    assert not same_answer(r"\triangle NLM", r"\triangle LMN")


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (r"△RST ≅ △XYZ", True),
        (r"\triangle STR \cong \triangle YZX", True),
        (r"\triangle STR \cong \triangle XYZ", False),
        (r"\triangle RST \sim \triangle XYZ", False),
    ],
)
def test_congruent_figures_name_their_vertices_in_pairs(answer, same):
    assert same_answer(answer, r"\triangle RST \cong \triangle XYZ") is same


def test_parallel_lines_have_no_order():
    assert same_answer(r"\overline{EF} \parallel \overline{GH}", r"GH \parallel EF")
    assert not same_answer(r"EF \perp GH", r"EF \parallel GH")


def test_small_letters_are_factors_where_nobody_can_say_them_or_the_question_uses_them():
    assert same_answer("zyx", "xyz")
    assert not same_answer("ba", "ab")
    assert same_answer("ba", "ab", asked="A rectangle has sides $a$ and $b$. What is its area?")
    assert not same_answer("BA", "AB", asked="Points A and B lie on the circle.")


def test_a_length_in_an_expression_is_one_symbol():
    assert same_answer(r"\frac{1}{2} BC \cdot AD", r"\frac{1}{2} AD \cdot CB")
    assert not same_answer(r"AC + BD", r"AB + CD")
    assert not same_answer(r"AC \cdot BD", r"AB \cdot CD")


def test_words_beside_mathematics_are_read():
    assert has_words("not 8")
    assert has_words("at least 3x")
    assert not has_words("ab + c")
    assert not has_words(r"\frac{1}{2}ab")
    assert not same_answer("at most 8", "8")


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("O2S", "SO2", False),
        ("N2H4", "H4N2", False),
        ("(OH)2Mg", "Mg(OH)2", False),
        ("2OH2", "2H2O", False),
        ("SO_2", "SO2", True),
        (r"\text{C}_6\text{H}_{12}", "C6H12", True),
        ("Mg(OH)_2", "Mg(OH)2", True),
        (r"\mathrm{NH_4^+}", "NH_4^{+}", True),
        ("3AB", "3BA", True),
    ],
)
def test_a_formula_keeps_its_order(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("M^2N", "NM^2", False),
        ("M^2 N", "M^2N", True),
        ("M^{-1}NM", "MNM^{-1}", False),
        ("M^TN", "NM^T", False),
        (r"M \cdot N", r"N \cdot M", True),
        ("m^2n", "nm^2", True),
        ("MN^2", "NM^2", True),
    ],
)
def test_a_product_of_capitals_keeps_its_order_with_exponents(answer, truth, same):
    """A sign of multiplication makes them factors; two capitals with an exponent behind them are a length: MN^2."""
    assert same_answer(answer, truth) is same
