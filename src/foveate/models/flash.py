"""InternVL3.5-Flash: an InternVL whose tiles have 256 tokens, or 64 by a second projector where a router says so.

Source: InternVL3.5 (arXiv 2508.18265), section 2.2, and the modelling code that is released beside the Flash
checkpoints, whose names of modules these are. The weights of `attn3`, `attn4`, `norm3` and `norm4` are dead there, too:
the pooling asks its second attention three times. They are kept as they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from foveate.errors import DataError

FLASH_KEYS = ("flash_mode", "flash_relative_threshold", "flash_absolute_threshold")
"""The settings of a Flash model in config.json, of every layout."""
HEADS = 16
RELATIVE, ABSOLUTE = 0.1, 0.5
"""The thresholds that a new router begins with: a tile is compressed where it may be, as the router says, with at least
the second, and is not among the tenth of the tiles that it says the least of."""


def mark_as_flash(config: Any) -> None:
    """Make a configuration of InternVL that of a Flash model with the thresholds of a new router."""
    config.update(dict(zip(FLASH_KEYS, (True, RELATIVE, ABSOLUTE), strict=True)))


class FlashForConditionalGeneration(InternVLForConditionalGeneration):
    """InternVL with the modules of Flash below `model`. Its own forward, as the released one, has 256 tokens a tile."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__(config)
        parts: tuple[Any, Any] = config.vision_config, config.text_config
        vision, text = (part.hidden_size for part in parts)
        if vision % HEADS:
            raise DataError(f"a router has {HEADS} heads, which do not divide the {vision} of the vision tower")
        wide = vision * int(1 / config.downsample_ratio) ** 4
        # dropout, 0.1 in the released code, is left out: updates are deterministic here
        self.model.mlp2 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, 2 * text), nn.GELU(), nn.Identity(),
            nn.Linear(2 * text, 2 * text), nn.GELU(), nn.Identity(), nn.Linear(2 * text, text),
        )  # fmt: skip
        self.model.pooling_before_gating = _Pooling(vision)
        self.model.gating = _Gating(vision)

    @classmethod
    def from_config(cls, config: InternVLConfig, **options: Any) -> FlashForConditionalGeneration:
        """A model with new weights, as `AutoModel.from_config` makes those that transformers knows."""
        return cls._from_config(config, **options)


class _Pooling(nn.Module):
    """A tile's patches (N, P, D) as one vector (N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width))
        for number in range(1, 5):
            self.add_module(f"attn{number}", nn.MultiheadAttention(width, HEADS, batch_first=True))
            self.add_module(f"norm{number}", nn.LayerNorm(width))

    def forward(self, patches: Tensor) -> Tensor:
        found = self.query_token.expand(len(patches), 1, -1)
        for number in (1, 2, 2, 2):
            attention, norm = self.get_submodule(f"attn{number}"), self.get_submodule(f"norm{number}")
            found = norm(attention(found, patches, patches, need_weights=False)[0])
        return found[:, 0]


class _Gating(nn.Module):
    """The probabilities (N, 2) that a tile is compressed, and that it is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for number in range(1, 5):
            self.add_module(
                f"block{number}",
                nn.Sequential(
                    nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(),
                    nn.Linear(4 * width, width), nn.Identity(), nn.LayerNorm(width),
                ),
            )  # fmt: skip
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, pooled: Tensor) -> Tensor:
        for number in range(1, 5):
            pooled = pooled + self.get_submodule(f"block{number}")(pooled)
        return self.gate(pooled).softmax(-1)


@torch.no_grad()
def begin_as_mean(model: Any) -> None:
    """Set the second projector to the first one applied to the mean of the four tokens that it stands for, but for the
    normalisation, which is over all four together: equal where the four are. Its middle layer passes a vector on
    through its GELU as two halves, for gelu(x) - gelu(-x) = x."""
    first, second = model.model.multi_modal_projector, model.model.mlp2
    width, hidden = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    blocks = [row % 2 * 2 + column % 2 for row in range(4) for column in range(4)]  # of a token, in those of its four
    index = torch.cat([torch.arange(block * width, (block + 1) * width) for block in blocks])
    second[0].weight.copy_(first.layer_norm.weight[index])
    second[0].bias.copy_(first.layer_norm.bias[index])
    second[1].weight[:hidden] = first.linear_1.weight[:, index] / 4
    second[1].bias[:hidden] = first.linear_1.bias
    second[4].weight.zero_()
    second[4].weight[:, :hidden] = torch.cat([first.linear_2.weight, -first.linear_2.weight])
    second[4].bias.copy_(torch.cat([first.linear_2.bias, -first.linear_2.bias]))
    second[7].weight.copy_(torch.cat([torch.eye(hidden), -torch.eye(hidden)], 1))
    second[7].bias.zero_()


# transformers renames tensors of its own classes alone, unless one says that it is like another
register_checkpoint_conversion_mapping(
    "FlashForConditionalGeneration", get_checkpoint_conversion_mapping("internvl") or [], overwrite=True
)


def is_flash(config: Any) -> bool:
    """Whether a configuration of transformers, or of JSON, is that of a Flash model."""
    found = config.get("flash_mode") if isinstance(config, dict) else vars(config).get("flash_mode")
    return bool(found)


def internvl_class(config: Any) -> type[InternVLForConditionalGeneration]:
    """The class of a model of that configuration."""
    return FlashForConditionalGeneration if is_flash(config) else InternVLForConditionalGeneration


def patches_of(model: Any, pixels: Tensor) -> Tensor:
    """The output of the vision tower for tiles, as it goes into the projectors: (N, side, side, D)."""
    seen = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    side = int(seen.shape[1] ** 0.5)
    return seen.reshape(len(seen), side, side, -1)


def projected(model: Any, patches: Tensor, *, compressed: bool) -> Tensor:
    """The features (N, tokens, D) of tiles, by the second projector where they are compressed."""
    ratio = model.config.downsample_ratio
    shuffled = model.model.pixel_shuffle(patches, scale_factor=ratio**2 if compressed else ratio)
    flat = shuffled.flatten(1, 2)  # also of no tile
    return (model.model.mlp2 if compressed else model.model.multi_modal_projector)(flat)


def compressible(model: Any, patches: Tensor) -> Tensor:
    """The router's probability (N,) that a tile loses nothing by 64 tokens."""
    return model.model.gating(model.model.pooling_before_gating(patches.flatten(1, 2)))[:, 0]


@torch.no_grad()
def route_of(model: Any, pixels: Tensor, thresholds: tuple[float, float]) -> list[bool]:
    """Which tiles of a prompt are compressed, as the released `generate_flash` decides it for one call: those that the
    router finds compressible by at least the second threshold, and by more than the quantile, of the first, over all
    tiles. So the route of a tile depends on those beside it, and belongs to the whole prompt."""
    pixels = pixels.to(next(model.parameters()))
    return route_by(compressible(model, patches_of(model, pixels)), thresholds)


def most_compressed(tiles: int, relative: float) -> int:
    """How many tiles of a prompt can be compressed at most: those above the quantile `relative`, which at least one is
    not."""
    return tiles - 1 - int((tiles - 1) * relative) if tiles else 0


def route_by(found: Tensor, thresholds: tuple[float, float]) -> list[bool]:
    """`route_of`, by what the router has found of the tiles (N,). The quantile is computed in float32, but compared in
    the router's own type, as are thresholds: in bfloat16 it may round to a neighbouring tile's probability."""
    relative, absolute = thresholds
    return ((found > torch.quantile(found.float(), relative)) & (found >= absolute)).tolist()
