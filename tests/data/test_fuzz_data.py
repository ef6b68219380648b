"""Whatever rows, answers and picture files hold: each is taken or refused with a name, and nothing crashes or hangs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from geo3k_answers import ANSWERS

from foveate.data.images import load_image, read_image
from foveate.data.table import BOX, open_tasks, row_schema, write_rows
from foveate.data.validate import RowInspection, inspect_rows
from foveate.encoding.dataset import RowCheck
from foveate.errors import DataError
from foveate.records import Image, Message, Task
from foveate.rewards import REWARDS
from foveate.rewards.boxes import check_box, parse_box
from foveate.rewards.build import FAILED, build_reward
from foveate.rewards.pool import Graders

LONGEST = 30.0  # seconds of CPU that one picture or answer may take

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, math.nan, math.inf, "", " ", "x" * 10_000, "\u0000", "\ud800", "<image>" * 50,
    [], [[]], [None], {}, {"a": {"b": []}}, [1, 2], [1, 2, 3, 4], ["1", "2", "3", "4"], [[0, 0, 1, 1]] * 3,
    [math.inf] * 4,
    "a.png", "../a.png", ".", "/", "a\u0000b", "a.png/", ["a.png"] * 99, {"path": None}, {"bytes": "text"}, {"path": 7},
    [{"role": "user"}], [{"role": "user", "content": None}], [{"from": "human", "value": "<image>"}], "<img>",
    "{{ 7 }}",
)  # fmt: skip


def schema_row() -> dict[str, Any]:
    return {
        "data_source": "grounding",
        "prompt": [{"role": "user", "content": "<image>\nWhere is <ref>it</ref>?"}],
        "images": ["a.png"],
        "ability": "grounding",
        "reward_model": {"style": "rule", "ground_truth": [1.0, 2.0, 300.0, 400.0]},
        "extra_info": {"id": "r", "index": 3},
    }


def referring_row() -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "<box>[1,2,3,4]</box>"}]
    usual = {"image": "a.png", "sent": "it", "bbox": [1, 2, 30, 40], "width": 64, "height": 48}
    return {**usual, "modal_bbox": [1, 2, 3, 4], "conversations": turns}


def mutated(rng: np.random.Generator, value: Any) -> Any:
    """The value with one place in it changed: replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = str(rng.choice(list(value)))
        rest = {name: inner for name, inner in value.items() if name != key}
        return rest if rng.random() < 0.15 else {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = int(rng.integers(len(value)))
        if rng.random() < 0.3:
            return value[:place] + value[place:] * 2
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]]
    return ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]


