"""What encoding needs to know of a family of models. `foveate.models.families.internvl` has the families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from foveate.errors import DataError


@dataclass(frozen=True, slots=True)
class ImageShape:
    """What a family makes of an image: `tokens` placeholder tokens and `entries` of the pixel tensor (tiles or
    patches). `grid` (rows, columns) is how the tokens lie in the picture where positions are 3-D, else None."""

    tokens: int
    entries: int
    grid: tuple[int, int] | None = None


class PromptFamily(Protocol):
    """How a family writes images into text and cuts them into tiles or patches."""

    @property
    def name(self) -> str:
        """The name of the family."""
        ...

    @property
    def image_text(self) -> str:
        """What stands for one image in the text, before it grows to its number of tokens; empty: it sees no images."""
        ...

    @property
    def image_token_id(self) -> int:
        """The token that image features replace; -1 where there is none."""
        ...

    @property
    def reserved(self) -> tuple[str, ...]:
        """Words that may not occur in the text of a task."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; the first is the one that demonstrations end with."""
        ...

    @property
    def unit(self) -> str:
        """What the size of an image is limited in: `tiles` or `pixels`, or "" for a family without images."""
        ...

    @property
    def budget(self) -> int:
        """Tiles (without the thumbnail) or pixels of one image that the checkpoint was made for."""
        ...

    def share(self, budget: int, images: int) -> int:
        """What each of several images of a prompt may take of a budget: a function of nothing else."""
        ...

    def frame_budget(self, budget: int) -> int:
        """What a frame of a video may take, however many there are."""
        ...

    def shape(self, width: int, height: int, budget: int) -> ImageShape:
        """What becomes of an image of that size in pixels. Raises DataError, without a place, if it cannot be seen."""
        ...

    def pixels(self, image: Image.Image, budget: int) -> Tensor:
        """The tiles or patches of an RGB image, float32 (N, 3, H, W)."""
        ...

    def box_frame(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """The largest x and y of boxes as the family writes them: (1000, 1000), or the size of the resized image."""
        ...


def budget_of(family: PromptFamily, *, max_tiles: int | None, max_pixels: int | None) -> int:
    """The budget of one prompt: the limit that was set, else the checkpoint's own. Raises DataError for a limit in a
    unit that the family does not have."""
    limits = {"tiles": max_tiles, "pixels": max_pixels}
    for unit, limit in limits.items():
        if limit is not None and unit != family.unit:
            instead = f"set max_{family.unit}" if family.unit else "it sees no images"
            raise DataError(f"max_{unit} is {limit}, but {family.name} has no limit in {unit}; {instead}")
    limit = limits.get(family.unit)
    return family.budget if limit is None else limit
