from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.internvl.processing_internvl import InternVLProcessor

from foveate.encoding.chat import CORRECTED_TEMPLATE, render
from foveate.encoding.encode import Encoder
from foveate.environments.calculator import calculator
from foveate.environments.tools import Tool
from foveate.errors import DataError
from foveate.models.policy import load_policy
from foveate.records import Image, Message

CASES = {
    "one tile": ("<image>\nWhat is shown?", [(56, 56)]),
    "many tiles": ("<image>\nWhat is shown?", [(170, 110)]),
    "no image": ("What is two and three?", []),
    "three images": ("<image>a<image>\nand <image> the last", [(56, 56), (120, 50), (30, 90)]),
    "image at the end": ("Look: <image>", [(60, 60)]),
    "marks without space": ("<image><image>", [(56, 56), (56, 56)]),
    "more images than tiles": ("<image>" * 8, [(60, 56)] * 8),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def task(request, make_image, make_task):
    text, sizes = request.param
    return make_task(text, *(make_image(*size, seed) for seed, size in enumerate(sizes)))


def test_image_tokens_grow_by_the_rule_of_transformers_processor(task, encode):
    prompt = encode(task)
    family = encode.family
    rule = SimpleNamespace(
        start_image_token="<img>",
        end_image_token="</img>",
        image_token="<IMG_CONTEXT>",
        image_seq_length=family.tokens_per_tile,
    )
    budget = max(1, 6 // max(1, len(task.images)))
    tiles = {"num_patches": [family.tiles(image.width, image.height, budget) for image in task.images]}
    text = render(task.messages, encode.tokenizer)
    for index in range(len(task.images)):
        text = text.replace("<image>", InternVLProcessor.replace_image_token(rule, tiles, index), 1)
    assert encode.tokenizer.encode(text, add_special_tokens=False) == list(prompt.token_ids)
    assert [slot.tiles for slot in prompt.slots] == tiles["num_patches"]


def test_slots_cover_the_image_tokens_and_pixels_match_them(task, encode):
    prompt = encode(task)
    placed = [i for slot in prompt.slots for i in range(slot.position, slot.position + slot.count)]
    assert placed == [i for i, token in enumerate(prompt.token_ids) if token == encode.family.image_token_id]
    assert sum(token == encode.family.image_token_id for token in prompt.engine_ids) == len(task.images)
    if not task.images:
        assert prompt.pixels is None
        return
    assert prompt.pixels is not None
    assert len(prompt.pixels) == sum(slot.tiles for slot in prompt.slots)
    assert len(placed) == len(prompt.pixels) * encode.family.tokens_per_tile


def test_the_length_from_headers_is_the_length_of_the_prompt(task, encode):
    assert encode.length(task) == len(encode(task))


def test_the_length_needs_no_pixels(encode, make_task):
    assert encode.length(make_task("<image>", Image(None, b"not a picture", 170, 110))) > 6 * 4


def test_pixels_stand_in_the_order_of_the_marks(encode, make_image, make_task):
    first, second = make_image(56, 56, 1), make_image(56, 56, 2)
    both = encode(make_task("<image> and <image>", first, second)).pixels
    alone = [encode(make_task("<image>", image)).pixels for image in (first, second)]
    assert torch.equal(both, torch.cat(alone))


def test_encoding_leaves_no_trace_on_the_next_task(encode, make_image, make_task):
    wide = make_task("<image>", make_image(170, 110))
    before = encode(wide)
    encode(make_task("<image>" * 6, *[make_image(170, 110)] * 6))
    after = encode(wide)
    assert before.token_ids == after.token_ids
    assert torch.equal(before.pixels, after.pixels)


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("no mark", 1, "0 <image> marks for 1 images; each image needs one mark"),
        ("<image> <image>", 1, "2 <image> marks for 1 images"),
        ("<image>", 0, "1 <image> marks for 0 images"),
        ("<IMG_CONTEXT>", 1, "0 <image> marks for 1 images"),
    ],
)
def test_text_that_does_not_fit_its_images_is_refused_by_row(text, images, message, encode, make_image, make_task):
    task = make_task(text, *[make_image(56, 56)] * images)
    for refuse in (encode, encode.length):
        with pytest.raises(DataError) as error:
            refuse(task)
        assert str(error.value).startswith("rows.parquet, row 3, field prompt: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    [(field, fault)] = encode.validation_errors(task)
    assert field == "prompt"
    assert fault == str(error.value).removeprefix("rows.parquet, row 3, field prompt: ")


def test_a_prompt_over_the_limit_is_refused_with_its_image_tokens_counted(encode, make_image, make_task):
    task = make_task("<image>\nWhat is shown?", make_image(170, 110))
    length = encode.length(task)
    fits, short = (replace(encode, max_prompt_tokens=limit) for limit in (length, length - 1))
    assert len(fits(task)) == length
    assert fits.validation_errors(task) == []
    message = f"{length} tokens with its images, the limit is {length - 1}"
    with pytest.raises(DataError, match=f"^rows.parquet, row 3, field prompt: {message}"):
        short(task)
    assert short.validation_errors(task)[0][1].startswith(message)


def test_a_prompt_over_the_limit_names_the_tools_that_count_to_it(encode, make_task):
    tools = tuple(Tool(name, calculator).schema() for name in ("plus", "minus"))
    task, shown = make_task("What is two and three?"), replace(encode, tools=tools)
    short = replace(shown, max_prompt_tokens=encode.length(task))
    message = (
        rf"tokens with its images and the tools that it shows \(plus, minus\), the limit is {encode.length(task)}; "
    )
    with pytest.raises(DataError, match=rf"{message}.* or show fewer tools$"):
        short(task)
    assert shown.length(task) > 2 * encode.length(task)


def test_a_picture_that_cannot_be_decoded_is_refused_by_row(encode, make_task):
    with pytest.raises(DataError, match=r"^rows.parquet, row 3, field images: "):
        encode(make_task("<image>", Image(None, b"not a picture", 56, 56)))


def test_the_template_sets_every_newline(tiny_policy):
    messages = (Message("user", "<image>\nhello"), Message("assistant", "yes"), Message("user", "why"))
    assert render(messages, tiny_policy.tokenizer) == (
        "<|im_start|>user\n<image>\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_message_joins_only_prompts_without_one(tiny_policy):
    user = Message("user", "hello")
    with_default = render((user,), tiny_policy.tokenizer, "Be brief.")
    assert with_default.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    own = render((Message("system", "Be long."), user), tiny_policy.tokenizer, "Be brief.")
    assert "Be long." in own
    assert "Be brief." not in own


def test_a_checkpoint_without_template_gets_the_corrected_one(tiny_folder):
    tokenizer = load_policy(str(tiny_folder)).tokenizer
    assert tokenizer.chat_template == CORRECTED_TEMPLATE
    tokenizer.chat_template = None
    assert render((Message("user", "a"),), tokenizer) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert render((Message("user", "a"),), tokenizer) == "a!"


def test_a_template_that_refuses_the_messages_is_an_error_by_row(tiny_folder, make_task):
    policy = load_policy(str(tiny_folder))
    policy.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    encode = Encoder(policy.tokenizer, policy.family, 6, 1024)
    with pytest.raises(DataError, match=r"row 3, field prompt: .*roles must alternate"):
        encode(make_task("hello"))


def test_the_fast_way_to_token_ids_gives_those_of_the_tokenizer(tiny_folder, monkeypatch):
    tokenizer = (policy := load_policy(str(tiny_folder))).tokenizer
    encode = Encoder(tokenizer, policy.family, 6, 1024)
    rng = np.random.default_rng(0)
    pieces = [
        "<|im_start|>",
        "<img>",
        "</img>",
        "<box>",
        "<|im_end",
        "|>",
        "dog",
        " Dog",
        "  ",
        "\n\n",
        "\t",
        "'ll",
        "7",
        "1e9",
    ]
    pieces += [
        "naïve",
        "e\u0301",
        "狐狸",
        "🦊",
        "\u200d",
        "\x00",
        "\ufffd",
        "ﬁ",
        "٣",
        "\u2028",
        "<",
        ">",
        "[[",
        "]]",
        "-0.5,",
    ]
    texts = ["".join(rng.choice(pieces, rng.integers(0, 30))) for _ in range(500)]
    assert [encode._ids(text) for text in texts] == [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    slow = []
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: slow.append(1) or [])
    encode._ids("dog")
    assert not slow
    tokenizer.backend_tokenizer.enable_truncation(3)  # what the fast way would cut by
    encode._ids("dog")
    assert slow


@pytest.mark.parametrize(
    "text", ["<box>[[1,2,3,4]]</box>", "a , b  c . d ' s", "naïve 狐 🦊\n\ttabs ", "<ref>x</ref>", ""]
)
def test_an_answer_comes_back_from_its_tokens_unchanged(text, encode):
    ids = encode.answer_ids(text)
    assert ids[-1] == encode.family.stop_ids[0]
    assert encode.decode(ids) == text
    assert encode.decode(ids[:-1]) == text


def test_only_the_last_token_is_taken_for_a_stop(encode):
    stop = encode.family.stop_ids[0]
    inner = (*encode.answer_ids("a"), *encode.answer_ids("b"))
    assert encode.decode(inner) == "a<|im_end|>b"
    assert encode.decode((stop,)) == ""
    assert encode.decode(()) == ""
