"""LLaVA-OneVision: the whole image as one tile, and a grid of tiles whose features are cut to the image, thinned out
where they are many, and given a token for the end of each line.

Sources: LLaVA-OneVision (arXiv 2408.03326), section 3 (Higher AnyRes), and transformers' `modeling_llava_onevision.py`
and `image_processing_pil_llava_onevision.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase
from transformers.image_processing_utils import select_best_resolution

from foveate.encoding.chat import IMAGE_MARK
from foveate.encoding.family import DummyImage, Family, Features, ImagePiece, ImageShape
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

_WHOLE = 0
"""The budget of an image that is seen as one tile, as each of several in a prompt and the frames of a video are."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """How an image lies in a grid of `rows` x `columns` tiles. Of the patches, `high` x `wide` in the middle are those
    of the image, and `lines` lines of `line` features are made of them."""

    rows: int
    columns: int
    high: int
    wide: int
    lines: int
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaOneVision(Family):
    """A tile of `tile` pixels has `side` x `side` patches, a feature each. `grids`: the rows and columns of tiles that
    an image may be resized to, in the processor's order; the budget limits their tiles. Beside the features of the
    whole image there are those of `most` tiles at most. `layer`: of the vision tower, whose output is taken."""

    tile: int
    side: int
    most: int
    grids: tuple[tuple[int, int], ...]
    layer: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector", "model.image_newline"),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }
    image_text = IMAGE_MARK
    reserved = ("<video>",)
    unit = "tiles"
    image_layouts = True
    auto_class = AutoModelForImageTextToText

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        config, vocabulary = read_hf_config(folder, cls.towers), tokenizer.get_vocab()
        require_words(folder, tokenizer, (IMAGE_MARK, *cls.reserved), "the model")
        check_image_token(folder, config.image_token_id, tokenizer, IMAGE_MARK)
        check_vocabulary(folder, config.text_config.vocab_size, tokenizer)
        tile, processor = config.vision_config.image_size, read_preprocessor(folder, ["size"])
        if processor["size"] != {"height": tile, "width": tile}:
            raise DataError(f"{folder}: size {processor['size']} is not the vision tower's {tile} x {tile}")
        if config.vision_feature_select_strategy != "full" or not isinstance(config.vision_feature_layer, int):
            raise DataError(
                f"{folder / 'config.json'}: images are the {config.vision_feature_select_strategy!r} features of layer "
                f"{config.vision_feature_layer}; only 'full' ones of one layer are known"
            )
        sizes = processor.get("image_grid_pinpoints", config.image_grid_pinpoints)
        if sizes != config.image_grid_pinpoints:
            raise DataError(f"{folder}: image_grid_pinpoints of the image processor are not those of config.json")
        grids = _grids_of(folder, sizes, tile)
        return config, cls(
            name=config.model_type,
            image_token_id=config.image_token_id,
            placeholder_ids=tuple(sorted(vocabulary[word] for word in (IMAGE_MARK, *cls.reserved))),
            stop_ids=stop_ids(folder, tokenizer),
            budget=max(rows * columns for rows, columns in grids),
            proof=mapped(folder, forest_difference, config.text_config),
            most=_most_tiles(folder, config.vision_aspect_ratio),
            grids=grids,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            **cls._sizes(config),
        )

    @classmethod
    def _sizes(cls, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        return {"tile": vision.image_size, "side": side, "layer": config.vision_feature_layer}

    def all_control_words(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Without the placeholder of an image, which is also the mark of one in a row."""
        return tuple(word for word in Family.all_control_words(self, tokenizer) if word != IMAGE_MARK)

    @classmethod
    def planned(cls, config: Any) -> Self:
        return cls(name=config.model_type, stop_ids=(), most=0, grids=(), mean=(), std=(), **cls._sizes(config))

    def piece(self, config: Any) -> ImagePiece:
        vision, text = config.vision_config, config.text_config
        width, patches = vision.hidden_size, self.side**2
        block = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * patches**2
        stem = 2 * patches * width * 3 * vision.patch_size**2
        projector = 2 * patches * (width + text.hidden_size) * text.hidden_size
        flops = vision.num_hidden_layers * block + stem + projector
        tokens, dummy = patches + 1, self.dummy_image
        return ImagePiece(tokens, tuple(dummy.pixels.shape), None, flops, layout=dummy.grids[0])

    @property
    def dummy_image(self) -> DummyImage:
        layout = self.shape(self.tile, self.tile, _WHOLE).layout
        assert layout is not None
        return DummyImage(torch.zeros(1, 3, self.tile, self.tile), (layout,))

    def share(self, budget: int, images: int) -> int:
        return budget if images < 2 else _WHOLE

    def frame_budget(self, budget: int) -> int:  # noqa: ARG002
        return _WHOLE

    def image_summary(self) -> str:
        each = self.side**2
        return (
            f"a tile of {self.tile} pixels, {each} tokens, and up to {self.budget} more of a grid, about "
            f"{(self.most + 1) * each} tokens at most in all; each of several images is one tile"
        )

    def shape(self, width: int, height: int, budget: int) -> ImageShape:
        entries, tokens = 1, self.side**2 + 1
        if budget != _WHOLE:
            grid = self._grid(width, height, budget)
            entries += grid.rows * grid.columns
            tokens += grid.lines * (grid.line + 1) - 1
        return ImageShape(tokens, entries, layout=(entries, tokens, width, height, budget))

    def pixels(self, image: Image.Image, budget: int) -> Tensor:
        size = (self.tile, self.tile)
        if budget == _WHOLE:
            edge = max(image.size)
            square = _padded(image, (edge, edge), tuple(int(value * 255) for value in self.mean))
            tiles = [square.resize(size, Image.Resampling.BICUBIC)]
        else:
            grid = self._grid(image.width, image.height, budget)
            wide, high = grid.columns * self.tile, grid.rows * self.tile
            by_width, by_height = wide / image.width, high / image.height
            if by_width < by_height:
                inner = wide, min(math.ceil(image.height * by_width), high)
            else:
                inner = min(math.ceil(image.width * by_height), wide), high
            whole = _padded(image.resize(inner, Image.Resampling.BICUBIC), (wide, high), (0, 0, 0))
            corners = [(x, y) for y in range(0, high, self.tile) for x in range(0, wide, self.tile)]
            tiles = [image.resize(size, Image.Resampling.BICUBIC)]
            tiles += [whole.crop((x, y, x + self.tile, y + self.tile)) for x, y in corners]
        values = np.stack([np.asarray(tile, np.float32) for tile in tiles]) / np.float32(255)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())

    def features(self, model: Any, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:
        inner = model.model
        pixels = pixels.to(next(model.parameters()).dtype)
        seen = inner.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        tiles = inner.multi_modal_projector(seen)
        newline = inner.image_newline.to(tiles.dtype)
        found = []
        parts = tiles.split([entries for entries, *_ in grids])
        for (entries, _, *image), own in zip(grids, parts, strict=True):
            found += [own[0], newline[None] if entries == 1 else self._lines(own[1:], newline, *image)]
        return Features(torch.cat(found))

    def _lines(self, tiles: Tensor, newline: Tensor, width: int, height: int, budget: int) -> Tensor:
        """The features (tiles, side x side, D) of a grid as lines of features, each with its end, (tokens, D)."""
        grid, side = self._grid(width, height, budget), self.side
        rows = tiles.view(grid.rows, grid.columns, side, side, -1).permute(4, 0, 2, 1, 3)
        rows = rows.flatten(1, 2).flatten(2, 3)
        top, left = (rows.shape[1] - grid.high) // 2, (rows.shape[2] - grid.wide) // 2
        rows = rows[:, top : top + grid.high, left : left + grid.wide]
        if (grid.lines, grid.line) != (grid.high, grid.wide):
            rows = interpolate(rows[None], [grid.lines, grid.line], mode="bilinear")[0]
        ends = newline[:, None, None].expand(-1, grid.lines, 1)
        return torch.cat([rows, ends], -1).flatten(1).T

    def _grid(self, width: int, height: int, budget: int) -> _Grid:
        sizes = [(rows * self.tile, columns * self.tile) for rows, columns in self.grids if rows * columns <= budget]
        rows, columns = (length // self.tile for length in select_best_resolution((height, width), sizes))
        high, wide = rows * self.side, columns * self.side
        if width / height > wide / high:
            high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
        thinning = math.sqrt(high * wide / (self.most * self.side**2))
        if thinning > 1.1:
            return _Grid(rows, columns, high, wide, int(high // thinning), int(wide // thinning))
        return _Grid(rows, columns, high, wide, high, wide)


def _padded(image: Image.Image, size: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a larger one."""
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def _grids_of(folder: Path, sizes: Any, tile: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tiles by image_grid_pinpoints, [height, width] each."""
    for size in sizes if isinstance(sizes, list) else [sizes]:
        if not isinstance(size, list) or len(size) != 2 or not all(is_count(one) and one % tile == 0 for one in size):
            raise DataError(f"{folder}: image_grid_pinpoints holds {size!r:.60}; two multiples of {tile} are known")
    grids = tuple((height // tile, width // tile) for height, width in sizes)
    if not any(rows * columns == 1 for rows, columns in grids):
        raise DataError(f"{folder}: image_grid_pinpoints lacks [{tile}, {tile}], the size of one tile")
    return grids


def _most_tiles(folder: Path, ratio: Any) -> int:
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", str(ratio))
    if found is None:
        raise DataError(f"{folder}: vision_aspect_ratio is {ratio!r:.60}; anyres_max_N is known, such as anyres_max_9")
    return int(found[1])
