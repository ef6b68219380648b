from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from foveate.errors import DataError
from foveate.records import Image, Task
from foveate.registry import resolve
from foveate.rewards import REWARDS
from foveate.rewards.box_text import parse_box, parse_boxes
from foveate.rewards.boxes import check_box, giou, grounding_reward, iou, to_whole_pixels, truth_box

DATA = Path(__file__).parent.parent / "data"


def grounding_task(answer, **meta):
    return Task("t", "grounding", (), (), answer, meta or {"width": 640, "height": 480}, "x.parquet, row 3")


def test_every_case_of_the_predecessors_reward_is_equal():
    cases = json.loads(gzip.decompress((DATA / "grounding_reward.json.gz").read_bytes()))
    assert len(cases) == 1100
    for case in cases:
        task = grounding_task(case["answer"], width=case["width"], height=case["height"])
        score = grounding_reward(
            case["text"], task, kind=case["kind"], alpha=case["alpha"], threshold=case["threshold"]
        )
        assert score.value == pytest.approx(case["reward"], abs=1e-12), case


@pytest.mark.parametrize("answer", [(10, 20, 300, 400), np.array([10, 20, 300, 400]), "[10, 20, 300, 400]"])
def test_lists_tuples_arrays_and_json_are_the_same_ground_truth(answer):
    text = "[12, 25, 310, 390]"
    assert grounding_reward(text, grounding_task(answer)) == grounding_reward(text, grounding_task([10, 20, 300, 400]))


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("[1,2,3,4] then [5,6,7,8]", (5, 6, 7, 8), (1, 2, 3, 4)),
        ("<box>[[5,6,7,8]]</box>", (5, 6, 7, 8), (5, 6, 7, 8)),
        ("[1,2,3,4] then [5,6]", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("[5,6] then 1 2 3 4", None, None),
        ('{"x1": 1, "y1": 2, "x2": 3, "y2": 4}', (1, 2, 3, 4), (1, 2, 3, 4)),
        ('[{"y2": 4, "x2": 3, "y1": 2, "x1": 1}]', (1, 2, 3, 4), (1, 2, 3, 4)),
        ("xmin=1, ymin=2, xmax=3, ymax=4", (1, 2, 3, 4), (1, 2, 3, 4)),
        ('{"x": 1, "y": 2, "width": 10, "height": 20}', (1, 2, 11, 22), (1, 2, 11, 22)),
        ('{"x1": 1, "y1": 2, "x2": 3, "y2": 4} or {"x1": 5, "y1": 6, "x2": 7, "y2": 8}', (5, 6, 7, 8), (1, 2, 3, 4)),
        ('{"x1": 1, "y1": 2, "x2": 3}', None, None),
        ("box_2d of img1: x1 y1 x2 y2", None, None),
        ("[[1,2],[3,4]]", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("[1,2], [3,4]", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("<box>(1,2),(3,4)</box>", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("[[1,2],[3,4],[5,6]]", None, None),
        ("[1,2] and then, somewhere else, [3,4]", None, None),
        ("[5,6] then [1,2,3,4,9]", (1, 2, 3, 4), (1, 2, 3, 4)),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "dog 9"}]', (1, 2, 3, 4), (1, 2, 3, 4)),
        ("<answer>[1,2,3,4]</answer> or [5,6,7,8]", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("<answer>[1,2,3,4]</answer> <answer>[5,6,7,8]</answer>", (5, 6, 7, 8), (1, 2, 3, 4)),
        ("<answer>[1,2,3,4]</answer> <answer>[5,6,7,8]", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("</answer> [5,6,7,8] <answer>", (5, 6, 7, 8), (5, 6, 7, 8)),
        ("<answer>none</answer> [5,6,7,8]", (5, 6, 7, 8), (5, 6, 7, 8)),
        ("2 dogs at 5 6 7 8", (5, 6, 7, 8), (5, 6, 7, 8)),
        ("[7,8,5,6]", (5, 6, 7, 8), (5, 6, 7, 8)),
        ("[1.5,-.5,3e1,4]", (1.5, -0.5, 30, 4), (1.5, -0.5, 30, 4)),
        ("[1,2,3,1e999]", None, None),
        ("[1,2,nan,4]", None, None),
        ("1 2 3", None, None),
        ("", None, None),
    ],
)
def test_a_box_is_read_from_the_last_or_the_first_bracket(text, last, first):
    assert parse_box(text) == last
    assert parse_box(text, which="first") == first


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('{"left": 10, "top": 20, "width": 30, "height": 40}', (10, 20, 40, 60)),
        ("left=10, top=20, w=30, h=40", (10, 20, 40, 60)),
        ('{"cx": 50, "cy": 60, "w": 20, "h": 40}', (40, 40, 60, 80)),
        ('{"x_center": 50, "y_center": 60, "width": 20, "height": 40}', (40, 40, 60, 80)),
        ('{"left": 10, "top": 20, "right": 30, "bottom": 40}', (10, 20, 30, 40)),
    ],
)
def test_a_box_may_be_given_by_its_size_and_a_corner_or_its_centre(text, box):
    assert parse_box(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[10-20, 30-40]", None),
        ("[10 - 20, 30 - 40]", None),
        ("[-10, 20, 30, 40]", (-10, 20, 30, 40)),
        ("By 2031 there were 5 oaks and 4 elms and 1 pine", None),
        ("The 3 dogs (2 of them brown) sit beside 1 cat and 1 bowl.", None),
        ("10; 20; 30; 40", (10, 20, 30, 40)),
        ("(10, 20) to (30, 40)", (10, 20, 30, 40)),
        ("x1 10 y1 20 x2 30 y2 40", (10, 20, 30, 40)),
        ("The dog is at 10, 20, 30, 40.", (10, 20, 30, 40)),
    ],
)
def test_ranges_and_numbers_scattered_in_prose_are_no_box(text, box):
    assert parse_box(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<think>[10,20,30,40]</think> There is no dog.", None),
        ("<think>[10,20,30,40]</think> [50,60,70,80]", (50, 60, 70, 80)),
        ("<think>[10,20,30,40]</think>\n", (10, 20, 30, 40)),
        ("<think>perhaps [10,20,30,40]", (10, 20, 30, 40)),
    ],
)
def test_a_box_of_the_thoughts_counts_only_where_nothing_follows_them(text, box):
    assert parse_box(text) == box
    assert parse_boxes(text) == ([box] if box else [])


