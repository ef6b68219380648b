from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from foveate.errors import DataError
from foveate.records import Task
from foveate.rewards.boxes import grounding_reward
from foveate.rewards.build import truth_check
from foveate.rewards.matching import best_pairs, boxes_reward, check_boxes


def scene(answer, **meta):
    return Task("t", "boxes", (), (), answer, meta or {"width": 1000, "height": 1000}, "b.parquet, row 2")


def test_the_pairs_have_the_greatest_total():
    generator = np.random.default_rng(0)
    for _ in range(300):
        rows, columns = map(int, generator.integers(1, 6, 2))
        value = generator.random((rows, columns)).round(1)
        pairs = best_pairs(value.tolist())
        count = min(rows, columns)
        best = max(
            sum(value[i, j] for i, j in zip(chosen, order, strict=True))
            for chosen in combinations(range(rows), count)
            for order in permutations(range(columns), count)
        )
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) == count
        assert sum(value[i, j] for i, j in pairs) == pytest.approx(best)


def test_no_boxes_make_no_pairs():
    assert best_pairs([]) == best_pairs([[], []]) == []


TWO = [[0, 0, 100, 100], [500, 500, 700, 700]]


@pytest.mark.parametrize(
    ("text", "f1", "soft_f1"),
    [
        ("[500,500,700,700] and [0,0,100,100]", 1.0, 1.0),
        ("[[0,0,100,100],[500,500,700,700]]", 1.0, 1.0),
        ('[{"bbox_2d": [0,0,100,100]}, {"bbox_2d": [500,500,700,600]}]', 1.0, 0.75),
        ("[0,0,100,100]", 2 / 3, 2 / 3),
        ("[0,0,100,100] [0,0,100,100] [0,0,100,100]", 0.4, 0.4),
        ("[0,0,100,100] [500,500,700,700] [800,800,900,900]", 0.8, 0.8),
        ("<answer>[0,0,100,100] [500,500,700,700]</answer> [1,2,3,4]", 1.0, 1.0),
        ("none", 0.0, 0.0),
    ],
)
def test_boxes_are_scored_after_matching(text, f1, soft_f1):
    score = boxes_reward(text, scene(TWO), alpha=0.25)
    assert (score.parts["f1"], score.parts["soft_f1"]) == (pytest.approx(f1), pytest.approx(soft_f1))
    assert score.value == pytest.approx(0.25 * f1 + 0.75 * soft_f1)


def test_one_box_on_each_side_is_the_mix_of_the_grounding_reward():
    generator = np.random.default_rng(1)
    for _ in range(50):
        truth, answer = (sorted(generator.integers(0, 500, 2)) + sorted(generator.integers(500, 1000, 2)) for _ in "ab")
        task = scene([int(v) for v in truth], width=640, height=480)
        text = str([int(v) for v in answer])
        assert boxes_reward(text, task).value == pytest.approx(grounding_reward(text, task).value)


def test_where_nothing_is_to_be_found_an_answer_without_box_is_right():
    assert boxes_reward("There is none.", scene([])).value == 1.0
    assert boxes_reward("[0,0,1,1]", scene([])).value == 0.0


def test_a_flood_of_boxes_is_graded_at_once_and_worth_little():
    assert boxes_reward("[0,0,100,100]" * 20_000, scene(TWO)).value < 1e-3


@pytest.mark.parametrize("reward", [grounding_reward, boxes_reward])
def test_pixels_and_thousandths_are_frames_of_answer_and_truth(reward):
    size = {"width": 500, "height": 250}
    thousandths, pixels = "[200, 400, 600, 800]", [100, 100, 300, 200]
    both = [(f, t) for f in ("thousandths", "pixels") for t in ("thousandths", "pixels")]
    for answer_frame, truth_frame in both:
        text = thousandths if answer_frame == "thousandths" else str(pixels)
        truth = [200, 400, 600, 800] if truth_frame == "thousandths" else pixels
        task = scene(truth, **size)
        assert reward(text, task, answer_frame=answer_frame, truth_frame=truth_frame).value == 1.0
    assert reward(str(pixels), scene(pixels, **size), answer_frame="pixels").value < 1.0


@pytest.mark.parametrize("name", ["grounding", "boxes"])
def test_the_frame_of_the_truth_decides_what_lies_outside(name):
    check = truth_check(name, {"truth_frame": "pixels", "alpha": 0.2})
    assert check is not None
    assert check(scene([0, 0, 1900, 1000], width=1920, height=1080)) == []
    faults = check(scene([0, 0, 1900, 1100], width=1920, height=1080))
    assert "lies outside the image: coordinates are pixels of 1920 x 1080" in faults[0][1]
    assert len(check(Task("t", "b", (), (), [0, 0, 5, 5]))) == 1


@pytest.mark.parametrize("answer", [TWO, np.array(TWO), "[[0,0,100,100],[500,500,700,700]]", tuple(map(tuple, TWO))])
def test_lists_arrays_and_json_are_the_same_boxes(answer):
    assert check_boxes(scene(answer)) == []
    assert boxes_reward(str(TWO), scene(answer)).value == 1.0


def test_a_box_that_is_none_is_named_by_its_place():
    assert check_boxes(scene([TWO[0], [5, 5, 5, 9]]))[0][0] == "reward_model.ground_truth[1]"
    assert check_boxes(scene(TWO[0])) == []
    for wrong in (None, "x", [[1, 2, 3]], [[1, 2, 3, "4"]], {"a": 1}):
        assert "is no list of boxes" in check_boxes(scene(wrong))[0][1]
        with pytest.raises(DataError, match=r"^b\.parquet, row 2, field reward_model\.ground_truth: "):
            boxes_reward("[1,2,3,4]", scene(wrong))
