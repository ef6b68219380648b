from __future__ import annotations

import json

import numpy as np
import pytest

from foveate.data.table import open_tasks
from foveate.records import Message, Task
from foveate.rewards.choices import named_option, options, several_options
from foveate.rewards.text import check_choice, check_letter, multiple_choice

VALUES = {"A": "oak", "B": "pine", "C": "birch", "D": "an old elm"}


def choice(truth, question="Which tree?", **meta):
    return Task("t", "mc", (Message("user", question),), (), truth, meta, "mc.jsonl, row 0")


@pytest.mark.parametrize(
    "text",
    [
        "B", "(B)", "b.", "B) pine", "Pine.", "**B**", "Answer: B", "Answer: $B$", "The answer is B.", "ANSWER: (B)",
        "The correct option is **B**, since it has needles.", "Option B is correct.", "I choose B.", "B is the answer.",
        "It cannot be A. Therefore the answer is (B) pine.", "Needles.\n\nB", "Final answer: pine", "答案是B。",
        "选项B",
        "Option A is incorrect. Option B is right.", "Not C but B. So the final answer is B.", "It's B.", "So, B!",
        "The answer is B; A is wrong.", "Definitely B.", "The answer is 'B'.", "Answer - B", "maybe B?", "B it is.",
        "Of all trees, B fits best.", "So I'd say pine.", "It looks like a pine, not an oak.", "I think it's a pine.",
        "Pine (B)", "It must be a pine.", "Options A, C and D can be excluded, leaving B.", "B项正确",
        "I'm going with pine.", "The answer is B; not A.",
        "Looking at the needles, (B) is most likely.", "Based on the bark, the answer should be B",
    ],
)  # fmt: skip
def test_an_option_is_read_from_ordinary_sentences(text):
    assert named_option(text, VALUES) == "B"
    assert multiple_choice(text, choice("B", choices=list(VALUES.values())), extraction="text").value == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "A or B", "B. oak", "The answer is not B.", "A tree stands there.", "BBB",
        "I see a pine and an oak.", "E", "", "The answer is A or B.", "It cannot be B.",
        "The answer is pine (A)", "B (oak)", "Definitely not B.", "I wouldn't say pine.",
        "It doesn't look like a pine.",
        "I see A dog.", "I choose a tree.", "Options A, B and D can be excluded.",
        "I'd say spruce.", "There is no pine here.", "The answer is B; A is right, too.",
        "It is hard to say.", "Options A and C are both right.", "I do not know.",
    ],
)  # fmt: skip
def test_an_answer_that_names_no_option_or_several_is_unreadable(text):
    assert named_option(text, VALUES) is None
    score = multiple_choice(text, choice("B", choices=list(VALUES.values())), extraction="text")
    assert (score.value, score.parts["parsed"]) == (0.0, 0.0)
    assert score.note


@pytest.mark.parametrize(
    "meta",
    [
        {"choices": ["oak", "pine"]},
        {"options": np.array(["oak", "pine"])},
        {"options": '["oak", "pine"]'},
        {"choices": "['oak', 'pine']"},
        {"choices": {"a": "oak", "b": "pine"}},
        {"choices": '{"A": "oak", "B": "pine"}'},
        {"choices": ["A. oak", "B. pine"]},
        {"choices": ["(A) oak", "(B) pine"]},
        {"choices": ["(a) oak", "(b) pine"]},
        {"choices": ["a. oak", "b. pine"]},
        {"choices": "A. oak\nB. pine"},
        {"A": "oak", "B": "pine", "C": None, "split": "test"},
        {"option_a": "oak", "option_b": "pine"},
    ],
)
def test_options_stand_in_lists_texts_mappings_and_columns(meta):
    assert options(choice("B", **meta)) == {"A": "oak", "B": "pine"}


@pytest.mark.parametrize("gap", [" ", "\t", "\n", " \n", "\u3000"])
def test_white_space_of_any_length_is_one_gap(gap):
    """Many times over it took minutes."""
    for text in (f"Option A{gap * 20_000}x", f"A{gap * 20_000}x", f"A,{gap * 20_000}B"):
        assert named_option(text, VALUES) in ("A", None)
        assert not several_options(text + "C, D are", VALUES)


