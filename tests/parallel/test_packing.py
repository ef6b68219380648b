from __future__ import annotations

import random

import pytest
import torch

from foveate.algorithms.aggregate import sum_by_sample
from foveate.parallel.packing import micro_batches, pack
from foveate.records import ImageSlot, PackedGroup, Prompt

IMAGE = 99


def text_prompt(*ids):
    return Prompt(ids, (), None, ids)


def image_prompt(before, tiles, after, value):
    """Tiles of 2 x 2 pixels, all `value`, two image tokens each."""
    ids = (*before, *[IMAGE] * (2 * tiles), *after)
    return Prompt(ids, (ImageSlot(len(before), 2 * tiles, tiles),), torch.full((tiles, 3, 2, 2), value), ids)


def test_a_group_is_packed_as_one_root_with_its_answers():
    batch = pack([PackedGroup.of_tokens(text_prompt(1, 2, 3), ((4, 5), (6,)))])
    assert batch.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 3]
    assert (batch.forest.start, batch.forest.length, batch.forest.parent) == ((0, 3, 5), (3, 2, 1), (-1, 0, 0))
    assert batch.target_M.tolist() == [3, 4, 5]
    assert batch.source_M.tolist() == [2, 3, 2]
    assert batch.sample_M.tolist() == [0, 0, 1]
    assert batch.samples == 2
    assert batch.pixels is None
    assert batch.slot_index.tolist() == []
    assert {t.dtype for t in (batch.token_ids_T, batch.position_T, batch.slot_index, batch.target_M)} == {torch.int64}


def test_images_stand_once_per_group_in_the_order_of_the_row():
    two = Prompt(
        (IMAGE, IMAGE, 5, IMAGE, IMAGE),
        (ImageSlot(0, 2, 1), ImageSlot(3, 2, 1)),
        torch.tensor([2.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2),
        (IMAGE, 5, IMAGE),
    )
    packed_groups = [
        PackedGroup.of_tokens(image_prompt((7,), 2, (8, 9), 1.0), ((4,), (4,), (4,))),
        PackedGroup.of_tokens(text_prompt(1, 2), ((3,),)),
        PackedGroup.of_tokens(two, ((4, 4), (4,))),
    ]
    batch = pack(packed_groups)
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0, 3.0]
    assert batch.slot_index.tolist() == (batch.token_ids_T == IMAGE).nonzero().flatten().tolist()
    assert batch.samples == 6
    assert sum_by_sample(torch.ones(len(batch.target_M)), batch.sample_M, 6).tolist() == [1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_a_packed_row_says_the_same_as_its_samples_one_by_one(seed):
    rng = random.Random(seed)

    def words(low, high):
        return tuple(rng.randrange(90) for _ in range(rng.randint(low, high)))

    packed_groups = [
        PackedGroup.of_tokens(text_prompt(*words(1, 9)), tuple(words(1, 6) for _ in range(rng.randint(0, 4))))
        for _ in range(rng.randint(1, 5))
    ]
    batch = pack(packed_groups)
    samples = [(packed.prompt.token_ids, answer.token_ids) for packed in packed_groups for answer in packed.answers]
    assert batch.samples == len(samples)
    assert batch.forest.tokens == len(batch.token_ids_T) == sum(packed.tokens for packed in packed_groups)
    for index, (prompt, answer) in enumerate(samples):
        mine = batch.sample_M == index
        targets, sources = batch.target_M[mine], batch.source_M[mine]
        sequence = prompt + answer
        assert tuple(batch.token_ids_T[targets].tolist()) == answer
        assert tuple(batch.token_ids_T[sources].tolist()) == sequence[len(prompt) - 1 : -1]
        assert batch.position_T[targets].tolist() == list(range(len(prompt), len(sequence)))
        assert (batch.position_T[sources] + 1 == batch.position_T[targets]).all()
    assert batch.sample_M.tolist() == sorted(batch.sample_M.tolist())


def tree_of(tokens):
    return PackedGroup.of_tokens(text_prompt(*range(tokens - 1)), ((0,),))


def test_micro_batches_fill_the_budget_and_do_not_pass_it():
    packed_groups = [tree_of(n) for n in (4, 6, 5, 5, 1, 9, 2)]
    assert micro_batches(packed_groups, 10) == [[0, 1], [2, 3], [4, 5], [6]]
    assert micro_batches(packed_groups, 1000) == [list(range(7))]
    assert micro_batches([], 10) == []


def test_a_tree_longer_than_the_budget_stands_alone():
    assert micro_batches([tree_of(n) for n in (3, 20, 3, 3)], 10) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_keep_every_tree_in_order(seed):
    rng = random.Random(seed)
    packed_groups = [tree_of(rng.randint(2, 30)) for _ in range(rng.randint(1, 40))]
    batches = micro_batches(packed_groups, 50)
    assert [index for batch in batches for index in batch] == list(range(len(packed_groups)))
    sizes = [sum(packed_groups[i].tokens for i in batch) for batch in batches]
    assert max(sizes) <= 50
    for size, following in zip(sizes, batches[1:], strict=False):
        assert size + packed_groups[following[0]].tokens > 50
