from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_cases import VISION_MODELS, build_family

from foveate.config.model import LoraSettings, ModelSettings
from foveate.config.train import OptimSettings
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError
from foveate.models.forward import token_logprobs
from foveate.models.lora import adapters_weighed, add_adapters, merged_state, trains_adapters_only
from foveate.models.policy import freeze_except, load_policy, parameters_by_part, save_policy
from foveate.parallel.packing import pack
from foveate.records import PackedGroup
from foveate.train.worker import Worker

NAMES = ["internvl", *VISION_MODELS, "qwen2", "qwen3", "qwen3_moe", "gpt_oss"]
LANGUAGE = ("language",)


@pytest.fixture(scope="module")
def folder_of(tiny_folder, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {"internvl": tiny_folder}

    def folder(name):
        if name not in made:
            made[name] = build_family(root / name, name)
        return made[name]

    return folder


@pytest.fixture
def tree_of(make_task, make_image):
    def packed(policy):
        task = make_task("<image> what?", make_image(90, 60)) if policy.family.unit else make_task("what?")
        encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
        return PackedGroup.of_tokens(encode(task), ((20, 30, 40), (50, 60)))

    return packed


def modules_of(policy):
    return [part for part in ("vision", "projector", "language") if part in policy.family.parts]


@pytest.mark.parametrize("name", NAMES)
def test_parts_with_adapters_learn_by_these_alone(name, folder_of, tree_of):
    policy = load_policy(str(folder_of(name)))
    modules = modules_of(policy)
    freeze_except(policy, modules)
    add_adapters(policy, LoraSettings(rank=2), modules)
    token_logprobs(policy, pack([tree_of(policy)]))[0].sum().backward()
    for part, parameters in parameters_by_part(policy).items():
        for key, parameter in parameters.items():
            learns = ".lora_" in key or part == "projector"
            assert parameter.requires_grad == learns, key
            assert parameter.grad is None or learns, key
            if part == "projector" or ".lora_B." in key:
                # the last keys and values of a vision tower whose class token is dropped may be unused; none is here
                assert parameter.grad is not None, key
                assert torch.isfinite(parameter.grad).all(), key
    for part in ("language", *(["vision"] if "vision" in modules else [])):
        grads = [p.grad for key, p in parameters_by_part(policy)[part].items() if ".lora_B." in key]
        assert sum(grad.abs().sum() > 0 for grad in grads) > 0.9 * len(grads)


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_model_has_the_adapters_merged(name, folder_of, tree_of, tmp_path):
    policy = load_policy(str(folder_of(name)))
    before = {key: tensor.clone() for key, tensor in policy.model.state_dict().items()}
    freeze_except(policy, LANGUAGE)
    add_adapters(policy, LoraSettings(rank=2), LANGUAGE)
    batch = pack([tree_of(policy)])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        start = token_logprobs(policy, batch)[0]
        for key, parameter in policy.model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.2, generator=generator)
        learned = token_logprobs(policy, batch)[0]
        with adapters_weighed(policy.model, 0):
            assert torch.equal(token_logprobs(policy, batch)[0], start)
        assert torch.equal(token_logprobs(policy, batch)[0], learned)
    assert (learned - start).abs().max() > 1e-2
    save_policy(policy, tmp_path / "saved", merged_state(policy.model))
    again = load_policy(str(tmp_path / "saved"))
    assert again.model.state_dict().keys() == before.keys()
    if "moe" not in name and name != "gpt_oss":  # float32 passes differ by as much; experts have no float64 product
        policy.model.double()
        again.model.double()
    with torch.no_grad():
        learned = token_logprobs(policy, batch)[0]
        torch.testing.assert_close(token_logprobs(again, batch)[0], learned, rtol=1e-5, atol=3e-5)
    again.model.float()
    for key, tensor in again.model.state_dict().items():
        inside = policy.family.part_of(key) in ("language", "head")
        if "q_proj.weight" not in key and not inside and name in ("internvl", *VISION_MODELS):
            assert torch.equal(tensor, before[key]), key


def worker_of(folder, seed=0, budget=1024, parts=LANGUAGE, **lora):
    model = ModelSettings(path=str(folder), trainable=parts, lora=LoraSettings(rank=2, **lora))
    return Worker(model, OptimSettings(lr=0.01), budget, reference=True, seed=seed)


