"""RefCOCO's rule, against the published evaluation: `data/refcoco_rule.json` holds what its metric lines say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from foveate.records import Image, Task
from foveate.rewards.build import build_reward, truth_check
from foveate.rewards.refcoco import first_fields

CASES = json.loads((Path(__file__).parent.parent / "data" / "refcoco_rule.json").read_text())


def task_of(truth, width, height):
    """A task with a box given in pixels, as `prepare grounding` turns it into thousandths."""
    sides = (width, height, width, height)
    thousandths = [value * 1000 / side for value, side in zip(truth, sides, strict=True)]
    return Task("id", "s", (), (Image(None, b"", width, height),), thousandths, where="a.jsonl, row 0")


def test_there_are_enough_cases_of_both_kinds():
    assert len(CASES) > 120
    assert 40 < sum(case["hit"] for case in CASES) < 80


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_first_box_rule_is_that_of_the_published_evaluation(case):
    score = build_reward("refcoco", {})(case["answer"], task_of(case["truth"], case["width"], case["height"]))
    assert bool(score.value) == case["hit"]
    if case["iou"] is not None and score.parts["parsed"]:
        assert score.parts["iou"] == pytest.approx(max(case["iou"], 0.0), abs=1e-6)


TRUTH = [64, 96, 320, 288]
RULES = {
    "two boxes": ("[100,200,500,600] or [1,2,3,4]", 1.0, 0.0),
    "a box thought of": ("<think>[1,2,30,40]</think>[100,200,500,600]", 0.0, 1.0),
    "in answer tags": ("[1,2,3,4]<answer>[100,200,500,600]</answer>[5,6,7,8]", 0.0, 1.0),
    "corners swapped": ("[500,600,100,200]", 0.0, 1.0),
    "fractions": ("[0.1,0.2,0.5,0.6]", 1.0, 0.0),
    "a word before": ("no [one] but [100,200,500,600]", 0.0, 1.0),
}


@pytest.mark.parametrize("name", RULES)
def test_where_the_two_rules_part(name):
    text, first, last = RULES[name]
    task = task_of(TRUTH, 640, 480)
    assert build_reward("refcoco", {"rule": "first"})(text, task).value == first
    assert build_reward("refcoco", {"rule": "last"})(text, task).value == last


VLMEVALKIT = {
    "[100,200,500,600]": 1.0,
    "[100 200 500 600]": 1.0,
    "[0.1, 0.2, 0.5, 0.6]": 1.0,
    "[500, 600, 100, 200] or [1, 2, 3, 4]": 1.0,
    "[1, 2, 3, 4] or [100, 200, 500, 600]": 0.0,
    "[7] is at 100, 200, 500, 600": 0.0,
    "between 100 and 200, 500 and 600": 1.0,
    '{"x1": 100, "y1": 200, "x2": 500, "y2": 600}': 0.0,
    "[1064, 96, 1320, 288]": 0.0,
    "[1, 2, 3]": 0.0,
    "": 0.0,
}


@pytest.mark.parametrize("text", VLMEVALKIT)
def test_the_rule_of_vlmevalkit_takes_the_first_four_numbers(text):
    assert build_reward("refcoco", {"rule": "vlmevalkit"})(text, task_of(TRUTH, 640, 480)).value == VLMEVALKIT[text]


def test_the_rule_of_vlmevalkit_tells_frames_by_the_largest_number_unless_one_is_set():
    reward, pixels = (build_reward("refcoco", {"rule": "vlmevalkit", **more}) for more in ({}, {"frame": "pixels"}))
    task = task_of([1100, 10, 1900, 500], 2000, 1000)
    assert reward("[1100, 10, 1900, 500]", task).parts["iou"] == 1.0
    assert reward("[550, 10, 950, 500]", task).parts["iou"] == 1.0
    assert pixels("[550, 10, 950, 500]", task).parts["iou"] == 0.0
    assert reward("[1100, 10, 3000, 500]", task).parts["iou"] == pytest.approx(800 / 900)


def test_frames_say_what_the_coordinates_are():
    task = task_of(TRUTH, 640, 480)
    said = {"thousandths": "[100,200,500,600]", "pixels": "[64,96,320,288]", "fractions": "[.1,.2,.5,.6]"}
    for rule in ("first", "last"):
        for frame, text in said.items():
            reward = build_reward("refcoco", {"rule": rule, "frame": frame})
            assert reward(text, task).parts["iou"] == pytest.approx(1.0, abs=1e-6)
    assert build_reward("refcoco", {})(said["pixels"], task).value == 0.0


def test_the_ground_truth_is_checked_as_for_the_reward():
    check = truth_check("refcoco", {"rule": "last"})
    assert check is not None
    assert check(task_of([5, 5, 5, 9], 640, 480))[0][0] == "reward_model.ground_truth"


def test_the_first_box_is_that_of_the_published_pattern_and_found_at_once():
    pattern = re.compile(r"\[+(.*?),(.*?),(.*?),(.*?)\]")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("[[],,,1a \n"), rng.integers(0, 20))) for _ in range(20_000)]
    found = [pattern.search(text) for text in texts]
    assert sum(match is not None for match in found) > 500
    assert [first_fields(text) for text in texts] == [list(match.groups()) if match else None for match in found]
    assert first_fields("[1," * 100_000) is None  # the pattern takes six seconds for a thousandth of this
