"""The experts that a server tells: of which token each is, over turns and interruptions, and against transformers."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engine_conformance import Case, start
from test_engine_families import build
from toy import make_data, rl_settings

from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, EngineError
from foveate.log import read_metrics
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.models.routing import ROUTERS, follow_routers, router_layers
from foveate.parallel.packing import engine_logprobs, pack
from foveate.records import Answer, PackedGroup, Prompt, SamplingParams, Segment
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.experts import with_told_experts
from foveate.rollout.server.turns import GroupTurns, unbegun
from foveate.rollout.sglang.engine import single_experts
from foveate.rollout.vllm.engine import VLLMEngine
from foveate.train.rl import run_rl

TURNS = SamplingParams(samples=3, max_tokens=40)
PLAIN = Prompt(tuple(range(20, 31)), (), None, tuple(range(20, 31)))


def mixture(folder, name):
    """A tiny mixture whose answers end their turns often."""
    policy = load_policy(str(build(folder, name)))
    follow_routers(policy.model, "test")
    return replace(policy, family=replace(policy.family, stop_ids=tuple(range(3, 600, 8))))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


def observe(_index, number, answer):
    seen, turns = Future(), sum(segment.trained for segment in answer.segments)
    ids = np.asarray([20 + number, 31, 32], np.int64)
    seen.set_result(None if turns > 2 else Segment(ids, ids, np.zeros(0, np.float32), False))
    return seen


def told(answer):
    """The experts of the prompt and of the answer."""
    return np.concatenate([answer.prompt_experts, *(segment.routed_experts for segment in answer.segments)])


@torch.no_grad()
def require_told(policy, prompt, answers):
    """Every token but the last has the experts that transformers' own forward of this answer alone chooses."""
    plain, chosen = policy.family.auto_class.from_pretrained(policy.folder, attn_implementation="eager"), []
    plain.load_state_dict(policy.model.state_dict())
    for module in plain.modules():
        if type(module).__name__ in ROUTERS:
            module.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    for answer in answers:
        chosen.clear()
        plain(input_ids=torch.tensor([[*prompt.token_ids, *answer.token_ids]]))
        wanted, found = torch.stack(chosen, 1).numpy(), told(answer)
        assert found.dtype == np.int16
        assert (found[-1] == -1).all()
        assert (np.sort(found[:-1]) == np.sort(wanted[:-1])).all()
    group = PackedGroup(prompt, tuple(answers))
    torch.testing.assert_close(token_logprobs(policy, pack([group]))[0], engine_logprobs(group), rtol=1e-4, atol=1e-4)


def test_experts_are_given_to_the_prompt_and_to_all_tokens_but_the_last():
    prompt = Prompt((1, 2, 3), (), None, (1, 2, 3))
    answers = [Answer.sampled((5, 6), (0, 0), "", "stop", 0), Answer.sampled((), (), "", "abort", 0)]
    rows = np.arange(8, dtype=np.uint8).reshape(4, 1, 2)
    one, other = with_told_experts(prompt, answers, [rows, None])
    assert one.prompt_experts.tolist() == rows[:3].tolist()
    assert one.segments[0].routed_experts.tolist() == [[[6, 7]], [[-1, -1]]]
    assert other.prompt_experts is None
    for wrong, what in ((rows[:3], 3), (None, 0)):
        with pytest.raises(EngineError, match=f"tells the experts of {what} tokens, not of the 4 that it computed"):
            with_told_experts(prompt, answers[:1], [wrong])


def test_turns_and_what_is_observed_between_them_have_the_experts_of_their_own_tokens(policy):
    engine, request, lock = NativeEngine(policy, str, record_experts=True), Request(PLAIN, 3), threading.Lock()

    def ask(one, sampling):
        with lock:
            return engine.generate([one], sampling)[0][0]

    turns = GroupTurns(
        0, request, unbegun(0, 3), ask, str, policy.family.stop_ids, observe, lambda: False, lambda: None
    )
    answers = turns.finish(TURNS)
    assert max(len(answer.segments) for answer in answers) > 2
    require_told(policy, PLAIN, answers)


def test_experts_of_a_model_that_vllm_serves_without_prefixes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"router_replay: vLLM tells experts .* qwen3_5_moe_text without; leave"):
        VLLMEngine(mixture(tmp_path, "qwen3_5_moe_text"), str, record_experts=True)


