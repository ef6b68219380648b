"""Products by oneDNN against those of PyTorch's own functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from foveate.models import matmul as products
from foveate.models.matmul import Linear, linear, matmul, use_fast_linear

needs_it = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    """Also on processors on which MKL is as fast."""
    monkeypatch.setattr(products, "has_fast_matmul", torch.backends.mkldnn.is_available)


def _within_rounding(found: torch.Tensor, true: torch.Tensor) -> bool:
    return torch.allclose(found, true.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(512, 256, 64), (37, 300, 700), (5, 1024, 1024), (700, 130, 57)]
)
def test_products_of_any_layout_are_those_of_pytorch(rows, inner, columns):
    wide, tall = torch.randn(rows, 2 * inner), torch.randn(2 * columns, inner)
    lefts = [wide[:, :inner].contiguous(), wide[:, :inner], wide[:, ::2], torch.randn(inner, rows).T]
    rights = [tall[:columns].T, tall[::2].T, torch.randn(inner, columns), torch.randn(inner, 3 * columns)[:, ::3]]
    for left in lefts:
        for right in rights:
            found = matmul(left, right)
            assert _within_rounding(found, left.double() @ right.double())
            assert found.shape == (rows, columns)
            assert found.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tokens", [50, 64, 150])
def test_a_linear_layer_and_its_gradients_are_those_of_pytorch(monkeypatch, bias, frozen, tokens):
    monkeypatch.setattr(products, "_TURNED", 64)
    layer = nn.Linear(256, 512, bias=bias).requires_grad_(not frozen)
    x = torch.randn(2, tokens, 256, requires_grad=True)
    grad = torch.randn(2, tokens, 512)
    expected = functional.linear(x, layer.weight, layer.bias)
    wanted = [x, *(parameter for parameter in layer.parameters() if not frozen)]
    true = torch.autograd.grad(expected, wanted, grad)
    found = linear(x, layer.weight, layer.bias)
    assert _within_rounding(found, expected)
    for one, other in zip(torch.autograd.grad(found, wanted, grad), true, strict=True):
        assert _within_rounding(one, other)
    with torch.no_grad():
        assert _within_rounding(linear(x, layer.weight, layer.bias), expected)


def test_a_bias_may_have_any_layout():
    x, weight = torch.randn(64, 256), torch.randn(256, 256)
    for bias in (torch.randn(512)[::2], torch.randn(256, 3)[:, 1], torch.tensor(1.5).expand(256)):
        assert _within_rounding(linear(x, weight, bias), functional.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(64,), (37,), (2, 37)])
def test_what_a_linear_layer_gives_may_be_changed_in_place(shape):
    layer, x, more = Linear(256, 512), torch.randn(*shape, 256), torch.randn(512, requires_grad=True)
    with torch.no_grad():
        frozen = layer(x)
    frozen += more
    found = layer(x).mul_(more).add_(frozen)
    wanted = functional.linear(x, layer.weight, layer.bias) * more + frozen
    assert _within_rounding(found, wanted)
    tensors = (more, layer.weight, layer.bias)
    grads = (torch.autograd.grad(one.square().mean(), tensors, retain_graph=True) for one in (found, wanted))
    for one, other in zip(*grads, strict=True):
        assert _within_rounding(one, other)


def test_other_types_and_small_products_stay_with_pytorch(monkeypatch):
    monkeypatch.setattr(products, "_multiply", lambda *_: pytest.fail("oneDNN was asked"))
    large = torch.randn(256, 256)
    halves = large.bfloat16()
    assert torch.equal(matmul(large.double(), large.double()), large.double() @ large.double())
    assert torch.equal(linear(halves, halves), functional.linear(halves, halves))
    assert torch.equal(matmul(large[:2], large), large[:2] @ large)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(large, large).dtype == torch.bfloat16


@needs_it
def test_float32_models_of_processors_get_fast_linear_layers_under_their_names(monkeypatch):
    model = nn.Sequential(nn.Linear(256, 256), nn.Sequential(nn.Linear(256, 256)), nn.LayerNorm(256))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert [type(one) for one in use_fast_linear(model, "meta").modules()].count(Linear) == 0
    assert [type(one) for one in use_fast_linear(model, "cpu").modules()].count(Linear) == 2
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    asked = []
    multiply = products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *them: asked.append(1) or multiply(*them))
    model(torch.randn(64, 256)).sum().backward()
    assert len(asked) == 5  # two forward, two for weights, one for what is between them


@needs_it
def test_rows_that_come_and_go_have_few_shapes(monkeypatch):
    shapes = set()

    def multiply(x, weight, *_):
        shapes.add(len(x))
        return functional.linear(x, weight)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply)
    weight = torch.randn(64, 32)
    for rows in range(1, 513):
        assert products._multiply(torch.randn(rows, 32), weight, None).shape == (rows, 64)
    assert len(shapes) == 7 + 15


@needs_it
def test_compiled_layers_are_one_graph():
    layers = use_fast_linear(nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)), "cpu")
    compiled = torch.compile(layers, backend="eager", fullgraph=True)
    x = torch.randn(64, 256, requires_grad=True)
    assert _within_rounding(compiled(x), layers(x))
