"""Answers with segments that the policy only read (a tool's result with an image) train as plain transformers does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from family_cases import VISION_MODELS, build_family, plain_images
from transformers import AutoModelForImageTextToText

from foveate.encoding.encode import Encoder
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack
from foveate.records import Answer, PackedGroup, Segment

NAMES = ["internvl", *VISION_MODELS]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_folder):
    def folder(name):
        return tiny_folder if name == "internvl" else build_family(tmp_path_factory.mktemp(name) / name, name)

    return folder


def sampled(generator, length):
    ids = torch.randint(20, 300, (length,), generator=generator).tolist()
    return Segment.sampled(ids, [-1.0] * length, 0)


def observed(prompt):
    """The tokens and images of a prompt, as something that the policy reads within its answer."""
    ids, engine_ids = (np.array(own, np.int64) for own in (prompt.token_ids, prompt.engine_ids))
    return Segment(ids, engine_ids, np.zeros(0, np.float32), False, prompt.slots, prompt.pixels)


@pytest.fixture
def group_of(make_task, make_image):
    """A prompt with an image and two answers: one that looks at two more images on its way, and one of text alone."""

    def make(policy):
        encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)
        prompt = encode(make_task("<image>\nWhat is shown?", make_image(130, 70, 1)))
        crops = [
            encode(make_task("<image> the crop", make_image(60, 90, 2))),
            encode(make_task("nothing, then <image>", make_image(90, 60, 3))),
        ]
        words = torch.Generator().manual_seed(0)
        looks = [sampled(words, 5), observed(crops[0]), sampled(words, 9), observed(crops[1]), sampled(words, 1)]
        return PackedGroup(prompt, (Answer(tuple(looks), "", "stop"), Answer((sampled(words, 7),), "", "stop")))

    return make


def plain_logprobs(model, policy, prompt, answer):
    """Log-probs of the trained tokens of one answer in plain transformers, in a row of its own."""
    family, own = policy.family, [segment.tiles for segment in answer.segments if segment.tiles is not None]
    ids = torch.tensor([[*prompt.token_ids, *answer.token_ids]])
    pixels = torch.cat([prompt.pixels, *own])
    slots = [*prompt.slots, *(slot for segment in answer.segments for slot in segment.slots)]
    inputs = plain_images(family, pixels, slots, (ids == family.image_token_id).int())
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    trained = [segment.trained for segment in answer.segments for _ in range(len(segment))]
    return logp[torch.tensor(trained)]


@pytest.mark.parametrize("name", NAMES)
def test_observed_segments_with_images_are_read_and_not_trained(name, folder_of, group_of):
    folder = folder_of(name)
    policy = load_policy(str(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    group = group_of(policy)
    assert group.trained_tokens == 5 + 9 + 1 + 7 < sum(map(len, group.answers))
    got, _ = token_logprobs(policy, pack([group]))
    wanted = torch.cat([plain_logprobs(model, policy, group.prompt, answer) for answer in group.answers])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, len(got))
    (weights * got).sum().backward()
    (weights * wanted).sum().backward()
    plain = dict(model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in plain.values() if p.grad is not None]).norm()
    for key, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            difference = (parameter.grad - plain[key].grad).norm()
            assert difference <= 1e-4 * plain[key].grad.norm() + 1e-6 * norm, key


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_an_image_that_several_answers_see_is_encoded_once(name, folder_of, group_of):
    policy = load_policy(str(folder_of(name)))
    group = group_of(policy)
    looking, plain = group.answers
    apart = Answer(
        tuple(replace(s, tiles=None if s.tiles is None else s.tiles.clone()) for s in looking.segments), "", "stop"
    )
    found = []
    for other in (looking, apart):
        batch = pack([PackedGroup(group.prompt, (looking, plain, other))])
        logp, _ = token_logprobs(policy, batch)
        policy.model.zero_grad()
        (torch.linspace(-1, 2, len(logp)) * logp).sum().backward()
        grads = [p.grad.clone() for p in policy.part("vision").parameters() if p.grad is not None]
        found.append((len(batch.pixels), len(batch.grids), batch.feature_index is None, logp.detach(), grads))
    once, twice = found
    seen = sum(len(segment.tiles) for segment in looking.segments if segment.tiles is not None)
    assert once[0] == twice[0] - seen
    assert (once[2], twice[2]) == (False, True)
    torch.testing.assert_close(once[3], twice[3], rtol=1e-6, atol=1e-6)
    for own, wanted in zip(once[4], twice[4], strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()) + 1e-8)
