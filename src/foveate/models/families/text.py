"""Causal language models without images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedTokenizerBase

from foveate.encoding.family import Family, ServedAs
from foveate.models.checkpoint.formats import read_hf_config
from foveate.models.checkpoint.small_files import check_vocabulary, stop_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOnly(Family):
    """A model that sees text alone: it refuses every image."""

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        config = read_hf_config(folder, cls.towers)
        check_vocabulary(folder, config.vocab_size, tokenizer)
        return config, cls(name=config.model_type, stop_ids=stop_ids(folder, tokenizer))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedText(TextOnly):
    """One that vLLM and SGLang take as it is."""

    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": ServedAs(), "sglang": ServedAs()}
