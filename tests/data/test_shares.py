"""Fixed shares of sources in every batch, and prompts chosen by their recent success."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import pytest

from foveate.data.rlcs import LeaningStream
from foveate.data.shares import SourcePattern, StratifiedStream
from foveate.data.stream import Curriculum, Stream, ranks
from foveate.errors import DataError

SOURCES = ["a"] * 5 + ["b"] * 40 + ["c"] * 17


def stratified(shares=None, batch=12, seed=3, sources=SOURCES, **how):
    return StratifiedStream(sources, shares or {"a": 1, "b": 1, "c": 2}, seed, batch, **how)


def again(make, stream):
    fresh = make()
    fresh.restore(json.loads(json.dumps(stream.state())))
    return fresh


def test_shares_are_exact_in_every_batch_over_200_steps_and_three_resumes():
    stream = stratified()
    for step in range(200):
        if step in (13, 90, 150):
            stream = again(stratified, stream)
        assert Counter(SOURCES[row] for row in stream.draw()) == {"a": 3, "b": 3, "c": 6}


@pytest.mark.parametrize(
    "shares", [{"a": 0.3, "b": 0.5, "c": 0.2}, {"a": 1, "b": 2, "c": 4}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}]
)
def test_no_prefix_is_a_whole_place_away_from_its_shares(shares):
    pattern, counts = SourcePattern(shares), np.zeros(3)
    part = np.array([*shares.values()]) / sum(shares.values())
    for place in range(500):
        source, before = pattern(place)
        assert before == counts[source]
        counts[source] += 1
        assert np.abs(counts - (place + 1) * part).max() < 1


def test_any_run_of_places_as_long_as_a_batch_has_its_shares():
    stream = stratified()
    stream.draw(5)  # as a step that has drawn more prompts than its batch
    assert Counter(SOURCES[row] for row in stream.draw()) == {"a": 3, "b": 3, "c": 6}


def test_a_source_that_runs_out_starts_its_next_epoch_alone():
    stream = stratified({"a": 1, "b": 1, "c": 1})
    rows = stream.draw(120)
    first = [row for row in rows if SOURCES[row] == "a"]
    assert [sorted(first[i : i + 5]) for i in range(0, 40, 5)] == [[0, 1, 2, 3, 4]] * 8
    assert len({tuple(first[i : i + 5]) for i in range(0, 40, 5)}) > 4
    assert sorted(row for row in rows if SOURCES[row] == "b") == list(range(5, 45))
    epochs = stream.metrics()
    assert (epochs["source/a/epoch"], epochs["source/b/epoch"]) == (8.0, 1.0)
    assert stream.state()["taken"] == {"a": 40, "b": 40, "c": 40}


def test_the_order_of_a_source_does_not_depend_on_the_others():
    one, other = stratified(), stratified({"a": 3, "b": 1, "c": 2}, sources=SOURCES)
    rows = [[row for row in stream.draw(120) if SOURCES[row] == "b"] for stream in (one, other)]
    assert rows[0][:20] == rows[1][:20]


def test_weights_and_a_curriculum_act_within_the_sources():
    path_of = np.array([0] * 20 + [1] * 42)
    stream = stratified(
        weights=[1, 0], source_of=path_of, sources=["a"] * 5 + ["b"] * 15 + ["b"] * 42, shares={"a": 1, "b": 1}
    )
    assert max(stream.draw(60)) < 20
    hard = Curriculum(ranks(range(62), descending=True), epochs=1, mixing=0.0)
    rows = stratified(curriculum=hard).draw(20)
    assert [row for row in rows if SOURCES[row] == "a"] == [4, 3, 2, 1, 0]


def test_rows_done_out_of_turn_keep_their_places():
    stream, plain = stratified(), stratified().draw(8)
    for place in (2, 0):
        stream.finish(place)
    assert again(stratified, stream).draw(4) == [plain[place] for place in (1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 1, "b": 1, "d": 1}, "no row has data_source 'd'.* there are a, b, c"),
        ({"a": 1, "b": 1}, "names no share for data_source c; add it, 0 to leave its rows out"),
        ({"a": 0.123457, "b": 0.654323, "c": 0.22222}, "repeat only after"),
        ({"a": 1e-9, "b": 1, "c": 1}, "repeat only after"),
    ],
)
def test_shares_that_do_not_fit_the_rows_are_refused(shares, message):
    with pytest.raises(DataError, match=message):
        stratified(shares)


def test_a_share_of_0_leaves_a_source_out_and_other_shares_are_another_plan():
    stream = stratified({"a": 0, "b": 1, "c": 1})
    assert {SOURCES[row] for row in stream.draw(60)} == {"b", "c"}
    with pytest.raises(DataError, match="field plan"):
        stratified({"a": 0, "b": 1, "c": 2}).restore(stream.state())


# ---------------------------------------------------------------------------------------------------------------- RLCS


def leaning(base=None, smoothing=0.5, floor=0.1):
    return LeaningStream(base or Stream(60, 7, 12), smoothing=smoothing, floor=floor)


def solve(stream, rows, first, success):
    for number, row in enumerate(rows):
        stream.observe(first + number, success(row))


def trained(stream, steps, success, resume_at=(), make=None):
    taken = []
    for step in range(steps):
        if step in resume_at:
            stream = again(make, stream)
        first = stream.position
        rows = stream.draw()
        solve(stream, rows, first, success)
        taken += rows
    return taken, stream


def by_half(row):
    return (1.0, 0.5, 0.0)[row % 3]


def test_prompts_near_one_half_come_more_often_and_none_is_lost():
    taken, stream = trained(leaning(), 200, by_half)
    counts = Counter(row % 3 for row in taken)
    assert counts[1] > 6 * counts[0]
    assert counts[1] > 6 * counts[2]
    assert len(set(taken)) == 60
    metrics = stream.metrics()
    assert metrics["data/rows_seen"] == 60
    assert metrics["data/success"] == pytest.approx(0.5)
    assert metrics["data/success_middle"] == pytest.approx(1 / 3)


def test_until_something_is_observed_it_is_a_plain_shuffle():
    assert leaning().draw(60) == Stream(60, 7, 12).draw(60)


def test_recent_success_is_an_exponential_mean_from_the_first_on():
    stream = leaning(Stream(1, 0, 1), smoothing=0.25)
    for score in (1.0, 0.0, 0.0):
        stream.draw()
        stream.observe(stream.position - 1, score)
    stream.draw()
    assert stream._success[0] == pytest.approx(0.5625)


def test_observations_take_effect_at_the_next_draw_in_task_order_however_they_arrive():
    one, other = leaning(Stream(4, 1, 8)), leaning(Stream(4, 1, 8))
    rows = one.draw()
    assert rows == other.draw()
    scores = [(place, row / 4) for place, row in enumerate(rows)]
    for place, score in scores:
        one.observe(place, score)
    for place, score in reversed(scores):
        other.observe(place, score)
    ahead = copy.copy(one)
    assert ahead.draw() == one.draw() == other.draw()
    assert one.state() == other.state()


def both(seed=5):
    return leaning(stratified(seed=seed))


def test_shares_and_rlcs_together_are_exact_and_resume_bit_by_bit():
    whole, end = trained(both(), 60, by_half)
    parts, other = trained(both(), 60, by_half, resume_at=(1, 17, 44), make=both)
    assert whole == parts
    assert end.state() == other.state()
    for step in range(60):
        assert Counter(SOURCES[row] for row in whole[12 * step : 12 * step + 12]) == {"a": 3, "b": 3, "c": 6}
    with pytest.raises(DataError, match="field plan"):
        leaning(stratified(seed=5), floor=0.2).restore(end.state())


def test_what_was_not_graded_is_forgotten():
    stream = leaning()
    stream.draw(3)
    stream.observe(2, 1.0)
    stream.draw(1)
    assert stream.state()["waiting"] == [(3, stream.row(3))]
