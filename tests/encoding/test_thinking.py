"""`data.thinking`: by the template, by the family's system message, or refused."""

from __future__ import annotations

import pytest

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.encoding.chat import CORRECTED_TEMPLATE, THINKING_SYSTEM, opened_by, some_prompt
from foveate.encoding.dataset import build_encoder
from foveate.errors import ConfigError
from foveate.models.families.text import TextOnly
from foveate.models.tiny import tiny_tokenizer

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
TEXT = TextOnly(name="qwen3", stop_ids=(2,))


def encoder(family, tokenizer, **data):
    return build_encoder(tokenizer, family, ModelSettings(path="m"), DataSettings(train=("rows.jsonl",), **data))


@pytest.fixture
def tokenizer():
    made = tiny_tokenizer(400)
    made.chat_template = CORRECTED_TEMPLATE + SWITCH
    return made


@pytest.mark.parametrize(("thinking", "opened"), [(None, ""), (True, ""), (False, "<think>\n\n</think>\n\n")])
def test_a_template_that_asks_is_switched_in_every_prompt(tokenizer, thinking, opened, make_task):
    before = tokenizer.chat_template
    made = encoder(TEXT, tokenizer, thinking=thinking, system="Be brief.")
    assert made.opened == opened == opened_by(some_prompt(made.tokenizer, TEXT.template))
    text = made.tokenizer.decode(made(make_task("What?")).token_ids)
    assert text.endswith(f"<|im_start|>assistant\n{opened}")
    assert "Be brief." in text
    assert tokenizer.chat_template == before


def test_a_model_without_a_switch_refuses_it(tokenizer):
    tokenizer.chat_template = CORRECTED_TEMPLATE
    with pytest.raises(ConfigError, match=r"data.thinking is false, but the chat template of qwen3 does not ask for"):
        encoder(TEXT, tokenizer, thinking=False)


def test_internvl_thinks_by_its_system_message(tiny_policy):
    family, tokenizer = tiny_policy.family, tiny_policy.tokenizer
    assert encoder(family, tokenizer, thinking=True).system == THINKING_SYSTEM
    assert encoder(family, tokenizer, thinking=False).system is None
    with pytest.raises(ConfigError, match=r"data.thinking is true and data.system is set.*choose one"):
        encoder(family, tokenizer, thinking=True, system="Be brief.")
