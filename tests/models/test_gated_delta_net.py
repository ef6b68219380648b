"""Gated DeltaNet over forests equals transformers' layer on one sequence after the other. transformers' layer drops the
ends of packed sequences silently on CPUs, so that only rows that are not packed can be compared with."""

from __future__ import annotations

import pytest
import torch
from family_cases import build_family
from transformers import AutoModelForImageTextToText

from foveate.config.model import LoraSettings
from foveate.models.attention.delta_rule import (
    chunked_delta_rule,
    chunks_of,
    forest_convolution,
    recurrent_delta_rule,
    reference_convolution,
    unit_length,
)
from foveate.models.forward import token_logprobs
from foveate.models.lora import add_adapters, merged_state
from foveate.models.policy import freeze_except, load_policy
from foveate.parallel.packing import pack
from foveate.records import Forest, PackedGroup, Prompt

NAMES = ("qwen3_5", "qwen3_5_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("delta")
    return {name: str(build_family(root / name, name)) for name in NAMES}


def random_forest(seed, longest, depth=4):
    """Segments in depth-first order, up to `longest` tokens each, below one another up to `depth` times."""
    generator = torch.Generator().manual_seed(seed)

    def number(high):
        return int(torch.randint(1, high + 1, (1,), generator=generator))

    start, length, parent = [], [], []

    def grow(above, level):
        own = len(start)
        start.append(start[-1] + length[-1] if start else 0)
        length.append(number(3) if number(2) == 1 else number(longest))
        parent.append(above)
        for _ in range(number(4) - 1 if level < depth else 0):
            grow(own, level + 1)

    for _ in range(number(3)):
        grow(-1, 1)
    return Forest(tuple(start), tuple(length), tuple(parent))


def rule_inputs(forest, seed, key_heads=2, heads=4, key_width=8, value_width=6):
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape):
        return torch.randn(forest.tokens, *shape, generator=generator)

    query, key = (unit_length(rows(key_heads, key_width)) for _ in range(2))
    decay, beta = -torch.rand(forest.tokens, heads, generator=generator), rows(heads).sigmoid()
    return [one.requires_grad_() for one in (query, key, rows(heads, value_width), decay, beta)]


@pytest.mark.parametrize("seed", range(8))
def test_the_chunked_rule_equals_the_recurrence_with_its_gradients(seed):
    forest = random_forest(seed, 90 if seed % 4 == 3 else 12)
    given = rule_inputs(forest, seed)
    results = []
    for rule in (recurrent_delta_rule, chunked_delta_rule):
        out, ends = rule(*given, forest, ends=True)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).sin()
        loss = (out * weights).sum() + (ends * ends.detach().cos()).sum()
        results.append((out, ends, *torch.autograd.grad(loss, given)))
        assert rule(*given, forest, ends=False)[1] is None
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_convolution_of_a_forest_follows_each_path(seed):
    forest = random_forest(seed, 9)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(forest.tokens, 5, generator=generator, requires_grad=True)
    weight = torch.randn(5, 4, generator=generator, requires_grad=True)
    results = []
    for convolution in (reference_convolution, forest_convolution):
        out = convolution(rows, weight, forest)
        results.append((out, *torch.autograd.grad((out * out.detach().cos()).sum(), (rows, weight))))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_chunks_below_one_prompt_begin_where_it_ends():
    forest = Forest((0, 130, 140, 220), (130, 10, 80, 64), (-1, 0, 0, 0))
    chunks = chunks_of(forest, torch.device("cpu"), 64)
    assert len(chunks.tokens) == 3 + 1 + 2 + 1
    assert [(level.count, level.inner) for level in chunks.levels] == [(1, 1), (1, 1), (1, 1), (3, 1), (1, 0)]
    assert [level.parent is None for level in chunks.levels] == [True, True, True, False, True]
    assert chunks.real.sum() == forest.tokens


# ------------------------------------------------------------------------------------------------ the whole model


