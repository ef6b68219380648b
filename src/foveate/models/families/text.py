"""Causal language models without images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedTokenizerBase

from foveate.encoding.family import VLLM_EXPERTS, Family, ImagePiece, ServedAs
from foveate.models.checkpoint.formats import mapped, read_hf_config
from foveate.models.checkpoint.small_files import check_vocabulary, stop_ids
from foveate.models.families.proof import forest_difference


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOnly(Family):
    """A model that sees text alone: it refuses every image. The proof says whether its attention is known."""

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        config = read_hf_config(folder, cls.towers)
        check_vocabulary(folder, config.vocab_size, tokenizer)
        proof = mapped(folder, forest_difference, config)
        return config, cls(name=config.model_type, stop_ids=stop_ids(folder, tokenizer), proof=proof)

    @classmethod
    def planned(cls, config: Any) -> Self:
        return cls(name=config.model_type, stop_ids=())

    def piece(self, config: Any) -> ImagePiece:  # noqa: ARG002
        """Nothing: plans count no pieces of a model without images."""
        return ImagePiece(1, (0,), None, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedText(TextOnly):
    """One that vLLM and SGLang take as it is."""

    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": ServedAs(), "sglang": ServedAs()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedMixture(TextOnly):
    """One whose feed-forward layers are mixtures of experts."""

    servers: ClassVar[Mapping[str, ServedAs]] = {
        "vllm": ServedAs(no_adapters=VLLM_EXPERTS),
        "sglang": ServedAs(no_adapters="on SGLang they are not proven beside experts"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35Text(TextOnly):
    """The language model of Qwen3.5 by itself. Checkpoints hold layers for multi-token prediction."""

    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": ServedAs().recurrent()}
    untrained = ("mtp.",)
