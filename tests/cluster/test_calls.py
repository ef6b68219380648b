"""Calls of workers name the method itself."""

from __future__ import annotations

from types import SimpleNamespace

from foveate.cluster.base import broadcast, scatter, scatter_gather
from foveate.cluster.local import LocalWorkers
from foveate.cluster.rank_engine import RankEngines


class Adder:
    def __init__(self, start):
        self.start = start

    def add(self, values, more=0):
        return [self.start + value + more for value in values]


class Two:
    """Two workers in one process, and the arguments that they got."""

    size, row = 2, 1

    def __init__(self, *workers):
        self.workers = workers

    def call(self, method, per_rank_arguments):
        self.arguments = per_rank_arguments
        return [method(one, *own) for one, own in zip(self.workers, per_rank_arguments, strict=True)]


def test_a_call_takes_the_arguments_of_its_method_by_place_and_by_name():
    workers = LocalWorkers(Adder(10))
    assert broadcast(workers, Adder.add, [1, 2]) == [[11, 12]]
    assert broadcast(workers, Adder.add, [1], more=5) == [[16]]
    assert scatter_gather(workers, Adder.add, [1, 2, 3], [1.0, 1.0, 1.0], more=1) == [12, 13, 14]
    assert [*scatter(Two(Adder(0), Adder(100)), Adder.add, [1, 2], [5.0, 1.0], 1)] == [([0], [2]), ([1], [103])]


def test_the_engines_of_workers_are_called_like_workers_and_arguments_that_are_one_object_stay_one():
    workers = Two(*(SimpleNamespace(engine=Adder(start)) for start in (0, 100)))
    assert broadcast(RankEngines(workers), Adder.add, [1]) == [[1], [101]]
    assert workers.arguments[0] is workers.arguments[1]