def test_the_frozen_reference_is_the_policy_with_its_adapters_off(tiny_folder, tree_of):
    worker = worker_of(tiny_folder)
    assert trains_adapters_only(worker.policy.model)
    assert worker.reference is worker.policy
    packed = tree_of(worker.policy)
    start = worker.logprobs([packed])[0]
    worker.update_sft([packed], "token", 5.0, 0.01)
    assert (worker.logprobs([packed])[0] - start).abs().max() > 1e-4
    assert torch.equal(worker.logprobs([packed], True)[0], start)
    learning = [key for key, parameter in worker.policy.model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all(".lora_" in key for key in learning)


@pytest.mark.parametrize("name", [*NAMES, "qwen3_5", "llava_onevision", "gemma3"])
def test_one_pass_has_the_logprobs_of_policy_and_reference(name, folder_of, tree_of):
    worker = worker_of(folder_of(name), budget=400, dropout=0.5)
    packed = tree_of(worker.policy)
    worker.update_sft([packed], "token", 5.0, 0.1)
    groups = [packed] * 5  # in rows of several groups and of the last one
    both = worker.both_logprobs(groups)
    for old_M, ref_M, (one_M, other_M) in zip(
        worker.logprobs(groups), worker.logprobs(groups, True), both, strict=True
    ):
        assert (old_M - ref_M).abs().max() > 1e-3
        torch.testing.assert_close(one_M, old_M, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(other_M, ref_M, rtol=1e-5, atol=2e-5)


def test_a_group_that_fits_no_row_twice_has_two_passes(tiny_folder, tree_of, monkeypatch):
    packed = tree_of(worker_of(tiny_folder).policy)
    short = replace(packed, answers=packed.answers[:1])
    worker = worker_of(tiny_folder, budget=2 * short.tokens)
    worker.update_sft([short], "token", 5.0, 0.1)
    rows = []
    monkeypatch.setattr("foveate.train.worker.pack", lambda groups: rows.append(groups) or pack(groups))
    both = worker.both_logprobs([short, packed, short])
    assert max(sum(group.tokens for group in row) for row in rows) <= worker.token_budget
    assert len(rows) == 4
    for found, group in zip(both, [short, packed, short], strict=True):
        torch.testing.assert_close(found[0], worker.logprobs([group])[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found[1], worker.logprobs([group], True)[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("parts", "times"), [(LANGUAGE, 1), (("vision", "language"), 2)])
def test_one_pass_sees_an_image_once_unless_adapters_see_it_too(parts, times, tiny_folder, tree_of):
    worker = worker_of(tiny_folder, parts=parts)
    seen, packed = [], tree_of(worker.policy)
    worker.policy.part("vision").register_forward_hook(lambda *_: seen.append(1))
    worker.update_sft([packed], "token", 5.0, 0.1)
    seen.clear()
    (both,) = worker.both_logprobs([packed])
    assert len(seen) == times
    torch.testing.assert_close(both[0], worker.logprobs([packed])[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(both[1], worker.logprobs([packed], True)[0], rtol=1e-5, atol=2e-5)


def test_routers_follow_the_sampler_for_the_policy_alone_in_one_pass(folder_of, tree_of):
    model = ModelSettings(path=str(folder_of("qwen3_moe")), trainable=LANGUAGE, lora=LoraSettings(rank=2))
    worker = Worker(model, OptimSettings(lr=0.01), 1024, reference=True, router_replay=True)
    packed = tree_of(worker.policy)
    layers, chosen = worker.policy.model.config.num_hidden_layers, worker.policy.model.config.num_experts_per_tok
    told = [
        replace(segment, routed_experts=np.tile(np.arange(chosen, dtype=np.int16), (len(segment), layers, 1)))
        for answer in packed.answers for segment in answer.segments
    ]  # fmt: skip
    replayed = replace(
        packed, answers=tuple(replace(a, segments=(one,)) for a, one in zip(packed.answers, told, strict=True))
    )
    worker.update_sft([packed], "token", 5.0, 0.1)
    ((old_M, ref_M),) = worker.both_logprobs([replayed])
    assert (old_M - worker.logprobs([packed])[0]).abs().max() > 1e-4
    torch.testing.assert_close(old_M, worker.logprobs([replayed])[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ref_M, worker.logprobs([packed], True)[0], rtol=1e-5, atol=2e-5)


def test_dropout_acts_in_updates_and_nowhere_else(tiny_folder, tree_of):
    worker = worker_of(tiny_folder, dropout=0.5)
    packed = tree_of(worker.policy)
    worker.update_sft([packed], "token", 5.0, 0.1)
    assert torch.equal(worker.logprobs([packed])[0], worker.logprobs([packed])[0])
    with torch.no_grad():
        one, other = (token_logprobs(worker.policy, pack([packed]))[0] for _ in range(2))
    assert not torch.equal(one, other)


def test_dropout_draws_by_the_seed_and_goes_on_where_it_was(tiny_folder, tree_of, tmp_path):
    def after(worker, updates):
        for _ in range(updates):
            worker.update_sft([tree_of(worker.policy)], "token", 5.0, 0.1)
        return worker.logprobs([tree_of(worker.policy)])[0]

    whole = after(worker_of(tiny_folder, dropout=0.5, seed=3), 3)
    worker = worker_of(tiny_folder, dropout=0.5, seed=3)
    after(worker, 2)
    path = worker.save(tmp_path, 2, {}, 2)
    again = worker_of(tiny_folder, dropout=0.5, seed=3)
    again.restore(path)
    torch.rand(5)  # what else draws does not matter
    assert torch.equal(after(again, 1), whole)
    assert not torch.equal(after(worker_of(tiny_folder, dropout=0.5, seed=4), 3), whole)


def test_a_worker_goes_on_from_its_checkpoint_and_exports_plain_weights(tiny_folder, tree_of, tmp_path):
    worker = worker_of(tiny_folder)
    packed = tree_of(worker.policy)
    worker.update_sft([packed], "token", 5.0, 0.01)
    path = worker.save(tmp_path, 1, {}, 2)
    again = worker_of(tiny_folder)
    again.restore(path)
    assert torch.equal(again.logprobs([packed])[0], worker.logprobs([packed])[0])
    worker.export(tmp_path / "final")
    policy = load_policy(str(tmp_path / "final"))
    with torch.no_grad():
        merged = token_logprobs(policy, pack([packed]))[0]
    torch.testing.assert_close(merged, worker.logprobs([packed])[0], rtol=0, atol=2e-5)


def test_an_unknown_target_names_the_linear_layers(tiny_folder):
    policy = load_policy(str(tiny_folder))
    with pytest.raises(ConfigError, match=r"no linear layer of language is called qkv; there are down_proj, gate_proj"):
        add_adapters(policy, LoraSettings(targets=("q_proj", "qkv")), LANGUAGE)


def test_without_peft_the_error_says_what_to_install(tiny_policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model.lora needs peft; install it by: pip install 'foveate\[lora\]'"):
        add_adapters(tiny_policy, LoraSettings(), LANGUAGE)
