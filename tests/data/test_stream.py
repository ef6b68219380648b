from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from foveate.data.stream import AdaptiveStream, Curriculum, Stream, ranks
from foveate.errors import DataError


def test_every_epoch_holds_every_row_once_even_where_batches_cross_epochs():
    stream = Stream(10, seed=3, batch=4)
    rows = [row for _ in range(15) for row in stream.draw()]
    epochs = [rows[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream.epoch == 6.0


def test_a_batch_may_be_larger_than_the_data():
    rows = Stream(3, seed=0, batch=8).draw()
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    assert len(rows) == 8


def test_the_order_depends_on_the_seed_alone():
    assert Stream(50, seed=1, batch=7).draw(50) == Stream(50, seed=1, batch=50).draw()
    assert Stream(50, seed=1, batch=50).draw() != Stream(50, seed=2, batch=50).draw()


@pytest.mark.parametrize("taken", [0, 1, 9, 10, 11, 37])
def test_a_restored_stream_goes_on_with_the_very_next_row(taken):
    stream = Stream(10, seed=5, batch=4)
    stream.draw(taken)
    saved = json.loads(json.dumps(stream.state()))
    again = Stream(10, seed=5, batch=4)
    again.restore(saved)
    assert again.draw(25) == stream.draw(25)


def test_a_stream_of_other_data_or_another_seed_is_refused():
    state = Stream(10, seed=5, batch=4).state()
    with pytest.raises(DataError, match="field length: saved with 10, but the run now has 11"):
        Stream(11, seed=5, batch=4).restore(state)
    with pytest.raises(DataError, match="field seed: saved with 5"):
        Stream(10, seed=6, batch=4).restore(state)


@pytest.mark.parametrize(("length", "batch"), [(0, 1), (1, 0)])
def test_an_empty_stream_is_refused(length, batch):
    with pytest.raises(DataError, match="at least one"):
        Stream(length, seed=0, batch=batch)


def counts_of(rows, length):
    return np.bincount(rows, minlength=length).tolist()


def test_a_weight_says_how_often_the_rows_of_a_file_come_in_an_epoch():
    source_of = np.array([0] * 4 + [1] * 6)
    stream = Stream(10, seed=0, batch=5, weights=[2.5, 0.5], source_of=source_of)
    assert stream.length == 13
    epochs = [counts_of(stream.draw(13), 10) for _ in range(40)]
    for counts in epochs:
        assert sorted(counts[:4]) == [2, 2, 3, 3]
        assert sorted(counts[4:]) == [0, 0, 0, 1, 1, 1]
    assert min(np.sum(epochs, axis=0)[4:]) > 0


def test_files_of_weight_zero_are_left_out_and_equal_weights_are_a_plain_shuffle_of_the_rows():
    source_of = np.array([0, 1, 1])
    assert set(Stream(3, seed=0, batch=2, weights=[0, 1], source_of=source_of).draw(8)) == {1, 2}
    with pytest.raises(DataError, match="leave no row in an epoch"):
        Stream(3, seed=0, batch=2, weights=[0.1, 0], source_of=source_of)
    even = Stream(3, seed=4, batch=2, weights=[1, 1], source_of=source_of)
    assert even.draw(9) == Stream(3, seed=4, batch=2).draw(9)


def test_a_curriculum_goes_from_easy_to_hard_and_then_shuffles():
    difficulty = [0.9, 0.1, 0.5, 0.3, 0.7]
    strict = Stream(5, seed=0, batch=5, curriculum=Curriculum(ranks(difficulty), epochs=2, mixing=0.0))
    assert [strict.draw(), strict.draw()] == [[1, 3, 2, 4, 0]] * 2
    assert sorted(strict.draw()) == [0, 1, 2, 3, 4]
    down = Stream(5, seed=0, batch=5, curriculum=Curriculum(ranks(difficulty, descending=True), epochs=1, mixing=0.0))
    assert down.draw() == [0, 4, 2, 3, 1]


def test_mixing_moves_rows_by_no_more_than_its_share():
    curriculum = Curriculum(ranks(range(1000)), epochs=1, mixing=0.1)
    stream = Stream(1000, seed=1, batch=1000, curriculum=curriculum)
    moved = np.abs(np.array(stream.draw()) - np.arange(1000))
    assert 10 < moved.max() <= 110


def test_equal_difficulties_share_their_rank():
    assert ranks([1, 2, 2, 3]).tolist() == [0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("taken", [0, 7, 13, 20])
def test_weights_and_curriculum_resume_exactly(taken):
    def make(mixing=0.3):
        curriculum = Curriculum(ranks(range(10)), epochs=1, mixing=mixing)
        return Stream(10, 3, 4, weights=[2.5, 0.5], source_of=np.array([0] * 4 + [1] * 6), curriculum=curriculum)

    stream, again = make(), make()
    stream.draw(taken)
    again.restore(json.loads(json.dumps(stream.state())))
    assert again.draw(40) == stream.draw(40)
    with pytest.raises(DataError, match="field plan: saved with"):
        make(mixing=0.2).restore(stream.state())


def test_rows_done_out_of_turn_are_passed_over_and_a_run_goes_on_with_the_others():
    stream, plain = Stream(5, 3, 2), Stream(5, 3, 2).draw(12)
    for place in (2, 6, 1):
        stream.finish(place)
    assert (stream.position, stream.coming(3)) == (0, [0, 3, 4])
    stream.finish(0)
    assert stream.position == 3
    again = Stream(5, 3, 2)
    again.restore(json.loads(json.dumps(stream.state())))
    assert again.coming(4) == [3, 4, 5, 7]
    assert again.draw(4) == stream.draw(4) == [plain[place] for place in (3, 4, 5, 7)]
    assert again.position == 8
    assert again.state() == stream.state()


def test_a_copy_of_a_stream_goes_its_own_way():
    stream = Stream(5, 3, 2)
    other = copy.copy(stream)
    stream.finish(1)
    other.draw(1)
    assert (stream.coming(2), other.coming(2)) == ([0, 2], [1, 2])


class HardestFirst(AdaptiveStream):
    """Repeats the row of the worst score until it is known to be another one."""

    worst: int | None = None

    def adapt(self, observed):
        self.seen = [*self.__dict__.get("seen", []), observed]
        place = min(observed, key=lambda pair: pair[1])[0]
        self.worst = int(self._order(place // self.length)[place % self.length])

    def draw(self, count=None):
        rows = super().draw(count)
        return rows if self.worst is None else [self.worst] * len(rows)


def test_observations_take_effect_at_the_next_step_boundary_in_the_order_of_the_tasks():
    stream, plain = HardestFirst(10, 3, 4), Stream(10, 3, 4)
    first = stream.draw()
    assert first == plain.draw()
    for place, score in ((2, 0.1), (0, 0.5), (3, 0.9), (1, 0.7)):  # as their answers happen to finish
        stream.observe(place, score)
        plain.observe(place, score)
    assert stream.worst is None
    again = HardestFirst(10, 3, 4)
    again.restore(json.loads(json.dumps(stream.state())))
    ahead = copy.copy(stream)
    assert ahead.draw() == stream.draw() == again.draw() == [first[2]] * 4
    assert stream.seen == [[(0, 0.5), (1, 0.7), (2, 0.1), (3, 0.9)]]
    assert [tuple(pair) for pair in again.seen[0]] == stream.seen[0]
    assert stream.draw() == [first[2]] * 4
    assert len(stream.seen) == 1
    assert plain.draw(8) == Stream(10, 3, 4).draw(12)[4:]