def broken_lines(rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Lines of JSONL: mutated rows of both kinds, and one in ten with its bytes damaged."""
    for index in range(count):
        row = schema_row() if index % 2 else referring_row()
        for _ in range(int(rng.integers(1, 4))):
            row = mutated(rng, row)
        line = bytearray(json.dumps(row).encode())
        if index % 10 == 0 and len(line) > 2:
            for place in rng.integers(0, len(line), 3):
                line[place] = int(rng.integers(256))
        yield bytes(line).replace(b"\n", b" ") or b"x"


UNFIT = ("judge", "endpoint", "entropy_band", "process")
"""Quick rewards that a text alone says nothing to."""


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_rows_are_taken_or_refused_by_row_and_field(tmp_path, encode, count):
    PIL.Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    rng = np.random.default_rng(count)
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([b"[" * 100_000, b"9" * 5000, *broken_lines(rng, count)]))
    table = open_tasks(tmp_path / "x.jsonl")
    found = inspect_rows(table, RowInspection(RowCheck(check_box, encode)), workers=1)
    assert len(found.problems) > count / 4
    assert len(found.kept) > count / 50
    for problem in found.problems:
        assert problem.what.strip()
        assert str(problem).startswith(f"{tmp_path / 'x.jsonl'}, row ")
        assert len(str(problem)) < 800
        assert "\n" not in str(problem)
        str(problem).encode()
    for index in found.kept[:50]:
        assert len(encode(table[index])) <= 1024


# ----------------------------------------------------------------------------------------------------------- pictures


def encoded(image: PIL.Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_with_text(size: int) -> bytes:
    """A whole PNG with a remark of `size` bytes, compressed to a thousandth."""
    data = encoded(PIL.Image.new("RGB", (4, 4)), "PNG")
    return data[:33] + chunk(b"zTXt", b"remark\0\0" + zlib.compress(bytes(size))) + data[33:]


def whole_pictures() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    rgb = PIL.Image.fromarray(noise)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    return {
        "png": encoded(rgb, "PNG"),
        "jpeg": encoded(rgb, "JPEG"),
        "progressive": encoded(rgb, "JPEG", progressive=True),
        "webp": encoded(rgb, "WEBP"),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "turned": encoded(rgb, "JPEG", exif=turned),
        "gif": encoded(rgb.convert("P"), "GIF", **frames),
        "moving webp": encoded(rgb, "WEBP", **frames),
        "moving png": encoded(rgb, "PNG", **frames),
        "tiff": encoded(rgb, "TIFF"),
        "bmp": encoded(rgb, "BMP"),
        "palette": encoded(rgb.convert("P"), "PNG", transparency=0),
        "grey": encoded(rgb.convert("L"), "PNG"),
        "one bit": encoded(rgb.convert("1"), "PNG"),
        "16 bit": encoded(PIL.Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"),
        "1 x 1": encoded(rgb.resize((1, 1)), "PNG"),
        "long": encoded(PIL.Image.new("RGB", (30_000, 1)), "PNG"),
        "tall": encoded(PIL.Image.new("RGB", (1, 30_000)), "JPEG"),
    }


def outcome(data: bytes, encode: Any) -> str:
    """ "taken" for bytes that become a prompt, else why they are refused."""
    begin = time.process_time()
    try:
        image = read_image(data, [])
        load_image(image)
        task = Task("id", "test", (Message("user", "<image>?"),), (image,), None, where="x.parquet, row 0")
        encode(task)
        said = "taken"
    except DataError as error:
        said = str(error)
    assert time.process_time() - begin < LONGEST
    return said


@pytest.mark.parametrize("name", list(whole_pictures()))
def test_every_kind_of_whole_picture_is_taken(encode, name):
    assert outcome(whole_pictures()[name], encode) == "taken"


@pytest.mark.slow
def test_a_picture_just_below_the_limit_of_pixels_is_taken(encode):
    assert outcome(encoded(PIL.Image.new("L", (9000, 9000)), "PNG"), encode) == "taken"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is not an image|is damaged or truncated"),
        (b"%PDF-1.7 not a picture", "is not an image of a known format"),
        (png_that_says(20_000, 20_000), "has too many pixels"),
        (png_that_says(10_000, 10_000), "has too many pixels"),
        (png_that_says(2**31 - 1, 2**31 - 1), "has too many pixels|is damaged"),
        (png_that_says(0, 5), "is not an image|is damaged"),
        (encoded(PIL.Image.new("1", (10_000, 10_000)), "PNG"), "has too many pixels"),  # whole, in 13 kB
        (b"GIF89a" + b"\xff" * 4 + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + b"\xff" * 4 + b"\0\2\0;", "too many pixels"),
        (b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 10**5, 10**5, 1, 24, *[0] * 6), "too many pixels"),
        (png_with_text(2**27), "is damaged or truncated .*too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nquit\n", "not an image of a known"),
        (png_that_says(100, 100), "cannot be decoded"),
    ],
)
def test_files_that_are_no_pictures_and_bombs_are_refused_by_what_they_are(encode, data, what):
    with pytest.raises(AssertionError, match=what):
        raise AssertionError(outcome(data, encode))


@pytest.mark.parametrize("count", [6, pytest.param(80, marks=pytest.mark.slow)])
def test_damaged_pictures_are_taken_or_refused_and_none_of_them_crashes(encode, count):
    """`count` cut and `count` garbled copies of every kind of picture."""
    rng = np.random.default_rng(count)
    said = []
    for name, data in whole_pictures().items():
        if name in ("long", "tall"):  # as the others, only slower
            continue
        for _ in range(count):
            said.append(outcome(data[: int(rng.integers(len(data)))], encode))
            garbled = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), int(rng.integers(1, 8))):
                garbled[place] = int(rng.integers(256))
            said.append(outcome(bytes(garbled), encode))
    refused = [text for text in said if text != "taken"]
    assert len(refused) > len(said) / 3
    assert all("embedded bytes" in text or "x.parquet, row 0" in text for text in refused)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for value in ("folder.png", "a\u0000b.png", "x" * 5000, ".", str(tmp_path), "/dev/null", "\ud800.png"):
        with pytest.raises(DataError, match="no such file"):
            read_image(value, [tmp_path])


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_files_are_refused_or_their_rows_are(tmp_path, kind, count):
    """`count` cut and garbled copies. An offset that leads out of its buffer would end the process."""
    rows = [{**schema_row(), "extra_info": {"id": str(index)}} for index in range(40)]
    PIL.Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    write_rows(tmp_path / "x.parquet", rows, row_schema(BOX, {"id": pa.string()}))
    if kind == "arrow":
        table = pq.read_table(tmp_path / "x.parquet")
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    whole = (tmp_path / f"x.{kind}").read_bytes()
    rng = np.random.default_rng(count)
    said = []
    for index in range(count):
        data = bytearray(whole[: int(rng.integers(len(whole)))] if index % 3 == 0 else whole)
        for place in rng.integers(0, len(data), 5) if index % 3 and len(data) else ():
            data[place] = int(rng.integers(256))
        (tmp_path / f"y.{kind}").write_bytes(data)
        try:
            table = open_tasks(tmp_path / f"y.{kind}")
            found = inspect_rows(table, RowInspection(), workers=1)
            table.values("extra_info.id")
            said += [str(problem) for problem in found.problems[:1]] or ["taken"]
        except DataError as error:
            said.append(str(error))
    refused = [text for text in said if text != "taken"]
    assert len(refused) > count / 2
    assert all(f"y.{kind}" in text for text in refused), [text for text in refused if f"y.{kind}" not in text]


# ------------------------------------------------------------------------------------------------------------ answers


def odd_answers(rng: np.random.Generator, count: int) -> Iterator[str]:
    words = [
        "<box>", "</box>", "[[", "]]", "[", "]", "<answer>", "</answer>", '"bbox_2d"', ":", ",", "12", "999.5", "1e400",
        "-3", "nan", "inf", "\n", "{", "}", "<think>", "</think>", "\\boxed{", "7" * 400, "०१२", "٣", " ",
    ]  # fmt: skip
    for _ in range(count):
        yield "".join(str(word) for word in rng.choice(words, int(rng.integers(0, 40))))
    yield from ("[" * 50_000, "<box>" * 20_000, "[1," * 20_000, "1 " * 50_000, "<answer>" * 20_000)


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_odd_answers_get_a_finite_score(count):
    """By every reward that may run in the training process, and none of them fails."""
    rng = np.random.default_rng(count)
    image = Image(Path("a.png"), None, 640, 480)
    asked = Message("user", "<image>?\nA. 5\nB. [1, 2]")
    boxed = Task("id", "grounding", (asked,), (image,), [1.0, 2.0, 300.0, 400.0], where="row 0")
    truths = {
        "counting": 5,
        "numeric": "5",
        "number_list": [5, 1],
        "string_list": ["B", "5"],
        "web_action": {"MARK": 5},
        "temporal_iou": [3.5, 12.0],
    }
    in_boxes = ("grounding", "boxes", "refcoco", "click")
    needed = {"overlong": {"limit": 100, "buffer": 50}, "length_band": {"start": 0, "low": 1, "high": 9, "end": 20}}
    quick = sorted(name for name, known in REWARDS.items() if known.quick and name not in UNFIT)
    rewards = [(name, build_reward(name, needed.get(name, {}))) for name in quick]
    for text in odd_answers(rng, count):
        for name, reward in rewards:
            begin = time.process_time()
            asked_for = boxed if name in in_boxes else dataclasses.replace(boxed, answer=truths.get(name, "B"))
            score = reward(text, asked_for)
            assert math.isfinite(score.value)
            assert not score.note.startswith(FAILED), (name, text[:80], score.note)
            assert time.process_time() - begin < LONGEST
        box = parse_box(text)
        assert box is None or all(math.isfinite(number) for number in box)


def odd_mathematics(rng: np.random.Generator, count: int) -> Iterator[tuple[str, str]]:
    """(answer, ground truth): answers of the table with characters lost, doubled or put in."""
    pieces = [
        "{",
        "}",
        "\\",
        "\\frac",
        "^",
        "_",
        "(",
        ")",
        "[",
        "]",
        ",",
        "%",
        "\\sqrt",
        "\\pi",
        "=",
        "0",
        "9",
        "!",
        "$",
        "x",
        "\u0000",
        "½",
    ]
    for _ in range(count):
        answer, truth, *_ = ANSWERS[int(rng.integers(len(ANSWERS)))]
        for _ in range(int(rng.integers(1, 5))):
            place = int(rng.integers(len(answer) + 1))
            with_piece = answer[:place] + str(rng.choice(pieces)) + answer[place:]
            answer = [with_piece, answer[:place] + answer[place + 1 :], answer[:place] * 2 + answer[place:]][
                int(rng.integers(3))
            ]
        yield answer, truth


@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["math", "geo3k"])
def test_odd_mathematics_gets_a_score_or_runs_out_of_time(name, count):
    """No answer takes down its worker for good, and each that is not graded says why."""
    cases = list(odd_mathematics(np.random.default_rng(count), count))
    answers = [(f"\\boxed{{{text}}}", Task("t", "s", (), (), truth, where="row 0")) for text, truth in cases]
    with Graders(name, {}, workers=2, time_limit=10.0) as graders:
        scores = graders.grade_many(answers)
        assert all(math.isfinite(score.value) for score in scores if score.value is not None)
        assert all((score.value is None) == score.note.startswith(FAILED) for score in scores)
        assert graders.failures.total() < count / 4, graders.failures
