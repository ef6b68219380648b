from __future__ import annotations

import pytest
import torch
from test_attention import EVERY, forest_of, inputs, mixed, random_forest, value_and_gradients

from foveate.models.attention import blocks
from foveate.models.attention.kernels import forest_attention, reference_attention
from foveate.models.attention.runs import parts

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")


@pytest.fixture
def always(monkeypatch):
    """Short runs too are computed by blocks, of few queries and keys."""
    monkeypatch.setattr(blocks, "has_fast_matmul", lambda: True)
    small = {"_QUERIES": 16, "_KEYS": 24, "_QUERY_ROUND": 8, "_KEY_ROUND": 8}
    for name in ("_LEAST_FORWARD", "_LEAST_BACKWARD", "_LEAST_KEYS"):
        monkeypatch.setattr(blocks, name, 0)
    for name, value in small.items():
        monkeypatch.setattr(blocks, name, value)


def require_reference(tensors, forest, tolerance, window=None):
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    fast = value_and_gradients(forest_attention, tensors, forest, window=window)
    for got, wanted in zip(fast, value_and_gradients(reference_attention, exact, forest, window=window), strict=True):
        assert got.dtype == tensors[0].dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (3, 1)])
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_blocks_equal_the_reference(forest, heads):
    require_reference(inputs(forest, torch.float32, *heads, scale=1.0), forest, 3e-5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_equal_the_reference_with_windows_and_sinks(seed, window):
    forest = mixed(random_forest(seed, longest=70), seed)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0]).requires_grad_()
    require_reference((*inputs(forest, torch.float32, scale=1.0), sinks), forest, 3e-5, window)


def test_long_runs_equal_the_reference(monkeypatch):
    monkeypatch.setattr(blocks, "has_fast_matmul", lambda: True)
    forest = forest_of([(700, [(390, []), (257, []), (90, [])])])
    for forward in (True, False):
        query = torch.empty(forest.tokens, 4, 32)
        by_blocks, by_flash = blocks.split_parts(parts(forest, query.device), query, 2, forward=forward)
        assert by_blocks
        assert by_flash
    require_reference(inputs(forest, torch.float32, dim=32, scale=1.0), forest, 3e-5)


@pytest.mark.usefixtures("always")
def test_scores_far_above_those_of_the_own_segment_equal_the_reference():
    forest = forest_of([(60, [(30, []), (20, [])])])
    query, key, value = (tensor.detach() for tensor in inputs(forest, torch.float32, scale=1.0))
    query[..., 0], key[:, :60, 0], key[:, 60:, 0] = 12.0, 12.0, -12.0
    require_reference([tensor.requires_grad_() for tensor in (query, key, value)], forest, 2e-4)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_scores_of_thousands_stay_finite_in_blocks(forest):
    for got in value_and_gradients(forest_attention, inputs(forest, torch.float32, scale=60.0), forest):
        assert torch.isfinite(got).all()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_is_computed_by_blocks(dtype):
    forest = forest_of([(50, [(7, []), (7, [])])])
    calls = parts(forest, torch.device("cpu"))
    for forward in (True, False):
        by_blocks, by_flash = blocks.split_parts(
            calls, torch.empty(forest.tokens, 4, 8, dtype=dtype), 2, forward=forward
        )
        assert not by_blocks
        assert by_flash == list(calls)


@pytest.mark.usefixtures("always")
def test_many_threads_keep_the_flash_kernel(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    forest = forest_of([(50, [(7, []), (7, [])])])
    assert not blocks.split_parts(parts(forest, torch.device("cpu")), torch.empty(forest.tokens, 4, 8), 2)[0]