def random_groups(seed, prompts, answers, longest):
    """Packed groups of random tokens, and among them prompts shorter than the convolution and than a chunk."""
    generator = torch.Generator().manual_seed(seed)

    def number(high):
        return int(torch.randint(1, high + 1, (1,), generator=generator))

    def words(count):
        return tuple(torch.randint(20, 400, (count,), generator=generator).tolist())

    groups = []
    for _ in range(number(prompts)):
        ids = words(number(3) if number(3) == 1 else number(longest))
        own = tuple(words(number(5) if number(3) == 1 else number(longest)) for _ in range(number(answers)))
        groups.append(PackedGroup.of_tokens(Prompt(ids, (), None, ids), own))
    return groups


def plain_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def one_at_a_time(model, groups):
    found = []
    for group in groups:
        for answer in group.answers:
            ids = torch.tensor([[*group.prompt.token_ids, *answer.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0])
    return torch.cat(found)


def assert_equal_steps(policy, plain, groups):
    logp = token_logprobs(policy, pack(groups))[0]
    wanted = one_at_a_time(plain, groups)
    torch.testing.assert_close(logp, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, len(logp)).roll(len(logp) // 3)
    policy.model.zero_grad(), plain.zero_grad()
    (weights * logp).sum().backward()
    (weights * wanted).sum().backward()
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters()}
    norm = torch.stack([grad.norm() for grad in theirs.values() if grad is not None]).norm()
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is None) == (theirs[name] is None), name
        if parameter.grad is not None:
            error = (parameter.grad - theirs[name]).norm()
            assert error <= 1e-4 * theirs[name].norm() + 1e-6 * norm, f"{name}: {error / theirs[name].norm():.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_random_forests_equal_transformers_one_sequence_at_a_time(name, folders):
    policy, plain = load_policy(folders[name]), plain_model(folders[name])
    for seed in range(2):
        assert_equal_steps(policy, plain, random_groups(seed, 2, 3, 20))


def test_the_state_of_a_prompt_reaches_its_answers(folders):
    """Else the comparisons would say nothing."""
    policy = load_policy(folders["qwen3_5"])
    words, answer = tuple(range(20, 140)), (7, 9, 8)
    prompts = [Prompt(ids, (), None, ids) for ids in (words, (*range(300, 330), *words[30:]))]
    for layer in policy.model.modules():
        if hasattr(layer, "self_attn"):
            layer.self_attn.o_proj.weight.data.zero_()
    with torch.no_grad():
        one, other = (token_logprobs(policy, pack([PackedGroup.of_tokens(p, [answer])]))[0] for p in prompts)
    assert (one - other).abs().min() > 1e-3


def test_checkpointed_blocks_have_the_same_gradients(folders):
    policy, groups = load_policy(folders["qwen3_5"]), random_groups(0, 2, 3, 20)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.model.train()
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.zero_grad()
        token_logprobs(policy, pack(groups))[0].sum().backward()
        found.append({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_adapters_of_recurrent_layers_train_and_merge(folders):
    policy, groups = load_policy(folders["qwen3_5"]), random_groups(1, 2, 3, 20)
    freeze_except(policy, ("language",))
    add_adapters(policy, LoraSettings(rank=2), ("language",))
    generator = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert any("linear_attn.in_proj_qkv.lora_A" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.05, generator=generator)
    got = token_logprobs(policy, pack(groups))[0]
    got.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
    plain = plain_model(folders["qwen3_5"])
    plain.load_state_dict(merged_state(policy.model))
    with torch.no_grad():
        torch.testing.assert_close(got.detach(), one_at_a_time(plain, groups), rtol=1e-4, atol=1e-4)


def test_autocast_rounds_the_products_and_not_the_states(folders):
    policy, groups = load_policy(folders["qwen3_5"]), random_groups(2, 2, 3, 30)
    with torch.no_grad():
        exact = token_logprobs(policy, pack(groups))[0]
        with torch.autocast("cpu", torch.bfloat16):
            ours = token_logprobs(policy, pack(groups))[0]
            theirs = one_at_a_time(plain_model(folders["qwen3_5"]), groups)
    error, peer = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert 0 < error < 1.5 * peer < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thirty_random_forests_equal_transformers_one_sequence_at_a_time(name, folders):
    policy, plain = load_policy(folders[name]), plain_model(folders[name])
    for seed in range(30):
        assert_equal_steps(policy, plain, random_groups(100 + seed, 4, 5, 200))
