from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers import InternVLForConditionalGeneration

from foveate.encoding.encode import Encoder
from foveate.errors import DataError, EngineError
from foveate.models.attention.kernels import AttentionOptions
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.parallel.packing import pack
from foveate.records import Forest, Image, Message, PackedGroup, SamplingParams, Task
from foveate.rollout.engine import Request
from foveate.rollout.native import engine as native
from foveate.rollout.native.cache import BatchCache
from foveate.rollout.native.engine import NativeEngine

SIZE = TinySize(tile=56, vision_width=32, vision_layers=1, vision_ffn=64, width=64, layers=2, head_dim=16, ffn=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose next token is neither certain nor arbitrary, and whose vocabulary is padded."""
    folder = build_tiny(tmp_path_factory.mktemp("tiny"), SIZE, padded_vocabulary=700)
    policy = load_policy(str(folder))
    with torch.no_grad():
        policy.part("head").weight.mul_(20)
    policy.model.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(folder):
    return load_policy(str(folder))


def picture(seed, width, height):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(file, "PNG")
    return Image(None, file.getvalue(), width, height)


def prompts(policy):
    """One image, no image, two images, several tiles, a long text: lengths differ."""
    encode = Encoder(policy.tokenizer, policy.family, 6, 1024)
    cases = [
        ("<image>\nthe small red circle", (picture(0, 56, 56),)),
        ("the big blue square", ()),
        ("<image> above <image>\nthe circle", (picture(1, 56, 56), picture(2, 60, 50))),
        ("<image>\nWhat is shown?", (picture(3, 160, 110),)),
        ("the green triangle left of the " * 9, ()),
    ]
    return [
        encode(Task(str(i), "test", (Message("user", text),), images, None)) for i, (text, images) in enumerate(cases)
    ]


def engine_of(policy, **settings):
    return NativeEngine(policy, Encoder(policy.tokenizer, policy.family, 6, 1024).decode, **settings)


def requests_of(policy):
    return [Request(prompt, seed=10 + i) for i, prompt in enumerate(prompts(policy))]


def ids(answers):
    return [[answer.token_ids for answer in group] for group in answers]


def often_stopping(policy):
    """Every twelfth token ends an answer, so that lengths differ much."""
    return replace(policy, family=replace(policy.family, stop_ids=tuple(range(0, len(policy.tokenizer), 12))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(policy, temperature):
    sampling = SamplingParams(samples=6, max_tokens=20, temperature=temperature)
    requests = requests_of(policy)
    answers = engine_of(often_stopping(policy)).generate(requests, sampling)
    batch = pack(
        [
            PackedGroup.of_tokens(r.prompt, tuple(c.token_ids for c in group))
            for r, group in zip(requests, answers, strict=True)
        ]
    )
    expected, entropy = token_logprobs(policy, batch, temperature)
    assert 0.2 < entropy.mean() < 5
    found = torch.tensor([value for group in answers for answer in group for value in answer.logprobs])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_logprobs_equal_the_trainers_under_bfloat16_up_to_its_precision(folder):
    policy = load_policy(str(folder), dtype="bfloat16")
    requests = requests_of(policy)
    answers = engine_of(policy).generate(requests, SamplingParams(samples=4, max_tokens=12))
    batch = pack(
        [
            PackedGroup.of_tokens(r.prompt, tuple(c.token_ids for c in group))
            for r, group in zip(requests, answers, strict=True)
        ]
    )
    found = torch.tensor([value for group in answers for answer in group for value in answer.logprobs])
    assert (found - token_logprobs(policy, batch)[0]).abs().mean() < 0.1


def with_bidirectional_images(batch, groups):
    """The batch with each image of a prompt as a bidirectional segment: prompts are chains, answers continue them."""
    forest, pieces, last = batch.forest, [], {}  # (start, length, parent, bidirectional)
    prompts = iter(groups)
    for k, (start, length, parent) in enumerate(zip(forest.start, forest.length, forest.parent, strict=True)):
        cuts = {length: False}
        for slot in next(prompts).prompt.slots if parent < 0 else ():
            cuts |= {slot.position: False, slot.position + slot.count: True}
        above, begin = last.get(parent, -1), 0
        for end in sorted(cuts):
            if end > begin:
                pieces.append((start + begin, end - begin, above, cuts[end]))
                above, begin = len(pieces) - 1, end
        last[k] = above
    return replace(batch, forest=Forest(*zip(*pieces, strict=True)))


def test_prompts_with_bidirectional_images_are_sampled_as_the_trainer_computes_them(policy, monkeypatch):
    def split(groups, _cuts=None):
        return with_bidirectional_images(pack(groups), groups)

    monkeypatch.setattr(native, "pack", split)
    policy, sampling = often_stopping(policy), SamplingParams(samples=4, max_tokens=30)
    requests = requests_of(policy)
    engine = engine_of(policy)
    whole = engine.generate(requests, sampling)
    groups = [
        PackedGroup.of_tokens(r.prompt, tuple(c.token_ids for c in group))
        for r, group in zip(requests, whole, strict=True)
    ]
    batch = split(groups)
    assert any(batch.forest.bidirectional)
    expected = token_logprobs(policy, batch)[0]
    found = torch.tensor([value for group in whole for answer in group for value in answer.logprobs])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - token_logprobs(policy, pack(groups))[0]).abs().max() > 1e-2
    begun = interrupted(engine, requests, sampling, 2)
    assert any("abort" in group for group in finishes(begun))
    assert ids(engine.generate(begun, sampling)) == ids(whole)


def test_greedy_equals_transformers_generate(policy, folder):
    plain = InternVLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
    requests = requests_of(policy)
    answers = engine_of(policy).generate(requests, SamplingParams(max_tokens=24, temperature=0))
    banned = [[token] for token in (*policy.family.placeholder_ids, *range(len(policy.tokenizer), 700))]
    for request, (answer,) in zip(requests, answers, strict=True):
        token_ids = torch.tensor([request.prompt.token_ids])
        out = plain.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=False,
            max_new_tokens=24,
            bad_words_ids=banned,
            **({} if request.prompt.pixels is None else {"pixel_values": request.prompt.pixels}),
        )
        assert out[0, len(request.prompt) :].tolist() == list(answer.token_ids)


def test_a_prompt_costs_one_prefill_whatever_the_number_of_answers(policy):
    engine = engine_of(policy)
    prompt = prompts(policy)[3]
    engine.generate([Request(prompt, 0)], SamplingParams(samples=16, max_tokens=3))
    assert (engine.stats.prefills, engine.stats.prefill_tokens) == (1, len(prompt))


def test_finished_answers_leave_the_batch(policy):
    engine = engine_of(often_stopping(policy))
    answers = engine.generate(requests_of(policy), SamplingParams(samples=8, max_tokens=60))
    lengths = [len(answer.token_ids) for group in answers for answer in group]
    assert len(set(lengths)) > 5
    assert engine.stats.decode_tokens == sum(lengths) - len(lengths)
    assert engine.stats.decode_steps == max(lengths) - 1


def test_the_cache_attends_to_prompt_and_own_tokens_while_answers_and_groups_leave():
    generator = torch.Generator().manual_seed(0)
    lengths, samples, heads, kv_heads, width = (5, 9, 3, 7), 3, 4, 2, 8
    starts = (0, 5, 14, 17)
    cache = BatchCache(torch.device("cpu"))
    cache.announce(Forest(starts, lengths, (-1,) * 4), lengths, [[6] * samples] * 4)

    def random(count, tokens):
        return torch.randn(count, tokens, width, generator=generator)

    prompt_key, prompt_value = random(kv_heads, sum(lengths)), random(kv_heads, sum(lengths))
    assert cache.attend(0, random(heads, sum(lengths)), prompt_key, prompt_value, 0.3) is None
    rows = cache.join().tolist()
    seen = []
    for group in range(4):
        span = slice(starts[group], starts[group] + lengths[group])
        seen += [(prompt_key[:, span], prompt_value[:, span])] * samples
    leaving = {1: {0, 1, 2, 4}, 2: {9, 10, 11}, 4: {3, 7}}  # answers: first the whole group 0, then group 3
    for step in range(6):
        keep = [row for row, answer in enumerate(rows) if answer not in leaving.get(step, ())]
        if len(keep) < len(rows):
            rows = [rows[row] for row in cache.drop(keep).tolist()]
        query, key, value = random(heads, len(rows)), random(kv_heads, len(rows)), random(kv_heads, len(rows))
        out = cache.attend(0, query, key, value, 0.3)
        for row, answer in enumerate(rows):
            keys, values = (torch.cat([a, b[:, [row]]], 1) for a, b in zip(seen[answer], (key, value), strict=True))
            seen[answer] = keys, values
            keys, values = keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
            scores = (query[:, [row]] @ keys.transpose(1, 2)) * 0.3
            torch.testing.assert_close(out[:, [row]], scores.softmax(-1) @ values)
        cache.extend()
    assert sorted(rows) == [5, 6, 8]


@pytest.mark.parametrize("window", [None, 4])
def test_the_cache_goes_on_from_answers_that_were_begun(window):
    """Two prompts whose answers were begun, of unlike lengths, and between them one whose answers begin now."""
    generator = torch.Generator().manual_seed(0)
    forest = Forest((0, 5, 8, 9, 18, 21), (5, 3, 1, 9, 3, 6), (-1, 0, 0, -1, -1, 4))
    heads, kv_heads, width, tokens = 4, 2, 8, 27
    cache = BatchCache(torch.device("cpu"))
    cache.announce(forest, (5, 9, 3), [[12, 12], [12, 12], [12]])

    def random(count, length):
        return torch.randn(count, length, width, generator=generator)

    key, value = random(kv_heads, tokens), random(kv_heads, tokens)
    assert cache.attend(0, random(heads, tokens), key, value, 0.3) is None
    rows = cache.join().tolist()
    paths = [(0, 1), (0, 2), (3,), (3,), (4, 5)]
    spans = [[slice(forest.start[k], forest.start[k] + forest.length[k]) for k in path] for path in paths]
    seen = [tuple(torch.cat([rows[:, span] for span in path], 1) for rows in (key, value)) for path in spans]
    for keep in ((0, 1, 2, 3, 4), (0, 2, 3, 4), (0, 2, 4), (4,), (4,)):
        if len(keep) < len(rows):
            rows = [rows[row] for row in cache.drop([rows.index(answer) for answer in keep]).tolist()]
        query, key, value = random(heads, len(rows)), random(kv_heads, len(rows)), random(kv_heads, len(rows))
        out = cache.attend(0, query, key, value, 0.3, AttentionOptions(window, None))
        for row, answer in enumerate(rows):
            new = key[:, [row]], value[:, [row]]
            seen[answer] = tuple(torch.cat(pair, 1) for pair in zip(seen[answer], new, strict=True))
            last = slice(None) if window is None else slice(-window, None)
            keys, values = (one[:, last].repeat_interleave(2, 0) for one in seen[answer])
            scores = (query[:, [row]] @ keys.transpose(1, 2)) * 0.3
            torch.testing.assert_close(out[:, [row]], scores.softmax(-1) @ values)
        cache.extend()
    assert rows == [4]


def interrupted(engine, requests, sampling, after):
    """The requests with what there is of their answers when `after` groups are complete."""
    found = {}
    for index, group in engine.stream(requests, sampling):
        found[index] = group
        if len(found) == after:
            engine.pause()
    engine.resume()
    return [replace(request, partial_answers=found.get(i, ())) for i, request in enumerate(requests)]


def finishes(requests):
    return [[answer.finish for answer in request.partial_answers] for request in requests]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_interrupted_answers_go_on_as_if_nothing_had_been(policy, after):
    policy, sampling = often_stopping(policy), SamplingParams(samples=4, max_tokens=40)
    whole = engine_of(policy).generate(requests_of(policy), sampling)
    engine = engine_of(policy)
    begun = interrupted(engine, requests_of(policy), sampling, after)
    assert any("abort" in group and set(group) != {"abort"} for group in finishes(begun))
    again = interrupted(engine, begun, sampling, after + 1)
    found = engine.generate(again, sampling)
    assert ids(found) == ids(whole)
    for group, expected in zip(found, whole, strict=True):
        for answer, other in zip(group, expected, strict=True):
            assert (answer.text, answer.finish, answer.versions) == (other.text, other.finish, other.versions)
            assert abs(answer.logprobs - other.logprobs).max() <= 1e-4


def test_what_was_not_begun_is_not_given_and_a_paused_engine_begins_nothing(policy):
    engine = engine_of(policy, token_budget=200)
    begun = interrupted(engine, requests_of(policy), SamplingParams(samples=2, max_tokens=20), 1)
    assert 0 < sum(not request.partial_answers for request in begun) < 5
    engine.pause()
    assert [*engine.stream(requests_of(policy), SamplingParams(max_tokens=9))] == []
    engine.resume()
    assert len([*engine.stream(requests_of(policy), SamplingParams(max_tokens=9))]) == 5


def test_an_answer_over_a_change_of_weights_has_the_logprobs_of_those_that_sampled_each_token(policy):
    policy, sampling = often_stopping(policy), SamplingParams(samples=4, max_tokens=40)
    decode = Encoder(policy.tokenizer, policy.family, 6, 1024).decode
    engine = NativeEngine.copy_of(policy, decode, version=1)
    requests = interrupted(engine, requests_of(policy), sampling, 1)
    old = replace(policy, model=copy.deepcopy(policy.model))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    engine.publish(2, policy.model.named_parameters())
    answers = engine.generate(requests, sampling)
    batch = pack(
        [
            PackedGroup.of_tokens(r.prompt, tuple(c.token_ids for c in group))
            for r, group in zip(requests, answers, strict=True)
        ]
    )
    answers = [answer for group in answers for answer in group]
    versions = torch.tensor([v for c in answers for v, tokens in c.versions for _ in range(tokens)])
    by_version = {1: token_logprobs(old, batch)[0], 2: token_logprobs(policy, batch)[0]}
    found = torch.tensor([value for answer in answers for value in answer.logprobs])
    torch.testing.assert_close(found, torch.where(versions == 1, *by_version.values()), atol=1e-4, rtol=0)
    assert (by_version[1] - by_version[2]).abs().max() > 0.1
    mixed = [answer for answer in answers if len(answer.versions) > 1]
    assert mixed
    assert {answer.version for answer in mixed} == {1}
    for answer in mixed:
        assert [version for version, _ in answer.versions] == [1, 2]
        assert sum(tokens for _, tokens in answer.versions) == len(answer.token_ids)


def test_answers_do_not_depend_on_what_else_is_in_the_batch(policy):
    policy, sampling = often_stopping(policy), SamplingParams(samples=4, max_tokens=40)
    requests = requests_of(policy)
    together = ids(engine_of(policy).generate(requests, sampling))
    engine = engine_of(policy)
    assert [ids(engine.generate([request], sampling))[0] for request in requests] == together
    assert ids(engine.generate(requests[::-1], sampling)) == together[::-1]
    assert ids(engine_of(policy, token_budget=450).generate(requests, sampling)) == together
    assert len({len(token_ids) for group in together for token_ids in group}) > 5


def test_answer_i_does_not_depend_on_the_number_of_answers_nor_on_their_limit(policy):
    requests = requests_of(policy)
    few = engine_of(policy).generate(requests, SamplingParams(samples=2, max_tokens=10))
    many = engine_of(policy).generate(requests, SamplingParams(samples=5, max_tokens=30))
    for short, long in zip(few, many, strict=True):
        assert [c.token_ids for c in short] == [c.token_ids[:10] for c in long[:2]]


def test_seeds_and_answers_differ(policy):
    prompt = prompts(policy)[0]
    first, second = engine_of(policy).generate([Request(prompt, 1), Request(prompt, 2)], SamplingParams(4, 12))
    assert len({answer.token_ids for answer in (*first, *second)}) == 8


def test_sampling_leaves_the_global_generators_alone(policy):
    before = torch.get_rng_state()
    engine_of(policy).generate(requests_of(policy)[:1], SamplingParams(2, 4))
    assert torch.get_rng_state().equal(before)


def test_an_answer_ends_with_its_stop_token_or_at_the_limit(policy):
    policy = often_stopping(policy)
    answers = engine_of(policy).generate(requests_of(policy), SamplingParams(samples=8, max_tokens=20))
    answers = [answer for group in answers for answer in group]
    assert {answer.finish for answer in answers} == {"stop", "length"}
    for answer in answers:
        assert len(answer.logprobs) == len(answer.token_ids) <= 20
        stops = [token in policy.family.stop_ids for token in answer.token_ids]
        assert not any(stops[:-1])
        assert answer.finish == ("stop" if stops[-1] else "length")
        assert answer.finish == "stop" or len(stops) == 20
        text = answer.token_ids[:-1] if answer.finish == "stop" else answer.token_ids
        assert answer.text == policy.tokenizer.decode(list(text), skip_special_tokens=False)


def test_one_token_is_drawn_without_a_decode_step(policy):
    engine = engine_of(policy)
    answers = engine.generate(requests_of(policy), SamplingParams(samples=3, max_tokens=1))
    assert all(len(answer.token_ids) == 1 for group in answers for answer in group)
    assert engine.stats.decode_steps == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_numbers_overflow_is_an_error_of_its_first_answer(policy, temperature):
    with torch.no_grad():
        policy.part("head").weight.mul_(1e38)
    with pytest.raises(EngineError, match="the model computes probabilities that are not finite"):
        engine_of(policy).generate(requests_of(policy)[:1], SamplingParams(1, 4, temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_placeholders_and_padded_rows_of_the_vocabulary_are_never_sampled(policy, temperature):
    known = len(policy.tokenizer)
    assert known < 700
    head = policy.part("head")
    bias = torch.zeros(700)
    bias[[*policy.family.placeholder_ids, known, 699]] = 1e4
    head.register_forward_hook(lambda _module, _input, logits: logits + bias)
    answers = engine_of(policy).generate(requests_of(policy), SamplingParams(4, 20, temperature=temperature))
    for group in answers:
        for answer in group:
            assert max(answer.token_ids) < known
            assert not set(answer.token_ids) & set(policy.family.placeholder_ids)


def test_a_shared_engine_sees_the_policys_weights_at_once(policy):
    engine, requests, sampling = engine_of(policy), requests_of(policy)[:1], SamplingParams(2, 6)
    before = engine.generate(requests, sampling)
    with torch.no_grad():
        policy.part("head").weight.neg_()
    engine.publish(3, iter(()))
    after = engine.generate(requests, sampling)
    assert ids(after) != ids(before)
    assert {c.version for c in before[0]} == {0}
    assert {c.version for c in after[0]} == {3}


def test_a_copied_engine_serves_the_old_weights_until_they_are_published(policy):
    decode = Encoder(policy.tokenizer, policy.family, 6, 1024).decode
    engine = NativeEngine.copy_of(policy, decode, version=1)
    requests, sampling = requests_of(policy)[:2], SamplingParams(2, 6)
    before = engine.generate(requests, sampling)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    assert engine.generate(requests, sampling) == before
    engine.publish(2, policy.model.named_parameters())
    after = engine.generate(requests, sampling)
    assert ids(after) == ids(engine_of(policy).generate(requests, sampling)) != ids(before)
    assert {answer.version for group in after for answer in group} == {2}


def test_published_weights_that_do_not_fit_are_refused_and_nothing_changes(policy):
    engine = NativeEngine.copy_of(policy, lambda _: "", version=1)
    weights = {name: torch.zeros_like(tensor) for name, tensor in policy.model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in engine.policy.model.state_dict().items()}
    lacking = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    for wrong, message in (
        (lacking, "lack lm_head.weight;"),
        ({**weights, "lora.weight": torch.zeros(1)}, "hold an unknown lora.weight;"),
        ({**weights, "lm_head.weight": torch.zeros(3, 64)}, r"lm_head.weight has shape \(3, 64\).*\(700, 64\)"),
    ):
        with pytest.raises(DataError, match=message):
            engine.publish(2, wrong.items())
    assert engine.version == 1
    assert all(tensor.equal(before[name]) for name, tensor in engine.policy.model.state_dict().items())


def test_sampling_does_not_disturb_training(policy):
    requests = sorted(requests_of(policy), key=lambda request: len(request.prompt))
    policy.model.train()
    policy.part("vision").eval()
    modes = [module.training for module in policy.model.modules()]
    engine_of(policy).generate(requests, SamplingParams(2, 6))
    assert [module.training for module in policy.model.modules()] == modes
    same_layout = pack([PackedGroup.of_tokens(request.prompt, ()) for request in requests])
    batch = replace(same_layout, target_M=torch.tensor([1]), source_M=torch.tensor([0]))
    token_logprobs(policy, batch)[0].sum().backward()
    assert policy.part("head").weight.grad.isfinite().all()


def test_no_requests_give_no_answers(policy):
    assert engine_of(policy).generate([], SamplingParams()) == []
