"""The units of boxes: recognised from the rows of a file, and named."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

from foveate.data.referring import GroundingRows, recognise_unit
from foveate.data.table import open_tasks
from foveate.errors import DataError
from foveate.records import Task
from foveate.rewards.boxes import check_box

WIDTH, HEIGHT = 800, 500


def corners(count, seed=0):
    """Boxes in a picture of WIDTH x HEIGHT, whole numbers."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, WIDTH - 60, count), rng.integers(0, HEIGHT - 60, count)
    x2, y2 = rng.integers(x + 50, WIDTH + 1), rng.integers(y + 50, HEIGHT + 1)
    return np.stack([x, y, x2, y2], 1).tolist()


def written(box, unit):
    x1, y1, x2, y2 = box
    sides = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    return {
        "xyxy": box,
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "fractions": [value / side for value, side in zip(box, sides, strict=True)],
        "fractions-xywh": [x1 / WIDTH, y1 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT],
        "thousandths": [value * 1000 / side for value, side in zip(box, sides, strict=True)],
    }[unit]


def file_of(folder, boxes, **changed):
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    rows = [{"image": "a.png", "sent": "it", "bbox": box, **changed} for box in boxes]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "x.jsonl"


@pytest.mark.parametrize("unit", ["xyxy", "xywh", "fractions", "fractions-xywh", "thousandths"])
@pytest.mark.parametrize("sizes", [{}, {"width": WIDTH, "height": HEIGHT}, {"width": None, "height": None}])
def test_boxes_of_any_unit_become_thousandths_and_the_unit_is_named(tmp_path, unit, sizes):
    boxes = corners(40)
    table = open_tasks(file_of(tmp_path, [written(box, unit) for box in boxes], **sizes))
    expected = [written(box, "thousandths") for box in boxes]
    assert np.allclose([task.answer for task in table], expected, rtol=1e-12)
    lines = " ".join(table.described())
    said = {
        "xyxy": "RefCOCO-style",
        "xywh": "[x, y, width, height] in pixels: ",
        "fractions": "as fractions of the sides: ",
        "fractions-xywh": "[x, y, width, height] as fractions of the sides: ",
        "thousandths": "in thousandths of the sides: ",
    }  # fmt: skip
    assert said[unit] in lines
    assert ("boxes are read as" in lines) == (unit != "xyxy")


def test_a_few_bad_boxes_do_not_change_the_unit_of_the_others(tmp_path):
    boxes = corners(200)
    boxes[7], boxes[90] = [300, 200, 100, 250], [10, 10, 900, 100]
    table = open_tasks(file_of(tmp_path, boxes))
    found = [table.inspect(index) for index in (7, 90, 91)]
    assert "has no area as [x1, y1, x2, y2] in pixels" in str(found[0][1][0])
    assert "as [x, y, width, height] in pixels it would fit (--box-unit xywh)" in str(found[0][1][0])
    assert "lies outside the image of 800 x 500 pixels; as [x1, y1, x2, y2] in thousandths" in str(found[1][1][0])
    assert found[2][0].answer == written(boxes[91], "thousandths")


@pytest.mark.parametrize(
    ("odd", "cut"),
    [([0.1, 0.1, 1.0004, 0.5], [100, 100, 1000, 500]), ([-0.001, 0.2, 0.5, 1.005], [0, 200, 500, 1000])],
)
def test_a_rounded_fraction_beyond_the_edge_is_cut_and_changes_no_other_row(tmp_path, odd, cut):
    table = open_tasks(file_of(tmp_path, [[0.1, 0.1, 0.5, 0.5]] * 50 + [odd]))
    assert table[0].answer == [100, 100, 500, 500]
    assert table[50].answer == cut
    assert "as fractions of the sides: no coordinate of the first 51 boxes" in " ".join(table.described())


@pytest.mark.parametrize("pixels", [3, 4, 60])
def test_fractions_in_a_file_of_pixels_are_errors_by_row(tmp_path, pixels):
    table = open_tasks(file_of(tmp_path, [[0.1, 0.1, 0.5, 0.5]] * 3 + [[80, 50, 400, 250]] * pixels))
    for index in range(3):
        task, [problem] = table.inspect(index)
        assert task is None
        assert "looks like fractions of the sides: an image of 800 x 500 pixels" in str(problem)
    assert table[3].answer == [100, 100, 500, 500]


def test_pixels_in_a_file_of_fractions_are_errors_by_row(tmp_path):
    table = open_tasks(file_of(tmp_path, [[0.1, 0.1, 0.5, 0.5]] * 5 + [[80, 50, 400, 250]] * 2))
    assert table[0].answer == [100, 100, 500, 500]
    assert "lies outside the image: coordinates are 0..1 of its sides; as [x1, y1, x2, y2] in pixels it would" in str(
        table.inspect(5)[1][0]
    )


