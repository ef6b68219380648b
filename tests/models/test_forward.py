from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import build_sharp
from transformers import InternVLForConditionalGeneration

from foveate.models.forward import embed, token_logprobs
from foveate.models.policy import load_policy
from foveate.models.tiny import TinySize
from foveate.parallel.packing import pack
from foveate.records import ImageSlot, PackedGroup, Prompt


def plain_model(folder):
    """transformers' own model and SDPA attention: nothing of ours in it."""
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def padded_logprobs(model, packed_groups, side, temperature=1.0):
    """Log-probs and entropies of all answers, every answer with its own copy of prompt and pixels in a padded batch."""
    rows = [(packed.prompt, answer.token_ids) for packed in packed_groups for answer in packed.answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    answer_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        begin = longest - length if side == "left" else 0
        input_ids[row, begin : begin + length] = torch.tensor([*prompt.token_ids, *answer])
        attention_mask[row, begin : begin + length] = 1
        answer_mask[row, begin + len(prompt) : begin + length] = True
    pixels = [prompt.pixels for prompt, _ in rows if prompt.pixels is not None]
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        pixel_values=torch.cat(pixels) if pixels else None,
        use_cache=False,
    ).logits[:, :-1]
    all_logp = torch.log_softmax(logits[answer_mask[:, 1:]] / temperature, -1)
    logp = all_logp.gather(1, input_ids[answer_mask][:, None])[:, 0]
    return logp, -(all_logp.exp() * all_logp).sum(-1)


