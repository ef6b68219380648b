from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import CharDelimiterSplit

from foveate.records import Message, Task
from foveate.registry import ConfigError
from foveate.rewards.build import build_reward
from foveate.rewards.shaping import overlong_penalty
from foveate.rewards.text import (
    exact,
    final_answer,
    format_tags,
    last_box,
    multiple_choice,
    options,
    repetition,
)


def task(answer="", question="What is it?", **meta):
    return Task(
        "t", "text", (Message("system", "A. no"), Message("user", question)), (), answer, meta, "t.parquet, row 1"
    )


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{}", ""),
        ("boxed{1}", None),
        ("\\boxed{1", None),
    ],
)
def test_the_last_balanced_box_is_read(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\fbox{a}", "a"),
        ("\\boxed 12.", "12"),
        ("\\boxed\\pi", "\\pi"),
        ("\\\\boxed{\\\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("$\\boxed{1}$, $\\boxed{2}$, and $\\boxed{3}$", "1, 2, 3"),
        ("x = \\boxed{1}, y = \\boxed{2}", "x=1, y=2"),
        ("\\boxed{1}\n\\boxed{1}", "1"),
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{1} is the side. The area is \\boxed{2}", "2"),
    ],
)
def test_boxes_joined_by_short_text_are_one_list(text, box):
    assert final_answer(text, "box") == box


@pytest.mark.parametrize(
    ("text", "in_box", "anywhere"),
    [
        ("<think>\\boxed{1}</think> \\boxed{2}", "2", "2"),
        ("<think>\\boxed{1}</think><answer>2</answer>", None, "2"),
        ("<think>\\boxed{1}</think> 2", None, "2"),
        ("\\boxed{1}</think> 2", None, "2"),
        ("<think>\\boxed{1}</think>\n", "1", "1"),
        ("<think>\\boxed{1}", "1", "1"),
    ],
)
def test_a_box_in_the_thoughts_never_beats_what_follows_them(text, in_box, anywhere):
    assert final_answer(text, "box") == in_box
    assert final_answer(text, "text") == anywhere


def test_a_final_answer_is_in_the_box_the_tags_or_after_the_thought():
    assert final_answer("<answer>a</answer> \\boxed{b} c", "text") == "b"
    assert final_answer("<think>x</think> <answer>a</answer> c", "text") == "a"
    assert final_answer("<think>x</think> y</think> c", "text") == "c"
    assert final_answer("c", "text") == "c"
    assert final_answer(" ", "text") is final_answer("c", "box") is None


@pytest.mark.parametrize(
    "question",
    [
        "Which?\nA. a cat\nB. a dog\nC. an A. B. C. book",
        "Which? (A) a cat (B) a dog (C) an A. B. C. book",
        "Which?\nA: a cat\nB: a dog\nC: an A. B. C. book\nAnswer with the letter.",
    ],
)
def test_options_are_read_from_the_question_or_from_the_row(question):
    read = options(task(question=question.replace("an A. B. C. book", "a book")))
    assert read == {"A": "a cat", "B": "a dog", "C": "a book"}
    assert options(task(question=question, choices=["x", 2])) == {"A": "x", "B": "2"}
    assert options(task(question=question, options={"a": "x", "b": "y"})) == {"A": "x", "B": "y"}
    assert options(task(question="A. only one")) == options(task(question="B. x C. y")) == {}


@pytest.mark.parametrize(
    ("text", "truth", "value"),
    [
        ("\\boxed{B}", "B", 1.0),
        ("\\boxed{a dog}", "B", 1.0),
        ("\\boxed{b}", "a dog", 1.0),
        ("\\boxed{A dog.}", "a dog", 1.0),
        ("\\boxed{A}", "B", 0.0),
        ("\\boxed{a cat}", "B", 0.0),
        ("\\boxed{a bird}", "B", 0.0),
        ("B", "B", 0.0),
    ],
)
def test_multiple_choice_takes_letter_or_value(text, truth, value):
    question = "Which?\nA. a cat\nB. a dog"
    assert multiple_choice(text, task(truth, question)).value == value


def test_exact_compares_plain_or_literally():
    assert exact("<answer> The  RED\tone. </answer>", task("the red one")).value == 1.0
    assert exact("the red one", task(["blue", "the red one"])).value == 1.0
    assert exact("The red one", task("the red one"), normalise=False).value == 0.0
    assert exact("the redone", task("the red one")).value == 0.0
    assert exact("red", task("red"), extraction="box").note == "no final answer in the text"


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        ("\n<think>a</think>\n<answer>b</answer>\n", 1.0, 1.0),
        ("<think>a</think> so <answer>b</answer> done", 0.0, 1.0),
        ("well <think>a</think><answer>b</answer>", 0.0, 0.0),
        ("<answer>b</answer><think>a</think>", 0.0, 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0, 0.0),
        ("<think>a<answer>b</answer></think>", 0.0, 0.0),
        ("<think>a</think>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_sections_must_stand_once_and_in_order(text, strict, loose):
    assert format_tags(text, task()).value == strict
    assert format_tags(text, task(), strict=False).value == loose


def test_the_overlong_punishment_falls_in_a_line_over_the_buffer():
    assert [overlong_penalty(n, 100, 20) for n in (0, 80, 85, 90, 100, 101, 10_000)] == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_overlong_counts_words_or_the_tokens_of_a_tokenizer(tmp_path):
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = CharDelimiterSplit("-")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a-b-c-d d d"
    words = build_reward("overlong", {"limit": 4, "buffer": 2})(text, task())
    tokens = build_reward("overlong", {"limit": 4, "buffer": 2, "tokenizer": str(tmp_path)})(text, task())
    assert (words.value, words.parts["length"]) == (-0.5, 3.0)
    assert (tokens.value, tokens.parts["length"]) == (-1.0, 4.0)
    with pytest.raises(ConfigError, match=r"buffer must be in 1\.\.limit, found buffer 5 and limit 4"):
        build_reward("overlong", {"limit": 4, "buffer": 5})
    with pytest.raises(ConfigError, match=r"no nowhere.tokenizer\.json"):
        build_reward("overlong", {"limit": 4, "buffer": 2, "tokenizer": "nowhere"})


def test_repetition_is_the_share_of_words_said_before():
    assert repetition("a b c d e f g", task()).value == 0.0
    assert repetition("a b c a b c a b c", task(), size=3).value == pytest.approx(-4 / 7)
    assert repetition("A a a a", task(), size=1).value == -0.75
    assert repetition("a a", task(), size=3).value == repetition("", task()).value == 0.0


@pytest.mark.parametrize(
    ("behind", "extraction", "said"),
    [
        ("Correction: I misread it, so my final answer is 12.", "text", "12"),
        ("Correction: I misread it, so my final answer is 12.", "box", "7"),
        ("A common mistake is to think that the answer is 12.", "text", "7"),
        ("The final answer is 7.", "text", "7"),
    ],
)
def test_a_box_gives_way_to_its_correction_where_the_text_counts(behind, extraction, said):
    found = final_answer(rf"\boxed{{7}} {behind}", extraction)
    assert found is not None
    assert said in found
    assert ("12" in found) is (said == "12")
