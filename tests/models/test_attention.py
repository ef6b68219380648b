from __future__ import annotations

import random

import pytest
import torch

from foveate.models.attention.kernels import Extras, forest_attention, forest_mask, reference_attention
from foveate.models.attention.runs import parts, path_positions
from foveate.records import Layout


def layout_of(trees):
    """A layout from nested pairs (length, [subtrees]), in depth-first order."""
    start, length, parent = [], [], []

    def add(tree, above):
        index = len(start)
        start.append(start[-1] + length[-1] if start else 0)
        length.append(tree[0])
        parent.append(above)
        for child in tree[1]:
            add(child, index)

    for tree in trees:
        add(tree, -1)
    return Layout(tuple(start), tuple(length), tuple(parent))


def random_tree(rng, depth, longest):
    children = rng.randint(0, 3) if depth else 0
    return rng.randint(1, longest), [random_tree(rng, depth - 1, longest) for _ in range(children)]


def random_forest(seed, depth=3, longest=24):
    rng = random.Random(seed)
    return layout_of([random_tree(rng, depth, longest) for _ in range(rng.randint(1, 4))])


CASES = {
    "one token": layout_of([(1, [])]),
    "single root": layout_of([(37, [])]),
    "roots of one length": layout_of([(9, []), (9, []), (9, [])]),
    "group": layout_of([(50, [(7, []), (7, []), (7, [])])]),
    "group of unequal answers": layout_of([(50, [(1, []), (13, []), (70, [])])]),
    "two groups": layout_of([(30, [(5, []), (5, [])]), (64, [(5, []), (5, []), (5, [])])]),
    "group and lone root": layout_of([(3, []), (20, [(4, []), (2, [])]), (11, [])]),
    "chain of three": layout_of([(8, [(6, [(5, [])])])]),
    "turns under turns": layout_of([(16, [(4, [(3, []), (9, [])]), (12, []), (4, [(1, [(2, []), (2, [])])])])]),
    **{f"random {seed}": random_forest(seed) for seed in range(6)},
    "random long": random_forest(99, depth=1, longest=150),
}


def inputs(layout, dtype, heads=4, kv_heads=2, dim=8, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(count):
        values = torch.randn(count, layout.tokens, dim, generator=generator, dtype=torch.float64)
        return (values * scale).to(dtype).requires_grad_()

    return noise(heads), noise(kv_heads), noise(kv_heads)


def value_and_gradients(attention, tensors, layout, seed=5, window=None):
    """`tensors` are query, key, value, and sinks where there are any."""
    out = attention(*tensors[:3], layout, tensors[0].shape[-1] ** -0.5, Extras(window, *tensors[3:]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)]


def require_reference_with_sinks(kernel, layout, window):
    """A kernel gives the values and gradients of the reference, in float64."""
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64).requires_grad_()
    tensors = (*inputs(layout, torch.float64), sinks)
    fast = value_and_gradients(kernel, tensors, layout, window=window)
    truth = value_and_gradients(reference_attention, tensors, layout, window=window)
    for got, wanted in zip(fast, truth, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_the_mask_shows_each_token_what_leads_to_it_and_nothing_else(layout):
    before = {}  # the token that each token directly follows
    for start, length, parent in zip(layout.start, layout.length, layout.parent, strict=True):
        before[start] = layout.start[parent] + layout.length[parent] - 1 if parent >= 0 else None
        before |= {token: token - 1 for token in range(start + 1, start + length)}
    mask = forest_mask(layout)
    for token in range(layout.tokens):
        seen, at = set(), token
        while at is not None:
            seen.add(at)
            at = before[at]
        assert set(mask[token].nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["all heads", "grouped", "one key head"])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_the_fast_kernel_equals_the_reference_in_float64(layout, heads):
    tensors = inputs(layout, torch.float64, *heads)
    fast = value_and_gradients(forest_attention, tensors, layout)
    truth = value_and_gradients(reference_attention, tensors, layout)
    for got, wanted in zip(fast, truth, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 60])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_windows_and_sinks_equal_the_reference_in_float64(layout, window):
    require_reference_with_sinks(forest_attention, layout, window)


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_a_window_shows_the_last_tokens_of_the_path(layout, window):
    mask, narrow, position = forest_mask(layout), forest_mask(layout, window=window), path_positions(layout)
    for token in range(layout.tokens):
        path = mask[token].nonzero().flatten()
        assert position[path].sort().values.tolist() == list(range(len(path)))
        last = path[position[path] > position[token] - window]
        assert narrow[token].nonzero().flatten().tolist() == last.tolist()


