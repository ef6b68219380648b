"""Qwen2-VL and its successors: images in their own shape, as patches with 3-D positions.

Sources: transformers, `image_processing_pil_qwen2_vl.py` (resizing, order of the patches) and the models' own code;
Qwen2-VL (arXiv 2409.12191), section 2.1.
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

from foveate.encoding.family import PER_MILLE, DummyImage, Family, Features, ImagePiece, ImageShape, ServedAs
from foveate.errors import DataError
from foveate.models.checkpoint.formats import read_hf_config
from foveate.models.checkpoint.small_files import (
    check_image_token,
    check_vocabulary,
    is_count,
    read_preprocessor,
    require_words,
    stop_ids,
)
from foveate.records import ImageSlot

_ASPECT = 200
"""No image may be longer than this many times its other side."""
_VLLM = ServedAs(
    options=(
        *("--limit-mm-per-prompt", json.dumps({"video": 0, "image": 64})),
        "--no-mm-device-do-normalize",  # pixels come normalised
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVL(Family):
    """An image is resized to whole blocks of `merge` x `merge` patches of `patch` pixels, one token a block, with an
    area between `min_pixels` and the budget. Each patch is given `repeats` times, as frames of a video.
    `relative_boxes`: boxes are thousandths of the sides, else pixels of the resized image. `mlp_matrices`: of a block
    of the vision tower. `counts_frames`: the limits of the image processor are of all repeats of an image."""

    patch: int
    merge: int
    repeats: int
    min_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    relative_boxes: ClassVar[bool] = True
    mlp_matrices: ClassVar[int] = 2
    image_word: ClassVar[str] = "<|image_pad|>"
    counts_frames: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    reserved = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    control_words = (*Family.control_words, "<|vision_pad|>")
    unit = "pixels"
    vision_depth = "depth"
    auto_class = AutoModelForImageTextToText

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        config, vocabulary = read_hf_config(folder, cls.towers), tokenizer.get_vocab()
        require_words(folder, tokenizer, cls.reserved, "the model")
        check_image_token(folder, config.image_token_id, tokenizer, cls.image_word)
        check_vocabulary(folder, config.text_config.vocab_size, tokenizer)
        vision, processor = config.vision_config, read_preprocessor(folder, [])
        sizes = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
        for key, value in sizes.items():
            if processor.get(key, value) != value:
                raise DataError(
                    f"{folder}: {key} of the image processor is {processor[key]}, the vision tower's is {value}"
                )
        least, most = _pixel_limits(folder, processor)
        frames = vision.temporal_patch_size if cls.counts_frames else 1
        return config, cls(
            name=config.model_type,
            image_token_id=config.image_token_id,
            placeholder_ids=tuple(sorted(vocabulary[word] for word in cls.reserved)),
            stop_ids=stop_ids(folder, tokenizer),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            repeats=vision.temporal_patch_size,
            min_pixels=-(-least // frames),
            budget=most // frames,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
        )

    @classmethod
    def planned(cls, config: Any) -> Self:
        vision = config.vision_config
        return cls(
            name=config.model_type, stop_ids=(), patch=vision.patch_size, merge=vision.spatial_merge_size,
            repeats=vision.temporal_patch_size, min_pixels=0, mean=(), std=(),
        )  # fmt: skip

    def piece(self, config: Any) -> ImagePiece:
        """A square of 16 x 16 tokens: 448 pixels wide in Qwen2.5-VL, a tile of InternVL."""
        vision, side = config.vision_config, 16
        tokens, (width, ffn) = side**2, self._widths(vision)
        patches = tokens * self.merge**2
        pairs = patches * self._keys(vision, patches)
        mlp = self.mlp_matrices * width * ffn
        blocks = 2 * patches * vision.depth * (4 * width**2 + mlp) + 4 * width * pairs
        stem = 2 * patches * width * 3 * self.repeats * self.patch**2
        merger = self._merger_flops(config, tokens)
        pixels = (patches, 3, self.patch, self.patch)
        return ImagePiece(tokens, pixels, (side, side), blocks + stem + merger)

    def _merger_flops(self, config: Any, tokens: int) -> float:
        vision = config.vision_config
        inner = self._widths(vision)[0] * self.merge**2
        mergers = 1 + len(vision.to_dict().get("deepstack_visual_indexes") or ())
        return 2.0 * tokens * (inner**2 + inner * config.text_config.hidden_size) * mergers

    def _widths(self, vision: Any) -> tuple[int, int]:
        """Of the vision tower, and of the MLP in its blocks."""
        return vision.hidden_size, vision.intermediate_size

    def _keys(self, vision: Any, patches: int) -> int:
        """The patches that a patch of so many attends to, in all blocks."""
        return vision.depth * patches

    @property
    def dummy_image(self) -> DummyImage:
        return DummyImage(torch.zeros(self.merge**2, 3, self.patch, self.patch), ((1, 1),))

    def image_summary(self) -> str:
        block = self.patch * self.merge
        return f"{block} x {block} pixels a token, {self.min_pixels:,} to {self.budget:,} pixels an image"

    def shape(self, width: int, height: int, budget: int) -> ImageShape:
        wide, high = self._resized(width, height, budget)
        grid = high // (self.patch * self.merge), wide // (self.patch * self.merge)
        tokens = grid[0] * grid[1]
        return ImageShape(tokens, tokens * self.merge**2, grid)

    def box_frame(self, width: int, height: int, budget: int) -> tuple[int, int]:
        return PER_MILLE if self.relative_boxes else self._resized(width, height, budget)

    def pixels(self, image: Image.Image, budget: int) -> Tensor:
        """Patches (N, 3, patch, patch), those of a block side by side. They are repeated on the way into the model."""
        size = self._resized(image.width, image.height, budget)
        values = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / np.float32(255)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        side = self.merge, self.patch
        blocks = values.reshape(size[1] // math.prod(side), *side, size[0] // math.prod(side), *side, 3)
        patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, self.patch, self.patch)
        return torch.from_numpy(patches)

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:
        pixels = pixels.to(next(model.parameters()).dtype)
        patches = [[1, rows * self.merge, columns * self.merge] for rows, columns in grids]
        grid = torch.tensor(patches, device="cpu" if pixels.is_meta else pixels.device)  # a plan needs its values
        seen = model.get_image_features(pixel_values=self._frames(pixels), image_grid_thw=grid)
        deeper = seen.get("deepstack_features") or ()  # of all images together before transformers 5.19
        joined = tuple(one if isinstance(one, Tensor) else torch.cat(one) for one in deeper)
        return Features(torch.cat(seen.pooler_output), joined)

    def vllm_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, tuple[Tensor, str]]:
        assert slot.grid is not None
        grid = torch.tensor([1, *(side * self.merge for side in slot.grid)])
        return {"pixel_values": (self._frames(pixels), "flat"), "image_grid_thw": (grid, "batched")}

    def _frames(self, pixels: Tensor) -> Tensor:
        """Patches (N, 3, H, W) as the model takes them: (N, 3 * repeats * H * W)."""
        return pixels[:, :, None].expand(-1, -1, self.repeats, -1, -1).flatten(1)

    def _resized(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Width and height after resizing: whole blocks, the aspect ratio kept as far as they allow."""
        if max(width, height) > _ASPECT * min(width, height):
            raise DataError(f"an image of {width} x {height} pixels is too narrow; {self.name} takes 1:{_ASPECT}")
        block = self.patch * self.merge
        wide, high = (round(side / block) * block for side in (width, height))
        if wide * high > budget:
            shrink = math.sqrt(width * height / budget)
            wide, high = (max(block, math.floor(side / shrink / block) * block) for side in (width, height))
        elif wide * high < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(side * grow / block) * block for side in (width, height))
        return wide, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VL(QwenVL):
    towers = ("qwen2_vl_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": _VLLM}

    def _widths(self, vision: Any) -> tuple[int, int]:
        return vision.embed_dim, vision.embed_dim * vision.mlp_ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen25VL(QwenVL):
    relative_boxes = False
    mlp_matrices = 3
    towers = ("qwen2_5_vl_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": _VLLM}

    def _keys(self, vision: Any, patches: int) -> int:
        window = min(patches, (vision.window_size // self.patch) ** 2)
        whole = sum(index < vision.depth for index in vision.fullatt_block_indexes)
        return whole * patches + (vision.depth - whole) * window


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VL(QwenVL):
    towers = ("qwen3_vl_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": _VLLM}

    def shallow_tower(self, config: Any, blocks: int) -> dict[str, Any]:
        return {"depth": blocks, "deepstack_visual_indexes": [*range(min(blocks, self.uneven_blocks(config)))]}

    def uneven_blocks(self, config: Any) -> int:
        """Features of as many blocks of the tower enter behind as many of the language model (DeepStack)."""
        return len(config.vision_config.deepstack_visual_indexes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VLMoe(Qwen3VL):
    towers = ("qwen3_vl_moe_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {}
    transposed_experts = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35(QwenVL):
    """Qwen3.5 and its successors of one structure: three of four layers are Gated DeltaNet. Checkpoints hold layers for
    multi-token prediction (MTP)."""

    towers = ("qwen3_5_text",)
    untrained = ("mtp.",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35Moe(QwenVL):
    towers = ("qwen3_5_moe_text",)
    untrained = ("mtp.",)


def _pixel_limits(folder: Path, processor: Mapping[str, Any]) -> tuple[int, int]:
    """The fewest and the most pixels of a resized image, as the image processor says them."""
    size = processor.get("size") or {}
    edges = size if isinstance(size, dict) else {}
    least = processor.get("min_pixels") or edges.get("shortest_edge")
    most = processor.get("max_pixels") or edges.get("longest_edge")
    if least is None or most is None:
        raise DataError(
            f"{folder}: the image processor says neither min_pixels and max_pixels nor a size with shortest_edge and "
            "longest_edge"
        )
    if not is_count(least) or not is_count(most) or least > most:
        raise DataError(
            f"{folder}: the image processor takes images of {least!r} to {most!r} pixels; these must be whole "
            "numbers above 0, the smaller one first"
        )
    return least, most
