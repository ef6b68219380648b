from __future__ import annotations

import numpy as np
import pytest
from geo3k_answers import ANSWERS

from foveate.errors import DataError
from foveate.records import Message, Task
from foveate.rewards import math, numbers
from foveate.rewards.latex import tidy
from foveate.rewards.math import math_reward, same_answer
from foveate.rewards.text import check_answer


def exercise(answer, question="How much?", **meta):
    return Task("t", "math", (Message("user", question),), (), answer, meta, "m.parquet, row 1")


SAME = [
    # numbers
    ("−5", "-5", True),
    ("+5", "5", True),
    ("1e-7", "0", False),
    ("1e-7", "0.0000001", True),
    ("3e-7", "1e-7", False),
    ("1.5e3", "1.5\\times 10^3", True),
    ("\\frac{1}{3}", "0.3333333333", True),
    ("12,345.5", "12345.5", True),
    (".5", "5", False),
    ("5²", "52", False),
    ("5²", "25", True),
    ("5!", "5", False),
    ("5!", "120", True),
    # expressions
    ("√(3)/2", "\\frac{\\sqrt3}{2}", True),
    ("2x+1", "1 + 2x", True),
    ("2x+1", "2y+1", False),
    ("y = 2x+1", "2x+1", True),
    ("x^2 = 4", "4", False),
    ("2x = 4", "4", False),
    ("A = \\frac12 \\cdot 4 \\cdot 5 = 10", "10", True),
    ("2 + 3i", "3i + 2", True),
    ("x < 3", "x > 3", False),
    # intervals and sets
    ("(-∞, 3]", "(-\\infty, 3]", True),
    ("(-\\infty, 3)", "(-\\infty, 3]", False),
    ("[1, 2] ∪ [3, 4]", "[3,4] \\cup [1,2]", True),
    ("x \\in [1,2]", "[1,2]", True),
    ("\\pm 2", "\\{2,-2\\}", True),
    ("1, 2", "2, 1", True),
    ("1, 2, 3", "2, 1", False),
    ("2 \\text{ or } 3", "2, 3", True),
    # units
    ("5 m²", "50000\\text{ cm}^2", True),
    ("12 square feet", "12 ft^2", True),
    ("12 square feet", "12 ft", False),
    ("300 cm^3", "300 mL", True),
    ("7 1/2 cm", "75 mm", True),
    ("5 kg", "5 m", False),
    ("5 kg", "5000", False),
    ("2\\sqrt{3}\\text{ units}", "2\\sqrt{3}", True),
    ("\\frac{12}{5} \\mathrm{~cm}", "2.4 cm", True),
    ("\\$5", "500 cents", True),
    # percent and ratio
    ("12.5\\%", "1/8", True),
    ("12.5%", "12.5", True),
    ("12.5%", "1.25", False),
    ("3:4", "\\frac{3}{4}", True),
    # words and dress
    ("\\text{Yes}", "yes", True),
    ("no", "yes", False),
    ("$\\frac{1}{2}$", "0.5", True),
    ("\\(7\\)", "7", True),
    ("**7**", "7", True),
    ("5.", "5", True),
]


@pytest.mark.parametrize(("answer", "truth", "same"), SAME)
def test_two_answers_have_the_same_value_or_not(answer, truth, same):
    assert same_answer(answer, truth) is same


