from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from foveate.models.attention import kernels
from foveate.models.attention.kernels import AttentionOptions, forest_attention, forest_mask, reference_attention
from foveate.models.attention.runs import parts, path_positions
from foveate.plan.trace import StorageCounter
from foveate.records import Forest


def forest_of(packed_groups):
    """A layout from nested pairs (length, [subtrees]), in depth-first order."""
    start, length, parent = [], [], []

    def add(packed, above):
        index = len(start)
        start.append(start[-1] + length[-1] if start else 0)
        length.append(packed[0])
        parent.append(above)
        for child in packed[1]:
            add(child, index)

    for packed in packed_groups:
        add(packed, -1)
    return Forest(tuple(start), tuple(length), tuple(parent))


def random_tree(rng, depth, longest):
    children = rng.randint(0, 3) if depth else 0
    return rng.randint(1, longest), [random_tree(rng, depth - 1, longest) for _ in range(children)]


def random_forest(seed, depth=3, longest=24):
    rng = random.Random(seed)
    return forest_of([random_tree(rng, depth, longest) for _ in range(rng.randint(1, 4))])


CASES = {
    "one token": forest_of([(1, [])]),
    "single root": forest_of([(37, [])]),
    "roots of one length": forest_of([(9, []), (9, []), (9, [])]),
    "group": forest_of([(50, [(7, []), (7, []), (7, [])])]),
    "group of unequal answers": forest_of([(50, [(1, []), (13, []), (70, [])])]),
    "two groups": forest_of([(30, [(5, []), (5, [])]), (64, [(5, []), (5, []), (5, [])])]),
    "group and lone root": forest_of([(3, []), (20, [(4, []), (2, [])]), (11, [])]),
    "chain of three": forest_of([(8, [(6, [(5, [])])])]),
    "turns under turns": forest_of([(16, [(4, [(3, []), (9, [])]), (12, []), (4, [(1, [(2, []), (2, [])])])])]),
    **{f"random {seed}": random_forest(seed) for seed in range(6)},
    "random long": random_forest(99, depth=1, longest=150),
}


def mixed(forest, seed):
    """The forest with about half of its segments bidirectional."""
    rng = random.Random(seed)
    return replace(forest, bidirectional=tuple(rng.random() < 0.5 for _ in forest.start))


MIXED = {
    "one image": replace(forest_of([(23, [])]), bidirectional=(True,)),
    "image in a prompt": replace(
        forest_of([(6, [(40, [(9, [(7, []), (3, [])])])]), (40, [])]),
        bidirectional=(False, True, False, False, False, True),
    ),
    **{f"mixed {name}": mixed(forest, seed) for seed, (name, forest) in enumerate(CASES.items())},
}
"""Forests with bidirectional segments among causal ones."""
EVERY = {**CASES, **MIXED}


def inputs(forest, dtype, heads=4, kv_heads=2, dim=8, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(count):
        values = torch.randn(count, forest.tokens, dim, generator=generator, dtype=torch.float64)
        return (values * scale).to(dtype).requires_grad_()

    return noise(heads), noise(kv_heads), noise(kv_heads)


def value_and_gradients(attention, tensors, forest, seed=5, window=None):
    """`tensors` are query, key, value, and sinks where there are any."""
    out = attention(*tensors[:3], forest, tensors[0].shape[-1] ** -0.5, AttentionOptions(window, *tensors[3:]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)]


def require_reference_with_sinks(kernel, forest, window):
    """A kernel gives the values and gradients of the reference, in float64."""
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64).requires_grad_()
    tensors = (*inputs(forest, torch.float64), sinks)
    fast = value_and_gradients(kernel, tensors, forest, window=window)
    truth = value_and_gradients(reference_attention, tensors, forest, window=window)
    for got, wanted in zip(fast, truth, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("forest", CASES.values(), ids=CASES)
def test_the_mask_shows_each_token_what_leads_to_it_and_nothing_else(forest):
    before = {}  # the token that each token directly follows
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        before[start] = forest.start[parent] + forest.length[parent] - 1 if parent >= 0 else None
        before |= {token: token - 1 for token in range(start + 1, start + length)}
    mask = forest_mask(forest)
    for token in range(forest.tokens):
        seen, at = set(), token
        while at is not None:
            seen.add(at)
            at = before[at]
        assert set(mask[token].nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("forest", MIXED.values(), ids=MIXED)
def test_a_token_of_a_bidirectional_segment_sees_all_of_it_whatever_the_window(forest, window):
    mask, causal = (forest_mask(f, window=window) for f in (forest, replace(forest, bidirectional=())))
    segment = torch.arange(len(forest.start)).repeat_interleave(torch.tensor(forest.length))
    own = segment[:, None] == segment
    assert torch.equal(mask[~own], causal[~own])
    bidirectional = torch.tensor(forest.bidirectional)[segment]
    assert mask[bidirectional][own[bidirectional]].all()
    assert torch.equal(mask[~bidirectional], causal[~bidirectional])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["all heads", "grouped", "one key head"])
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_the_fast_kernel_equals_the_reference_in_float64(forest, heads):
    tensors = inputs(forest, torch.float64, *heads)
    fast = value_and_gradients(forest_attention, tensors, forest)
    truth = value_and_gradients(reference_attention, tensors, forest)
    for got, wanted in zip(fast, truth, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 60])
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_windows_and_sinks_equal_the_reference_in_float64(forest, window):
    require_reference_with_sinks(forest_attention, forest, window)


