"""Log-probs on a real GPU: run with FOVEATE_TEST_GPU=1 where there is one."""

from __future__ import annotations

import pytest
import torch

from foveate.models.logprobs import chunked_logprobs, plain_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or FOVEATE_TEST_GPU is not set")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-4), (torch.float16, 2e-4)])
def test_logprobs_of_rounded_weights_are_not_rounded_again(dtype, limit):
    """The truth is that of the rounded weights in float64; bfloat16 logits would be off by some hundredths."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).to(dtype).cuda() for n in (300, 5000))
    ids = torch.randint(5000, (300,), generator=generator).cuda()
    here = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    there = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    found = chunked_logprobs(*here, ids, 2.0, chunk_elements=5000 * 64)
    wanted = plain_logprobs(*there, ids, 2.0)
    for got, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=limit, atol=limit)
    gradients = torch.autograd.grad(found[0].sum() + found[1].sum(), here)
    for got, truth in zip(gradients, torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), there), strict=True):
        assert (got.double() - truth).norm() <= max(limit, 1e-2 if dtype != torch.float32 else 0) * truth.norm()
