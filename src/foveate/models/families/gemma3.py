"""Gemma 3: each image as one square of fixed size, whose tokens attend to each other both ways.

Source: Gemma 3 Technical Report (arXiv 2503.19786), section 2.1, and transformers' `image_processing_pil_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from foveate.encoding.family import DummyImage, Family, Features, ImagePiece, ImageShape
from foveate.errors import DataError
from foveate.models.checkpoint.formats import read_hf_config
from foveate.models.checkpoint.small_files import (
    check_image_token,
    check_vocabulary,
    read_preprocessor,
    require_words,
    stop_ids,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3(Family):
    """An image becomes a square of `side` pixels, whatever its shape, and `tokens` tokens."""

    side: int
    tokens: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    budget: int = 1

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
    towers = ("gemma3_text",)
    image_text = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
    reserved = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    control_words = (*Family.control_words, "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>")
    unit = "tiles"
    bidirectional_images = True
    auto_class = AutoModelForImageTextToText

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        config, vocabulary = read_hf_config(folder, cls.towers), tokenizer.get_vocab()
        require_words(folder, tokenizer, cls.reserved, "the model")
        check_image_token(folder, config.image_token_id, tokenizer, "<image_soft_token>")
        check_vocabulary(folder, config.text_config.vocab_size, tokenizer)
        if cap := config.text_config.final_logit_softcapping or config.text_config.attn_logit_softcapping:
            raise DataError(f"{folder / 'config.json'}: scores or logits are capped at {cap}; no kernel here does that")
        side, processor = config.vision_config.image_size, read_preprocessor(folder, ["size"], resample=2)
        if processor["size"] != {"height": side, "width": side}:
            raise DataError(f"{folder}: size {processor['size']} is not the vision tower's {side} x {side}")
        if processor.get("do_pan_and_scan"):
            raise DataError(f"{folder}: do_pan_and_scan is set; images are seen whole here, so switch it off")
        return config, cls(
            name=config.model_type,
            image_token_id=config.image_token_id,
            placeholder_ids=tuple(sorted(vocabulary[word] for word in cls.reserved)),
            stop_ids=stop_ids(folder, tokenizer),
            side=side,
            tokens=config.mm_tokens_per_image,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
        )

    @classmethod
    def planned(cls, config: Any) -> Self:
        side, tokens = config.vision_config.image_size, config.mm_tokens_per_image
        return cls(name=config.model_type, stop_ids=(), side=side, tokens=tokens, mean=(), std=())

    def piece(self, config: Any) -> ImagePiece:
        vision, text = config.vision_config, config.text_config
        width, patches = vision.hidden_size, (self.side // vision.patch_size) ** 2
        block = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * patches**2
        stem = 2 * patches * width * 3 * vision.patch_size**2
        projector = 2 * self.tokens * width * text.hidden_size
        pixels = (1, 3, self.side, self.side)
        return ImagePiece(self.tokens, pixels, None, vision.num_hidden_layers * block + stem + projector)

    @property
    def dummy_image(self) -> DummyImage:
        return DummyImage(torch.zeros(1, 3, self.side, self.side))

    def image_summary(self) -> str:
        return f"one square of {self.side} pixels, {self.tokens} tokens, which attend to each other both ways"

    def shape(self, width: int, height: int, budget: int) -> ImageShape:  # noqa: ARG002 - all images are one size
        if budget != 1:
            raise DataError(f"max_tiles is {budget}, but {self.name} sees each image as one tile; leave it out")
        return ImageShape(self.tokens, 1)

    def pixels(self, image: Image.Image, budget: int) -> Tensor:  # noqa: ARG002
        values = np.asarray(image.resize((self.side, self.side), Image.Resampling.BILINEAR), np.float32) / np.float32(
            255
        )
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(values.transpose(2, 0, 1)[None].copy())

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:  # noqa: ARG002
        pixels = pixels.to(next(model.parameters()).dtype)
        return Features(model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1))
