"""Norms in few passes against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated

from foveate.models import norms
from foveate.models.norms import RMSNorm, use_fast_norms


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(norms, "_LEAST", 1)


def _norms(width: int = 64, kind: type[nn.Module] = LlamaRMSNorm) -> tuple[nn.Module, nn.Module]:
    """transformers' layer and the fast one, of the same random weights."""
    slow = kind(width, eps=1e-5)
    nn.init.normal_(slow.weight)
    return slow, use_fast_norms(copy.deepcopy(slow), "cpu")


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 64), (64, 64), (1, 150, 64), (2, 75, 64), (1, 50, 3, 32), (7, 5000), (130, 64)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("wants_x", [True, False])
def test_a_norm_and_its_gradients_are_those_of_transformers(shape, frozen, wants_x):
    layers = [layer.requires_grad_(not frozen) for layer in _norms(shape[-1])]
    x, grad = torch.randn(shape).mul_(3).requires_grad_(wants_x), torch.randn(shape)
    wanted, found = (layer(x) for layer in layers)
    assert type(layers[1]) is RMSNorm
    assert _same(found, wanted)
    assert found.requires_grad == wanted.requires_grad
    if wanted.requires_grad:
        grads = (torch.autograd.grad(
            out, [*([x] if wants_x else []), *([] if frozen else layer.parameters())], grad
        ) for layer, out in zip(layers, (wanted, found), strict=True))  # fmt: skip
        assert all(_same(*pair) for pair in zip(*reversed([*grads]), strict=True))
    with torch.no_grad():
        assert _same(layers[1](x), wanted)


def test_rows_of_any_layout_and_size_are_normalised():
    slow, fast = _norms()
    wide = torch.randn(100, 2, 128)
    for x in (wide[..., ::2], wide[:, :, :64], wide[:, :, 64:].transpose(0, 1), wide.new_ones(1, 1).expand(90, 64)):
        for scale in (0.0, 1e-4, 1e4):
            one = (x * scale if x.stride()[0] else x).detach().requires_grad_()
            pairs = [layer(one).transpose(0, -1) for layer in (fast, slow)]
            grad = torch.randn(pairs[0].shape)
            assert _same(*pairs)
            assert _same(*(torch.autograd.grad(out, one, grad)[0] for out in pairs))


def test_a_norm_may_be_used_twice_checkpointed_hooked_and_changed_in_place():
    layers, results = _norms(), []
    for layer in layers:
        torch.manual_seed(0)
        x, seen = torch.randn(100, 64, requires_grad=True), []
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        once = checkpoint(layer, x, use_reentrant=False)
        twice = layer(once + x).mul_(x).add_(once)
        twice.square().sum().backward()
        assert len(seen) >= 2  # a checkpoint computes again only what it has to
        results.append((twice, x.grad, layer.weight.grad))
    assert all(_same(*pair) for pair in zip(*results, strict=True))


def test_an_input_that_changes_after_a_norm_is_an_error():
    _, fast = _norms()
    x = torch.randn(100, 64, requires_grad=True) * 1.0
    out = fast(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_other_types_stay_with_transformers_and_few_numbers_are_the_same(monkeypatch):
    slow, fast = _norms()
    x = torch.randn(100, 64)
    monkeypatch.setattr(norms._RMSNorm, "apply", lambda *_: pytest.fail("the fast norm was asked"))
    for other in (x.double(), x.bfloat16()):
        assert torch.equal(fast(other), slow(other))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), slow(x))
    assert torch.equal(fast.bfloat16()(x), slow.bfloat16()(x))
    fast, slow = fast.float(), slow.float()
    assert torch.equal(torch.compile(fast, backend="eager", fullgraph=True)(x), slow(x))
    monkeypatch.setattr(norms, "_LEAST", 1 << 16)
    assert torch.equal(fast(x), slow(x))
    x.requires_grad_()
    fast_grad, slow_grad = (torch.autograd.grad(layer(x).square().sum(), [x, layer.weight]) for layer in (fast, slow))
    assert all(map(_same, fast_grad, slow_grad))


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, Qwen3RMSNorm, Gemma3RMSNorm, Qwen3_5RMSNorm, Qwen3_5RMSNormGated])
def test_norms_are_recognised_by_what_they_compute(kind):
    slow, fast = _norms(kind=kind)
    assert (type(fast) is RMSNorm) == (kind in (Qwen2RMSNorm, Qwen3RMSNorm))
    x = (torch.randn(100, 64), torch.randn(100, 64)) if kind is Qwen3_5RMSNormGated else (torch.randn(100, 64),)
    assert _same(fast(*x), slow(*x))
    assert type(use_fast_norms(copy.deepcopy(slow), "meta")) is kind
    assert [*fast.state_dict()] == [*slow.state_dict()]


def test_a_norm_that_differs_in_one_number_is_left():
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(4).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    assert type(use_fast_norms(Other(64), "cpu")) is Other