@pytest.mark.parametrize("window", [None, 5])
def test_sinks_and_windows_stay_finite_for_scores_of_thousands(window):
    layout = CASES["turns under turns"]
    sinks = torch.tensor([100.0, -300.0, 0.0, 5.0]).requires_grad_()
    tensors = (*inputs(layout, torch.float32, scale=60.0), sinks)
    for got in value_and_gradients(forest_attention, tensors, layout, window=window):
        assert torch.isfinite(got).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_the_fast_kernel_equals_the_reference_in_lower_precision(layout, dtype, tolerance):
    tensors = inputs(layout, dtype, scale=1.0)
    fast = value_and_gradients(forest_attention, tensors, layout)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for got, wanted in zip(fast, value_and_gradients(reference_attention, exact, layout), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_scores_of_thousands_give_finite_gradients(layout):
    tensors = inputs(layout, torch.float32, scale=60.0)
    for got in value_and_gradients(forest_attention, tensors, layout):
        assert torch.isfinite(got).all()


def test_the_order_of_roots_does_not_matter():
    trees = [(20, [(4, []), (9, [])]), (33, []), (7, [(7, []), (7, [(2, [])])]), (1, [])]
    layout = layout_of(trees)
    tensors = inputs(layout, torch.float64)
    results = value_and_gradients(forest_attention, tensors, layout)

    lengths = [layout_of([tree]).tokens for tree in trees]
    tokens = torch.arange(layout.tokens).split(lengths)
    order = [2, 0, 3, 1]
    index = torch.cat([tokens[i] for i in order])
    shuffled_layout = layout_of([trees[i] for i in order])
    shuffled = [tensor.detach()[:, index].requires_grad_() for tensor in tensors]
    out = forest_attention(*shuffled, shuffled_layout, 8**-0.5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    back = torch.empty_like(index).scatter_(0, index, torch.arange(len(index)))
    grads = torch.autograd.grad((out[:, back] * weights).sum(), shuffled)
    for got, wanted in zip([out, *grads], results, strict=True):
        torch.testing.assert_close(got[:, back], wanted, rtol=1e-12, atol=1e-12)


def test_a_token_does_not_feel_another_branch():
    layout = layout_of([(10, [(5, []), (5, [])]), (10, [])])
    query, key, value = inputs(layout, torch.float64)
    out = forest_attention(query, key, value, layout, 0.3)
    _, grad_key, grad_value = torch.autograd.grad(out[:, 10:15].sum(), (query, key, value))
    for grad in (grad_key, grad_value):
        assert grad[:, :15].abs().sum() > 0
        assert grad[:, 15:].abs().sum() == 0


@pytest.mark.parametrize("name", ["two groups", "single root", "slices"])
def test_any_memory_layout_of_inputs_and_gradient_is_right(name):
    layout = {**CASES, "slices": layout_of([(200, [(60, []), (60, [])])])}[name]
    tensors = inputs(layout, torch.float64)
    wanted = value_and_gradients(reference_attention, tensors, layout)
    strided = [t.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for t in tensors]
    for got, truth in zip(value_and_gradients(forest_attention, strided, layout), wanted, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    sums = [
        torch.autograd.grad(f(*tensors, layout, 0.3).sum(), tensors) for f in (forest_attention, reference_attention)
    ]
    for got, truth in zip(*sums, strict=True):  # the gradient of a sum is one number expanded, with strides of 0
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_causal_calls_cover_every_token_once_and_padding_is_bounded(layout):
    calls = parts(layout, torch.device("cpu"))
    row = torch.arange(layout.tokens)
    covered = torch.cat([row[part.query.tokens] for part in calls if part.causal])
    assert sorted(covered.tolist()) == row.tolist()
    done = sum(part.query.batch * part.query.length * part.key.length for part in calls)
    needed = sum(length * length for length in layout.length)
    mask = forest_mask(layout)
    for start, length in zip(layout.start, layout.length, strict=True):
        needed += int(mask[start, :start].sum()) * length
    assert done <= 1.5 * needed + 4096 * len(calls)


def test_a_short_answer_is_not_padded_to_the_length_of_a_prompt():
    layout = layout_of([(1024, [(64, [])] * 4), (1024, [(64, [])] * 4)])
    causal = [part.query for part in parts(layout, torch.device("cpu")) if part.causal]
    assert sorted((runs.batch, runs.length) for runs in causal) == [(2, 1024), (8, 64)]


def test_runs_that_stand_back_to_back_are_taken_without_a_copy():
    layout = layout_of([(200, [(60, []), (60, []), (60, [])])])
    rows = torch.randn(layout.tokens, 2, 4)
    for part in parts(layout, torch.device("cpu")):
        for runs in (part.query, part.key):
            assert runs.take(rows).untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
