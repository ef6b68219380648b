"""What differs between model families, behind one small surface; and InternVL, in the Hugging Face layout.

Qwen-VL is in `foveate.models.families.qwen_vl`, models without images are in `foveate.models.families.text`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from foveate.encoding.family import ImageShape, PromptFamily
from foveate.encoding.tiles import cut_tiles, tile_budget, tile_count
from foveate.records import DataError


class Family(PromptFamily, Protocol):
    """How a family of models sees images and where the parts of its module tree are."""

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that may never be sampled."""
        ...

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Where the parts of the model are: `vision`, `projector`, `language`, `head` -> names of submodules, the first
        of them the main one. A submodule of another part's belongs to the inner one alone."""
        ...

    @property
    def dummy_image(self) -> DummyImage | None:
        """The smallest picture, for ranks that have none while others have; None for a family without images."""
        ...

    def features(self, model: nn.Module, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Features:
        """Features of all images in the order of their placeholder tokens. `grids` as in `Batch`."""
        ...


@dataclass(frozen=True, slots=True)
class DummyImage:
    """Pixels and grids, as in `Batch`, of a picture that nothing depends on."""

    pixels: Tensor
    grids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Features:
    """Image features (tokens, D) that stand in for the embeddings of placeholder tokens; and `deeper` ones of the same
    shape, which are added at these tokens behind the first, second, ... layer of the language model (DeepStack)."""

    embeddings: Tensor
    deeper: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class InternVL:
    """InternVL in transformers' `InternVLForConditionalGeneration`: square tiles, pixel shuffle, scattered features.

    `image_text` is what stands for one image before expansion; `placeholder_ids` may never be sampled."""

    image_token_id: int
    placeholder_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    tile: int
    tokens_per_tile: int
    budget: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "internvl"
    image_text: str = "<img><IMG_CONTEXT></img>"
    reserved: tuple[str, ...] = ("<IMG_CONTEXT>", "<img>", "</img>")
    unit: str = "tiles"

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {
            "vision": ("model.vision_tower",),
            "projector": ("model.multi_modal_projector",),
            "language": ("model.language_model",),
            "head": ("lm_head",),
        }

    @property
    def dummy_image(self) -> DummyImage:
        return DummyImage(torch.zeros(1, 3, self.tile, self.tile))

    def share(self, budget: int, images: int) -> int:
        return tile_budget(budget, images)

    def frame_budget(self, budget: int) -> int:  # noqa: ARG002 - one tile, as in InternVL's own video data
        return 1

    def shape(self, width: int, height: int, budget: int) -> ImageShape:
        tiles = self.tiles(width, height, budget)
        return ImageShape(tiles * self.tokens_per_tile, tiles)

    def box_frame(self, width: int, height: int, budget: int) -> tuple[int, int]:  # noqa: ARG002 - whatever the size
        return PER_MILLE

    def tiles(self, width: int, height: int, budget: int) -> int:
        return tile_count(width, height, budget, self.tile)

    def pixels(self, image: Image.Image, budget: int) -> Tensor:
        return cut_tiles(image, budget, self.tile, self.mean, self.std)

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Features:  # noqa: ARG002
        pixels = pixels.to(next(model.parameters()).dtype)
        return Features(model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1))


PARTS = ("vision", "projector", "language", "head")
PER_MILLE = (1000, 1000)
"""The frame of boxes in thousandths of the picture's sides."""
_ONLY = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
"""Settings of the image processor that have one value: bicubic resize, pixels in 0..1, normalised."""


def internvl_family(
    folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, processor: dict[str, Any] | None = None
) -> InternVL:
    """The family's facts, from transformers' configuration and from `processor`: the settings of transformers' image
    processor, or None to read them from the folder. Raises DataError naming what is missing."""
    vocabulary = tokenizer.get_vocab()
    image_token_id = vocabulary["<IMG_CONTEXT>"]
    if config.image_token_id != image_token_id:
        raise DataError(
            f"{folder}/config.json: image_token_id is {config.image_token_id}, but the tokenizer's <IMG_CONTEXT> is "
            f"{image_token_id}; correct image_token_id"
        )
    check_vocabulary(folder, config.text_config.vocab_size, tokenizer)
    tile, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    if not 1 <= patch <= tile:
        raise DataError(f"{folder}/config.json: patches of {patch} pixels do not fit into tiles of {tile}")
    side = int(tile // patch * config.downsample_ratio)
    processor = processor or _tile_settings(folder, tile)
    budget = processor.get("max_patches", 12)
    if not is_count(budget):
        raise DataError(
            f"{folder}: max_patches of the image processor is {budget!r}; it must be a whole number above 0"
        )
    if processor.get("min_patches", 1) != 1:
        raise DataError(f"{folder}: images of at least {processor['min_patches']!r} tiles are not known; only 1 is")
    banned = ("<img>", "<IMG_CONTEXT>", "</img>", "<video>", "<IMG>")
    return InternVL(
        image_token_id=image_token_id,
        placeholder_ids=tuple(sorted(vocabulary[word] for word in banned if word in vocabulary)),
        stop_ids=stop_ids(folder, tokenizer),
        tile=tile,
        tokens_per_tile=side * side,
        budget=budget,
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
    )


def check_vocabulary(folder: Path, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError for a tokenizer with more tokens than the embedding has rows."""
    if len(tokenizer) > rows:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows; they must fit"
        )


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """<|im_end|> (GPT-OSS: <|return|>) ends a turn; the tokenizer's own end token, where it is another one, ends it
    too. Raises DataError where there is none."""
    vocabulary = tokenizer.get_vocab()
    words = ("<|im_end|>", "<|return|>", tokenizer.eos_token)
    ids = tuple(dict.fromkeys(vocabulary[word] for word in words if word in vocabulary))
    if not ids:
        raise DataError(f"{folder}: the tokenizer has no end token; name one in tokenizer_config.json as eos_token")
    return ids


def read_preprocessor(folder: Path, needed: Sequence[str]) -> dict[str, Any]:
    """The settings of transformers' image processor, refused where they lack something or ask for what is not built:
    another resize than the bicubic one, or pixels that are not in 0..1 and normalised."""
    path, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    content = read_json(path) if path.is_file() else {}
    if not content and joint.is_file():
        path, content = joint, read_json(joint).get("image_processor")
    if not isinstance(content, dict) or not path.is_file():
        raise DataError(f"{folder}: no preprocessor_config.json; images cannot be prepared as the model expects")
    absent = [key for key in (*needed, "image_mean", "image_std") if key not in content]
    if absent:
        raise DataError(f"{path}: lacks {', '.join(absent)}; images cannot be prepared as the model expects")
    for key, only in _ONLY.items():
        if content.get(key, only) != only:
            raise DataError(f"{path}: {key} is {content[key]}; only {only} is known")
    for key, above in (("image_mean", -math.inf), ("image_std", 0.0)):
        value = content[key]
        numbers = [v for v in value if isinstance(v, int | float) and v > above] if isinstance(value, list) else []
        if len(numbers) != 3 or len(value) != 3:
            raise DataError(f"{path}: {key} is {value!r}; it must be three numbers{' above 0' if above == 0 else ''}")
    return content


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _tile_settings(folder: Path, tile: int) -> dict[str, Any]:
    """The preprocessing of an InternVL folder. `crop_to_patches` is not read: InternVL's processor switches it on
    whatever the file says."""
    content = read_preprocessor(folder, ["size"])
    if content["size"] != {"height": tile, "width": tile}:
        raise DataError(f"{folder}: size {content['size']} is not the vision tower's {tile} x {tile}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content