def fractions(count):
    """Pairs of answers of which the shortcut reads many, and of which about half are equal or nearly so."""
    rng = np.random.default_rng(0)

    def number(a, b):
        forms = [f"{a}/{b}", rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}", f"{a / b:.8f}", f"{a / b:.3f}"]
        return str(rng.choice(["", "", "-"])) + str(rng.choice([*forms, f"{a}"]))

    for _ in range(count):
        a, b = (int(value) for value in rng.integers(1, 20, 2))
        yield number(a, b), number(a, b)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_shortcut_of_fractions_says_what_math_verify_says(count, monkeypatch):
    pairs = [(tidy(answer), tidy(truth)) for answer, truth, *_ in [*SAME, *ANSWERS, *fractions(count)]]
    short = [numbers.same_fractions(answer, truth, 6) for answer, truth in pairs]
    monkeypatch.setattr(math, "same_fractions", lambda *_: None)
    math._same_value.cache_clear()
    try:
        for said, (answer, truth) in zip(short, pairs, strict=True):
            assert said is None or math._same_value(answer, truth, 6) is said, (answer, truth)
    finally:
        math._same_value.cache_clear()
    assert min(short.count(verdict) for verdict in (True, False, None)) > 10 + count / 20


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        (r"2.2\times 10^{-17}", r"1.1\times 10^{-17}", False),
        (r"-1.1\times 10^{-17}", r"1.1\times 10^{-17}", False),
        (r"11\cdot 10^{-18}", r"1.1\times 10^{-17}", True),
        (r"\frac{1}{50!}", r"\frac{1}{51!}", False),
        (r"\frac{51}{51!}", r"\frac{1}{50!}", True),
        (r"\frac{1}{900!}", r"\frac{1}{902!}", False),
        (r"10^{-30}x", r"10^{-31}x", False),
        ("10^{-30}", "0", False),
        (r"\sqrt{2}\cdot\sqrt{2}-2", "0", True),
        ("0.166667", r"\frac{1}{6}", True),
        ("0.0166667", r"\frac{1}{60}", True),
        ("0.16667", r"\frac{1}{6}", False),
    ],
)
def test_small_values_are_compared_by_their_digits(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        (r"2-\frac{1}{\pi}", r"2+\frac{1}{\pi}", False),
        ("2, 4, 8, \\ldots", "2, 4, 16, \\ldots", False),
        ("2,4,8,…", "2, 4, 8, \\dots", True),
        ("\\cos 45", "\\cos 45^\\circ", False),
        ("\\cos 60^\\circ", "\\frac{1}{2}", True),
        ("\\sin^2 30°+\\cos^2 30°", "1", True),
        ("\\frac{\\pi}{4}", "45^\\circ", True),
        ("not 12", "12", False),
        ("\\ge 12", "12", False),
        ("about 12", "12", True),
        ("twenty-five", "25", True),
        ("5 5", "10", False),
        ("x < 3", "(-\\infty, 3)", True),
        ("(5, 6)", "5, 6", False),
        ("{5, 6}", "6, 5", True),
        ("[5, 6]", "(5, 6)", False),
        ("P(5, 6)", "(5,6)", True),
        ("(x, y) = (5, 6)", "(5,6)", True),
        ("(6, 5)", "(5, 6)", False),
        ("a = 2, b = 3", "b=3, a=2", True),
        ("a = 2, b = 3", "a=3, b=2", False),
        ("pi/2", "\\frac{\\pi}{2}", True),
    ],
)
def test_what_is_written_is_read_as_a_whole(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("7×10⁶", r"7\times 10^6"), ("y⁵", "y^5"), ("⅖", "0.4"), ("1¾", "1.75"), ("－９", "-9"),
        ("（２，３）", "(2,3)"),
        ("a₂", "a_2"), ("５。", "5"), ("￥8", "8"), ("30％", "0.3"), ("β+1", r"1+\beta"), ("4≤x", r"x\ge 4"),
        ("（D）", "D"), ("D．9", "D"), ("D、9", "D"), ("选项D", "D"), ("答案：D", "D"), ("故选D", "D"),
    ],
)  # fmt: skip
def test_characters_that_unicode_calls_alike_are_the_same(answer, truth):
    assert math_reward(f"\\boxed{{{answer}}}", exercise(truth)).value == 1.0


def test_digits_say_how_close_a_number_must_be():
    assert same_answer("3.14", "3.142", digits=2)
    assert not same_answer("3.14", "3.142", digits=4)
    assert not same_answer("1.2e-19", "1.6e-19", digits=2)


@pytest.mark.parametrize(
    ("text", "value", "parsed"),
    [
        ("so \\boxed{7}", 1.0, 1.0),
        ("so \\boxed {7}", 1.0, 1.0),
        ("\\boxed{8} or rather \\boxed{7}", 1.0, 1.0),
        ("\\boxed{7} or rather \\boxed{8}", 0.0, 1.0),
        ("\\boxed{7} and \\boxed{\\frac{8}{", 1.0, 1.0),
        ("\\boxed{\\boxed{7}}", 1.0, 1.0),
        ("} a stray brace { and \\boxed{7}", 1.0, 1.0),
        ("7", 0.0, 0.0),
    ],
)
def test_the_answer_is_the_last_balanced_box(text, value, parsed):
    score = math_reward(text, exercise("7"))
    assert (score.value, score.parts["parsed"]) == (value, parsed)
    assert score.note == ("" if parsed else "no final answer in the text")


@pytest.mark.parametrize(
    "text", ["<think>6?</think> 7", "<think>6</think> <answer> 7 </answer> done", "\\boxed{7}", "7"]
)
def test_without_a_box_the_text_itself_may_be_the_answer(text):
    assert math_reward(text, exercise("7"), extraction="text").value == 1.0