def test_options_of_a_verl_row_may_stand_in_extra_info_alone(tmp_path):
    row = {
        "data_source": "trees", "prompt": [{"role": "user", "content": "Which tree?"}],
        "reward_model": {"ground_truth": "pine"}, "extra_info": {"choices": ["oak", "pine"]},
    }  # fmt: skip
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    task = open_tasks(tmp_path / "x.jsonl")[0]
    assert check_choice(task) == []
    assert [multiple_choice(f"\\boxed{{{said}}}", task).value for said in ("B", "pine", "(b)", "A", "oak")] == [
        1,
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("question", ["Which?\nA．oak\nB．pine", "Which?\nA、oak\nB、pine", "哪个？（A）oak （B）pine"])
def test_options_of_a_question_may_have_chinese_marks(question):
    assert options(choice("B", question)) == {"A": "oak", "B": "pine"}


def test_numbers_mark_options_only_where_choices_are_asked_for():
    asked = "Which?\n1. oak\n2. pine"
    assert options(choice("2", asked), numbered=True) == {"1": "oak", "2": "pine"}
    assert options(choice("2", asked)) == {}
    assert multiple_choice("\\boxed{pine}", choice("2", asked)).value == 1.0
    assert multiple_choice("\\boxed{oak}", choice("2", asked)).value == 0.0


@pytest.mark.parametrize(
    ("truth", "right"),
    [("B", 1), (1, 1), ("1", 1), ("pine", 1), ("(B)", 1), (np.int64(1), 1), (1.0, 1), (0, 0), ("A", 0)],
)
def test_a_truth_is_a_label_a_value_or_an_index_from_0(truth, right):
    assert multiple_choice("\\boxed{B}", choice(truth, choices=["oak", "pine"])).value == right
    assert check_choice(choice(truth, choices=["oak", "pine"])) == []


def test_a_truth_of_several_letters_wants_them_all():
    task = choice("A, C", choices=["oak", "pine", "elm"])
    assert multiple_choice("\\boxed{C and A}", task).value == 1.0
    assert multiple_choice("\\boxed{A} and \\boxed{C}", task).value == 1.0
    for said in ("(A) and (C)", "Both A and C are correct.", "Options A and C are correct.", "AC", "A、C"):
        assert multiple_choice(said, task, extraction="text").value == 1.0
    for said in ("A, B and C", "Options A and C are wrong.", "A or C"):
        assert multiple_choice(said, task, extraction="text").value == 0.0
    assert multiple_choice("\\boxed{A}", task).value == 0.0
    assert check_choice(task) == []


@pytest.mark.parametrize(
    "said",
    ["oak, pine", "oak; pine", "oak, or maybe pine", "A. oak B. pine", "A. oak\nB. pine\nC. elm", "A oak, B pine",
     "A.B", "A.B.C", "A,,B", "A... B", "A -> B", "A (or B)", "A, but maybe B", "Oak, pine, elm."],
)  # fmt: skip
def test_an_answer_that_lists_options_names_none(said):
    score = multiple_choice(said, choice("A", choices=["oak", "pine", "elm"]), extraction="text")
    assert (score.value, score.parts["parsed"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    "said",
    ["A, I think.", "Option A, I believe.", "A. oak. B. pine is wrong because of its needles.", "oak, not pine",
     "oak, because pine is wrong", "A. oak B. pine C. elm. The answer is A.", "A. A tree with lobed leaves.",
     "It is an oak or a pine; the leaves have lobes.\nOak."],
)  # fmt: skip
def test_other_options_may_be_spoken_of_beside_the_one_that_is_chosen(said):
    assert multiple_choice(said, choice("A", choices=["oak", "pine", "elm"]), extraction="text").value == 1.0


def test_an_index_is_no_answer():
    task = choice(1, choices=["1", "2", "3"])
    assert [multiple_choice(said, task, extraction="text").value for said in ("1", "2", "B")] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("truth", ["E", "spruce", 7, -1, "A, E"])
def test_a_truth_that_is_no_option_is_a_fault(truth):
    [(field, fault)] = check_choice(choice(truth, choices=["oak", "pine"]))
    assert field == "reward_model.ground_truth"
    assert "none of the options A (oak), B (pine)" in fault


def test_a_letter_that_is_no_option_is_a_fault_of_mathematical_rows_too():
    [(field, fault)] = check_letter(choice("E", choices=["5", "7"]))
    assert (field, fault) == ("reward_model.ground_truth", "'E' is none of the options A, B")
    for sound in (choice("B", choices=["5", "7"]), choice("\\frac{14}{2}", choices=["5", "7"]), choice("E")):
        assert check_letter(sound) == []


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (r"130^\circ", "C"), (r"130^{\circ}", "C"), ("130 °", "C"), ("130", "C"), (r"140^\circ", "D"),
        (r"13^\circ", None),
        (r"2 \sqrt{3}", "A"), ("2√3", "A"), (r"2\sqrt{2}", None), (r"\dfrac{1}{2}", "B"), ("½", "B"), ("1/3", None),
        (r"50\%", "E"), (r"3\pi", "F"), (r"\left(2, 5\right)", None),
    ],
)  # fmt: skip
def test_a_value_is_the_same_option_in_latex_and_as_typed(answer, label):
    values = {"A": r"$2\sqrt{3}$", "B": r"$\frac{1}{2}$", "C": "130°", "D": "140°", "E": "50%", "F": "3π"}
    assert named_option(answer, values) == label
    assert named_option(rf"So it is ${answer}$.", values) == label
