from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch

from foveate.data.stream import AdaptiveStream, Stream
from foveate.data.table import open_tasks
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.errors import DataError


@pytest.fixture
def table(tmp_path):
    """Seven rows with a picture each."""
    rows = []
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 60 + 20 * i, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        prompt = [{"role": "user", "content": f"<image>\nWhat is number {i}?"}]
        truth = {"style": "rule", "ground_truth": str(i)}
        rows.append({"data_source": "test", "prompt": prompt, "images": [f"{i}.png"], "reward_model": truth})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return open_tasks([str(tmp_path / "rows.jsonl")])


def taken(table, encode, workers, counts, position=0):
    stream = Stream(len(table), 3, 3)
    stream.position = position
    with Reader(table, stream, encode, workers) as reader:
        return [pair for count in counts for pair in reader.take(count)], stream.position


def assert_same(got, wanted):
    assert [task.id for task, _ in got] == [task.id for task, _ in wanted]
    for (_, one), (_, other) in zip(got, wanted, strict=True):
        assert (one.token_ids, one.slots) == (other.token_ids, other.slots)
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.slow
def test_processes_give_what_this_process_gives_in_the_same_order_and_go_on_from_any_place(table, encode):
    wanted, end = taken(table, encode, 0, [3, 2, 5, 1, 4])
    got, there = taken(table, encode, 2, [3, 2, 5, 1, 4])
    assert end == there == 15  # what is encoded ahead does not count as taken
    assert_same(got, wanted)
    assert_same(taken(table, encode, 1, [5], position=10)[0], wanted[10:])


def test_a_picture_that_breaks_is_an_error_of_its_row_in_a_process_too(table, encode, tmp_path):
    (tmp_path / "4.png").write_text("no picture")
    with pytest.raises(DataError, match=r"row 4 \(line 5\), field images: .*4.png is not an image"):
        taken(table, encode, 1, [7])


def test_the_frames_of_a_video_stand_in_the_prompt_with_one_tile_each(tiny_policy, tmp_path):
    for name, size in (("a", (60, 60)), ("b", (200, 60)), ("c", (200, 60)), ("still", (200, 60))):
        PIL.Image.new("RGB", size).save(tmp_path / f"{name}.png")
    row = {
        "data_source": "test",
        "prompt": [{"role": "user", "content": "<image> and\n<video>\nWhat happens?"}],
        "images": ["still.png"],
        "videos": [["a.png", "b.png", "c.png"]],
        "reward_model": {"ground_truth": "x"},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    task = open_tasks([str(tmp_path / "rows.jsonl")])[0]
    assert task.messages[0].content == ("<image> and\nFrame1: <image>\nFrame2: <image>\nFrame3: <image>\nWhat happens?")
    assert [image.path.name for image in task.images] == ["still.png", "a.png", "b.png", "c.png"]
    encode = Encoder(tiny_policy.tokenizer, tiny_policy.family, 6, 1024)
    prompt = encode(task)
    assert [slot.tiles for slot in prompt.slots] == [4, 1, 1, 1]
    assert encode.length(task) == len(prompt)
    assert len(prompt.pixels) == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"videos": [["a.png"], ["a.png"]]}, "the prompt has 1 <video> marks for 2; one each is needed"),
        ({"videos": [[]]}, "a video has no frames"),
        ({"videos": ["gone.png"]}, "field videos: no such file: gone.png"),
        ({"images": []}, "the prompt has 1 <image> marks for 0"),
    ],
)
def test_a_faulty_video_is_an_error_of_its_row(changes, said, tmp_path):
    PIL.Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    row = {
        "data_source": "test",
        "prompt": [{"role": "user", "content": "<image> <video>"}],
        "images": ["a.png"],
        "videos": ["a.png"],
        "reward_model": {"ground_truth": "x"},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | changes))
    with pytest.raises(DataError, match=said):
        open_tasks([str(tmp_path / "rows.jsonl")])[0]


class Recorded(AdaptiveStream):
    """Rows in order, which remembers what it was told."""

    def adapt(self, observed):
        self.seen = [*self.__dict__.get("seen", []), *observed]


class AsTheyAre:
    """An encoder whose prompts are the tasks themselves."""

    def for_graders(self, task):
        return task

    def __call__(self, task):
        return task

    @property
    def plain(self):
        return self

    def routed(self, prompts):
        return prompts


def test_scores_are_told_to_the_stream_by_the_place_of_their_task(table):
    stream = Recorded(len(table), 3, 3)
    with Reader(table, stream, AsTheyAre()) as reader:
        reader.take(2)
        reader.take(1)  # a further round of the same step
        reader.observe([0.5, None, 1.0])
        reader.take(2)
        reader.observe([0.0, 0.25])
        reader.take(1)
    assert stream.seen == [(0, 0.5), (2, 1.0), (3, 0.0), (4, 0.25)]
    assert stream.position == 6
