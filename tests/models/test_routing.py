"""The experts of mixtures: recorded where the sampler chooses them, replayed where they are trained, and balanced."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from family_cases import EXPERTS, build_family, build_internvl
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError
from foveate.models.forward import hidden_states, token_logprobs
from foveate.models.policy import load_policy
from foveate.models.routing import ROUTERS, Routing, follow_routers
from foveate.parallel.packing import engine_logprobs, pack
from foveate.records import Answer, PackedGroup, Prompt, SamplingParams, Segment
from foveate.rollout.build import choose_engine
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

MIXTURES = ("qwen3_moe", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "internvl")
SAMPLING = SamplingParams(samples=3, max_tokens=9)


@pytest.fixture(scope="module", params=MIXTURES)
def policy(request, tmp_path_factory):
    """A tiny mixture of each family, whose routers are followed."""
    folder = tmp_path_factory.mktemp("mixture") / request.param
    if request.param == "internvl":
        build_internvl(folder, TINY, text={"model_type": "qwen3_moe", **EXPERTS}, vision={})
    else:
        build_family(folder, request.param)
    policy = load_policy(str(folder))
    assert follow_routers(policy.model, "test") == follow_routers(policy.model) > 0
    return policy


def routers_of(model):
    return [module for module in model.modules() if type(module).__name__ in ROUTERS]


def plain_model(policy):
    return policy.family.auto_class.from_pretrained(policy.folder, dtype=torch.float32, attn_implementation="eager")


def prompt_of(policy, make_task):
    return Encoder(policy.tokenizer, policy.family, policy.family.budget, 4096)(make_task("What is two and three?"))


def choosing(monkeypatch, router, experts=None):
    """Let the choices of transformers' own routers be `experts` (L, layers, k), one layer after the other; the list of
    what they chose."""
    own, found = torch.topk, []

    def topk(values, k, dim=-1, **how):
        if (values.shape[-1], k) != (router.num_experts, router.top_k):
            return own(values, k, dim=dim, **how)
        chosen = own(values, k, dim=dim, **how)
        if experts is not None:
            index = experts[:, len(found)]
            chosen = values.gather(1, index), index
        found.append(chosen[1])
        return chosen

    monkeypatch.setattr(torch, "topk", topk)
    return found


def routed(ids, experts, prompt_experts):
    """An answer with the experts (L, layers, k) of its tokens."""
    answer = Answer.written(ids)
    segment = replace(answer.segments[0], routed_experts=experts.numpy().astype(np.int16))
    return replace(answer, segments=(segment,), prompt_experts=prompt_experts.numpy().astype(np.int16))


def test_replayed_experts_have_transformers_logprobs_and_gradients(policy, make_task, monkeypatch):
    prompt, answers = prompt_of(policy, make_task), [tuple(range(20 + 7 * i, 33 + 9 * i)) for i in range(2)]
    layers, router = len(routers_of(policy.model)), routers_of(policy.model)[0]
    generator = torch.Generator().manual_seed(0)

    def any_experts(tokens):
        ranked = torch.rand(tokens, layers, router.num_experts, generator=generator).argsort(-1)
        return ranked[..., : router.top_k]

    first, own = any_experts(len(prompt)), [any_experts(len(ids)) for ids in answers]
    group = PackedGroup(prompt, tuple(routed(ids, experts, first) for ids, experts in zip(answers, own, strict=True)))
    policy.model.zero_grad()
    got, _ = token_logprobs(policy, pack([group]))
    got.square().sum().backward()

    plain, expected = plain_model(policy), []
    for ids, experts in zip(answers, own, strict=True):
        with monkeypatch.context() as patched:
            choosing(patched, router, torch.cat([first, experts]))
            row = torch.tensor([[*prompt.token_ids, *ids]])
            logp = plain(input_ids=row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(logp.gather(1, torch.tensor(ids)[:, None])[:, 0])
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.cat(expected).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item(), msg=name)
    with torch.no_grad():
        free, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, answers)]))
    assert (free - got).abs().max() > 0.02


def test_the_engine_records_the_experts_of_all_that_it_computes(policy, make_task, monkeypatch):
    requests = [Request(prompt_of(policy, make_task), 0), Request(Prompt((21, 30, 22), (), None, (21, 30, 22)), 1)]
    groups = NativeEngine(policy, lambda _: "", record_experts=True).generate(requests, SAMPLING)
    plain, router = plain_model(policy), routers_of(policy.model)[0]
    for request, answers in zip(requests, groups, strict=True):
        for answer in answers:
            with monkeypatch.context() as patched, torch.no_grad():
                found = choosing(patched, router)
                plain(input_ids=torch.tensor([[*request.prompt.token_ids, *answer.token_ids]]))
            chosen = torch.stack(found, 1).sort(-1).values.numpy()
            got = np.concatenate([answer.prompt_experts, answer.segments[0].routed_experts])
            assert got.dtype == np.int16
            assert (got[-1] == -1).all()  # it was not fed back
            assert (np.sort(got[:-1], -1) == chosen[:-1]).all()


def cut(answer, tokens):
    """An answer as it was when its token number `tokens` had just been sampled."""
    experts = answer.segments[0].routed_experts[:tokens].copy()
    experts[-1] = -1
    begun = Answer.sampled(answer.token_ids[:tokens], answer.logprobs[:tokens], "", "abort", 0)
    segment = replace(begun.segments[0], routed_experts=experts)
    return replace(begun, segments=(segment,), prompt_experts=answer.prompt_experts)


def test_an_answer_goes_on_under_other_routers_with_the_experts_that_it_began_with(policy, make_task):
    """Then the trainer finds the log-probs of the sampler by these experts, and others by those of its own routers."""
    own = replace(policy, family=replace(policy.family, stop_ids=(699,)))
    engine = NativeEngine.copy_of(own, lambda _: "", record_experts=True)
    request = Request(prompt_of(policy, make_task), 0)
    [whole] = engine.generate([request], SAMPLING)
    begun = tuple(cut(answer, 5) for answer in whole)
    with torch.no_grad():
        for router in routers_of(engine.policy.model):
            router.weight.neg_()
    [again] = engine.generate([replace(request, partial_answers=begun)], SAMPLING)
    for before, after in zip(whole, again, strict=True):
        assert after.token_ids[:5] == before.token_ids[:5]
        experts = after.segments[0].routed_experts
        assert (experts[:4] == before.segments[0].routed_experts[:4]).all()
        assert (after.prompt_experts == before.prompt_experts).all()
        assert (experts[:-1] >= 0).all()
        assert len(experts) == len(after)
    group = PackedGroup(request.prompt, again)
    batch = pack([group])
    with torch.no_grad():
        replayed = token_logprobs(engine.policy, batch)[0]
        chosen_now = token_logprobs(engine.policy, replace(batch, routed_experts=None))[0]
    later = torch.arange(9).repeat(3) >= 5
    sampled = engine_logprobs(group)[later]
    torch.testing.assert_close(replayed[later], sampled, rtol=1e-4, atol=1e-4)
    assert (chosen_now[later] - sampled).abs().max() > 0.01


def test_observations_are_computed_with_experts_that_are_recorded(policy, make_task):
    stop = tuple(range(60, 300))
    own = replace(policy, family=replace(policy.family, stop_ids=stop))
    engine = NativeEngine(own, lambda _: "", record_experts=True)

    def observe(_index, number, answer):
        seen = Future()
        turns = sum(segment.trained for segment in answer.segments)
        ids = np.asarray([20 + number, 31, 32], np.int64)
        seen.set_result(None if turns > 2 else Segment(ids, ids, np.zeros(0, np.float32), False))
        return seen

    request = Request(prompt_of(policy, make_task), 3)
    [answers] = engine.generate([request], SamplingParams(samples=4, max_tokens=30), observe)
    assert max(len(answer.segments) for answer in answers) > 2
    for answer in answers:
        experts = np.concatenate([segment.routed_experts for segment in answer.segments])
        assert (experts[:-1] >= 0).all()
        assert (experts[-1] == -1).all()
    group = PackedGroup(request.prompt, answers)
    with torch.no_grad():
        got = token_logprobs(policy, pack([group]))[0]
        routing = Routing(records=True)
        hidden_states(policy, replace(pack([group]), routed_experts=None), routing=routing)
    torch.testing.assert_close(got, engine_logprobs(group), rtol=1e-4, atol=1e-4)
    recorded = pack([group]).routed_experts
    known = recorded[:, 0, 0] >= 0
    assert torch.equal(routing.experts()[known].sort(-1).values, recorded[known].sort(-1).values)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_balancing_loss_is_transformers(policy, make_task, checkpointing):
    prompt, ids = prompt_of(policy, make_task), tuple(range(20, 44))
    model = copy.deepcopy(policy.model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    routing = Routing(balances=True)
    hidden_states(
        replace(policy, model=model), pack([PackedGroup.of_tokens(prompt, [ids])]), routing=routing
    ).sum().mul(0).add(routing.load_balancing_loss()).backward()
    plain, logits = plain_model(policy), []
    for router in routers_of(plain):
        router.register_forward_hook(lambda _, __, out: logits.append(out[0]))
    plain(input_ids=torch.tensor([[*prompt.token_ids, *ids]]))
    router = routers_of(plain)[0]
    expected = load_balancing_loss_func(tuple(logits), router.num_experts, router.top_k)
    expected.backward()
    torch.testing.assert_close(routing.load_balancing_loss(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(routers_of(model), routers_of(plain), strict=True):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-6)
    assert max(router.weight.grad.abs().max() for router in routers_of(plain)) > 1e-4


def test_what_has_no_routers_or_unknown_ones_is_refused_by_name(tiny_policy):
    with pytest.raises(ConfigError, match=r"algorithm.router_replay needs a mixture of experts, but the model is none"):
        follow_routers(tiny_policy.model, "algorithm.router_replay")
    assert follow_routers(tiny_policy.model) == 0
    small = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    config = Ernie4_5_MoeConfig(**small, num_attention_heads=2, num_key_value_heads=1, vocab_size=50, moe_num_experts=4)
    with pytest.raises(ConfigError, match=r"routers in Ernie4_5_MoeSparseMoeBlock that are not known; known are "):
        follow_routers(AutoModelForCausalLM.from_config(config), "record_experts")
    for settings in (
        {"engine": "foveate.rollout.build:weights_for"},
        {"engine": "vllm", "engine_settings": {"record_experts": False}},
    ):
        with pytest.raises(ConfigError, match=rf"engine {settings['engine']} does not tell which experts it chose"):
            choose_engine(RolloutSettings(**settings), 64, given={"record_experts": True})
