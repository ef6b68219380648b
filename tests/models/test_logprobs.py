from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate.models.logprobs import chunked_logprobs, plain_logprobs

M, D, V = 37, 16, 101


def inputs(dtype=torch.float64, m=M, d=D, v=V, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(m, d, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (m,), generator=generator)


def loss_of(logp, entropy, uses):
    """A loss whose gradient differs from token to token."""
    weights = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    total = torch.zeros((), dtype=logp.dtype)
    if "logp" in uses:
        total = total + (weights * logp).sum()
    if "entropy" in uses:
        total = total + (weights.cos() * entropy.square()).sum()
    return total


@pytest.mark.parametrize("uses", ["logp", "entropy", "logp and entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("chunk", [1, V, 3 * V + 1, 36 * V, 37 * V, 1 << 20])
def test_chunked_equals_plain_in_value_and_gradient(chunk, temperature, uses):
    hidden, weight, token_ids = inputs()
    fast = chunked_logprobs(hidden, weight, token_ids, temperature, chunk)
    truth = plain_logprobs(hidden, weight, token_ids, temperature)
    fast_grads = torch.autograd.grad(loss_of(*fast, uses), (hidden, weight))
    true_grads = torch.autograd.grad(loss_of(*truth, uses), (hidden, weight))
    for got, wanted in zip([*fast, *fast_grads], [*truth, *true_grads], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_values_are_those_of_the_definition():
    hidden, weight, token_ids = inputs()
    logp, entropy = chunked_logprobs(hidden, weight, token_ids, 0.7, 5 * V)
    for row, token in enumerate(token_ids.tolist()):
        p = torch.softmax(weight.detach() @ hidden.detach()[row] / 0.7, 0)
        assert logp[row].item() == pytest.approx(p[token].log().item(), abs=1e-12)
        assert entropy[row].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-12)


def test_float32_stays_within_rounding_of_float64():
    hidden, weight, token_ids = inputs(torch.float32, m=200, d=32, v=5000)
    fast = chunked_logprobs(hidden, weight, token_ids, 1.0, 7 * 5000)
    grads = torch.autograd.grad(loss_of(*fast, "logp and entropy"), (hidden, weight))
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    truth = plain_logprobs(*exact, token_ids, 1.0)
    true_grads = torch.autograd.grad(loss_of(*truth, "logp and entropy"), exact)
    for got, wanted in zip([*fast, *grads], [*truth, *true_grads], strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() / wanted.norm() < 2e-6


def test_logits_of_hundreds_stay_finite():
    hidden, weight, token_ids = inputs(torch.float32, scale=200.0)
    logp, entropy = chunked_logprobs(hidden, weight, token_ids, 0.1, 4 * V)
    grads = torch.autograd.grad((logp + entropy).sum(), (hidden, weight))
    for values in (logp, entropy, *grads):
        assert torch.isfinite(values).all()
    assert (entropy >= -1e-6).all()
    assert (logp <= 0).all()


def test_bfloat16_weights_gather_their_gradient_in_float32():
    hidden, weight, token_ids = inputs(torch.bfloat16, m=600)
    logp, _ = chunked_logprobs(hidden, weight, token_ids, 1.0, V)  # 600 chunks of one row
    grad = torch.autograd.grad(logp.sum(), weight)[0]
    exact = [hidden.detach().double(), weight.detach().double().requires_grad_()]
    truth = torch.autograd.grad(plain_logprobs(*exact, token_ids, 1.0)[0].sum(), exact[1])[0]
    assert logp.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - truth).norm() / truth.norm() < 1e-2


def test_autocast_computes_forward_and_backward_in_the_same_precision():
    hidden, weight, token_ids = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fast = chunked_logprobs(hidden, weight, token_ids, 1.0, 4 * V)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    truth = chunked_logprobs(*low, token_ids, 1.0, 4 * V)
    grads = torch.autograd.grad(loss_of(*fast, "logp"), (hidden, weight))
    true_grads = torch.autograd.grad(loss_of(*truth, "logp"), low)
    assert torch.equal(fast[0], truth[0])
    for got, wanted in zip(grads, true_grads, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted.float())


def test_a_frozen_head_or_a_frozen_model_gets_no_gradient():
    hidden, weight, token_ids = inputs()
    logp, _ = chunked_logprobs(hidden, weight.detach(), token_ids)
    assert torch.autograd.grad(logp.sum(), hidden)[0].abs().sum() > 0
    logp, _ = chunked_logprobs(hidden.detach(), weight, token_ids)
    assert torch.autograd.grad(logp.sum(), weight)[0].abs().sum() > 0
    with torch.no_grad():
        assert not chunked_logprobs(hidden, weight, token_ids)[0].requires_grad


def test_no_trained_token_is_no_error():
    hidden, weight, _ = inputs()
    logp, entropy = chunked_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("uses", ["logp", "logp and entropy"])
def test_no_tensor_is_larger_than_a_chunk_in_forward_or_backward(uses):
    v, chunk = 1000, 8000
    hidden, weight, token_ids = inputs(torch.float32, m=300, d=4, v=v)
    with Largest() as largest:
        loss_of(*chunked_logprobs(hidden, weight, token_ids, 0.9, chunk), uses).backward()
    assert largest.elements <= chunk
    with Largest() as largest:
        loss_of(*plain_logprobs(hidden, weight, token_ids, 0.9), uses).backward()
    assert largest.elements == 300 * v  # the measure sees what it should


def test_backward_keeps_nothing_of_the_size_of_logits():
    hidden, weight, token_ids = inputs(torch.float32, m=300, d=4, v=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_logprobs(hidden, weight, token_ids, 1.0, 8000)
    assert max(kept) == weight.numel()