def loss_of(logp, entropy):
    """A policy-gradient-like loss: signs and sizes differ from token to token."""
    weights = torch.linspace(-1, 2, len(logp)).roll(len(logp) // 3)
    return -(weights * logp).sum() / len(logp) + 0.01 * entropy.mean()


def assert_same_gradients(got, wanted, tolerance=1e-5):
    """Relative to the norm of the whole gradient, and ten times looser for each parameter on its own."""
    wanted = dict(wanted.named_parameters())
    pairs = {name: (p.grad, wanted[name].grad) for name, p in got.named_parameters()}
    assert pairs.keys() == wanted.keys()
    errors = torch.stack([(a - b).norm() for a, b in pairs.values()])
    norms = torch.stack([b.norm() for _, b in pairs.values()])
    assert (norms > 0).sum() > 0.9 * len(norms)
    assert errors.norm() <= tolerance * norms.norm()
    for name, error, norm in zip(pairs, errors, norms, strict=True):
        assert error <= 10 * tolerance * norm + 1e-7 * norms.norm(), name


def assert_equal_steps(policy, plain, packed_groups, side):
    policy.model.zero_grad()
    plain.zero_grad()
    logp, entropy = token_logprobs(policy, pack(packed_groups))
    plain_logp, plain_entropy = padded_logprobs(plain, packed_groups, side)
    torch.testing.assert_close(logp, plain_logp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropy, plain_entropy, rtol=1e-5, atol=2e-5)
    loss, plain_loss = loss_of(logp, entropy), loss_of(plain_logp, plain_entropy)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    loss.backward()
    plain_loss.backward()
    assert_same_gradients(policy.model, plain)


def random_words(generator, count):
    return tuple(torch.randint(12, 400, (count,), generator=generator).tolist())


def random_group(policy, generator, tiles, before, after, answers):
    """A prompt of random tokens with one image of `tiles` tiles (none for 0) and answers of the given lengths."""
    family = policy.family
    count = tiles * family.tokens_per_tile
    head = random_words(generator, before)
    ids = (*head, *[family.image_token_id] * count, *random_words(generator, after))
    if not tiles:
        return PackedGroup.of_tokens(Prompt(ids, (), None, ids), tuple(random_words(generator, n) for n in answers))
    pixels = torch.randn(tiles, 3, family.tile, family.tile, generator=generator)
    prompt = Prompt(ids, (ImageSlot(before, count, tiles),), pixels, ids)
    return PackedGroup.of_tokens(prompt, tuple(random_words(generator, n) for n in answers))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_groups_of_unequal_answers_equal_padded_copies(checkpointing, side, tiny_folder):
    policy, plain = load_policy(str(tiny_folder)), plain_model(tiny_folder)
    if checkpointing:
        policy.model.train()  # transformers checkpoints in training mode only; the model has no dropout
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert policy.model.is_gradient_checkpointing
    generator = torch.Generator().manual_seed(3)
    packed_groups = [
        random_group(policy, generator, 12, 5, 9, (7, 1, 30, 12)),
        random_group(policy, generator, 3, 1, 4, (5, 5, 5)),
    ]
    assert_equal_steps(policy, plain, packed_groups, side)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_rows_with_and_without_images_give_the_logprobs_that_they_have_alone(
    attention, tiny_folder, encode, make_image, make_task
):
    policy, plain = load_policy(str(tiny_folder), attention=attention), plain_model(tiny_folder)
    generator = torch.Generator().manual_seed(4)
    tasks = [
        make_task("What is two and three?"),
        make_task("<image>\nWhat is shown?", make_image(56, 56)),
        make_task("<image> and <image>, not <image>", *(make_image(60 * i, 70, i) for i in (1, 2, 3))),
        make_task("again no image"),
    ]
    packed_groups = [
        PackedGroup.of_tokens(encode(task), tuple(random_words(generator, n) for n in (4, 9))) for task in tasks
    ]
    with torch.no_grad():
        together = token_logprobs(policy, pack(packed_groups), 0.7)
        for kind in (0, 1):
            alone = [token_logprobs(policy, pack([packed]), 0.7)[kind] for packed in packed_groups]
            torch.testing.assert_close(together[kind], torch.cat(alone), rtol=1e-5, atol=2e-5)
            peers = [padded_logprobs(plain, [packed], "right", 0.7)[kind] for packed in packed_groups]
            torch.testing.assert_close(together[kind], torch.cat(peers), rtol=1e-5, atol=2e-5)


def test_gradients_reach_the_vision_tower_from_mixed_rows(tiny_folder, encode, make_image, make_task):
    policy, plain = load_policy(str(tiny_folder)), plain_model(tiny_folder)
    tasks = [make_task("no image"), make_task("<image>\nWhat is shown?", make_image(120, 56))]
    packed_groups = [PackedGroup.of_tokens(encode(task), ((5, 6, 7), (8,))) for task in tasks]
    assert_equal_steps(policy, plain, packed_groups, "left")
    assert all(p.grad.abs().sum() > 0 for p in policy.part("projector").parameters())


def test_the_pixels_matter_and_stay_in_their_own_rows(tiny_policy, encode, make_image, make_task):
    def logprobs(seed):
        tasks = [
            make_task("<image>\nfirst", make_image(56, 56, seed)),
            make_task("<image>\nsecond", make_image(56, 56)),
        ]
        with torch.no_grad():
            return token_logprobs(
                tiny_policy, pack([PackedGroup.of_tokens(encode(task), ((5, 6, 7),)) for task in tasks])
            )[0]

    one, other = logprobs(1), logprobs(2)
    assert (one[:3] - other[:3]).abs().max() > 1e-3
    torch.testing.assert_close(one[3:], other[3:], rtol=1e-5, atol=1e-5)


def test_a_placeholder_in_an_answer_does_not_move_the_image_features(tiny_policy, encode, make_image, make_task):
    prompt = encode(make_task("<image>\nWhat is shown?", make_image(56, 56)))
    placeholder = tiny_policy.family.image_token_id
    batch = pack([PackedGroup.of_tokens(prompt, ((5, placeholder, 6), (7,)))])
    with torch.no_grad():
        embeddings, _ = embed(tiny_policy, batch)
        table = tiny_policy.part("language").get_input_embeddings().weight
        assert torch.equal(embeddings[len(prompt) + 1], table[placeholder])
        logp, _ = token_logprobs(tiny_policy, batch)
        alone, _ = token_logprobs(tiny_policy, pack([PackedGroup.of_tokens(prompt, ((7,),))]))
    torch.testing.assert_close(logp[3:], alone, rtol=1e-5, atol=1e-5)


def test_features_that_do_not_fit_the_slots_are_caught(tiny_policy):
    batch = pack([PackedGroup.of_tokens(Prompt(tuple(range(10)), (), None, ()), ())])
    with pytest.raises(AssertionError, match="8 image features for 3 image tokens"):
        embed(tiny_policy, replace(batch, pixels=torch.zeros(2, 3, 56, 56), slot_index=torch.arange(3)))


def test_autocast_stays_near_float32(tiny_folder, tiny_policy):
    policy = load_policy(str(tiny_folder))
    packed_groups = [random_group(policy, torch.Generator().manual_seed(5), 6, 3, 5, (9, 4, 9))]
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = token_logprobs(policy, pack(packed_groups))
    assert logp.dtype == entropy.dtype == torch.float32
    loss_of(logp, entropy).backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None)
    with torch.no_grad():
        exact, _ = token_logprobs(tiny_policy, pack(packed_groups))
    assert 0 < (logp - exact).abs().mean() < 0.15


LONG = TinySize(vision_width=32, vision_layers=1, vision_ffn=64, width=64, layers=2, head_dim=16, ffn=96)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_two_groups_of_sixteen_with_a_thousand_prompt_tokens_equal_padded_copies(checkpointing, tmp_path):
    folder = build_sharp(tmp_path, LONG)
    policy, plain = load_policy(str(folder)), plain_model(folder)
    if checkpointing:
        policy.model.train()
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert policy.model.is_gradient_checkpointing
    generator = torch.Generator().manual_seed(6)
    packed_groups = [
        random_group(policy, generator, 60, 8, 56, (64,) * 16),
        random_group(policy, generator, 60, 20, 44, (64,) * 15 + (33,)),
    ]
    assert all(len(packed.prompt) == 1024 for packed in packed_groups)
    assert_equal_steps(policy, plain, packed_groups, "left")
