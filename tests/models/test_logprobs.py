from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate.errors import ConfigError
from foveate.models import logprobs
from foveate.models.logprob_blocks import COLUMNS, ROWS
from foveate.models.logprobs import (
    Divergence,
    TeacherStates,
    TeacherTopK,
    chunked_logprobs,
    chunked_terms,
    chunked_top_k,
    logits_of,
    plain_logprobs,
)

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


# ------------------------------------------------------------------------------------------------ terms that are asked


def teacher_of(kind, temperature, dtype=torch.float64, m=M, v=V):
    """A teacher of another width, and its log-probs (m, v), dense in float64."""
    generator = torch.Generator().manual_seed(3)
    states = TeacherStates(
        torch.randn(m, 11, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(v, 11, generator=generator, dtype=torch.float64).to(dtype),
    )
    logp = (states.hidden.double() @ states.weight.double().T / temperature).log_softmax(-1)
    if kind == "states":
        return states, logp
    top = logp.topk(5)
    return TeacherTopK(top.indices, top.values.to(dtype)), logp


def dense(kind, beta, teacher, teacher_logp, hidden, weight, temperature):
    """The divergence by its definition, of probabilities with all logits in memory; tokens outside of a top-k
    lumped."""
    p, q = (hidden @ weight.T / temperature).softmax(-1), teacher_logp.exp()
    if isinstance(teacher, TeacherTopK):
        p, q = (one.gather(1, teacher.token_ids) for one in (p, q))
        p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p, q))
    m = beta * q + (1 - beta) * p
    kl = {"forward_kl": (q, p, 1.0), "reverse_kl": (p, q, 1.0)}
    terms = [kl[kind]] if kind in kl else [(q, m, beta), (p, m, 1 - beta)]
    return sum(share * (a * (a / b).log()).sum(-1) for a, b, share in terms)


KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5 * V, 1 << 20])
@pytest.mark.parametrize("teacher_kind", ["states", "top-k"])
@pytest.mark.parametrize(("kind", "beta"), [*((kind, 0.5) for kind in KINDS), ("jensen_shannon", 0.1)])
def test_divergences_equal_their_definition_in_value_and_gradient(kind, beta, teacher_kind, chunk, temperature):
    hidden, weight, token_ids = inputs(scale=0.5)
    teacher, teacher_logp = teacher_of(teacher_kind, temperature)
    terms = ("entropy", Divergence(kind, teacher, beta), "logp")
    entropy, found, logp = chunked_terms(hidden, weight, token_ids, temperature, terms, chunk)
    true_logp, true_entropy = plain_logprobs(hidden, weight, token_ids, temperature)
    wanted = dense(kind, beta, teacher, teacher_logp, hidden, weight, temperature)
    for got, true in ((found, wanted), (logp, true_logp), (entropy, true_entropy)):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-9)
    assert (found > 0).all()
    weights = torch.linspace(-1, 2, M, dtype=torch.float64)
    for got, true in (
        ((weights * found).sum(), (weights * wanted).sum()),
        (
            loss_of(logp, entropy, "logp and entropy") + found.square().sum(),
            loss_of(true_logp, true_entropy, "logp and entropy") + wanted.square().sum(),
        ),
    ):
        grads = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (got, true))
        for grad, true_grad in zip(*grads, strict=True):
            torch.testing.assert_close(grad, true_grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_does_not_diverge_from_itself_or_from_its_own_top_k(kind):
    hidden, weight, token_ids = inputs()
    top = (hidden @ weight.T).log_softmax(-1).topk(7)
    for teacher in (TeacherStates(hidden, weight), TeacherTopK(top.indices, top.values)):
        (found,) = chunked_terms(hidden, weight, token_ids, 1.0, (Divergence(kind, teacher),), 4 * V)
        assert found.abs().max() < 1e-10
        for grad in torch.autograd.grad(found.sum(), (hidden, weight)):
            assert grad.abs().max() < 1e-10


def test_terms_that_are_asked_alone_are_those_that_are_asked_together():
    hidden, weight, token_ids = inputs(torch.float32)
    both = chunked_logprobs(hidden, weight, token_ids, 0.7, 5 * V)
    for term, together in zip(("logp", "entropy"), both, strict=True):
        (alone,) = chunked_terms(hidden, weight, token_ids, 0.7, (term,), 5 * V)
        assert torch.equal(alone, together)
        for grads in zip(
            *(torch.autograd.grad(one.sum(), (hidden, weight), retain_graph=True) for one in (alone, together)),
            strict=True,
        ):
            assert torch.equal(*grads)


class Operations(TorchDispatchMode):
    """Counts the elements that all operators returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


def test_an_entropy_that_is_not_asked_for_costs_nothing():
    hidden, weight, token_ids = inputs(torch.float32, m=300, d=4, v=1000)
    cost = {}
    for terms in (("logp",), ("logp", "entropy")):
        with Operations() as operations:
            chunked_terms(hidden, weight, token_ids, 1.0, terms, 8000)
        cost[terms] = operations.elements
    assert cost["logp", "entropy"] - cost["logp",] >= 300 * 1000


@pytest.mark.parametrize("teacher_kind", ["states", "top-k"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_holds_no_more_than_chunks_and_keeps_nothing_of_their_size(kind, teacher_kind):
    v, chunk = 1000, 8000
    hidden, weight, token_ids = inputs(torch.float32, m=300, d=4, v=v)
    term = Divergence(kind, teacher_of(teacher_kind, 1.0, torch.float32, 300, v)[0])
    kept = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        (found,) = chunked_terms(hidden, weight, token_ids, 0.9, (term,), chunk)
        assert max(kept) == weight.numel()
        found.sum().backward()
    assert largest.elements <= 11 * v  # the teacher's weight is as large; a chunk has 8 * v


def test_a_divergence_stays_finite_for_logits_of_hundreds():
    hidden, weight, token_ids = inputs(torch.float32, scale=200.0)
    for kind in KINDS:
        for teacher_kind in ("states", "top-k"):
            term = Divergence(kind, teacher_of(teacher_kind, 1.0, torch.float32)[0])
            (found,) = chunked_terms(hidden, weight, token_ids, 1.0, (term,), 4 * V)
            for values in (found, *torch.autograd.grad(found.sum(), (hidden, weight))):
                assert torch.isfinite(values).all()


@pytest.mark.parametrize("uses", ["logp", "entropy", "logp and entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (7, 1024), (600, 2300), (512, 3072)])
def test_blocks_of_the_vocabulary_give_the_values_and_gradients_of_all_logits(uses, temperature, rows, vocabulary):
    hidden, weight, token_ids = inputs(m=rows, v=vocabulary, scale=5.0)
    found, wanted = (of(hidden, weight, token_ids, temperature) for of in (chunked_logprobs, plain_logprobs))
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, true)
    of_found, of_wanted = (torch.autograd.grad(loss_of(*them, uses), (hidden, weight)) for them in (found, wanted))
    for got, true in zip(of_found, of_wanted, strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("lowest", [-math.inf, -1e37])
def test_a_first_block_that_is_far_below_the_others_counts_for_nothing(lowest):
    hidden, weight, token_ids = (one.detach() for one in inputs(torch.float32, v=COLUMNS + 100))
    hidden[:, 0] = 1
    weight[:COLUMNS, 0] = lowest
    token_ids = token_ids % 100
    found = chunked_logprobs(hidden.requires_grad_(), weight, token_ids + COLUMNS)
    wanted = chunked_logprobs(hidden, weight[COLUMNS:], token_ids)
    torch.testing.assert_close(found[0], wanted[0])
    if math.isfinite(lowest):  # an infinite logit has no entropy
        torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("token", [-100, -1, V, 5000])
def test_a_token_outside_of_the_vocabulary_is_an_error(token):
    hidden, weight, token_ids = inputs()
    token_ids[3] = token
    with pytest.raises(IndexError, match=f"token {token} is none of the {V} of the vocabulary"):
        chunked_logprobs(hidden, weight, token_ids)


def test_a_large_vocabulary_takes_a_block_of_logits_at_a_time_on_processors():
    hidden, weight, token_ids = inputs(torch.float32, m=2 * ROWS, d=4, v=8 * COLUMNS)
    with Largest() as largest:
        loss_of(*chunked_logprobs(hidden, weight, token_ids), "logp and entropy").backward()
    assert largest.elements == ROWS * COLUMNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2047, 2048, 5000])
@pytest.mark.parametrize("whole", [0, 1 << 22])
@pytest.mark.parametrize("rows", [5, 16])
@pytest.mark.parametrize("of_intel", [True, False])
def test_logits_by_columns_are_those_of_one_product(monkeypatch, vocabulary, whole, rows, of_intel, dtype):
    monkeypatch.setattr(logprobs, "_CPU_WHOLE", whole)
    monkeypatch.setattr(logprobs, "has_fast_mkl", lambda: of_intel)
    monkeypatch.setattr(logprobs, "has_fast_matmul", lambda: not of_intel)
    hidden, weight, _ = inputs(dtype, m=rows, d=8, v=vocabulary)
    with torch.no_grad():
        wanted = (hidden @ weight.T).float()
        for out in (None, torch.empty(rows, vocabulary)):
            found = logits_of(hidden, weight, out)
            torch.testing.assert_close(found, wanted)
            assert found.dtype == torch.float32


def test_a_divergence_that_cannot_be_is_refused_by_name():
    teacher, _ = teacher_of("states", 1.0)
    with pytest.raises(ConfigError, match="'kl' is no divergence; use forward_kl, reverse_kl or jensen_shannon"):
        Divergence("kl", teacher)
    with pytest.raises(ConfigError, match=r"beta of a divergence is 1\.0, not between 0 and 1"):
        Divergence("jensen_shannon", teacher, 1.0)


@pytest.mark.parametrize("more", [3, -3])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_other_lengths_are_compared_over_the_tokens_that_both_have(kind, more):
    hidden, weight, token_ids = inputs(scale=0.5)
    teacher, _ = teacher_of("states", 1.0, v=V + more)
    both = min(V, V + more)
    cut = TeacherStates(teacher.hidden, teacher.weight[:both])
    wanted = dense(kind, 0.5, cut, (cut.hidden @ cut.weight.T).log_softmax(-1), hidden, weight[:both], 1.0)
    (found,) = chunked_terms(hidden, weight, token_ids, 1.0, (Divergence(kind, teacher),), 4 * V)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    grads = (torch.autograd.grad(one.square().sum(), (hidden, weight)) for one in (found, wanted))
    for grad, true_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_top_k_of_a_teacher_are_those_of_its_whole_distribution(temperature):
    states, logp = teacher_of("states", temperature)
    found, wanted = chunked_top_k(states.hidden, states.weight, temperature, 5, 4 * V), logp.topk(5)
    assert torch.equal(found.token_ids, wanted.indices)
    torch.testing.assert_close(found.logprobs, wanted.values)
    assert chunked_top_k(states.hidden, states.weight, temperature, 2 * V).logprobs.shape == (M, V)
    with Largest() as largest:
        chunked_top_k(*(one.float() for one in (states.hidden, states.weight)), temperature, 5, 4 * V)
    assert largest.elements <= max(4 * V, states.weight.numel())


def generalised_jsd(student, teacher, beta, temperature):
    """GKD's loss per token (arXiv 2306.13649, equation 1; beta 0 is the forward KL and 1 the reverse one), as TRL's
    `GKDTrainer.generalized_jsd_loss` sums it up over the vocabulary, by `torch.nn.functional.kl_div`."""
    p, q = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    if beta in (0, 1):
        pair = (p, q) if beta == 0 else (q, p)
        return functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    m = torch.logsumexp(torch.stack([p + math.log(1 - beta), q + math.log(beta)]), 0)
    of_teacher, of_student = (functional.kl_div(m, one, reduction="none", log_target=True).sum(-1) for one in (q, p))
    return beta * of_teacher + (1 - beta) * of_student


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_divergences_are_the_loss_of_gkd_in_value_and_gradient(beta, temperature):
    hidden, weight, token_ids = inputs(scale=0.5)
    teacher, _ = teacher_of("states", temperature)
    kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, "jensen_shannon")
    term = Divergence(kind, teacher, beta if kind == "jensen_shannon" else 0.5)
    (found,) = chunked_terms(hidden, weight, token_ids, temperature, (term,), 4 * V)
    wanted = generalised_jsd(hidden @ weight.T, teacher.hidden @ teacher.weight.T, beta, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    grads = (torch.autograd.grad(one.mean(), (hidden, weight)) for one in (found, wanted))
    for grad, true_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-8, atol=1e-9)
