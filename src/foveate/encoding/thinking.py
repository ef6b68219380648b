"""Thoughts before the answer, switched on and off: by the chat template where it asks for `enable_thinking` (Qwen3,
Qwen3.5, SmolLM3, GLM), or by the system message of a family that has one for it (InternVL3.5)."""

from __future__ import annotations

import copy
import re

from transformers import PreTrainedTokenizerBase

from foveate.encoding.chat import template_of
from foveate.encoding.family import Family
from foveate.errors import ConfigError

_ASKS = re.compile(r"\benable_thinking\b")


def with_thinking(
    tokenizer: PreTrainedTokenizerBase, family: Family, system: str | None, *, thinking: bool
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer and the system message of prompts with or without thoughts: a copy of the tokenizer whose template
    begins with the switch, or the message. Raises ConfigError for a model that has neither, and where the message
    would stand beside another one."""
    template = template_of(tokenizer, family.template)
    if _ASKS.search(template):
        switched = copy.copy(tokenizer)
        switched.chat_template = f"{{%- set enable_thinking = {str(thinking).lower()} %}}{template}"
        return switched, system
    if family.thinking_system is None:
        raise ConfigError(
            f"data.thinking is {str(thinking).lower()}, but the chat template of {family.name} does not ask for "
            "enable_thinking; leave it out"
        )
    if thinking and system is not None:
        raise ConfigError(
            f"data.thinking is true and data.system is set, but {family.name} thinks by its system message; choose one"
        )
    return tokenizer, family.thinking_system if thinking else system
