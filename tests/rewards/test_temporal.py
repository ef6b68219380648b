from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from foveate.errors import DataError
from foveate.records import Message, Task, Video
from foveate.rewards.build import build_reward
from foveate.rewards.temporal import check_span, span_iou, temporal_iou


def task(answer, *videos):
    return Task("a", "test", (Message("user", "When?"),), (), answer, where="row 0", videos=videos)


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        ("10 - 20", 1.0),
        ("from 10.0 s to 20.0 seconds.", 1.0),
        ("between 10 and 15 seconds", 0.5),
        ("It happens at 0:10 – 0:20.", 1.0),
        ("00:00:10 until 00:00:20.0", 1.0),
        ('{"start": 10, "end": 20}', 1.0),
        ("{'start_time': 10.0, 'end_time': 20}", 1.0),
        ("[10, 20]", 1.0),
        ("<think>0 - 5</think> 15 - 25", 1 / 3),
        ("<think>0 - 5, no: 10 - 20</think>\n", 1.0),
        ("<answer>10 - 20</answer> and not 1 - 2", 1.0),
        ("first 1 - 2, no: 10s-20s", 1.0),
        ("30 - 40", 0.0),
        ("20 - 10", None),
        ("at 10", None),
        ("never", None),
        ("v1.10-20x", None),
        ("10 - 20, no: 20 - 10", None),
        ("10 - 20. Correction: 5 - 5.", None),
        ("10 - 20 in part 3, 2", 1.0),
        ("-5 - 20", None),
        ("\u22125 - 20", None),
        ("- 10 - 20", 1.0),
        ("10-20-30", None),
        ("nan - 20", None),
        ("1e1 - 2e1", None),
        ("1e9 - 2e9", None),
        ("10 - 20 frames", None),
        ("frames 10 - 20", None),
        ("10 - 20%", None),
        ("10 - 20 ms", None),
        ("10 - 20 minutes", 0.0),
        ("0 min 10 s to 0 minutes and 20 seconds", 1.0),
        ("10 s - 1 min", 0.2),
        ("It starts at 10 seconds, and ends at 20 seconds.", 1.0),
        ("It starts at 10.0s and lasts until 20.0s.", 1.0),
        ("from t=10s to t=20s", 1.0),
        ("from second 10 up to second 20", 1.0),
        ("**10** - **20**", 1.0),
        ("$10$ to $20$", 1.0),
        ("\uff11\uff10\uff0d\uff12\uff10", 1.0),
        ("00:10 --> 00:20", 1.0),
        ("start: 10\nend: 20", 1.0),
        ("10 - 20 in the video", 1.0),
    ],
)
def test_spans_are_read_as_answers_write_them(text, iou):
    score = temporal_iou(text, task([10, 20]))
    assert score.parts["parsed"] == float(iou is not None)
    assert score.value == pytest.approx(iou or 0.0)
    assert score.parts["hit"] == float((iou or 0) >= 0.5)


def test_settings_mix_the_iou_with_a_hit():
    reward = build_reward("temporal_iou", {"alpha": 0.5, "threshold": 0.4})
    assert reward("10 - 15", task([10, 20])).value == pytest.approx(0.5 + 0.25)


def test_several_spans_are_compared_by_their_unions():
    truth = task([[0, 10], {"start": 20, "end": 30}])
    assert temporal_iou("0 - 10 and 20 - 30", truth).value == pytest.approx(1.0)
    assert temporal_iou("20 - 30", truth).value == pytest.approx(0.5)
    assert temporal_iou("0 - 10, 20 - 30, 40 - 60", truth).value == pytest.approx(0.5)
    assert temporal_iou("0 - 10, 30 - 20", truth).value == pytest.approx(0.5)
    assert temporal_iou("10 - 20", truth).value == 0  # they touch
    rng = np.random.default_rng(0)
    for _ in range(100):  # by counting small steps of time
        spans = [[tuple(sorted(rng.choice(60, 2, replace=False).tolist())) for _ in range(n)] for n in (3, 2)]
        marks = np.zeros((2, 60), bool)
        for row, own in zip(marks, spans, strict=True):
            for begin, end in own:
                row[begin:end] = True
        assert span_iou(*spans) == pytest.approx(marks.all(0).sum() / marks.any(0).sum())


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ([1], "[1] is no span of time"),
        ([5, 2], "0 <= start < end"),
        ("soon", "is no span of time"),
        ([[1, 2], "x"], "is no span of time"),
        ([-1, 2], "is no span of time"),
        ([1, float("nan")], "is no span of time"),
        ([3, 12], "ends at 12 s, and the video has 10.0 s"),
        ([3, 10.5], ""),
        ("[3, 4]", ""),
        (np.array([1.0, 2.0]), ""),
        ({"start": 0, "end": 1}, ""),
    ],
)
def test_a_ground_truth_that_is_no_span_is_told_before_the_run(truth, said):
    video = Video(Path("a.mp4"), None, 64, 64, 100, 10.0)
    faults = check_span(task(truth, video))
    assert bool(faults) == bool(said)
    assert said in str(faults)
    if "no span" in said:
        with pytest.raises(DataError, match=r"row 0, field reward_model\.ground_truth"):
            temporal_iou("1 - 2", task(truth))


def test_a_long_answer_takes_little_time():
    begin = time.process_time()
    for text in (
        "1 - 2, " * 20_000,
        "1" * 200_000,
        "1:" * 50_000,
        "1 " * 100_000,
        "1 - " * 50_000,
        "1 min " * 40_000,
        "and ends at " * 20_000,
    ):
        temporal_iou(text, task([[1, 2], [3, 4]]))
    assert time.process_time() - begin < 2
