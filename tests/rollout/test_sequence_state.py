"""Each kind of `SequenceState` gives the output that its layer has when a sequence is computed alone and at once."""

from __future__ import annotations

import random

import pytest
import torch

from foveate.models.attention.kernels import AttentionOptions, forest_mask, reference_attention
from foveate.records import Forest
from foveate.rollout.native import rows, shelves
from foveate.rollout.native.cache import BatchCache, KeysAndValues, partial_attention, plain_partial_attention

HEADS, KEY_HEADS, WIDTH, STEPS = 4, 2, 8, 9


class AttentionLayer:
    """Query, key and value; every tensor has its tokens in dimension 1."""

    def __init__(self, window=None, sinks=None):
        self.options = AttentionOptions(window, sinks)

    def inputs(self, tokens, generator):
        return [torch.randn(heads, tokens, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]

    def prefill(self, cache, layer, inputs, _forest):
        assert cache.attend(layer, *inputs, 0.3, self.options) is None

    def extend(self, cache, layer, inputs):
        return cache.attend(layer, *inputs, 0.3, self.options)

    def alone(self, inputs):
        tokens = inputs[0].shape[1]
        return reference_attention(*inputs, Forest((0,), (tokens,), (-1,)), 0.3, self.options)


class Sums:
    """The state of a layer that gives the sum of what it was given: a recurrence, of which the engine has none yet."""

    def __init__(self, rows):
        self._rows = rows

        self._sums = torch.zeros(1, 0, WIDTH)

    def prefill(self, sums):
        self._new = sums

    def fork(self, moves):
        self._sums = torch.cat([self._sums, self._new[:, self._rows.last_B]], 1)
        self.drop(moves)

    def extend(self, new):
        self._sums = self._sums + new
        return self._sums

    def drop(self, moves):
        self._sums = self._sums[:, moves.source]


class SumLayer:
    def inputs(self, tokens, generator):
        return [torch.randn(1, tokens, WIDTH, generator=generator)]

    def prefill(self, cache, layer, inputs, forest):
        sums = forest_mask(forest).float() @ inputs[0]
        assert cache.call_layer(layer, Sums, (sums,), inputs) is None

    def extend(self, cache, layer, inputs):
        return cache.call_layer(layer, Sums, (), inputs)

    def alone(self, inputs):
        return inputs[0].cumsum(1)


SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
LAYERS = {
    "attention": [AttentionLayer()],
    "attention with sinks": [AttentionLayer(None, SINKS)],
    "window": [AttentionLayer(4)],
    "window with sinks": [AttentionLayer(4, SINKS)],
    "recurrence": [SumLayer()],
    "hybrid": [SumLayer(), AttentionLayer(4), AttentionLayer(), SumLayer(), AttentionLayer(3, SINKS)],
}
BATCHES = {  # of each group the segments of its prompt, and the tokens of answers that were begun
    "new": [([5], []), ([9], []), ([3], []), ([7], [])],
    "one": [([6], [])],
    "begun": [([5], [3, 1]), ([9], []), ([3], [6])],
    "prompts of several segments": [([2, 4, 3], [1, 5, 2]), ([4, 4], []), ([1, 6], [4]), ([8], [])],
}


def packed(groups, samples):
    """The forest of a batch, the lengths of its prompts, and for each answer its tokens in the row."""
    start, length, parent, paths, place = [], [], [], [], 0

    def grow(tokens, above):
        nonlocal place
        start.append(place)
        length.append(tokens)
        parent.append(above)
        place += tokens
        return len(start) - 1

    for prompt, begun in groups:
        first, above = place, -1
        for tokens in prompt:
            above = grow(tokens, above)
        own = list(range(first, place))
        for tokens in begun:
            grow(tokens, above)
            paths.append([*own, *range(place - tokens, place)])
        paths += [own] * (0 if begun else samples)
    bidirectional = tuple(above >= 0 and k % 2 == 1 for k, above in enumerate(parent))
    return Forest(tuple(start), tuple(length), tuple(parent), bidirectional), [sum(p) for p, _ in groups], paths


class Batch:
    """A cache, and what each of its sequences has been given so far, layer by layer."""

    def __init__(self, layers, generator):
        self.layers, self.generator = layers, generator
        self.cache = BatchCache(torch.device("cpu"))
        self.rows, self.seen = [], [[] for _ in layers]

    def join(self, groups, limit, samples=3):
        """The packed row of `groups` goes through the layers."""
        forest, lengths, paths = packed(groups, samples)
        limits = [[limit + tokens for tokens in begun] or [limit] * samples for _, begun in groups]
        self.cache.announce(forest, lengths, limits)
        first = len(self.seen[0])
        for number, layer in enumerate(self.layers):
            inputs = layer.inputs(forest.tokens, self.generator)
            layer.prefill(self.cache, number, inputs, forest)
            self.seen[number] += [[one[:, path] for one in inputs] for path in paths]
        assert self.cache.rows.last_B.tolist() == [path[-1] for path in paths]
        self.rows += range(first, first + len(paths))
        self.reorder(self.cache.join())

    def reorder(self, source):
        if source is not None:
            self.rows = [self.rows[row] for row in source.tolist()]

    def drop(self, live):
        self.reorder(self.cache.drop(live))

    def step(self, is_fixed=False):
        """A token of each row: every layer gives what it gives to each sequence alone."""
        if not self.cache.rows.is_fixed:
            self.reorder(self.cache.promote())
            if is_fixed:
                self.cache.rows.fix()
        for number, layer in enumerate(self.layers):
            inputs = layer.inputs(len(self.rows), self.generator)
            out = layer.extend(self.cache, number, inputs)
            for row, answer in enumerate(self.rows):
                pairs = zip(self.seen[number][answer], inputs, strict=True)
                self.seen[number][answer] = [torch.cat([one, new[:, [row]]], 1) for one, new in pairs]
                torch.testing.assert_close(out[:, [row]], layer.alone(self.seen[number][answer])[:, -1:])
        self.cache.extend()


@pytest.fixture
def small(monkeypatch):
    """Answers of tens of tokens meet what those of thousands meet."""
    monkeypatch.setattr(rows, "_PLACES", 8)
    monkeypatch.setattr(shelves, "SMALLEST", 4)
    monkeypatch.setattr(shelves, "FIRST_ROOM", 4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("is_fixed", [False, True], ids=["filled places", "fixed places"])
@pytest.mark.parametrize("groups", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("seed", range(2))
def test_a_state_gives_what_its_layer_gives_to_each_sequence_alone(layers, groups, is_fixed, seed):
    rng = random.Random(seed)
    batch = Batch(layers, torch.Generator().manual_seed(seed))
    batch.join(groups, STEPS)
    for step in range(STEPS):
        count = len(batch.rows)
        keep = [row for row in range(count) if rng.random() < 0.85] or [0]
        keep = keep[-1:] if step == STEPS - 2 else keep  # whole groups leave
        if len(keep) < count:
            batch.drop(keep)
        batch.step(is_fixed)
    assert sum(len(shelf.members) for shelf in batch.cache.rows.prompts.values()) == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("is_fixed", [False, True], ids=["filled places", "fixed places"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_sequences_that_join_a_running_batch_get_what_they_get_alone(layers, is_fixed, seed):
    """Prompts and begun answers of all lengths join, outgrow their slots, leave, and leave their slots to others."""
    rng = random.Random(seed)
    batch = Batch(layers, torch.Generator().manual_seed(seed))
    for groups in (BATCHES["begun"], BATCHES["one"], [([33], [2]), ([1], [17, 1])], BATCHES["new"]):
        batch.join(groups, 40)
        for _ in range(rng.randint(0, 4)):
            batch.step(is_fixed)
        keep = [row for row in range(len(batch.rows)) if rng.random() < 0.6]
        batch.drop(keep)
    if batch.rows:
        batch.step(is_fixed)
    batch.drop([])
    assert batch.cache.rows.held == 0
    assert not any(state.shelves for state in batch.cache.states.values() if isinstance(state, KeysAndValues))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("is_fixed", [False, True], ids=["filled places", "fixed places"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("samples", [1, 3])
def test_a_short_prompt_lies_in_the_slot_of_its_only_answer(layers, samples, is_fixed, monkeypatch):
    """Beside prompts that are longer or have more answers, or without any."""
    monkeypatch.setattr(shelves, "SHORT", 8)
    batch = Batch(layers, torch.Generator().manual_seed(0))
    batch.join(BATCHES["new"], 12, samples=1)  # of 5, 9, 3 and 7 tokens
    batch.step(is_fixed)
    batch.join([([8], []), ([1, 6], [4])], 20, samples)
    for _ in range(10):
        batch.step(is_fixed)
    held = [one.length for shelf in batch.cache.rows.prompts.values() for one in shelf.members]
    assert sorted(held) == ([9] if samples == 1 else [8, 9])
    batch.drop([row for row, one in enumerate(batch.cache.rows.kept) if one.before])
    assert not batch.cache.rows.prompts
    batch.step(is_fixed)


@pytest.mark.usefixtures("small")
def test_newcomers_whose_prompts_fail_leave_the_others_as_they_were():
    layers = LAYERS["hybrid"]
    batch = Batch(layers, torch.Generator().manual_seed(0))
    batch.join(BATCHES["new"], 9)
    forest, lengths, _ = packed(BATCHES["one"], 3)
    batch.cache.announce(forest, lengths, [[9] * 3])
    layers[0].prefill(batch.cache, 0, layers[0].inputs(forest.tokens, batch.generator), forest)
    batch.cache.abandon()
    batch.step()
    batch.join(BATCHES["begun"], 9)
    batch.step()


@pytest.mark.usefixtures("small")
def test_slots_are_as_many_as_their_sequences_and_a_quarter_more_and_short_ones_stay_short():
    batch = Batch([AttentionLayer()], torch.Generator().manual_seed(0))
    for count in (1, 3, 2):
        for _ in range(count):
            batch.join(BATCHES["new"], 3)
        batch.step()
        batch.drop(range(0, len(batch.rows), 5))
        batch.step()
        batch.drop([])
    batch.join(BATCHES["new"], 3)
    batch.step()
    batch.join([([60], [20])], 50)
    batch.step()
    rows, [state] = batch.cache.rows, batch.cache.states.values()
    slots = {shelf: kept[0].shape for shelf, kept in state.shelves.items()}
    for shelf, shape in slots.items():
        assert len(shelf.members) <= shape[0] <= 1.25 * len(shelf.members)
        assert shape[2] <= shelf.size
    assert {size: len(shelf.members) for size, shelf in rows.answers.items()} == {4: 12, 128: 1}


@pytest.mark.parametrize("hidden", [None, float("-inf"), -1e30], ids=["no bias", "hidden", "all hidden"])
@pytest.mark.parametrize("queries", [1, 2, 32])
def test_many_keys_are_met_as_few_are(queries, hidden):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, KEY_HEADS, queries, WIDTH, generator=generator)
    key, value = torch.randn(2, 3, KEY_HEADS, 300, WIDTH, generator=generator)[..., :270, :]
    bias = None
    if hidden is not None:
        bias = torch.zeros(3, 1, 1, 270)
        bias[0, ..., 100:] = bias[1, ..., :200] = hidden
        bias[2] = 0.0 if hidden == float("-inf") else hidden
    found, lse = partial_attention(query, key, value, 0.3, bias)
    expected, expected_lse = plain_partial_attention(query, key, value, 0.3, bias)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(found, expected)