def test_layers_with_a_router_go_by_their_number_among_all(policy):
    assert router_layers(policy.model, "test") == [0, 1, 2]


def test_sglang_gets_experts_one_by_one_as_checkpoints_hold_them(policy):
    found, experts = dict(single_experts([*policy.model.named_parameters()])), policy.model.model.layers[1].mlp.experts
    parts = [found[f"model.layers.1.mlp.experts.2.{part}_proj.weight"] for part in ("gate", "up", "down")]
    assert torch.equal(torch.cat(parts[:2]), experts.gate_up_proj[2])
    assert torch.equal(parts[2], experts.down_proj[2])
    assert sum(tensor.numel() for tensor in found.values()) == sum(own.numel() for own in policy.model.parameters())
    assert not any(name.endswith((".gate_up_proj", ".down_proj")) for name in found)


# ------------------------------------------------------------------------------------------------------ a real server


SERVED = [("vllm", "qwen3_moe"), ("vllm", "qwen3_vl_moe"), ("sglang", "qwen3_moe")]


@pytest.fixture(scope="module", params=SERVED, ids="-".join)
def case(request, tmp_path_factory, make_task):
    engine, name = request.param
    own = mixture(tmp_path_factory.mktemp(name), name)
    encoder = Encoder(own.tokenizer, own.family, own.family.budget, 1024)
    prompts = [encoder(make_task(text)) for text in ("the big blue square", "a red circle above it " * 30)]
    running = start(engine, own, encoder, record_experts=True)
    yield Case(running, own, encoder, prompts)
    running.close()


@pytest.mark.slow
def test_a_server_tells_the_experts_that_transformers_chooses(case):
    """Also of what it has found in its cache of prefixes, and never of earlier weights."""
    for _ in range(3):
        for _ in range(2):
            groups = case.engine.generate(case.requests(), SamplingParams(samples=4, max_tokens=16))
            for prompt, group in zip(case.prompts, groups, strict=True):
                require_told(case.policy, prompt, group)
        case.change_weights(0.05)
        case.publish()


@pytest.mark.slow
def test_a_server_tells_the_experts_of_turns_and_observations(case):
    groups = case.engine.generate(case.requests(), TURNS, observe)
    assert max(len(answer.segments) for group in groups for answer in group) > 2
    for prompt, group in zip(case.prompts, groups, strict=True):
        require_told(case.policy, prompt, group)


@pytest.mark.slow
def test_an_interrupted_answer_goes_on_and_every_token_has_its_experts(case):
    policy = replace(case.policy, family=replace(case.policy.family, stop_ids=(699,)))
    case.engine._policy, sampling = policy, SamplingParams(samples=2, max_tokens=400)
    before = case.engine.statistics()["server_tokens"] + sum(map(len, case.prompts))
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(lambda: dict(case.engine.stream(case.requests(), sampling)))
        while case.engine.statistics()["server_tokens"] < before + 100:
            time.sleep(0.005)
        case.engine.pause()
        found = stream.result()
    case.engine.resume()
    assert "abort" in {answer.finish for group in found.values() for answer in group}
    again = [replace(request, partial_answers=found.get(i, ())) for i, request in enumerate(case.requests())]
    groups = case.engine.generate(again, sampling)
    for prompt, group in zip(case.prompts, groups, strict=True):
        require_told(case.policy, prompt, group)
    case.engine._policy = case.policy


@pytest.mark.slow
def test_a_run_replays_what_a_server_tells_of_prompts_with_images(tmp_path):
    program = os.environ.get("FOVEATE_VLLM")
    if program is None:
        pytest.skip("FOVEATE_VLLM does not name an environment with vllm (docs/engines.md)")
    settings = rl_settings(
        tmp_path / "run", build(tmp_path, "qwen3_vl_moe"), make_data(tmp_path / "data"),
        algorithm={"router_replay": True, "correction": {"mode": "sequence-truncate"}},
        rollout={"engine": "vllm", "engine_settings": {"program": program, "memory_mb": 64}},
        train={"steps": 2, "updates_per_step": 2}, eval={"every": 0},
    )  # fmt: skip
    records = read_metrics(run_rl(settings).metrics)
    assert [record["engine/logprob_difference_max"] < 1e-4 for record in records] == [True, True]
    assert not any(record["optim/update_skipped"] for record in records)
