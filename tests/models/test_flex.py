"""The forest's mask for FlexAttention, which computes on GPUs: here as PyTorch computes it without a compiler."""

from __future__ import annotations

import pytest
import torch
from slow_cases import slow_but
from test_attention import (
    CASES,
    MIXED,
    forest_of,
    inputs,
    mixed,
    random_forest,
    require_reference_with_sinks,
    value_and_gradients,
)
from torch.nn.attention import flex_attention as of_torch

from foveate.errors import ConfigError
from foveate.models.attention.flex import BLOCK, block_mask, flex_forest_attention
from foveate.models.attention.kernels import AttentionOptions, flex_attention, forest_mask, reference_attention

LONG = {
    "prompt and answers": forest_of([(300, [(128, []), (90, []), (200, [])]), (700, [(64, [])] * 4)]),
    "whole blocks": forest_of([(256, [(128, []), (128, [])]), (128, [])]),
    "turns": forest_of([(200, [(150, [(140, []), (10, [])]), (260, [])])]),
    **{f"random {seed}": random_forest(seed, longest=160) for seed in range(4)},
}
LONG_MIXED = {f"mixed {name}": mixed(forest, seed) for seed, (name, forest) in enumerate(LONG.items())}
EVERY = {**CASES, **MIXED, **{f"long {name}": forest for name, forest in (LONG | LONG_MIXED).items()}}


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention on a CPU, without a compiler: it refuses gradients there, which it can compute."""
    monkeypatch.setattr(of_torch, "_validate_device", lambda *_: None)
    monkeypatch.setattr(of_torch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)

    def attend(query, key, value, forest, scale, options):
        return flex_forest_attention(query, key, value, forest, scale, options.window, options.sinks)

    return attend


@pytest.mark.parametrize("window", slow_but((None, 5), [None, 1, 5, 60]))
@pytest.mark.parametrize("forest", (CASES | MIXED).values(), ids=CASES | MIXED)
def test_flex_attention_equals_the_reference_in_float64(forest, window, flex):
    require_reference_with_sinks(flex, forest, window)


@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (14, 2)], ids=["all heads", "one key head", "seven to one"])
def test_flex_attention_shares_key_heads_like_the_reference(heads, flex):
    forest = LONG["turns"]
    tensors = inputs(forest, torch.float64, *heads)
    fast = value_and_gradients(flex, tensors, forest)
    for got, wanted in zip(fast, value_and_gradients(reference_attention, tensors, forest), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_flex_attention_stays_finite_for_scores_of_thousands(flex):
    forest = CASES["turns under turns"]
    sinks = torch.tensor([100.0, -300.0, 0.0, 5.0]).requires_grad_()
    for window in (None, 5):
        tensors = (*inputs(forest, torch.float32, scale=60.0), sinks)
        for got in value_and_gradients(flex, tensors, forest, window=window):
            assert torch.isfinite(got).all()


@pytest.mark.parametrize("window", slow_but([None, 129], [None, 1, 30, 129, 400]))
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_a_block_that_is_skipped_holds_nothing_and_one_without_a_mask_all(forest, window):
    mask = block_mask(forest, torch.device("cpu"), window)
    count = -(-forest.tokens // BLOCK)
    dense = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    dense[: forest.tokens, : forest.tokens] = forest_mask(forest, window=window)
    tail = torch.arange(forest.tokens, count * BLOCK)
    dense[tail, tail] = True  # what fills the row up sees itself, and nothing sees it
    index = torch.arange(count * BLOCK)
    seen = mask.mask_mod(index[:0].sum(), index[:0].sum(), index[:, None], index)
    assert torch.equal(seen, dense)
    cells = dense.view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)
    partial, full = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool)
    for kind, counts, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(count):
            kind[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    assert not (partial & full).any()
    assert not cells[~(partial | full)].any()
    assert cells[full].all()
    if window is None:
        assert cells[partial].any(-1).all()
        assert not cells[partial].all(-1).any()


def test_most_of_a_row_of_groups_is_skipped():
    forest = forest_of([(1024, [(256, [])] * 8)] * 4)
    assert block_mask(forest, torch.device("cpu")).sparsity() > 75  # percent


def test_kernels_of_the_other_device_are_refused_by_name():
    forest = CASES["group"]
    rows = inputs(forest, torch.float32)
    with pytest.raises(ConfigError, match=r"model\.attention: flex is a kernel for GPUs"):
        flex_attention(*rows, forest, 0.3, AttentionOptions())
