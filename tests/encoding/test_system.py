"""The system message of a family's own conversations, against those of InternVL's training code."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from family_cases import build_family

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.config.recipe import load_recipe
from foveate.config.runs import MPOSettings
from foveate.encoding.chat import DEFAULT_SYSTEM
from foveate.encoding.dataset import build_encoder
from foveate.errors import ConfigError
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.records import Message, Task

FILE = Path(__file__).parent.parent / "data" / "official_conversations.json.gz"
OFFICIAL = json.loads(gzip.decompress(FILE.read_bytes()))["conversations"]
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def encoder_with(folder, system: str):
    found = inspect_model_folder(str(folder))
    data = DataSettings(train=("rows.parquet",), system=system)
    tiles = 6 if found.family.sees_images else None
    return build_encoder(found.tokenizer, found.family, ModelSettings(path=str(folder), max_tiles=tiles), data)


def encoded(encoder, conversation, make_image) -> tuple[list[int], list[int]]:
    """Prompt and answer of a conversation whose last turn is the answer."""
    *turns, (_, answer) = conversation["turns"]
    images = tuple(make_image(*size) for size in conversation["images"])
    messages = tuple(Message(ROLES[role], text) for role, text in turns)
    prompt = encoder(Task("id", "s", messages, images, None, where="row 0"))
    return list(prompt.token_ids), list(encoder.answer_ids(answer))


def official(tokenizer, conversation) -> list[int]:
    """The official tokens: each turn by itself."""
    return [token for turn in conversation["official"] for token in tokenizer.encode(turn, add_special_tokens=False)]


def test_there_are_eighteen_conversations():
    assert len(OFFICIAL) == 18
    assert sum(turns["turns"][0][0] == "system" for turns in OFFICIAL) == 3


@pytest.mark.parametrize("conversation", OFFICIAL, ids=range(18))
def test_with_the_default_system_message_a_conversation_has_the_official_tokens(conversation, tiny_folder, make_image):
    encoder = encoder_with(tiny_folder, "default")
    prompt, answer = encoded(encoder, conversation, make_image)
    line = encoder.tokenizer.encode("\n", add_special_tokens=False)
    assert [*prompt, *answer, *line] == official(encoder.tokenizer, conversation)
    assert len(prompt) == conversation["answer_starts"]


@pytest.mark.parametrize("conversation", OFFICIAL[:4], ids=range(4))
def test_without_it_a_conversation_begins_with_the_user(conversation, tiny_folder, make_image):
    encoder = encoder_with(tiny_folder, "none")
    prompt, _ = encoded(encoder, conversation, make_image)
    user = encoder.tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    assert prompt[: len(user)] == user


def test_a_text_is_a_system_message_where_a_row_has_none(tiny_folder, make_image):
    encoder = encoder_with(tiny_folder, "Be brief.")
    for conversation, expected in ((OFFICIAL[0], "Be brief."), (OFFICIAL[5], "You are a careful judge.")):
        prompt, _ = encoded(encoder, conversation, make_image)
        assert encoder.decode(tuple(prompt)).startswith(f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\n")


def test_a_family_without_a_system_message_of_its_own_has_no_default(tmp_path):
    folder = build_family(tmp_path / "qwen3", "qwen3")
    with pytest.raises(ConfigError, match=r"data\.system=default: qwen3 has no system message of its own"):
        encoder_with(folder, "default")


def test_the_message_follows_from_the_language_model(tiny_policy):
    assert tiny_policy.family.default_system == DEFAULT_SYSTEM["internvl2_5"]
    gpt_oss = replace(tiny_policy.family, conversation="internvl3_5_gpt_oss")
    assert gpt_oss.default_system == DEFAULT_SYSTEM["internvl3_5_gpt_oss"]
    assert replace(tiny_policy.family, conversation="internvl_zh").default_system is None
    assert "书生·万象" in DEFAULT_SYSTEM["internvl2_5"]
    assert "Reasoning: low" in DEFAULT_SYSTEM["internvl3_5_gpt_oss"]


@pytest.mark.parametrize("size", ["1b", "8b", "38b"])
def test_the_recipes_of_the_offline_stage_use_it(size):
    recipes = Path(__file__).parents[2] / "src" / "foveate" / "recipes"
    assert load_recipe(recipes / f"internvl3_5_{size}_mpo.yaml", [], MPOSettings).data.system == "default"
