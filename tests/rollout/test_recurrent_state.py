"""Sampling from a model with recurrent layers: each answer has a state of its own, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_cases import build_family

from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.parallel.packing import engine_logprobs, pack
from foveate.records import Answer, PackedGroup, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

SAMPLING = SamplingParams(samples=3, max_tokens=14)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Answers end at one of many tokens, so that rows leave all the time."""
    policy = load_policy(str(build_family(tmp_path_factory.mktemp("delta") / "m", "qwen3_5")))
    return replace(policy, family=replace(policy.family, stop_ids=tuple(range(60, 120))))


@pytest.fixture(scope="module")
def requests():
    """Prompts shorter than the convolution, and longer than a chunk."""
    prompts = [tuple(range(20 + i, 20 + i + length)) for i, length in enumerate((1, 3, 70, 12))]
    return [Request(Prompt(ids, (), None, ids), seed) for seed, ids in enumerate(prompts)]


def require_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [(one.token_ids, one.finish) for one in ours] == [(one.token_ids, one.finish) for one in theirs]


def test_answers_do_not_depend_on_the_others_and_carry_the_trainers_logprobs(policy, requests):
    engine = NativeEngine(policy, lambda _: "")
    together = engine.generate(requests, SAMPLING)
    assert len({len(answer) for group in together for answer in group}) > 3
    require_same(together, [engine.generate([request], SAMPLING)[0] for request in requests])
    groups = [PackedGroup(request.prompt, answers) for request, answers in zip(requests, together, strict=True)]
    with torch.no_grad():
        wanted = token_logprobs(policy, pack(groups))[0]
    torch.testing.assert_close(torch.cat([engine_logprobs(group) for group in groups]), wanted, rtol=1e-4, atol=1e-4)


def test_answers_that_were_begun_continue_from_their_own_state(policy, requests):
    engine = NativeEngine(policy, lambda _: "")
    whole = engine.generate(requests, SAMPLING)

    def begun(answer, tokens):
        if len(answer) <= tokens:
            return answer
        ids = tuple(answer.token_ids[:tokens])
        return Answer.sampled(ids, tuple(answer.logprobs[:tokens]), "", "abort", 0)

    again = [
        replace(request, partial_answers=tuple(begun(one, 1 + 4 * i) for i, one in enumerate(answers)))
        for request, answers in zip(requests, whole, strict=True)
    ]
    require_same(engine.generate(again, SAMPLING), whole)
