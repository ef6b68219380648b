"""Videos as Qwen-VL sees them: which frames, and how large.

Sources: transformers, `video_processing_qwen2_vl.py` and `video_processing_qwen3_vl.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.config.data import VideoSettings
from foveate.errors import DataError
from foveate.models.checkpoint.small_files import is_count, read_video_preprocessor
from foveate.records import Video


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """The video processor of a checkpoint: fewest and most pixels, and how frames are taken."""

    least: int
    most: int
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768


def taken_frames(
    video: Video, options: VideoSettings, limits: VideoLimits, repeats: int, *, keeps_odd: bool
) -> list[int]:
    """The indices of the frames of a video, as `sample_frames` finds them. keeps_odd: as that of Qwen3-VL, which also
    takes the last frame; else as that of Qwen2-VL, by whole pieces of `repeats` frames and from the begin of each part.
    More frames than there are, which transformers refuses, are as many as there are."""
    total = video.frames
    most = options.frames or limits.max_frames
    if options.frames and options.fps is None:
        count: float = min(options.frames, total)
    else:
        count = total / video.fps * (options.fps or limits.fps)
        count = min(max(count, min(limits.min_frames, most)), most, total)
    if keeps_odd:
        return np.linspace(0, total - 1, max(1, int(count))).round().astype(int).tolist()
    pieces = min(max(1, int(count) // repeats), total // repeats)
    number = pieces * repeats or 1
    return (
        torch.arange(0, total, total / number).int().tolist()[:number]
    )  # rounded to 32 bits as torch does it, as there


def fitted_frames(video: Video, frames: int, block: int, repeats: int, within: tuple[int, int]) -> tuple[int, int]:
    """Width and height of whole blocks, within the fewest and the most pixels of all frames together, as `smart_resize`
    of Qwen3-VL finds them. Fewer frames than one piece has count as one piece."""
    width, height, frames = video.width, video.height, max(frames, repeats)
    if min(width, height) < block:
        scale = max(block / height, block / width)
        width, height = int(width * scale), int(height * scale)
    wide, high = (round(side / block) * block for side in (width, height))
    pixels = round(frames / repeats) * repeats * wide * high
    if pixels > within[1]:
        shrink = math.sqrt(frames * width * height / within[1])
        wide, high = (max(block, math.floor(side / shrink / block) * block) for side in (width, height))
    elif pixels < within[0]:
        grow = math.sqrt(within[0] / (frames * width * height))
        wide, high = (math.ceil(side * grow / block) * block for side in (width, height))
    return wide, high


def video_limits(folder: Path, images: Mapping[str, Any]) -> VideoLimits:
    """As the video processor says them; transformers takes the image processor's where there is none."""
    content = {**read_video_preprocessor(folder)} or {**images}
    least, most = pixel_limits(folder, content)
    for key in ("image_mean", "image_std"):
        if content.get(key, images[key]) != images[key]:
            raise DataError(
                f"{folder}: {key} of the video processor is {content[key]}, that of images {images[key]}; one is known"
            )
    given = {name: content[name] for name in ("fps", "min_frames", "max_frames") if content.get(name) is not None}
    if not all(isinstance(value, int | float) and value > 0 for value in given.values()):
        raise DataError(f"{folder}: the video processor has {given}; these must be numbers above 0")
    return VideoLimits(least, most, **given)


def pixel_limits(folder: Path, processor: Mapping[str, Any]) -> tuple[int, int]:
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