def test_a_single_box_of_fractions_with_a_width_is_refused_with_the_unit_that_would_fit(tmp_path):
    path = file_of(tmp_path, [[0.6, 0.5, 0.2, 0.2]])
    _, [problem] = open_tasks(path).inspect(0)
    assert "has no area as [x1, y1, x2, y2] as fractions" in str(problem)
    assert "(--box-unit fractions-xywh)" in str(problem)
    said = open_tasks(path, parser=GroundingRows(box_unit="fractions-xywh"))[0].answer
    assert np.allclose(said, [600, 500, 800, 700])


def test_a_box_of_one_pixel_is_one_where_the_unit_is_said(tmp_path):
    assert open_tasks(file_of(tmp_path, [[0, 0, 1, 1]]), parser=GroundingRows(box_unit="xyxy"))[0].answer == [
        0, 0, 1.25, 2,
    ]  # fmt: skip


def test_fractions_in_a_reply_are_no_box_of_thousandths(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhere is it?"},
        {"from": "gpt", "value": "<box>[0.1, 0.1, 0.5, 0.5]</box>"},
    ]
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}))
    with pytest.raises(DataError, match=r"looks like fractions of the sides: a box in a reply is in 0\.\.1000"):
        open_tasks(tmp_path / "x.jsonl")[0]


@pytest.mark.parametrize("box", ["[1, 2", "[" * 100_000, f"[{'1' * 5000}, 2, 3, 4]"])
def test_a_reply_whose_box_is_no_json_is_refused_by_its_field(tmp_path, box):
    turns = [{"from": "human", "value": "<image>\nWhere is it?"}, {"from": "gpt", "value": f"<box>{box}</box>"}]
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}))
    with pytest.raises(DataError, match=r"field conversations: <box>.* is not \[x1,y1,x2,y2\]"):
        open_tasks(tmp_path / "x.jsonl")[0]


@pytest.mark.parametrize("frame", ["thousandths", "pixels"])
def test_a_ground_truth_in_fractions_is_a_fault_that_names_the_frame(frame):
    def task(box, side):
        return Task("1", "x", (), (), box, {"width": side, "height": side}, "x")

    [(field, fault)] = check_box(task([0.1, 0.1, 0.5, 0.5], 400), truth_frame=frame)
    assert field == "reward_model.ground_truth"
    assert f"looks like fractions of the sides, and truth_frame is {frame}" in fault
    assert not check_box(task([0.1, 0.1, 3, 3], 400), truth_frame=frame)
    assert not check_box(task([0, 0, 1, 1], 4), truth_frame="pixels")


def test_a_unit_that_is_said_is_not_guessed(tmp_path):
    path = file_of(tmp_path, [[100, 100, 300, 200]])
    for unit, answer in {
        "xyxy": [125, 200, 375, 400], "xywh": [125, 200, 500, 600], "thousandths": [100, 100, 300, 200],
    }.items():  # fmt: skip
        assert open_tasks(path, parser=GroundingRows(box_unit=unit))[0].answer == answer
    with pytest.raises(DataError, match=r"outside the image: coordinates are 0\.\.1 of its sides"):
        open_tasks(path, parser=GroundingRows(box_unit="fractions"))[0]
    with pytest.raises(DataError, match="setting box_unit: unknown 'cxcywh'; allowed: auto, xyxy"):
        GroundingRows(box_unit="cxcywh")


@pytest.mark.parametrize("boxes", [[], [("text", (5, 5))], [([1, 2, 3], (5, 5)), (None, None)], [([1, 2, 3, 4], None)]])
def test_without_boxes_that_can_be_read_the_unit_is_the_usual_one(boxes):
    assert recognise_unit(boxes) == ("xyxy", "")


def test_amodal_boxes_that_pass_the_edges_are_no_thousandths(tmp_path):
    boxes = [[700, 400, 900, 700], [750, 300, 990, 520], [-20, -30, 100, 90], [600, 450, 820, 640]]
    table = open_tasks(file_of(tmp_path, boxes), parser=GroundingRows("amodal"))
    assert table[0].answer == [875, 800, 1000, 1000]


def test_a_box_in_a_cell_of_text_is_read(tmp_path):
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    (tmp_path / "x.csv").write_text('image,sent,bbox,width,height\na.png,it,"[80, 50, 400, 250]",800,500\n')
    assert open_tasks(tmp_path / "x.csv")[0].answer == [100, 100, 500, 500]


def test_a_reply_that_is_only_a_box_is_a_box_to_find_and_a_text_to_imitate(tmp_path):
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    reply = "<ref>the dog</ref><box>[[100, 200, 300, 400]]</box>"
    for text, answer in ((reply, [100, 200, 300, 400]), (f"There: {reply}", f"There: {reply}")):
        turns = [{"from": "human", "value": "<image>\nWhere is it?"}, {"from": "gpt", "value": text}]
        (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}))
        task = open_tasks(tmp_path / "x.jsonl")[0]
        assert (task.answer, task.meta["response"]) == (answer, text)
        assert "<box>" not in task.messages[0].content
