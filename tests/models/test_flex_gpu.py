"""What PyTorch's compiler makes of the forest's mask on a real GPU: run with FOVEATE_TEST_GPU=1 where there is one."""

from __future__ import annotations

import pytest
import torch
from test_attention import forest_of, inputs, random_forest, value_and_gradients
from test_flex import EVERY, LONG

from foveate.models.attention.kernels import AttentionOptions, forest_attention, reference_attention
from foveate.records import Forest

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or FOVEATE_TEST_GPU is not set"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler
]
SHAPES = {
    "all heads": (4, 4, 64),
    "wide": (4, 2, 128),
    "seven to one": (14, 2, 64),
    "odd": (4, 2, 80),
    "small": (4, 2, 16),
}


def moved(tensors, dtype):
    return tuple(tensor.detach().to("cuda", dtype).requires_grad_() for tensor in tensors)


def value_and_gradients_there(tensors, forest, window=None):
    out = forest_attention(*tensors[:3], forest, tensors[0].shape[-1] ** -0.5, AttentionOptions(window, *tensors[3:]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights.to(out)).sum(), tensors)]


def require_near(forest, shape, window, dtype, limit, sinks=()):
    """The error of each result, as a share of its norm."""
    heads, kv_heads, dim = shape
    tensors = (*inputs(forest, torch.float64, heads, kv_heads, dim, scale=1.0), *sinks)
    rounded = tuple(tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors)
    wanted = value_and_gradients(reference_attention, rounded, forest, window=window)
    for got, truth in zip(value_and_gradients_there(moved(tensors, dtype), forest, window), wanted, strict=True):
        got = got.detach().double().cpu()
        assert (got - truth).norm() <= limit * truth.norm() + 1e-4 * (truth.norm() == 0), (forest, window)


@pytest.mark.parametrize("window", [None, 1, 5, 60])
@pytest.mark.parametrize("forest", EVERY.values(), ids=EVERY)
def test_compiled_attention_equals_the_reference_in_float32(forest, window):
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64).requires_grad_()
    require_near(forest, (4, 2, 16), window, torch.float32, 2e-6, (sinks,))
    require_near(forest, (4, 2, 16), window, torch.float32, 2e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_compiled_attention_takes_heads_of_every_shape_and_type(shape, dtype, limit):
    for forest in (LONG["turns"], LONG["prompt and answers"]):
        require_near(forest, shape, None, dtype, limit)


def test_a_row_of_real_length_is_right_and_takes_no_memory_of_its_square():
    forest = forest_of([(2048, [(512, [])] * 16), (1500, [(300 + 40 * i, []) for i in range(12)]), (700, [])])
    tensors = moved(inputs(forest, torch.float32, 16, 8, 128, scale=1.0), torch.bfloat16)
    value_and_gradients_there(tensors, forest)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = value_and_gradients_there(tensors, forest)
    assert torch.cuda.max_memory_allocated() - before < 40 * forest.tokens * 16 * 128 * 2
    held = tuple(tensor.detach().float().requires_grad_() for tensor in tensors)
    out = reference_attention(*held, forest, 128**-0.5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    truth = [out, *torch.autograd.grad((out * weights.to(out)).sum(), held)]
    for got, wanted in zip(found, truth, strict=True):
        assert (got.float() - wanted).norm() <= 8e-3 * wanted.norm()


def test_other_forests_and_lengths_take_no_new_kernels():
    from torch._dynamo.utils import counters

    def once(forest: Forest) -> None:
        tensors = moved(inputs(forest, torch.float32, 4, 2, 64), torch.bfloat16)
        value_and_gradients_there(tensors, forest)

    for forest in (forest_of([(5, [])]), LONG["turns"], LONG["whole blocks"], random_forest(50, longest=200)):
        once(forest)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for seed in range(12):
        once(random_forest(100 + seed, longest=120))
    assert counters["stats"]["unique_graphs"] == graphs