QUESTION = "<image>How long is AB?\nA. 5 cm\nB. 7 cm\nC. \\sqrt{8}\nD. 12\nChoose one."


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("B", "B", True),
        ("(b)", "B", True),
        ("\\text{B}", "B", True),
        ("B. 7 cm", "B", True),
        ("Option B", "B", True),
        ("7", "B", True),
        ("7 cm", "B", True),
        ("2\\sqrt{2}", "C", True),
        ("5", "B", False),
        ("A", "B", False),
        ("B", "7", True),
        ("C", "2\\sqrt2", True),
        ("A", "7", False),
        ("B", "B. 7 cm", True),
        ("7 cm", "B. 7 cm", True),
        ("E", "B", False),
    ],
)
def test_a_choice_is_named_by_its_letter_or_by_its_value(answer, truth, right):
    text = f"\\boxed{{{answer}}}"
    assert math_reward(text, exercise(truth, QUESTION)).value == right
    for choices in (["5 cm", "7 cm", "\\sqrt{8}", "12"], {"A": "5 cm", "B": "7 cm", "C": "\\sqrt{8}", "D": "12"}):
        assert math_reward(text, exercise(truth, choices=choices)).value == right


def test_lists_and_arrays_accept_any_of_their_entries():
    for truth in (["6", "7"], np.array(["6", "7"]), np.array([6, 7]), np.int64(7), 7, 7.0):
        assert check_answer(exercise(truth)) == []
        assert math_reward("\\boxed{7}", exercise(truth)).value == 1.0
    assert math_reward("\\boxed{8}", exercise(np.array([6, 7]))).value == 0.0


@pytest.mark.parametrize("truth", [None, "", " ", [], {"a": 1}, float("nan"), True, ["7", ""]])
def test_a_ground_truth_that_is_no_answer_is_a_fault(truth):
    assert [field for field, _ in check_answer(exercise(truth))] == ["reward_model.ground_truth"]
    with pytest.raises(DataError, match=r"^m\.parquet, row 1, field reward_model\.ground_truth: "):
        math_reward("\\boxed{7}", exercise(truth))


@pytest.mark.parametrize(
    "noise", ["\\boxed{", "{", "}", "a , ", "x" + " " * 30_000, "\\boxed{}", "<answer>", "$", "\\", "9", "(", "1 "]
)
def test_a_degenerate_answer_of_a_hundred_thousand_characters_is_graded(noise):
    text = noise * (100_000 // len(noise))
    assert math_reward(text, exercise("7")).value == 0.0
    assert math_reward(text + " \\boxed{7}", exercise("7")).value == 1.0
    assert math_reward(text, exercise("7"), extraction="text").value == 0.0


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        (r"6.02\times10^{23}", 6.02e23, True),
        (r"10^{22}", 1e22, True),
        (r"5.972\times 10^{24}", "5.972e24", True),
        (r"1.7\times10^{25}", r"17\times10^{24}", True),
        (r"1.7\times10^{25}", r"17\times10^{25}", False),
        (r"5.973\times 10^{24}", "5.972e24", False),
        ("98765432109876543", "98765432109876544", False),
        (r"2^{90}+1", r"2^{90}", False),
        ("2000001", "2000000", False),
    ],
)
def test_large_numbers_are_as_exact_as_they_are_written(answer, truth, same):
    assert math_reward(rf"\boxed{{{answer}}}", Task("t", "s", (), (), truth, {}, "r")).value == same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("12,000 m", "12 km", True),
        ("2.25 kg", "2{,}250 g", True),
        ("2,250 g", "2.3 kg", False),
        (r"1,500\pi", r"1500\pi", True),
        ("(1,500)", "(1, 500)", True),
    ],
)
def test_a_comma_of_thousands_may_stand_in_any_number(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        (r"0.\overline{6}", "2/3", True),
        (r"0.\bar{6}", r"\frac{2}{3}", True),
        (r"0.\dot6", "2/3", True),
        (r"2.1\overline{6}", "13/6", True),
        (r"-0.\overline{27}", "-3/11", True),
        (r"0.\dot{1}4285\dot{7}", "1/7", True),
        (r"0.\overline{6}", "0.6", False),
        (r"0.\overline{27}", "0.27", False),
        (r"0.5\overline{AB}", r"\frac{AB}{2}", True),
    ],
)
def test_repeating_decimals_are_fractions(answer, truth, same):
    assert same_answer(answer, truth) is same


def test_expressions_with_variables_are_told_apart_below_the_digits_of_decimals():
    assert not same_answer(r"y+10^{-17}", r"y+3\cdot10^{-17}")
    assert same_answer(r"y+10^{-17}", r"10^{-17}+y")


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("exactly 9", "9", True),
        ("half", "0.5", True),
        ("one half", r"\frac{1}{2}", True),
        ("³⁄₄", "3/4", True),
        ("\u20119", "-9", True),
        ("9'", "9", False),
        ("9...", "9", False),
        ("9.", "9", True),
        ("'9'.", "9", True),
    ],
)
def test_marks_behind_a_number_and_words_before_it_are_read(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The excluded value is x = 9", True),
        ("probability of failure = 9", True),
        ("This contradicts x = 9", False),
        ("we exclude x = 9", False),
        ("if x = 9", False),
        ("x is not = 9", False),
    ],
)
def test_an_equation_that_is_denied_says_nothing(answer, same):
    assert same_answer(answer, "9") is same
