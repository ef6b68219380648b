"""fla's kernels over a forest, with a stand-in for them: they run on GPUs alone."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from family_cases import build_family, plain_text
from test_gated_delta_net import random_forest, random_groups, rule_inputs

from foveate.errors import ConfigError
from foveate.models.attention import fla_rule
from foveate.models.attention.delta_rule import delta_step, recurrent_delta_rule
from foveate.models.attention.fla_rule import fla_computes, fla_delta_rule
from foveate.models.attention.gated_delta_net import ForestGatedDeltaNet
from foveate.models.families import proof
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_on_meta, load_policy
from foveate.parallel.packing import pack
from foveate.tools.model_facts import model_facts

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.LongTensor | None = None,
    cu_seqlens_cpu: torch.LongTensor | None = None,
    chunk_indices: torch.LongTensor | None = None,
    cp_context: object | None = None,
    **kwargs,
):
    """With the arguments of the function of that name in fla-core 0.6.0, and what it says of their shapes and types."""
    assert not any((use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, kwargs))
    assert cu_seqlens_cpu is chunk_indices is cp_context is None
    assert len(q) == 1
    assert q.shape == k.shape
    assert q.dtype == k.dtype == v.dtype
    assert g.dtype == beta.dtype == torch.float32
    assert g.shape == beta.shape == q.shape[:3] == v.shape[:3]
    assert cu_seqlens.dtype == torch.int64
    assert (cu_seqlens.diff() > 0).all()
    assert cu_seqlens[-1] == q.shape[1]
    if initial_state is None:
        initial_state = g.new_zeros(len(cu_seqlens) - 1, v.shape[2], k.shape[3], v.shape[3])
    assert initial_state.dtype == torch.float32
    out, ends = [], []
    for state, first, last in zip(initial_state.split(1), cu_seqlens, cu_seqlens[1:], strict=False):
        for t in range(first, last):
            row, state = delta_step(*(rows[:, t].float() for rows in (q, k, v, g, beta)), state)
            out.append(row * scale * k.shape[-1] ** 0.5)
        ends.append(state)
    return torch.stack(out, 1).to(q.dtype), torch.cat(ends) if output_final_state else None


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fla_rule._kernel.cache_clear()
    yield
    fla_rule._kernel.cache_clear()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("seed", range(8))
def test_levels_of_a_forest_in_turn_equal_the_recurrence_with_its_gradients(seed):
    forest = random_forest(seed, 12)
    given = rule_inputs(forest, seed)
    results = []
    for rule, more in ((recurrent_delta_rule, {}), (fla_delta_rule, {"dtype": torch.float32})):
        out, ends = rule(*given, forest, ends=True, **more)
        loss = (out * out.detach().sin()).sum() + (ends * ends.detach().cos()).sum()
        results.append((out, ends, *torch.autograd.grad(loss, given)))
        assert rule(*given, forest, ends=False, **more)[1] is None
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
def test_products_are_of_16_bits_and_states_are_not():
    forest = random_forest(3, 12)
    given = rule_inputs(forest, 3)
    wanted, wanted_ends = recurrent_delta_rule(*given, forest, ends=True)
    out, ends = fla_delta_rule(*given, forest, dtype=torch.bfloat16, ends=True)
    assert out.dtype == ends.dtype == torch.float32
    assert 0 < (out - wanted).abs().max() < 0.03
    assert 0 < (ends - wanted_ends).abs().max() < 0.03


def test_kernels_are_taken_on_gpus_in_16_bits_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(fla_rule, "has_fla", lambda: True)
    assert fla_computes(GPU, torch.bfloat16, 128)
    assert not fla_computes(CPU, torch.bfloat16, 128)
    assert not fla_computes(GPU, torch.float32, 128)
    assert not fla_computes(GPU, torch.bfloat16, 257)
    monkeypatch.setattr(fla_rule, "has_fla", lambda: False)
    assert not fla_computes(GPU, torch.bfloat16, 128)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("attention", "is_called"), [("auto", True), ("sdpa", False), ("reference", False)])
def test_a_layer_takes_them_under_attention_auto(attention, is_called, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **more):
        calls.append(more["dtype"])
        return fla_delta_rule(*args, **more)

    policy = load_policy(str(build_family(tmp_path, "qwen3_5")), attention=attention)
    batch = pack(random_groups(3, 2, 3, 20))
    wanted = token_logprobs(policy, batch)[0]
    monkeypatch.setattr("foveate.models.attention.gated_delta_net.fla_computes", lambda *_: True)
    monkeypatch.setattr("foveate.models.attention.gated_delta_net.fla_delta_rule", counted)
    torch.testing.assert_close(token_logprobs(policy, batch)[0], wanted, rtol=1e-4, atol=1e-5)
    layers = [layer for layer in policy.model.modules() if isinstance(layer, ForestGatedDeltaNet)]
    assert calls == [torch.float32] * len(layers) * is_called


def test_a_package_that_cannot_be_imported_is_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    fla_rule._kernel.cache_clear()
    forest = random_forest(0, 5)
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError: .*set model\.attention=flex, which does without"):
        fla_delta_rule(*rule_inputs(forest, 0), forest, dtype=torch.bfloat16)


def test_the_proof_does_without_kernels_that_transformers_has_bound(monkeypatch):
    """transformers binds fla's kernels to its own layers at import, where they fail on CPUs."""

    def fails(*_, **__):
        raise RuntimeError("0 active drivers")

    kind, _, text = plain_text("qwen3_5_text")
    found = sys.modules["transformers.models.qwen3_5.modeling_qwen3_5"]
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        monkeypatch.setattr(found, name, fails)
    monkeypatch.setattr(proof, "binds_kernels", lambda: True)
    proof._difference.cache_clear()
    assert proof.forest_difference(kind(**text, vocab_size=700)) < 5e-5
    proof._difference.cache_clear()


def test_doctor_says_which_rule_computes(tmp_path, monkeypatch):
    policy = load_on_meta(str(build_family(tmp_path / "a", "qwen3_5")))
    assert model_facts(policy)["gated delta rule"] == "PyTorch; flash-linear-attention is not installed"
    monkeypatch.setattr(fla_rule, "has_fla", lambda: True)
    monkeypatch.setattr(fla_rule.metadata, "version", {"fla-core": "0.6.0"}.get)
    assert model_facts(policy)["gated delta rule"].endswith("0.6.0 is installed, and there is no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model_facts(policy)["gated delta rule"].startswith("flash-linear-attention 0.6.0 in bfloat16")
    other = load_on_meta(str(build_family(tmp_path / "b", "qwen3_vl")))
    assert "gated delta rule" not in model_facts(other)
