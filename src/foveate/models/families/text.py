"""Causal language models without images, behind the surface of the other families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from foveate.encoding.family import ImageShape
from foveate.models.families.internvl import PER_MILLE, Features, check_vocabulary, stop_ids
from foveate.records import DataError


@dataclass(frozen=True, slots=True)
class TextOnly:
    """A model that sees text alone: it refuses every image."""

    name: str
    stop_ids: tuple[int, ...]
    image_text: str = ""
    image_token_id: int = -1
    placeholder_ids: tuple[int, ...] = ()
    reserved: tuple[str, ...] = ()
    unit: str = ""
    budget: int = 0
    dummy_image: None = None

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {"language": ("model",), "head": ("lm_head",)}

    def share(self, budget: int, images: int) -> int:  # noqa: ARG002 - there are no images
        return budget

    def frame_budget(self, budget: int) -> int:
        return budget

    def shape(self, width: int, height: int, budget: int) -> ImageShape:  # noqa: ARG002
        raise self._blind()

    def pixels(self, image: Image.Image, budget: int) -> Tensor:  # noqa: ARG002
        raise self._blind()

    def features(self, model: nn.Module, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Features:  # noqa: ARG002
        raise self._blind()

    def box_frame(self, width: int, height: int, budget: int) -> tuple[int, int]:  # noqa: ARG002
        return PER_MILLE

    def _blind(self) -> DataError:
        return DataError(f"{self.name} is a text-only model and sees no images")


def text_family(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> TextOnly:
    """The family's facts. Raises DataError for a tokenizer that does not fit the model."""
    check_vocabulary(folder, config.vocab_size, tokenizer)
    return TextOnly(config.model_type, stop_ids(folder, tokenizer))
