from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from pydantic import ValidationError

from foveate.config.train import AugmentSettings, SFTTrainSettings
from foveate.data.augment import Augment
from foveate.data.stream import Stream
from foveate.data.table import open_tasks
from foveate.encoding.reader import Reader


def photo(seed=0, width=90, height=70):
    """Waves, which compression changes little where it is weak."""
    y, x = np.mgrid[:height, :width] / 3
    values = 128 + 100 * np.stack([np.sin(x + seed), np.cos(y), np.sin(x + y)], -1)
    return PIL.Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def table(tmp_path):
    rows = []
    for number in range(5):
        photo(number).save(tmp_path / f"{number}.png")
        rows.append({"question": "<image>?", "image": f"{number}.png", "response": "x"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_tasks([str(tmp_path / "rows.jsonl")])


def taken(table, encode, augment, counts, *, workers=0, state=None):
    stream = Stream(len(table), 3, 2)
    if state is not None:
        stream.restore(state)
    with Reader(table, stream, encode, workers, augment) as reader:
        found = [pair for count in counts for pair in reader.take(count)]
    return found, stream.state()


def test_what_is_drawn_depends_on_seed_row_and_epoch_alone():
    image, augment = photo(), Augment(1, (20, 90), (0.3, 1.0))
    first = np.asarray(augment.drawn(4, 2)(image))
    assert np.array_equal(first, np.asarray(Augment(1, (20, 90), (0.3, 1.0)).drawn(4, 2)(image)))
    for other in (augment.drawn(5, 2), augment.drawn(4, 3), Augment(2, (20, 90), (0.3, 1.0)).drawn(4, 2)):
        assert not np.array_equal(first, np.asarray(other(image)))


def test_images_keep_their_size_and_become_worse_within_the_limits():
    image = photo()
    plain = np.asarray(image).astype(float)
    for jpeg, resize, most in (((95, 95), None, 6), (None, (1.0, 1.0), 0), ((1, 5), None, 90), (None, (0.05, 0.1), 90)):
        worse = Augment(0, jpeg, resize).drawn(0, 0)(image)
        assert (worse.size, worse.mode) == (image.size, "RGB")
        lost = np.abs(np.asarray(worse) - plain).mean()
        assert lost <= most
        assert lost > 2 or most < 10, (jpeg, resize, lost)


def test_a_run_that_resumes_sees_the_images_that_it_would_have_seen(table, encode):
    augment = Augment(7, (30, 95), (0.5, 1.0))
    whole, _ = taken(table, encode, augment, [2] * 5)  # two epochs
    begun, state = taken(table, encode, augment, [2, 2])
    rest, _ = taken(table, encode, augment, [2] * 3, state=state)
    in_processes, _ = taken(table, encode, augment, [2] * 5, workers=1)
    for got in (begun + rest, in_processes):
        assert [task.id for task, _ in got] == [task.id for task, _ in whole]
        for (_, one), (_, other) in zip(got, whole, strict=True):
            assert one.token_ids == other.token_ids
            assert torch.equal(one.pixels, other.pixels)
    plain, _ = taken(table, encode, None, [2] * 5)
    for (task, one), (_, other) in zip(whole, plain, strict=True):
        assert (one.token_ids, one.slots) == (other.token_ids, other.slots)
        assert not torch.equal(one.pixels, other.pixels), task.id
    by_row = {}
    for task, prompt in whole:
        by_row.setdefault(task.id, []).append(prompt.pixels)
    assert all(len(seen) == 2 and not torch.equal(*seen) for seen in by_row.values())


def test_settings_say_which_number_comes_first_and_what_does_not_act():
    assert AugmentSettings.model_validate({"jpeg": [75, 100]}).jpeg == (75, 100)
    with pytest.raises(ValidationError, match="write the smaller number first"):
        AugmentSettings.model_validate({"resize": [0.9, 0.5]})
    with pytest.raises(ValidationError):
        AugmentSettings.model_validate({"jpeg": [0, 100]})
    with pytest.raises(ValidationError, match="images stay as they are"):
        SFTTrainSettings.model_validate({"steps": 1, "trained_turns": "all", "augment": {"jpeg": [75, 100]}})


@pytest.mark.parametrize("size", [(1, 1), (70_000, 10), (10, 70_000), (12_000, 7_600)])
def test_images_of_every_size_that_is_read_can_be_made_worse(size):
    image = PIL.Image.new("RGB", size, "red")
    worse = Augment(0, jpeg=(1, 1), resize=(0.001, 0.5)).drawn(3, 4)(image)
    assert (worse.size, worse.mode) == (size, "RGB")