def test_all_boxes_of_an_answer_are_read_in_every_form():
    text = '[1,2,3,4], [[5,6],[7,8]], {"x1": 9, "y1": 10, "x2": 11, "y2": 12}, [1,2]'
    assert parse_boxes(text) == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]


@pytest.mark.parametrize(
    "noise", ["x1", "x1: 5,", "(1,2),", "aaaa", "[1,2],", "[", "1", "<answer>", "</answer>", "[1,2,", "9e", "]"]
)
def test_a_degenerate_answer_of_a_hundred_thousand_characters_is_parsed(noise):
    text = noise * (100_000 // len(noise))
    assert parse_box(text + " [5,6,7,8]") == (5, 6, 7, 8)
    assert parse_box("[5,6,7,8] " + text, which="first") == (5, 6, 7, 8)


def test_pixels_are_rounded_held_inside_and_never_without_area():
    assert to_whole_pixels((0, 0, 1000, 1000), 640, 480) == (0, 0, 639, 479)
    assert to_whole_pixels((-50, 500, 2000, 500), 100, 100) == (0, 50, 99, 51)
    assert to_whole_pixels((1000, 1000, 1000, 1000), 100, 100) == (98, 98, 99, 99)


def test_iou_and_giou_of_known_boxes():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert giou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7 - 2 / 9)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert giou((0, 0, 1, 1), (2, 0, 3, 1)) == pytest.approx(-1 / 3)
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == giou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0