@pytest.mark.parametrize("halved", [True, False], ids=["halved", "forward whole"])
@pytest.mark.parametrize("window", [None, 300])
def test_long_segments_equal_the_reference_in_float64(window, halved, monkeypatch):
    monkeypatch.setattr(kernels, "has_fast_matmul", lambda: halved)
    for forest in (
        forest_of([(600, [(257, []), (257, []), (390, [(30, [])])])]),
        forest_of([(512, [(512, []), (512, [])])]),
    ):
        require_reference_with_sinks(forest_attention, forest, window)


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("forest", CASES.values(), ids=CASES)
def test_a_window_shows_the_last_tokens_of_the_path(forest, window):
    mask, narrow, position = forest_mask(forest), forest_mask(forest, window=window), path_positions(forest)
    for token in range(forest.tokens):
        path = mask[token].nonzero().flatten()
        assert position[path].sort().values.tolist() == list(range(len(path)))
        last = path[position[path] > position[token] - window]
        assert narrow[token].nonzero().flatten().tolist() == last.tolist()


@pytest.mark.parametrize("window", [None, 5])
def test_sinks_and_windows_stay_finite_for_scores_of_thousands(window):
    forest = CASES["turns under turns"]
    sinks = torch.tensor([100.0, -300.0, 0.0, 5.0]).requires_grad_()
    tensors = (*inputs(forest, torch.float32, scale=60.0), sinks)
    for got in value_and_gradients(forest_attention, tensors, forest, window=window):
        assert torch.isfinite(got).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_the_fast_kernel_equals_the_reference_in_lower_precision(forest, dtype, tolerance):
    tensors = inputs(forest, dtype, scale=1.0)
    fast = value_and_gradients(forest_attention, tensors, forest)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for got, wanted in zip(fast, value_and_gradients(reference_attention, exact, forest), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_scores_of_thousands_give_finite_gradients(forest):
    tensors = inputs(forest, torch.float32, scale=60.0)
    for got in value_and_gradients(forest_attention, tensors, forest):
        assert torch.isfinite(got).all()


def test_the_order_of_roots_does_not_matter():
    packed_groups = [(20, [(4, []), (9, [])]), (33, []), (7, [(7, []), (7, [(2, [])])]), (1, [])]
    forest = forest_of(packed_groups)
    tensors = inputs(forest, torch.float64)
    results = value_and_gradients(forest_attention, tensors, forest)

    lengths = [forest_of([packed]).tokens for packed in packed_groups]
    tokens = torch.arange(forest.tokens).split(lengths)
    order = [2, 0, 3, 1]
    index = torch.cat([tokens[i] for i in order])
    shuffled_layout = forest_of([packed_groups[i] for i in order])
    shuffled = [tensor.detach()[:, index].requires_grad_() for tensor in tensors]
    out = forest_attention(*shuffled, shuffled_layout, 8**-0.5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    back = torch.empty_like(index).scatter_(0, index, torch.arange(len(index)))
    grads = torch.autograd.grad((out[:, back] * weights).sum(), shuffled)
    for got, wanted in zip([out, *grads], results, strict=True):
        torch.testing.assert_close(got[:, back], wanted, rtol=1e-12, atol=1e-12)


def test_a_token_does_not_feel_another_branch():
    forest = forest_of([(10, [(5, []), (5, [])]), (10, [])])
    query, key, value = inputs(forest, torch.float64)
    out = forest_attention(query, key, value, forest, 0.3)
    _, grad_key, grad_value = torch.autograd.grad(out[:, 10:15].sum(), (query, key, value))
    for grad in (grad_key, grad_value):
        assert grad[:, :15].abs().sum() > 0
        assert grad[:, 15:].abs().sum() == 0


@pytest.mark.parametrize("name", ["two groups", "single root", "slices"])
def test_any_memory_forest_of_inputs_and_gradient_is_right(name):
    forest = {**CASES, "slices": forest_of([(200, [(60, []), (60, [])])])}[name]
    tensors = inputs(forest, torch.float64)
    wanted = value_and_gradients(reference_attention, tensors, forest)
    strided = [t.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for t in tensors]
    for got, truth in zip(value_and_gradients(forest_attention, strided, forest), wanted, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    sums = [
        torch.autograd.grad(f(*tensors, forest, 0.3).sum(), tensors) for f in (forest_attention, reference_attention)
    ]
    for got, truth in zip(*sums, strict=True):  # the gradient of a sum is one number expanded, with strides of 0
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def true_tokens(runs, row):
    taken = runs.take(row[:, None]).flatten()
    return taken if runs.real is None else taken[runs.real]


@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_first_calls_cover_every_token_once_and_padding_is_bounded(forest):
    calls = parts(forest, torch.device("cpu"))
    row = torch.arange(forest.tokens)
    covered = torch.cat([true_tokens(part.query, row) for part in calls if part.first])
    assert [part.first for part in calls] == sorted((part.first for part in calls), reverse=True)
    assert sorted(covered.tolist()) == row.tolist()
    done = sum(part.query.batch * part.query.length * part.key.length for part in calls)
    needed = sum(length * length for length in forest.length)
    mask = forest_mask(forest)
    for start, length in zip(forest.start, forest.length, strict=True):
        needed += int(mask[start, :start].sum()) * length
    assert done <= 1.5 * needed + 4096 * len(calls)


def test_a_short_answer_is_not_padded_to_the_length_of_a_prompt():
    forest = forest_of([(1024, [(64, [])] * 4), (1024, [(64, [])] * 4)])
    causal = [part.query for part in parts(forest, torch.device("cpu")) if part.causal]
    assert sorted((runs.batch, runs.length) for runs in causal) == [(8, 64), (8, 256)]


@pytest.mark.parametrize("length", [512, 1024, 1500, 4096])
def test_a_long_causal_segment_computes_little_that_its_mask_hides(length):
    calls = parts(forest_of([(length, [])]), torch.device("cpu"))
    done = sum(part.query.batch * part.query.length * part.key.length for part in calls)
    assert done <= length * (length + 1) / 2 + 128 * length


def test_gradients_over_many_keys_come_some_keys_at_a_time(monkeypatch):
    forest = forest_of([(500, [(9, []), (9, []), (70, [])]), (37, [(9, [])])])
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments[2].shape[2])
        return flash_backward(*arguments, **options)

    flash_backward = kernels._flash_backward
    monkeypatch.setattr(kernels, "_flash_backward", counted)
    value_and_gradients(forest_attention, inputs(forest, torch.float32), forest)
    assert max(calls) <= 384


def test_memory_of_a_step_grows_with_the_row_and_not_with_its_square():
    def peak(length):
        rows = [torch.empty(2, 2 * length, 16, device="meta", requires_grad=True) for _ in range(3)]
        with StorageCounter(rows) as step:
            forest_attention(*rows, forest_of([(length, [(length, [])])]), 1.0).sum().backward()
        return step.peak / length

    assert peak(16_384) < 1.1 * peak(2_048)


@pytest.mark.parametrize("length", [60, 1024])
def test_runs_at_equal_distances_are_taken_without_a_copy(length):
    forest = forest_of([(200, [(length, [])] * 3)])
    rows = torch.randn(forest.tokens, 2, 4)
    for part in parts(forest, torch.device("cpu")):
        for runs in (part.query, part.key):
            assert runs.take(rows).untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
