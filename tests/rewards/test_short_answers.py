"""Rewards of short answers on constructed cases: text, lists, counts, numbers, orders, clicks, web actions.

The cases were held against Vero's verifiers; where the values differ, the rule is in docs/rewards.md.
"""

from __future__ import annotations

import json

import pytest

from foveate.records import Task
from foveate.rewards.box_text import parse_point
from foveate.rewards.build import build_reward, truth_check
from foveate.rewards.strings import normalised


def task(answer, **meta):
    return Task("t", "s", (), (), answer, meta, "c.parquet, row 4")


CASES = {
    "string_match": [
        (1, "\\boxed{Paris}", "paris"),
        (1, "<think>Rome?</think><answer>It is \\boxed{The  Eiffel Tower.}</answer>", "eiffel tower"),
        (1, "\\boxed{\\text{café}}", "CAFE"),
        (1, "1,234.0", "1234"),
        (1, "$5", "5"),
        (1, "5%", "5"),
        (1, ".5", "0.5"),
        (1, "don’t", "don't"),
        (1, "dog", ["cat", "dog"]),
        (1, "dog", "['cat', \"dog\"]"),
        (1, "+", "+"),
        (1, "vitamin A", "Vitamin a."),
        (0, "vitamin", "vitamin a"),
        (0, "-5", "5"),
        (0, "3 5", "3.5"),
        (0, "1 2", "1/2"),
        (0, "か", "が"),
        (0, "cats", "cat"),
        (0, "+", "-"),
        (0, "", "x"),
        (1, "1½", "1 1/2"),
        (1, "10^2", "10²"),
        (1, "m²", "m2"),
        (1, "A -> B", "A → B"),
        (1, "x≥3", "x >= 3"),
        (1, "+5", "5"),
        (1, "= 5", "5"),
        (1, "≈ 5", "~5"),
        (0, "A+", "A"),
        (1, "3 / 4", "3/4"),
        (1, "a", "{'a', 'b'}"),
        (0, "C#", "C++"),
        (0, "C", "C++"),
        (0, "x < 3", "x > 3"),
        (0, "a = b", "a ≠ b"),
        (0, "x - 5", "x + 5"),
        (0, "102", "10²"),
        (0, "11/2", "1½"),
    ],
    "string_list": [
        (1, "\\boxed{b, a and c}", ["a", "b", "c"]),
        (1, '["x, y", "z"]', ["z", "x, y"]),
        (1, "red; green", "['green', 'red']"),
        (0.8, "a, b", ["a", "b", "c"]),
        (0.4, "a, a", ["a", "b", "c"]),
        (0, "d", ["a"]),
        (1, "1. a\n2. b", ["a", "b"]),
        (1, "salt and pepper, oil", ["oil", "salt and pepper"]),
        (1, "a & b", ["a", "b"]),
        (1, "+, -", ["-", "+"]),
        (0, "!, ?", ["+", "-"]),
    ],
    "counting": [
        (1, "\\boxed{7}", 7),
        (1, "There are seven birds.", "7"),
        (1, "I see 12 of them", "12"),
        (1, "none", 0),
        (1, "No, there are 5.", 5),
        (1, "twenty-one", "21"),
        (1, "1,024", 1024),
        (0, "between 3 and 5", 3),
        (0, "-4", 4),
        (0, "many", 4),
        (0, "eight", "7"),
        (1, "There are no birds.", 0),
        (1, "7 (seven) of them", 7),
        (1, "the 2nd row has 7", 7),
        (1, "2 dozen", 24),
        (1, "7, one of them hidden", 7),
        (1, "x" * 500 + " 7", 7),
        (0, "7 or eight", 7),
        (0, "7 million", 7),
        (0, "7e3", 7),
        (0, "7.5e3", 7),
        (0, "7th", 7),
        (0, "7%", 7),
        (0, "7,000%", 7),
        (1, "7, 7", 7),
        (0, "7,8", 8),
        (0, "7" * 5000, 7),
        (0, "not 7", 7),
        (0, "more than 7", 7),
        (0, "at least seven", 7),
        (0, "no idea", 0),
        (0, "no fewer than many", 0),
        (0, "7 " + "x" * 500 + " 8", 7),
    ],
    "numeric": [
        (1, "\\boxed{105}", "100"),
        (0, "105.01", "100"),
        (1, "1.05", "1"),
        (1, "95", 100),
        (0, "94.9", 100),
        (0, "0.01", "0"),
        (1, "0", "0"),
        (1, "50%", "0.5"),
        (1, "50%", "50"),
        (1, "$1,200", "1,250"),
        (1, "3.2 million", "3200000"),
        (1, "\\frac{1}{2}", "0.5"),
        (1, "1/4", "0.26"),
        (1, "2.5 \\times 10^{3}", "2500"),
        (1, "x = -4", "-4"),
        (1, "12 km", "12"),
        (1, "\\(12\\)", "12"),
        (1, "twelve", "12"),
        (1, "The total is 12.", "12"),
        (1, "−3", "-3"),
        (0, "3", "-3"),
        (0, "about twice", "2"),
        (0, "1/0", "1"),
        (1, "5½", "5.5"),
        (1, "5 1/2", "5.5"),
        (1, "two and a half hours", "2.5"),
        (1, "10^5", "100000"),
        (1, "100k", "100000"),
        (1, "3.2 bn", "3200000000"),
        (1, "$2.5M", "2.5 million"),
        (1, "300K", "300"),
        (1, "30^{\\circ}", "30"),
        (1, "3 times", "3"),
        (0, "two and a half hours", "2"),
        (0, "5½", "5"),
        (0, "2\\sqrt{3}", "2"),
        (0, "3\\pi", "3"),
        (0, "5x", "5"),
        (0, "100k", "100"),
        (0, "100 hundred", "100"),
        (0, "100 or fifty", "100"),
        (0, "100, fifty", "100"),
        (0, "100 squared", "100"),
        (0, "5" + " " * 190 + "#", "5"),
    ],
    "chartqa": [
        (1, "Yes", "yes"),
        (1, "51", "50"),
        (1, "Asia", ["Europe", "Asia"]),
        (0, "54", "50"),
        (1, "12 %", "12%"),
    ],
    "number_list": [
        (1, "\\boxed{[3, 1, 2]}", [3, 1, 2]),
        (1, "3-1-2", "3, 1, 2"),
        (0.2 / 3, "3, 2, 1", [3, 1, 2]),
        (0, "2, 3, 1", [3, 1, 2]),
        (0, "3, 1", [3, 1, 2]),
        (0, "3, 1, 1", [3, 1, 2]),
        (1, "3, 1, 2", [3, "1", "2"]),
        (1, "1, 1, 2", [1, 1, 2]),
        (1, "-1, 2.5", "-1, 2.5"),
    ],
    "click": [
        (1, '[{"point_2d": [150, 250]}]', [100, 200, 200, 300]),
        (1, "click(100, 300)", [100, 200, 200, 300]),
        (1, '<point x="150" y="250">', '[{"bbox_2d": [100, 200, 200, 300], "label": "ok"}]'),
        (1, "[100, 200, 200, 300]", [100, 200, 200, 300]),
        (1, "(0, 0), (300, 500)", [100, 200, 200, 300]),
        (1, "150, 250", [100, 200, 200, 300]),
        (1, "Not at [1, 1]. Click at [820, 30]", [[100, 200, 200, 300], [800, 0, 900, 50]]),
        (0, "[99, 250]", [100, 200, 200, 300]),
        (0, "top left", [100, 200, 200, 300]),
    ],
    "web_action": [
        (1, '{"ACTION": "CLICK", "MARK": 3, "VALUE": "None"}', "{'ACTION': 'CLICK', 'MARK': 3, 'VALUE': 'None'}"),
        (1, "```json\n{\"action\": \"click\", \"mark\": \"3\"}\n```", {"ACTION": "CLICK", "MARK": 3}),
        (1, "{'ACTION': 'TYPE', 'MARK': 9, 'VALUE': 'a b '}", {"ACTION": "TYPE", "MARK": -1, "VALUE": "a b"}),
        (2 / 3, '{"ACTION": "TYPE", "MARK": 3, "VALUE": "x"}', {"ACTION": "TYPE", "MARK": 3, "VALUE": "y"}),
        (0.5, '{"ACTION": "CLICK"}', {"ACTION": "CLICK", "MARK": 3}),
        (0, "CLICK 3", {"ACTION": "CLICK", "MARK": 3}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_constructed_answers_get_the_values_of_their_rule(name):
    reward = build_reward(name, {})
    for value, text, truth in CASES[name]:
        score = reward(text, task(truth))
        assert score.value == pytest.approx(value), (text, truth, score)
        assert 0 <= score.parts["parsed"] <= 1
        check = truth_check(name)
        assert check is not None
        assert check(task(truth, width=1000, height=1000)) == [], (name, truth)


@pytest.mark.parametrize(
    ("name", "truth", "meta", "message"),
    [
        ("string_match", {"a": 1}, {}, "is no answer"),
        ("string_match", ["a", ""], {}, "has an empty entry"),
        ("string_list", '["a", " "]', {}, "has an empty entry"),
        ("string_match", "[]", {}, "is empty"),
        ("number_list", [1, None], {}, "something else beside them"),
        ("number_list", [1.0, float("nan")], {}, "something else beside them"),
        ("numeric", "2\\sqrt{3}", {}, "is no number"),
        ("string_list", "red", {}, "no list of texts"),
        ("search", None, {}, "is missing; the reward search"),
        ("counting", "-2", {}, "no count"),
        ("counting", "several", {}, "no count"),
        ("numeric", "Asia", {}, "is no number; write it in digits, or choose the reward math or chartqa"),
        ("numeric", "5", {"tolerance": -1}, "is no number from 0 on"),
        ("number_list", "none", {}, "holds no number"),
        ("click", [], {"width": 9, "height": 9}, "holds no box"),
        ("click", "here", {"width": 9, "height": 9}, "no list of boxes"),
        ("web_action", {"VALUE": "None"}, {}, "is no action"),
    ],
)
def test_a_ground_truth_of_another_form_is_a_fault(name, truth, meta, message):
    check = truth_check(name)
    assert check is not None
    [(field, fault)] = check(task(truth, **meta))
    assert message in fault
    assert field.startswith(("reward_model.ground_truth", "extra_info.tolerance"))


def test_a_row_gives_its_own_tolerance_and_0_wants_the_number_itself():
    reward = build_reward("numeric", {})
    assert reward("110", task("100", tolerance=0.1)).value == 1.0
    assert reward("101", task("100", tolerance=0.0)).value == 0.0
    assert reward("100.0000001", task("100", tolerance=0)).value == 1.0
    strict = build_reward("numeric", {"tolerance": 0.0})
    assert [strict(text, task("3.14")).value for text in ("3.14", "3.15")] == [1.0, 0.0]


def test_a_search_with_options_is_multiple_choice():
    choices = task("B", options=["red", "blue"])
    reward = build_reward("search", {})
    assert [reward(text, choices).value for text in ("\\boxed{B}", "blue", "A")] == [1.0, 1.0, 0.0]
    assert reward("Blue.", task("blue")).value == 1.0


def test_frames_of_clicks_are_brought_together():
    row = task([0, 0, 320, 240], width=640, height=480)
    assert build_reward("click", {"truth_frame": "pixels"})("[500, 500]", row).value == 1.0
    both = build_reward("click", {"truth_frame": "pixels", "answer_frame": "pixels"})
    assert [both(text, row).value for text in ("[320, 240]", "[321, 240]")] == [1.0, 0.0]
    score = build_reward("click", {})("[500, 540]", task([400, 400, 600, 600]))
    assert score.parts == {"accuracy": 1.0, "distance": 40.0, "parsed": 1.0}


def test_points_are_read_from_all_their_forms():
    assert parse_point("[1, 2]. Then [3, 4]", "first") == (1.0, 2.0)
    assert parse_point("<think>[1, 2]</think> x=3, y=4") == (3.0, 4.0)
    assert parse_point('{"x": 5, "y": 6}') == (5.0, 6.0)
    assert parse_point("<answer>(7, 8)</answer> or (9, 9)") == (7.0, 8.0)
    assert parse_point("3 of 4 and 5") is None


def test_the_normal_form_keeps_what_tells_numbers_apart():
    assert [normalised(text) for text in ("The 7:30 train", "-0.50", "v2.0", "A", "a b")] == [
        "7 30 train", "-0.50", "v2.0", "a", "a b",
    ]  # fmt: skip


def test_located_boxes_count_place_hits_and_misses():
    truth = [[0, 0, 100, 100], [500, 500, 600, 600]]
    reward = build_reward("boxes", {"kind": "located"})
    row = task(truth, width=1000, height=1000)
    assert reward(json.dumps(truth), row).value == 1.0  # 1 + 0.75, held to 1
    assert reward("[0, 0, 100, 100]", row).value == 1.0  # 1 + 0.75 * 2/3 - 0.25 * 1/2
    assert reward("[0, 0, 100, 60]", row).value == pytest.approx(0.6 + 0.5 - 0.125, abs=0.02)
    assert reward("[700, 0, 800, 60]", row).value == 0.0
