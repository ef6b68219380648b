"""Frozen layers of few bits: transformers' own numbers, the forest over them, and adapters on top."""

from __future__ import annotations

import sys

import pytest
import torch
from family_cases import build_family
from test_forward import padded_logprobs, random_group
from transformers import BitsAndBytesConfig, InternVLForConditionalGeneration

from foveate.config.model import LoraSettings, ModelSettings
from foveate.config.runs import RLSettings
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.models.forward import token_logprobs
from foveate.models.lora import merged_state, train_parts
from foveate.models.policy import load_policy, save_policy
from foveate.models.quantize import dequantized, linear_layers, packed_bytes, quantized_layers
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, Prompt
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.weights import served_weights
from foveate.train.worker import Worker

KINDS = ["nf4", "int8"]
PARTS = ("vision", "language")
LORA = LoraSettings(rank=2)


@pytest.fixture(scope="module")
def groups(tiny_policy):
    generator = torch.Generator().manual_seed(5)
    return [
        random_group(tiny_policy, generator, tiles, 7, 9, answers)
        for tiles, answers in ((2, (5, 3)), (0, (4,)), (1, (2, 6, 1)))
    ]


def adapted(folder, kind, seed=2):
    """A quantised policy whose adapters have moved."""
    policy = load_policy(str(folder), quantization=kind)
    train_parts(policy, PARTS, LORA)
    move(policy.model, seed)
    return policy


def move(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=generator)


def in_full(folder, policy):
    """The policy with the numbers that its quantised layers multiply with, in full, and the same adapters."""
    plain = load_policy(str(folder))
    layers = quantized_layers(policy.model)
    with torch.no_grad():
        for name, module in linear_layers(plain.model, plain.family):
            module.weight.copy_(dequantized(layers.get(name) or layers[f"{name}.base_layer"]))
    train_parts(plain, PARTS, LORA)
    move(plain.model)
    return plain


