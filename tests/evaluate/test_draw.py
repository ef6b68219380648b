"""Boxes drawn on pictures, and pictures made small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from foveate.evaluate.draw import (
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    LabelledBox,
    as_shown,
    box_in_pixels,
    draw_boxes,
    encode_jpeg,
    save_thumbnail,
    true_and_predicted,
)
from foveate.evaluate.predictions import thumbnail_path

GREY = (128, 128, 128)


def rgb(colour: str) -> tuple[int, int, int]:
    return (int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16))


def test_a_box_in_thousandths_is_scaled_by_each_side_of_the_picture() -> None:
    assert box_in_pixels((0, 0, 1000, 1000), (641, 428)) == (0, 0, 640, 427)
    assert box_in_pixels((250, 500, 500, 750), (801, 401)) == (200, 200, 400, 300)


def test_corners_in_any_order_and_outside_the_picture_are_mended() -> None:
    assert box_in_pixels((500, 750, 250, 500), (801, 401)) == (200, 200, 400, 300)
    assert box_in_pixels((-50, 0, 2000, 100), (101, 101)) == (0, 0, 100, 10)


def test_the_true_box_is_green_and_the_predicted_blue() -> None:
    boxes = true_and_predicted((100, 100, 400, 400), (600, 600, 900, 900))
    drawn = draw_boxes(Image.new("RGB", (201, 101), GREY), boxes)
    assert drawn.getpixel((80, 25)) == rgb(TRUE_COLOUR)
    assert drawn.getpixel((180, 75)) == rgb(PREDICTED_COLOUR)
    assert drawn.getpixel((100, 50)) == GREY


def test_a_box_that_is_not_there_is_not_drawn() -> None:
    assert [entry.label for entry in true_and_predicted((0, 0, 1, 1), None)] == ["true"]
    assert true_and_predicted(None, None) == ()


def test_the_picture_that_was_given_stays_as_it_was() -> None:
    image = Image.new("RGB", (50, 50), GREY)
    draw_boxes(image, true_and_predicted((0, 0, 1000, 1000), None))
    assert image.getcolors() == [(2500, GREY)]


def test_boxes_that_lie_on_each_other_keep_both_labels() -> None:
    box = (200, 300, 800, 700)
    drawn = draw_boxes(Image.new("RGB", (300, 200), GREY), true_and_predicted(box, box))
    counts = {colour: count for count, colour in drawn.getcolors(60_000) or []}
    assert counts[rgb(TRUE_COLOUR)] > 100
    assert counts[rgb(PREDICTED_COLOUR)] > 100


@pytest.mark.parametrize("box", [(0, 0, 200, 200), (900, 0, 1000, 50), (900, 950, 1000, 1000)])
def test_a_label_stays_inside_the_picture(box: tuple[float, float, float, float]) -> None:
    plain = draw_boxes(Image.new("RGB", (300, 200), GREY), [LabelledBox(box, "", "#0000ff")])
    labelled = draw_boxes(Image.new("RGB", (300, 200), GREY), [LabelledBox(box, "predicted", "#0000ff")])
    count = [sum(pixel == (0, 0, 255) for pixel in image.get_flattened_data()) for image in (plain, labelled)]
    assert count[1] - count[0] > 300


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    assert as_shown(Image.new(mode, (8, 6))).mode == "RGB"


def test_transparent_parts_lie_on_white() -> None:
    assert as_shown(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((1, 1)) == (255, 255, 255)


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    image = Image.new("RGB", (60, 40))
    image.getexif()[274] = 6
    assert as_shown(image).size == (40, 60)


def test_a_thumbnail_keeps_the_shape_and_never_grows(tmp_path: Path) -> None:
    path = thumbnail_path(tmp_path, "photo/1")
    save_thumbnail(Image.new("RGB", (1280, 854)), path, max_side=400)
    with Image.open(path) as small:
        assert (small.format, small.size) == ("JPEG", (400, 267))
    save_thumbnail(Image.new("RGB", (112, 90)), path)
    with Image.open(path) as same:
        assert same.size == (112, 90)
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("row_id", ["a/b", "..", "", "x" * 5000, "\0", "\ud800", "C:", "../../escape"])
def test_an_id_is_no_file_name(tmp_path: Path, row_id: str) -> None:
    path = thumbnail_path(tmp_path, row_id)
    save_thumbnail(Image.new("RGB", (4, 4)), path)
    assert path.parent == tmp_path / "gallery"
    assert re.fullmatch(r"[0-9a-f]{32}\.jpg", path.name)
    assert path != thumbnail_path(tmp_path, f"{row_id}1")


def test_the_original_is_not_shrunk_by_encoding() -> None:
    image = Image.new("RGB", (500, 500))
    encode_jpeg(image, 100, quality=80)
    assert image.size == (500, 500)
