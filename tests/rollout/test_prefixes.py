"""Begun answers that begin alike: what they have in common goes through the model once, and changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from family_cases import build_family

from foveate.models.policy import load_policy
from foveate.records import Answer, PackedGroup, Prompt, SamplingParams, Segment
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.native.prefixes import shared_beginnings

IDS = tuple(range(30, 50))
SAMPLING = SamplingParams(max_tokens=30)


def begun(*ids):
    return Answer((Segment.sampled(ids, [0.0] * len(ids), 0),), "", "abort")


def test_what_answers_begin_with_stands_once():
    answers = [begun(*ids) for ids in ((1, 2), (1, 2, 3, 4), (5,), (1, 2), (1, 2, 3), (1, 3))]
    tree = shared_beginnings([PackedGroup(Prompt((9,), (), None, ()), answers)] * 2)
    assert [[one.token_ids for one in group.answers] for group in tree.groups] == [[(1, 2, 3, 4), (5,), (1, 3)]] * 2
    assert tree.held == [[(0, 2), (0, 4), (1, 1), (0, 2), (0, 3), (2, 2)]] * 2
    assert tree.cuts == {0: [2, 3], 3: [2, 3]}


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_5", "gemma3", "gpt_oss"))]
)
def test_continuations_are_those_of_each_beginning_alone(tmp_path, name):
    """A tree of depth two: the prompt, the beginnings of its answers, two continuations of each."""
    policy = load_policy(str(build_family(tmp_path / "model", name)))
    policy = replace(policy, family=replace(policy.family, stop_ids=tuple(range(60, 90))))
    prompt, engine = Prompt(IDS, (), None, IDS), NativeEngine(policy, lambda _: "")
    other = tuple(range(70, 82))
    answers = [begun(*ids[:end]) for ids in (IDS, other) for end in (3, 7, 12) for _ in range(2)]
    [found] = engine.generate([Request(prompt, 5, tuple(answers))], SAMPLING)
    assert engine.stats.prefill_tokens == len(IDS) + 12 + 12
    held = [replace(one, finish="stop") for one in answers]
    for number, answer in enumerate(found):
        alone = (*held[:number], answers[number], *held[number + 1 :])
        [wanted] = engine.generate([Request(prompt, 5, alone)], SAMPLING)
        assert (answer.token_ids, answer.finish) == (wanted[number].token_ids, wanted[number].finish)
        assert answer.logprobs == pytest.approx(wanted[number].logprobs, abs=1e-4)
    assert found[0].token_ids != found[1].token_ids
