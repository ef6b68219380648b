"""InternVL, in the layouts of GitHub and of transformers: square tiles, pixel shuffle, scattered features."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from foveate.encoding.chat import DEFAULT_SYSTEM, THINKING_SYSTEM
from foveate.encoding.family import DummyImage, Family, Features, ImagePiece, ImageShape, ServedAs
from foveate.encoding.tiles import cut_tiles, tile_budget, tile_count
from foveate.errors import DataError
from foveate.models.checkpoint.configs import TEMPLATES, TEXT_ARCHITECTURES, hf_preprocessor
from foveate.models.checkpoint.formats import (
    IMAGE_WORDS,
    check_tower,
    hf_form,
    mapped,
    model_config,
    read_config,
)
from foveate.models.checkpoint.small_files import (
    check_image_token,
    check_vocabulary,
    read_preprocessor,
    require_tiles,
    require_words,
    stop_ids,
)
from foveate.models.flash import FlashForConditionalGeneration, is_flash, patches_of, projected
from foveate.records import ImageSlot

_BANNED = ("<img>", "<IMG_CONTEXT>", "</img>", "<video>", "<IMG>")


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVL(Family):
    """An image is a grid of tiles of `tile` pixels and a thumbnail, each `tokens_per_tile` tokens, normalised by `mean`
    and `std`. `conversation`: the name of InternVL's template for conversations with such a model."""

    name: str = "internvl"
    tile: int
    tokens_per_tile: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    conversation: str = "internvl2_5"

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
    towers = (*TEXT_ARCHITECTURES.values(), "llama")  # llama: InternLM2 in transformers' own format
    image_text = "<img><IMG_CONTEXT></img>"
    reserved = ("<IMG_CONTEXT>", "<img>", "</img>")
    control_words = (*Family.control_words, *_BANNED, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                     "<|image_pad|>", "<|video_pad|>")  # fmt: skip
    thinking_system = THINKING_SYSTEM
    unit = "tiles"
    auto_class = AutoModelForImageTextToText
    github_type = "internvl_chat"
    servers: ClassVar[Mapping[str, ServedAs]] = {
        # transformers' processor, which vLLM builds at its start and requests never reach, asks for a video token
        "vllm": ServedAs(
            options=("--limit-mm-per-prompt", json.dumps({"video": 0, "image": 64})), lent=("video_token",)
        ),
        # SGLang would build the processor that this names, and knows the GitHub layout only
        "sglang": ServedAs(layout="chat", hidden=("processor_class",)),
    }

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        require_words(folder, tokenizer, IMAGE_WORDS, "InternVL")
        vocabulary, form = tokenizer.get_vocab(), hf_form(folder, tokenizer)
        check_tower(folder, (form.get("text_config") or {}).get("model_type"), cls.towers)
        config: Any = model_config(folder, form)
        layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
        if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
            raise DataError(
                f"{folder / 'config.json'}: images are taken from layer {layer} of a tower of {layers} layers"
            )
        check_image_token(folder, config.image_token_id, tokenizer, "<IMG_CONTEXT>")
        check_vocabulary(folder, config.text_config.vocab_size, tokenizer)
        tile, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
        if not 1 <= patch <= tile:
            raise DataError(f"{folder}/config.json: patches of {patch} pixels do not fit into tiles of {tile}")
        side = int(tile // patch * config.downsample_ratio)
        chat = read_config(folder)
        in_github_layout = chat["model_type"] == cls.github_type
        processor = mapped(folder, hf_preprocessor, chat) if in_github_layout else _tile_settings(folder, tile)
        budget = require_tiles(f"{folder}: max_patches of the image processor", processor.get("max_patches", 12))
        if processor.get("min_patches", 1) != 1:
            raise DataError(f"{folder}: images of at least {processor['min_patches']!r} tiles are not known; only 1 is")
        kind: Any = cls
        if is_flash(form):
            kind = partial(FlashInternVL, thresholds=_thresholds(folder, form))
        return config, kind(
            image_token_id=config.image_token_id,
            placeholder_ids=tuple(sorted(vocabulary[word] for word in _BANNED if word in vocabulary)),
            stop_ids=stop_ids(folder, tokenizer),
            tile=tile,
            tokens_per_tile=side * side,
            budget=budget,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            conversation=str(chat.get("template") or TEMPLATES.get(config.text_config.model_type, "internvl2_5")),
        )

    @property
    def default_system(self) -> str | None:
        return DEFAULT_SYSTEM.get(self.conversation)

    @classmethod
    def planned(cls, config: Any) -> Self:
        """The family of a model that has a configuration alone, for the planner: without tokens and pixels."""
        tile, tokens = config.vision_config.image_size[0], config.image_seq_length
        kind: Any = cls
        if is_flash(config):
            thresholds = config.flash_relative_threshold, config.flash_absolute_threshold
            kind = partial(FlashInternVL, thresholds=thresholds)
        return kind(stop_ids=(), tile=tile, tokens_per_tile=tokens, mean=(), std=())

    def piece(self, config: Any) -> ImagePiece:
        vision, text = config.vision_config, config.text_config
        width, tokens = vision.hidden_size, (vision.image_size[0] // vision.patch_size[0]) ** 2 + 1
        block = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * tokens**2
        projector = 2 * self.tokens_per_tile * (4 * width * text.hidden_size + text.hidden_size**2)
        flops = vision.num_hidden_layers * block + projector
        return ImagePiece(self.tokens_per_tile, (1, 3, *vision.image_size), None, flops)

    @property
    def dummy_image(self) -> DummyImage:
        return DummyImage(torch.zeros(1, 3, self.tile, self.tile))

    def share(self, budget: int, images: int) -> int:
        return tile_budget(budget, images)

    def frame_budget(self, budget: int) -> int:  # noqa: ARG002 - one tile, as in InternVL's own video data
        return 1

    def image_summary(self) -> str:
        each = f"tiles of {self.tile} pixels, {self.tokens_per_tile} tokens each"
        return f"{each}, at most {self.budget} and a thumbnail"

    def shape(self, width: int, height: int, budget: int) -> ImageShape:
        tiles = self.tiles(width, height, budget)
        return ImageShape(tiles * self.tokens_per_tile, tiles)

    def tiles(self, width: int, height: int, budget: int) -> int:
        return tile_count(width, height, budget, self.tile)

    def pixels(self, image: Image.Image, budget: int) -> Tensor:
        return cut_tiles(image, budget, self.tile, self.mean, self.std)

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:  # noqa: ARG002
        pixels = pixels.to(next(model.parameters()).dtype)
        return Features(model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1))

    def vllm_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, tuple[Tensor, str]]:  # noqa: ARG002
        return {
            "pixel_values": (pixels, "flat"),
            "image_num_patches": (torch.tensor(len(pixels)), "batched"),
            "image_token_id": (torch.tensor(self.image_token_id), "shared"),
        }

    def sglang_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, Tensor]:  # noqa: ARG002
        return {"feature": pixels}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInternVL(InternVL):
    """InternVL3.5-Flash: a tile may be compressed to a fourth of its tokens (`foveate.models.flash`). Batches whose
    slots say nothing of it have all tokens. `thresholds`: the relative and the absolute one of its router."""

    name: str = "internvl_flash"
    thresholds: tuple[float, float] = (0.0, 0.5)

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **InternVL.parts,
        "projector": ("model.multi_modal_projector", "model.mlp2"),
        "router": ("model.pooling_before_gating", "model.gating"),
    }
    auto_class = FlashForConditionalGeneration
    servers: ClassVar[Mapping[str, ServedAs]] = {}

    @property
    def router_thresholds(self) -> tuple[float, float]:
        return self.thresholds

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens along a side of a tile, and of one that is compressed."""
        side = math.isqrt(self.tokens_per_tile)
        return side, side // 2

    @property
    def dummy_image(self) -> DummyImage:
        side = self.sides[0]
        return DummyImage(torch.zeros(1, 3, self.tile, self.tile), ((side, side),))

    def unseen(self, sides: Collection[int]) -> tuple[str, ...]:
        large, small = self.sides
        projectors = {large: "model.multi_modal_projector", small: "model.mlp2"}
        return tuple(name for side, name in projectors.items() if side not in sides and 0 not in sides)

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:
        if not grids:
            return InternVL.features(self, model, pixels, grids)
        return self.of_patches(model, patches_of(model, pixels.to(next(model.parameters()).dtype)), grids)

    def of_patches(self, model: Any, patches: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:
        """Tiles go through one of two projectors. Both are in the graph, so that all ranks have the same gradients."""
        assert len(grids) == len(patches), f"{len(grids)} grids for {len(patches)} tiles: some prompts have no route"
        tiles: list[Tensor] = [patches.new_empty(0)] * len(grids)
        nothing: list[Tensor] = []
        for compressed in (False, True):
            chosen = [place for place, grid in enumerate(grids) if (grid[0] == self.sides[1]) == compressed]
            index = torch.tensor(chosen, dtype=torch.int64, device=patches.device)
            seen = projected(model, patches[index], compressed=compressed)
            nothing += [] if len(chosen) else [seen.flatten(0, 1)]
            for place, tile in zip(chosen, seen, strict=True):
                tiles[place] = tile
        return Features(torch.cat([*tiles, *nothing]))


def _thresholds(folder: Path, form: Any) -> tuple[float, float]:
    relative, absolute = (form.get(f"flash_{name}_threshold") for name in ("relative", "absolute"))
    for value in (relative, absolute):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise DataError(
                f"{folder / 'config.json'}: flash_relative_threshold is {relative!r} and flash_absolute_threshold "
                f"{absolute!r}; both must be numbers from 0 to 1"
            )
    return float(relative), float(absolute)


def _tile_settings(folder: Path, tile: int) -> dict[str, Any]:
    """The preprocessing of a Hugging Face folder. `crop_to_patches` is not read: InternVL's processor switches it on
    in any case."""
    content = read_preprocessor(folder, ["size"])
    if content["size"] != {"height": tile, "width": tile}:
        raise DataError(f"{folder}: size {content['size']} is not the vision tower's {tile} x {tile}")
    return content
