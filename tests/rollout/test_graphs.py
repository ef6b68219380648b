"""Steps of sampling that were recorded say what steps say that are computed anew. Without a GPU they are recorded by
tracing, which keeps what a CUDA graph keeps: operations on the very tensors, and every number of Python as it was."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from family_cases import build_family
from torch.fx.experimental.proxy_tensor import make_fx

from foveate.config.model import LoraSettings
from foveate.encoding.encode import Encoder
from foveate.models.lora import add_adapters
from foveate.models.policy import load_policy
from foveate.records import Answer, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native import engine, rows
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.native.graphs import is_recordable, recorder

REAL = torch.cuda.is_available()
DEVICE = "cuda" if REAL else "cpu"


def by_tracing(step, last_B, position_B):
    with patch("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True):  # as it is on a GPU
        return make_fx(step)(last_B.clone(), position_B.clone())


class Recorded:
    """An engine that records each step, and how often it did."""

    def __init__(self, policy, decode):
        self.engine, self.times = NativeEngine(policy, decode), 0
        self.engine._record = self.record

    def record(self, *step):
        self.times += 1
        return (recorder(self.engine.policy) if REAL else by_tracing)(*step)


def step_by_step(policy, decode):
    """An engine that records nothing."""
    engine = NativeEngine(policy, decode)
    engine._record = None
    return engine


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Answers of tens of tokens meet what those of thousands meet."""
    monkeypatch.setattr(rows, "_PLACES", 8)
    monkeypatch.setattr(engine, "_WORTH", 4)


@pytest.fixture
def parts(tmp_path, tiny_folder, make_image, make_task):
    def made(name):
        folder = tiny_folder if name == "internvl" else build_family(tmp_path / name, name)
        policy = load_policy(str(folder), device=DEVICE)
        encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)
        pictures = [make_image(60 + 50 * i, 70, i) if policy.family.unit else None for i in range(4)]
        prompts = [
            encode(make_task(("<image> " if one else "") + "Where is it? " + "far " * (5 * i), *[one] * bool(one)))
            for i, one in enumerate(pictures)
        ]
        return policy, encode, [Request(prompt, 10 + i) for i, prompt in enumerate(prompts)]

    return made


def cut_off(answer, end):
    """An answer as an engine that pauses leaves it."""
    return Answer.sampled(answer.token_ids[:end], answer.logprobs[:end], "", "abort", answer.version)


def require_same(groups, others):
    for group, other in zip(groups, others, strict=True):
        for one, wanted in zip(group, other, strict=True):
            assert one.token_ids == wanted.token_ids
            assert (one.finish, one.text, one.version) == (wanted.finish, wanted.text, wanted.version)
            assert one.logprobs == pytest.approx(wanted.logprobs, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("internvl", {}),
        pytest.param("qwen2-window", {"top_p": 0.8, "temperature": 0.7}, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", {}, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", {}, marks=pytest.mark.slow),
        pytest.param("internvl", {"temperature": 0.0}, marks=pytest.mark.slow),
        pytest.param("internvl", {"top_k": 20}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recorded_steps_sample_what_others_sample(parts, name, how):
    policy, encode, requests = parts(name)
    sampling = SamplingParams(5, 30, **how)
    plain, recorded = step_by_step(policy, encode.decode), Recorded(policy, encode.decode)
    groups = plain.generate(requests, sampling)
    require_same(recorded.engine.generate(requests, sampling), groups)
    assert recorded.times >= 2
    assert recorded.engine.stats.decode_tokens == plain.stats.decode_tokens


@pytest.mark.slow
def test_answers_that_leave_change_nothing_for_those_that_stay(parts):
    policy, encode, requests = parts("internvl")
    policy = replace(policy, family=replace(policy.family, stop_ids=tuple(range(0, 700, 12))))  # they end often
    plain, recorded = step_by_step(policy, encode.decode), Recorded(policy, encode.decode)
    sampling = SamplingParams(12, 30)
    groups = plain.generate(requests[:2], sampling)
    lengths = {len(one.token_ids) for group in groups for one in group}
    assert len(lengths) > 3, "the answers end at different steps"
    require_same(recorded.engine.generate(requests[:2], sampling), groups)
    assert recorded.times > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "qwen2-window"])
