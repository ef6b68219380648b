"""The rows of a run: which, in which order, and how they become prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from foveate.config.base import Settings, Strings

FileWeights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)]
Shares = dict[str, Annotated[float, Field(ge=0)]]
MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is read unless `data.max_image_pixels` says otherwise: Pillow's own limit."""
MOST_PIXELS = 2 * MAX_PIXELS
"""The largest that `data.max_image_pixels` can be: beyond it Pillow refuses."""


class CurriculumSettings(Settings):
    key: str = Field(min_length=1, description="Field of the rows with their difficulty: extra_info.accuracy.")
    descending: bool = Field(
        default=False, description="Begin with the largest values (an accuracy), not with the smallest (a length)."
    )
    epochs: int = Field(default=1, ge=1, description="Epochs in this order; those that follow are in random order.")
    mixing: float = Field(
        default=0.2, ge=0, description="How far a row may move at random, as a share of the epoch; 0: strictly sorted."
    )


class RLCSSettings(Settings):
    smoothing: float = Field(
        default=0.5, gt=0, le=1, description="How much the newest success of a prompt counts in its recent success."
    )
    floor: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Least probability that a prompt is taken when its turn comes, however easy or hard it is.",
    )


class VideoSettings(Settings):
    fps: float | None = Field(
        default=None,
        gt=0,
        description="Frames that are taken a second; null: as the model's family does (Qwen-VL: 2), or a fixed number.",
    )
    frames: int | None = Field(
        default=None,
        ge=1,
        description="Frames that are taken of a video, or with data.video.fps the most of them; null: as the model's "
        "family does (InternVL: 32; Qwen-VL: at most 768).",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Qwen-VL: most pixels of all frames of a video together, after resizing; null: what the model's "
        "folder says.",
    )


class DataSettings(Settings):
    train: Strings = Field(
        min_length=1,
        description="Training files, folders of a dataset (FOLDER@SPLIT), or datasets of the Hugging Face Hub "
        "(owner/name@split).",
    )
    test: Strings = Field(default=(), description="Held-out files for evaluation, as in data.train.")
    hold_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the rows of data.train kept aside for evaluation instead of data.test: the same rows in "
        "every run over these files.",
    )
    image_root: str | None = Field(
        default=None,
        description="Folder that relative image paths start from; null: the folder of the file that names them.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="A row that cannot be used ends the run, or is left out, counted and listed."
    )
    columns: dict[str, str] = Field(
        default={},
        description="Columns that are not recognised by their names: prompt, images, answer, ... -> column, or =text "
        "for a constant text. Empty: all are recognised.",
    )
    max_image_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=MOST_PIXELS,
        description="Most pixels of an image. Larger ones are refused from their headers, before they are decoded.",
    )
    weights: FileWeights = Field(
        default=(),
        description="How often the rows of each file in data.train come in an epoch, such as [1, 0.5, 3]; empty: once.",
    )
    shares: Shares = Field(
        default={},
        description="Share of each data_source in every batch, such as {count: 1, read: 2}; empty: as rows come.",
    )
    rlcs: RLCSSettings | None = Field(
        default=None,
        description="Online choice of prompts: those whose recent success is near one half come more often; null: all.",
    )
    curriculum: CurriculumSettings | None = Field(
        default=None, description="From easy to hard in the first epochs; null: in random order from the start."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Processes that check rows; null: one per core where there are many rows."
    )
    image_workers: int = Field(
        default=0,
        ge=0,
        description="Processes that decode and tile images ahead of the step; 0: images are prepared in the step.",
    )
    video: VideoSettings = Field(default=VideoSettings(), description="The frames of videos.")
    max_prompt_tokens: int = Field(default=8192, ge=1, description="Longest prompt, in tokens, image tokens included.")
    system: str = Field(
        default="none",
        description="System prompt where a row has none: default (that of the model's family), none, or a text.",
    )
    thinking: bool | None = Field(
        default=None,
        description="Thoughts before the answer: true and false switch a chat template that asks for enable_thinking "
        "(Qwen3, Qwen3.5); with InternVL3.5, true sets the system prompt of its thinking mode. null: as it is.",
    )
