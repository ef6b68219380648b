"""Qwen2-VL and its successors: images in their own shape, as patches with 3-D positions.

Sources: transformers, `image_processing_pil_qwen2_vl.py` (resizing, order of the patches) and the models' own code;
Qwen2-VL (arXiv 2409.12191), section 2.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from foveate.config.data import VideoSettings
from foveate.encoding.family import (
    PER_MILLE,
    VLLM_EXPERTS,
    Clip,
    DummyImage,
    Family,
    Features,
    ImagePiece,
    ImageShape,
    ServedAs,
)
from foveate.errors import DataError
from foveate.models.checkpoint.formats import read_hf_config
from foveate.models.checkpoint.small_files import (
    check_image_token,
    check_vocabulary,
    read_preprocessor,
    require_words,
    stop_ids,
)
from foveate.models.families.qwen_video import VideoLimits, fitted_frames, pixel_limits, taken_frames, video_limits
from foveate.records import ImageSlot, Video

_ASPECT = 200
"""No image may be longer than this many times its other side."""
_VLLM = ServedAs(
    options=(
        *("--limit-mm-per-prompt", json.dumps({"video": 0, "image": 64})),
        "--no-mm-device-do-normalize",  # pixels come normalised
    )
)
_SGLANG = ServedAs(prefixes=(("model.language_model.", "model."), ("model.visual.", "visual.")))
_SERVERS = {"vllm": _VLLM, "sglang": _SGLANG}


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVL(Family):
    """An image is resized to whole blocks of `merge` x `merge` patches of `patch` pixels, one token a block, with an
    area between `min_pixels` and the budget. Each patch is given `repeats` times, as frames of a video.
    `relative_boxes`: boxes are thousandths of the sides, else pixels of the resized image. `mlp_matrices`: of a block
    of the vision tower. `counts_frames`: the limits of the image processor are of all repeats of an image.

    A video is pieces of `repeats` frames each. `timed`: every piece stands by itself, behind its time in seconds, and
    the limits of pixels are of all frames together; else the video is one run of tokens, whose pieces lie apart in
    their positions by `tokens_per_second` (None: by 1), and the limits are of each frame."""

    patch: int
    merge: int
    repeats: int
    min_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    video: VideoLimits | None = None
    tokens_per_second: float | None = None

    relative_boxes: ClassVar[bool] = True
    timed: ClassVar[bool] = False
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
    video_text = "<|vision_start|><|video_pad|><|vision_end|>"
    video_word: ClassVar[str] = "<|video_pad|>"
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
        least, most = pixel_limits(folder, processor)
        frames = vision.temporal_patch_size if cls.counts_frames else 1
        return config, cls(
            name=config.model_type,
            image_token_id=config.image_token_id,
            video_token_id=vocabulary.get(cls.video_word, -1),
            placeholder_ids=tuple(sorted(vocabulary[word] for word in cls.reserved)),
            stop_ids=stop_ids(folder, tokenizer),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            repeats=vision.temporal_patch_size,
            min_pixels=-(-least // frames),
            budget=most // frames,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            video=video_limits(folder, processor),
            tokens_per_second=vision.to_dict().get("tokens_per_second"),
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
        return self._patches(image, self._resized(image.width, image.height, budget))

    def _patches(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        values = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / np.float32(255)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        side = self.merge, self.patch
        blocks = values.reshape(size[1] // math.prod(side), *side, size[0] // math.prod(side), *side, 3)
        patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, self.patch, self.patch)
        return torch.from_numpy(patches)

    def clips(self, video: Video, options: VideoSettings) -> tuple[Clip, ...]:
        """The frames and their sizes are those of transformers' processors, with the frames as `Family.clips` says by
        its options."""
        limits = self._video_limits
        frames = taken_frames(video, options, limits, self.repeats, keeps_odd=self.timed)
        size = self._frame_size(video, len(frames), limits, options.max_pixels)
        rate = len(frames) / video.frames * video.fps
        frames += frames[-1:] * (-len(frames) % self.repeats)
        pieces = [frames[first : first + self.repeats] for first in range(0, len(frames), self.repeats)]
        if self.timed:
            seconds = [(piece[0] / video.fps + piece[-1] / video.fps) / 2 for piece in pieces]
            marks = [f"<{time:.1f} seconds>" for time in seconds]
            return tuple(Clip(video, tuple(one), mark, size, (0,)) for one, mark in zip(pieces, marks, strict=True))
        apart = 1.0
        if self.tokens_per_second is not None:  # in 32 bits, as transformers computes it
            apart = np.float32(self.tokens_per_second) * np.float32(self.repeats / rate)
        times = (np.arange(len(pieces), dtype=np.float32) * np.float32(apart)).astype(int).tolist()
        return (Clip(video, tuple(frames), "", size, tuple(times)),)

    @property
    def _video_limits(self) -> VideoLimits:
        return self.video or VideoLimits(self.min_pixels, self.budget)

    def _frame_size(self, video: Video, frames: int, limits: VideoLimits, most: int | None) -> tuple[int, int]:
        """Width and height of the frames after resizing; `most`: pixels of all of them."""
        if self.timed:
            within = limits.least, min(limits.most, most or limits.most)
            self._require_wide(video.width, video.height)
            return fitted_frames(video, frames, self.patch * self.merge, self.repeats, within)
        each = limits.most if most is None else max(limits.least, min(limits.most, most // frames))
        return self._fitted(video.width, video.height, limits.least, each)

    def clip_shape(self, clip: Clip) -> ImageShape:
        assert clip.size is not None
        columns, rows = (side // (self.patch * self.merge) for side in clip.size)
        tokens, each = len(clip.times) * rows * columns, len(clip.frames) // len(clip.times)
        entries = tokens * self.merge**2 * each
        return ImageShape(tokens, entries, (rows, columns), times=clip.times, frames=each)

    def clip_pixels(self, frame: Image.Image, clip: Clip) -> Tensor:
        assert clip.size is not None
        return self._patches(frame, clip.size)

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:
        pixels = pixels.to(next(model.parameters()).dtype)
        patches = [[1, rows * self.merge, columns * self.merge] for rows, columns, *_ in grids]
        grid = torch.tensor(patches, device="cpu" if pixels.is_meta else pixels.device)  # a plan needs its values
        seen = model.get_image_features(pixel_values=self._pieces(pixels, grids), image_grid_thw=grid)
        deeper = seen.get("deepstack_features") or ()  # of all images together before transformers 5.19
        joined = tuple(one if isinstance(one, Tensor) else torch.cat(one) for one in deeper)
        return Features(torch.cat(seen.pooler_output), joined)

    def vllm_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, tuple[Tensor, str]]:
        return {"pixel_values": (self._frames(pixels), "flat"), "image_grid_thw": (self._patch_grid(slot), "batched")}

    def sglang_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, Tensor]:
        return {"feature": self._frames(pixels), "image_grid_thw": self._patch_grid(slot)[None]}

    def _patch_grid(self, slot: ImageSlot) -> Tensor:
        """Frames, rows and columns of the patches of an image that a server is given."""
        assert slot.grid is not None
        if slot.times:
            raise DataError(f"videos of {self.name} are not handed to a server yet; use rollout.engine=native")
        return torch.tensor([1, *(side * self.merge for side in slot.grid)])

    def _pieces(self, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Tensor:
        """The same where pieces of videos, whose grids say how many frames they have, stand among images."""
        if all(len(grid) == 2 for grid in grids):
            return self._frames(pixels)
        parts = pixels.split([math.prod(grid) * self.merge**2 for grid in grids])
        return torch.cat(
            [
                self._frames(part)
                if len(grid) == 2
                else part.unflatten(0, (grid[2], -1)).permute(1, 2, 0, 3, 4).flatten(1)
                for part, grid in zip(parts, grids, strict=True)
            ]
        )

    def _frames(self, pixels: Tensor) -> Tensor:
        """Patches (N, 3, H, W) as the model takes them: (N, 3 * repeats * H * W)."""
        return pixels[:, :, None].expand(-1, -1, self.repeats, -1, -1).flatten(1)

    def _resized(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Width and height after resizing: whole blocks, the aspect ratio kept as far as they allow."""
        return self._fitted(width, height, self.min_pixels, budget)

    def _require_wide(self, width: int, height: int) -> None:
        if max(width, height) > _ASPECT * min(width, height):
            raise DataError(f"an image of {width} x {height} pixels is too narrow; {self.name} takes 1:{_ASPECT}")

    def _fitted(self, width: int, height: int, least: int, budget: int) -> tuple[int, int]:
        self._require_wide(width, height)
        block = self.patch * self.merge
        wide, high = (round(side / block) * block for side in (width, height))
        if wide * high > budget:
            shrink = math.sqrt(width * height / budget)
            wide, high = (max(block, math.floor(side / shrink / block) * block) for side in (width, height))
        elif wide * high < least:
            grow = math.sqrt(least / (width * height))
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
    servers: ClassVar[Mapping[str, ServedAs]] = _SERVERS

    def _keys(self, vision: Any, patches: int) -> int:
        window = min(patches, (vision.window_size // self.patch) ** 2)
        whole = sum(index < vision.depth for index in vision.fullatt_block_indexes)
        return whole * patches + (vision.depth - whole) * window


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VL(QwenVL):
    timed = True
    towers = ("qwen3_vl_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = _SERVERS

    def shallow_tower(self, config: Any, blocks: int) -> dict[str, Any]:
        return {"depth": blocks, "deepstack_visual_indexes": [*range(min(blocks, self.uneven_blocks(config)))]}

    def uneven_blocks(self, config: Any) -> int:
        """Features of as many blocks of the tower enter behind as many of the language model (DeepStack)."""
        return len(config.vision_config.deepstack_visual_indexes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VLMoe(Qwen3VL):
    towers = ("qwen3_vl_moe_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": replace(_VLLM, no_adapters=VLLM_EXPERTS)}
    transposed_experts = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35(QwenVL):
    """Qwen3.5 and its successors of one structure: three of four layers are Gated DeltaNet. Checkpoints hold layers for
    multi-token prediction (MTP)."""

    timed = True
    towers = ("qwen3_5_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": _VLLM.recurrent()}
    untrained = ("mtp.",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen35Moe(QwenVL):
    timed = True
    towers = ("qwen3_5_moe_text",)
    servers: ClassVar[Mapping[str, ServedAs]] = {"vllm": _VLLM.recurrent()}
    untrained = ("mtp.",)