def test_recorded_steps_go_on_with_answers_of_unequal_length(parts, name):
    policy, encode, requests = parts(name)
    sampling = SamplingParams(3, 24)
    plain, recorded = step_by_step(policy, encode.decode), Recorded(policy, encode.decode)
    begun = []
    for number, group in enumerate(plain.generate(requests, sampling)):
        cut = [min(len(one.token_ids) - 1, 2 + 3 * number + i) for i, one in enumerate(group)]
        begun.append(tuple(cut_off(one, end) if end > 0 else one for one, end in zip(group, cut, strict=True)))
    again = [Request(r.prompt, r.seed, own) for r, own in zip(requests, begun, strict=True)]
    require_same(recorded.engine.generate(again, sampling), plain.generate(again, sampling))
    assert recorded.times >= 1


@pytest.mark.slow
def test_an_engine_that_pauses_in_recorded_steps_goes_on_as_if_it_had_not(parts):
    policy, encode, requests = parts("internvl")
    recorded = Recorded(policy, encode.decode).engine
    plain = step_by_step(policy, encode.decode)
    sampling = SamplingParams(3, 30)
    groups = plain.generate(requests, sampling)
    replayed = recorded._decode_step
    steps = []

    def pausing(batch):
        steps.append(len(batch.live))
        if len(steps) == 9:
            recorded.pause()
        return replayed(batch)

    recorded._decode_step = pausing
    half = recorded.generate(requests, sampling)
    assert any(one.finish == "abort" for group in half for one in group)
    recorded.resume()
    rest = [Request(r.prompt, r.seed, own) for r, own in zip(requests, half, strict=True)]
    for group, wanted in zip(recorded.generate(rest, sampling), groups, strict=True):
        assert [one.token_ids for one in group] == [one.token_ids for one in wanted]


@pytest.mark.slow
def test_two_streams_of_one_engine_keep_their_steps_apart(parts):
    policy, encode, requests = parts("internvl")
    recorded = Recorded(policy, encode.decode).engine
    plain = step_by_step(policy, encode.decode)
    recorded._token_budget = plain._token_budget = 1  # a wave for each prompt
    sampling = SamplingParams(3, 20)
    wanted = plain.generate(requests[:2], sampling), plain.generate(requests[2:], sampling)
    streams = recorded.stream(requests[:2], sampling), recorded.stream(requests[2:], sampling)
    found = [{}, {}]
    for _ in range(2):
        for own, stream in zip(found, streams, strict=True):
            own.update([next(stream)])
    for own, groups in zip(found, wanted, strict=True):
        require_same([own[0], own[1]], groups)


def test_a_stream_that_is_closed_leaves_no_recorded_step(parts):
    policy, encode, requests = parts("internvl")
    policy = replace(policy, family=replace(policy.family, stop_ids=tuple(range(0, 700, 12))))  # they end one by one
    recorded = Recorded(policy, encode.decode)
    kept = []
    recorded.engine._record = lambda *step: kept.append(weakref.ref(one := recorded.record(*step))) or one
    stream = recorded.engine.stream(requests, SamplingParams(2, 40))
    next(stream)
    assert kept
    stream.close()
    gc.collect()
    assert [one() for one in kept] == [None] * len(kept)


def test_few_steps_are_not_worth_a_recorded_one(parts, monkeypatch):
    monkeypatch.setattr(engine, "_WORTH", 16)
    policy, encode, requests = parts("internvl")
    recorded = Recorded(policy, encode.decode)
    recorded.engine.generate(requests, SamplingParams(2, 16))
    assert recorded.times == 0


@pytest.mark.skipif(REAL, reason="a GPU is there")
def test_nothing_is_recorded_on_a_cpu(tiny_policy):
    assert recorder(tiny_policy) is None


def test_steps_that_depend_on_what_they_compute_are_not_recorded(tmp_path, tiny_policy):
    assert is_recordable(tiny_policy.model)
    assert is_recordable(load_policy(str(build_family(tmp_path / "window", "qwen2-window"))).model)
    assert not is_recordable(load_policy(str(build_family(tmp_path / "mixture", "qwen3_moe"))).model)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    far = load_policy(str(tmp_path / "window")).model
    far.config.get_text_config().rope_parameters = dynamic
    assert not is_recordable(far)
    adapted = load_policy(str(build_family(tmp_path / "adapted", "qwen3")))
    add_adapters(adapted, LoraSettings(rank=2), ("language",))
    assert is_recordable(adapted.model)
    dropping = load_policy(str(tmp_path / "adapted"))
    add_adapters(dropping, LoraSettings(rank=2, dropout=0.1), ("language",))
    assert not is_recordable(dropping.model)
