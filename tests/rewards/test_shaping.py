from __future__ import annotations

import pytest

from foveate.errors import ConfigError, DataError
from foveate.records import Answer, Task
from foveate.rewards.build import build_reward

TASK = Task("t", "s", (), (), "7", {}, "row")


def test_the_length_band_is_a_trapezoid():
    reward = build_reward("length_band", {"start": 2, "low": 4, "high": 6, "end": 10})
    values = [reward("word " * n, TASK).value for n in (0, 2, 3, 4, 6, 8, 10, 11)]
    assert values == [0.0, 0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert reward("a b", TASK).parts == {"length": 2.0}
    steep = build_reward("length_band", {"start": 4, "low": 4, "high": 6, "end": 6})
    assert [steep("word " * n, TASK).value for n in (3, 4, 6, 7)] == [0.0, 1.0, 1.0, 0.0]


def test_bounds_of_a_band_grow():
    with pytest.raises(ConfigError, match="does not hold for 5, 4, 6, 9"):
        build_reward("length_band", {"start": 5, "low": 4, "high": 6, "end": 9})


def test_the_entropy_band_takes_off_how_far_the_mean_surprise_is_outside():
    reward = build_reward("entropy_band", {"low": 0.25, "high": 0.5})
    values = [reward(Answer.sampled([1, 2], [-h, -h], "a", "stop", 0), TASK).value for h in (0.0, 0.25, 0.5, 1.5)]
    assert values == [-0.25, 0.0, 0.0, -1.0]
    with pytest.raises(DataError, match="only the text of the answers is known"):
        reward.read("a")


def test_a_length_may_be_that_of_the_tokens_that_were_sampled():
    reward = build_reward("overlong", {"limit": 4, "buffer": 2, "tokenizer": "sampled"})
    score = reward(Answer.sampled([1, 2, 3], [0.0] * 3, "one", "stop", 0), TASK)
    assert (score.value, score.parts) == (-0.5, {"length": 3.0})
    assert not reward.reads_text