def test_four_bits_are_those_of_transformers_and_its_padded_copies_equal_the_forest(tiny_folder, groups):
    policy = load_policy(str(tiny_folder), quantization="nf4")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.multi_modal_projector"],
    )
    theirs = InternVLForConditionalGeneration.from_pretrained(
        tiny_folder, quantization_config=config, device_map="cpu", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    assert quantized_layers(theirs).keys() == quantized_layers(policy.model).keys()
    for name, layer in quantized_layers(theirs).items():
        assert torch.equal(dequantized(layer), dequantized(policy.model.get_submodule(name))), name
        layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logp, entropy = token_logprobs(policy, pack(groups))
        plain_logp, plain_entropy = padded_logprobs(theirs, groups, "right")
    torch.testing.assert_close(logp, plain_logp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy, plain_entropy, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        assert (logp - token_logprobs(load_policy(str(tiny_folder)), pack(groups))[0]).abs().max() > 1e-3


def test_eight_bits_are_those_of_bitsandbytes(tiny_folder):
    functional = pytest.importorskip("bitsandbytes.functional")
    policy, plain = load_policy(str(tiny_folder), quantization="int8"), load_policy(str(tiny_folder))
    for name, module in linear_layers(plain.model, plain.family):
        numbers, scales, _ = functional.int8_vectorwise_quant(module.weight.detach().half())
        layer = policy.model.get_submodule(name)
        assert (layer.weight.int() - numbers.int()).abs().max() <= 1, name  # theirs are rounded to half first
        torch.testing.assert_close(layer.scale[:, 0] * 127, scales, rtol=1e-3, atol=0)
        assert (dequantized(layer) - module.weight).abs().amax(1).le(0.51 * layer.scale[:, 0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_over_few_bits_what_they_learn_over_the_same_numbers_in_full(tiny_folder, groups, kind):
    policy = adapted(tiny_folder, kind)
    plain = in_full(tiny_folder, policy)
    found = []
    for one in (policy, plain):
        logp, entropy = token_logprobs(one, pack(groups))
        (torch.linspace(-1, 2, len(logp)) * logp - 0.1 * entropy).sum().backward()
        grads = {name: p.grad for name, p in one.model.named_parameters() if p.grad is not None}
        assert grads.keys() == {name for name, p in one.model.named_parameters() if p.requires_grad}
        found.append((logp.detach(), torch.cat([grads[name].flatten() for name in sorted(grads)])))
    (logp, grad), (true_logp, true_grad) = found
    torch.testing.assert_close(logp, true_logp, rtol=1e-5, atol=2e-5)
    assert (grad - true_grad).norm() <= 1e-4 * true_grad.norm()
    assert true_grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_no_weight_in_full(tiny_folder, groups, kind):
    policy = adapted(tiny_folder, kind)
    full = {(layer.out_features, layer.in_features) for layer in quantized_layers(policy.model).values()}
    own = {parameter.data_ptr() for parameter in policy.model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_logprobs(policy, pack(groups[1:2]))
    more = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in own]
    assert not {tuple(tensor.shape) for tensor in more} & full


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_has_the_numbers_that_were_trained_on(tiny_folder, groups, kind, tmp_path):
    policy = adapted(tiny_folder, kind)
    save_policy(policy, tmp_path / "saved", merged_state(policy.model))
    saved = load_policy(str(tmp_path / "saved"))
    assert not quantized_layers(saved.model)
    with torch.no_grad():
        wanted = token_logprobs(policy, pack(groups))[0]
        torch.testing.assert_close(token_logprobs(saved, pack(groups))[0], wanted, rtol=1e-5, atol=3e-5)
    served, state = dict(served_weights(policy.model)), saved.model.state_dict()
    assert served.keys() == dict(saved.model.named_parameters()).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in served.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_with_its_own_copy_has_the_same_layers(tiny_folder, groups, kind):
    policy = adapted(tiny_folder, kind)
    engine = NativeEngine.copy_of(policy, lambda _: "", version=1)
    with torch.no_grad():
        wanted = token_logprobs(policy, pack(groups))[0]
        assert torch.equal(token_logprobs(engine.policy, pack(groups))[0], wanted)
        move(policy.model, seed=9)
        engine.publish(2, policy.model.named_parameters())
        moved = token_logprobs(policy, pack(groups))[0]
        assert torch.equal(token_logprobs(engine.policy, pack(groups))[0], moved)
    assert not torch.equal(moved, wanted)


def worker_of(folder, kind, **changes):
    model = ModelSettings(path=str(folder), trainable=PARTS, lora=LORA, quantization=kind, **changes)
    return Worker(model, OptimSettings(lr=0.01), 1024, reference=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_is_trained_and_a_run_resumes_from_it(tiny_folder, groups, kind, tmp_path):
    worker = worker_of(tiny_folder, kind)
    for _ in range(2):
        worker.update_sft(groups, "token", 21.0, 0.01)
    path = worker.save(tmp_path / "checkpoints", 2, {}, 1)
    quantized = sum(layer.weight.nbytes for layer in quantized_layers(worker.policy.model).values())
    trained = sum(p.nbytes for p in worker.policy.model.parameters() if p.is_floating_point())
    assert sum(file.stat().st_size for file in path.glob("*.distcp")) < 3 * trained + quantized / 2
    worker.update_sft(groups, "token", 21.0, 0.01)
    again = worker_of(tiny_folder, kind)
    again.restore(path)
    again.update_sft(groups, "token", 21.0, 0.01)
    for (name, one), (_, other) in zip(
        worker.policy.model.named_parameters(), again.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    with torch.no_grad():
        first, reference = worker.logprobs(groups), worker.logprobs(groups, True)
    assert not torch.equal(torch.cat(first), torch.cat(reference))
    base = load_policy(str(tiny_folder), quantization=kind)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(reference), token_logprobs(base, pack(groups))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 32), (100, 36), (512, 512)])
def test_the_bytes_of_a_layer_are_those_that_are_planned(kind, shape, tiny_policy):
    policy = load_policy(str(tiny_policy.folder), quantization=kind)
    layer = next(iter(quantized_layers(policy.model).values()))
    made = type(layer)
    if kind == "int8":
        one = made(torch.nn.Linear(shape[1], shape[0], bias=False), torch.device("cpu"))
        assert one.weight.nbytes + one.scale.nbytes == packed_bytes(kind, *shape)
        return
    functional = sys.modules["bitsandbytes.functional"]
    packed, state = functional.quantize_4bit(
        torch.randn(shape), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    parts = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert sum(part.nbytes for part in parts) == packed_bytes(kind, *shape)
    assert shape != (512, 512) or packed_bytes(kind, *shape) <= 0.29 * 2 * shape[0] * shape[1]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5", "gpt_oss"])
def test_other_families_are_quantised_where_they_have_linear_layers(name, tmp_path):
    folder = build_family(tmp_path / name, name)
    policy = load_policy(str(folder), quantization="int8")
    layers = quantized_layers(policy.model)
    assert layers
    assert not any("lm_head" in layer for layer in layers)
    train_parts(policy, ("language",), LORA)
    group = PackedGroup.of_tokens(Prompt((7, 8, 9, 10, 11), (), None, ()), ((20, 30, 40), (50, 60)))
    token_logprobs(policy, pack([group]))[0].sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in policy.model.parameters())


# ------------------------------------------------------------------------------------------------------- refusals


def settings_of(**changes):
    values = {"run": "r", "model": {"path": "demo", "quantization": "int8"}, "data": {"train": ["d"]}}
    values |= {"train": {"steps": 1, "prompts_per_step": 1}}
    values["model"] |= changes.pop("model", {})
    return RLSettings.model_validate({**values, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "model.quantization is int8, so that vision, language cannot train; set model.lora, or model.train"),
        ({"cluster": {"gpus_per_node": 2}}, "model.quantization is int8, but the weights are sharded over 2 ranks"),
        ({"cluster": {"dtype": "bfloat16"}}, "model.quantization is int8, but cluster.dtype=bfloat16 would compute"),
    ],
)
def test_runs_that_cannot_have_few_bits_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        settings_of(**changes, model={"lora": {}} if changes else {})


def test_a_part_that_would_train_in_full_is_refused(tiny_folder):
    policy = load_policy(str(tiny_folder), quantization="int8")
    with pytest.raises(ConfigError, match=r"model.quantization: the linear layers of vision are frozen"):
        train_parts(policy, PARTS, LoraSettings(rank=2, targets=("down_proj",)))


def test_the_projector_alone_trains_over_a_frozen_model(tiny_folder, groups):
    policy = load_policy(str(tiny_folder), quantization="nf4")
    train_parts(policy, ("projector",), None)
    token_logprobs(policy, pack(groups))[0].sum().backward()
    trained = {name for name, p in policy.model.named_parameters() if p.grad is not None}
    assert trained
    assert all("multi_modal_projector" in name for name in trained)


def test_without_bitsandbytes_the_error_says_what_to_install(tiny_folder, monkeypatch):
    monkeypatch.setattr("foveate.models.quantize.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'foveate\[bnb\]', or use int8"):
        load_policy(str(tiny_folder), quantization="nf4")
