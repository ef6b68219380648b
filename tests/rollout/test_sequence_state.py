"""Each kind of `SequenceState` gives the output that its layer has when a sequence is computed alone and at once."""

from __future__ import annotations

import random

import pytest
import torch

from foveate.models.attention.kernels import AttentionOptions, forest_mask, reference_attention
from foveate.records import Forest
from foveate.rollout.native import cache as module
from foveate.rollout.native.cache import GroupCache

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

    def prefill(self, sums):
        self._sums = sums

    def fork(self):
        self._sums = self._sums[:, self._rows.last_B]

    def extend(self, new):
        self._sums = self._sums + new
        return self._sums

    def drop(self, moves):
        self._sums[:, moves.gaps] = self._sums[:, moves.movers]
        self._sums = self._sums[:, : moves.rows]


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


@pytest.mark.parametrize("is_fixed", [False, True], ids=["by number", "by tensor"])
@pytest.mark.parametrize("groups", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_state_gives_what_its_layer_gives_to_each_sequence_alone(layers, groups, is_fixed, seed, monkeypatch):
    monkeypatch.setattr(module, "_PLACES", 8)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    forest, lengths, paths = packed(groups, 3)
    cache = GroupCache(forest, lengths, 3, STEPS, torch.device("cpu"))
    given = [layer.inputs(forest.tokens, generator) for layer in layers]
    for number, (layer, inputs) in enumerate(zip(layers, given, strict=True)):
        layer.prefill(cache, number, inputs, forest)
    assert cache.rows.last_B.tolist() == [path[-1] for path in paths]
    cache.fork()
    seen = [[[one[:, path] for one in inputs] for path in paths] for inputs in given]
    rows = list(range(len(paths)))
    for step in range(STEPS):
        keep = [row for row in range(len(rows)) if rng.random() < 0.85] or [0]
        keep = keep[-1:] if step == STEPS - 2 else keep  # whole groups leave
        if len(keep) < len(rows):
            rows = [rows[row] for row in cache.drop(keep)]
        if is_fixed and not cache.rows.is_fixed:
            cache.rows.fix()
        for number, layer in enumerate(layers):
            inputs = layer.inputs(len(rows), generator)
            out = layer.extend(cache, number, inputs)
            for row, answer in enumerate(rows):
                pairs = zip(seen[number][answer], inputs, strict=True)
                seen[number][answer] = [torch.cat([one, new[:, [row]]], 1) for one, new in pairs]
                torch.testing.assert_close(out[:, [row]], layer.alone(seen[number][answer])[:, -1:])
        cache.extend()
    assert len(cache.rows.lengths) == 1