def test_giou_tells_disjoint_boxes_apart_and_no_box_is_worth_least():
    task = grounding_task([0, 0, 100, 100])
    near, far, none = (
        grounding_reward(t, task, kind="giou").value for t in ("[200,0,300,100]", "[900,900,999,999]", "-")
    )
    assert 1 > near > far > none == 0.0


def test_the_size_comes_from_meta_or_else_from_the_first_image():
    with_image = Task("t", "g", (), (Image(Path("a.png"), None, 50, 40),), [100, 100, 480, 480])
    text = "[130, 110, 505, 505]"
    assert grounding_reward(text, with_image) == grounding_reward(
        text, grounding_task([100, 100, 480, 480], width=50, height=40)
    )
    other = grounding_task([100, 100, 480, 480], width=1920, height=1080)
    assert grounding_reward(text, with_image) != grounding_reward(text, other)
    with pytest.raises(DataError, match=r"^x\.parquet, row 3, field images: "):
        grounding_reward(text, grounding_task([1, 2, 3, 4], split="train"))


def test_the_split_of_a_task_does_not_change_the_kind():
    text, truth = "[0, 0, 600, 500]", [0, 0, 500, 500]
    train, test = (grounding_task(truth, width=100, height=100, split=split) for split in ("train", "test"))
    assert grounding_reward(text, train).value == grounding_reward(text, test).value != 1.0


def test_parts_and_note_say_what_happened():
    task = grounding_task([0, 0, 500, 500])
    hit = grounding_reward("[0,0,500,500]", task, kind="eval", threshold=0.9)
    assert (hit.value, hit.note) == (1.0, "")
    assert hit.parts == {"iou": 1.0, "hit": 1.0, "parsed": 1.0}
    miss = grounding_reward("I cannot see it.", task, kind="sigmoid")
    assert (miss.value, miss.note) == (0.0, "no box in the answer")
    assert miss.parts == {"iou": 0.0, "hit": 0.0, "parsed": 0.0}
    half = grounding_reward("[0,0,500,300]", task, kind="eval", threshold=0.9)
    assert (half.value, half.parts["hit"]) == (0.0, 1.0)


def test_an_unknown_kind_names_the_allowed_ones():
    with pytest.raises(DataError, match="unknown kind 'iou'; allowed: mix, sigmoid"):
        grounding_reward("", grounding_task([1, 2, 3, 4]), kind="iou")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ([1, 2, 3], "four finite numbers"),
        ([1, 2, 3, float("nan")], "four finite numbers"),
        ([1, 2, 3, True], "four finite numbers"),
        ("A", "four finite numbers"),
        (7, "four finite numbers"),
        ("12", "four finite numbers"),
        ([30, 2, 30, 4], "no area"),
        ([3, 40, 30, 4], "no area"),
        ([3, 4, 1000.5, 40], "outside the image"),
        ([-1, 4, 100, 40], "outside the image"),
    ],
)
def test_a_ground_truth_that_is_no_box_in_the_picture_is_a_fault(answer, what):
    faults = check_box(grounding_task(answer))
    assert [field for field, _ in faults] == ["reward_model.ground_truth"]
    assert what in faults[0][1]
    if what.startswith("four"):
        with pytest.raises(DataError, match=r"^x\.parquet, row 3, field reward_model\.ground_truth: "):
            truth_box(grounding_task(answer))


def test_a_good_truth_has_no_fault_and_a_missing_size_is_one():
    assert check_box(grounding_task([0, 0.5, 1000, 1000])) == []
    assert [field for field, _ in check_box(grounding_task([0, 0, 10, 10], split="x"))] == ["images"]


def test_the_tables_name_functions_that_exist():
    assert resolve({}, REWARDS["grounding"].function, "reward") is grounding_reward
    assert resolve({}, REWARDS["grounding"].check, "check") is check_box
