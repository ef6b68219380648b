"""SmolVLM and Idefics3: an image is rows of square tiles and the whole image as one more, each a run of tokens.

Sources: Idefics3 (arXiv 2408.12637), section 2.2, SmolVLM (arXiv 2504.05299), and transformers'
`image_processing_pil_idefics3.py` and `processing_idefics3.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from foveate.encoding.chat import IMAGE_MARK
from foveate.encoding.family import DummyImage, Family, Features, ImagePiece, ImageShape, ServedAs
from foveate.errors import DataError
from foveate.models.checkpoint.formats import mapped, read_hf_config
from foveate.models.checkpoint.small_files import (
    check_image_token,
    check_vocabulary,
    is_count,
    read_preprocessor,
    require_words,
    stop_ids,
)
from foveate.models.families.proof import forest_difference
from foveate.records import ImageSlot

_SIDE = 6
"""The most rows and columns of tiles that tokenizers have words for."""
_MOST = 4096
"""No side of an image is resized to more pixels, whatever its processor says."""
_EDGE, _WHOLE = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolVLM(Family):
    """Tiles of `tile` pixels give `tokens` tokens each. The budget is the tiles of a square image: its root times
    `tile` is what the longer side is resized to."""

    tile: int
    tokens: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_model",),
        "projector": ("model.connector",),
        "language": ("model.text_model",),
        "head": ("lm_head",),
    }
    servers: ClassVar[Mapping[str, ServedAs]] = {  # each tile is an image there
        "vllm": ServedAs(options=("--limit-mm-per-prompt", json.dumps({"image": 16 * (_SIDE**2 + 1)})))
    }
    image_text = f"{_EDGE}{_WHOLE}<image>{_EDGE}"
    reserved = (_EDGE, _WHOLE, *(f"<row_{i}_col_{j}>" for i in range(1, _SIDE + 1) for j in range(1, _SIDE + 1)))
    control_words = (*Family.control_words, "<end_of_utterance>")
    unit = "tiles"
    auto_class = AutoModelForImageTextToText

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        config, vocabulary = read_hf_config(folder, cls.towers), tokenizer.get_vocab()
        require_words(folder, tokenizer, ("<image>", *cls.reserved), "the model")
        check_image_token(folder, config.image_token_id, tokenizer, "<image>")
        check_vocabulary(folder, config.text_config.vocab_size, tokenizer)
        vision, processor = config.vision_config, read_preprocessor(folder, ["size", "max_image_size"], resample=1)
        edges = [processor[key].get("longest_edge") for key in ("size", "max_image_size") if _is_edge(processor[key])]
        if len(edges) < 2 or edges[1] != vision.image_size or edges[0] % edges[1] or edges[0] // edges[1] > _SIDE:
            raise DataError(
                f"{folder}: size is {processor['size']} and max_image_size {processor['max_image_size']}; the latter "
                f"must be the vision tower's longest_edge of {vision.image_size}, the former 1 to {_SIDE} times that"
            )
        if processor.get("do_image_splitting") is False:
            raise DataError(f"{folder}: do_image_splitting is off; images are split into tiles here, so switch it on")
        return config, cls(
            name=config.model_type,
            image_token_id=config.image_token_id,
            placeholder_ids=tuple(sorted(vocabulary[word] for word in ("<image>", *cls.reserved))),
            stop_ids=stop_ids(folder, tokenizer),
            budget=(edges[0] // edges[1]) ** 2,
            proof=mapped(folder, forest_difference, config.text_config),
            tile=edges[1],
            tokens=(vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
        )

    @classmethod
    def planned(cls, config: Any) -> Self:
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
        return cls(name=config.model_type, stop_ids=(), tile=vision.image_size, tokens=tokens, mean=(), std=())

    def piece(self, config: Any) -> ImagePiece:
        """A tile."""
        vision, text, shuffled = config.vision_config, config.text_config, config.scale_factor**2
        width, patches = vision.hidden_size, self.tokens * shuffled
        block = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * patches**2
        stem = 2 * patches * width * 3 * vision.patch_size**2
        connector = 2 * self.tokens * shuffled * width * text.hidden_size
        flops = vision.num_hidden_layers * block + stem + connector
        return ImagePiece(self.tokens, (1, 3, self.tile, self.tile), None, flops)

    def all_control_words(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Without the placeholder of an image, which is also the mark of one in a row."""
        return tuple(word for word in Family.all_control_words(self, tokenizer) if word != IMAGE_MARK)

    @property
    def dummy_image(self) -> DummyImage:
        return DummyImage(torch.zeros(1, 3, self.tile, self.tile))

    def image_summary(self) -> str:
        side = math.isqrt(self.budget) * self.tile
        return f"tiles of {self.tile} pixels, {self.tokens} tokens each, of up to {side} pixels, and all as one more"

    def frame_budget(self, budget: int) -> int:  # noqa: ARG002 - frames are seen whole
        return 1

    def shape(self, width: int, height: int, budget: int) -> ImageShape:
        rows, columns = self._tiles(width, height, budget)
        runs = rows * columns + 1 if rows * columns > 1 else 1
        return ImageShape(runs * self.tokens, runs, runs=runs)

    def written(self, width: int, height: int, budget: int) -> str:
        rows, columns = self._tiles(width, height, budget)
        if rows * columns == 1:
            return self.image_text
        tiles = (
            "".join(f"{_EDGE}<row_{row}_col_{column}><image>" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        return f"{''.join(tiles)}\n{self.image_text}"

    def pixels(self, image: Image.Image, budget: int) -> Tensor:
        first = self._resized(image.width, image.height, budget)
        rows, columns = self._tiles(image.width, image.height, budget)
        image = image.resize(first, Image.Resampling.LANCZOS)
        image = image.resize((columns * self.tile, rows * self.tile), Image.Resampling.LANCZOS)
        corners = [(column * self.tile, row * self.tile) for row in range(rows) for column in range(columns)]
        pieces = [image.crop((x, y, x + self.tile, y + self.tile)) for x, y in corners]
        if len(pieces) > 1:
            pieces.append(image.resize((self.tile, self.tile), Image.Resampling.LANCZOS))
        values = np.stack([np.asarray(piece, np.float32) for piece in pieces]) / np.float32(255)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:  # noqa: ARG002
        """By the parts of `get_image_features`, which leaves out what is all 0."""
        side = self.tile // model.config.vision_config.patch_size
        whole = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
        pixels = pixels.to(next(model.parameters()).dtype)
        seen = model.model.vision_model(pixel_values=pixels, patch_attention_mask=whole).last_hidden_state
        return Features(model.model.connector(seen).flatten(0, 1))

    def vllm_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, tuple[Tensor, str]]:  # noqa: ARG002
        mask = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.bool)
        return {
            "pixel_values": (pixels, "flat"),
            "pixel_attention_mask": (mask, "flat"),
            "num_patches": (torch.tensor(len(pixels)), "batched"),
        }

    def _resized(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Width and height after the first of two resizes: the longer side as the budget has it, the other one even."""
        edge, ratio = math.isqrt(budget) * self.tile, width / height
        size = (edge, int(edge / ratio)) if width >= height else (int(edge * ratio), edge)
        wide, high = (max(1, side + side % 2) if side != edge else side for side in size)
        ratio = wide / high
        if wide >= high and wide > _MOST:
            wide, high = _MOST, int(_MOST / ratio)
        elif high > wide and high > _MOST:
            wide, high = int(_MOST * ratio), _MOST
        return max(wide, 1), max(high, 1)

    def _tiles(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        wide, high = self._resized(width, height, budget)
        ratio = wide / high
        if wide >= high:
            columns = math.ceil(wide / self.tile)
            return max(1, math.ceil(int(columns * self.tile / ratio) / self.tile)), columns
        rows = math.ceil(high / self.tile)
        return rows, max(1, math.ceil(int(rows * self.tile * ratio) / self.tile))


def _is_edge(value: Any) -> bool:
    return isinstance(value, dict) and is_count(value.get("longest_edge"))
