"""GLM-4.1V and GLM-4.5V: images as in Qwen-VL, with words and limits of their own.

Source: GLM-4.1V-Thinking (arXiv 2507.01006) and transformers' `image_processing_pil_glm4v.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.config.data import VideoSettings
from foveate.encoding.family import Clip, Family
from foveate.models.families.qwen_vl import QwenVL
from foveate.records import Video


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4V(QwenVL):
    """The limits of its image processor count each image `repeats` times, as frames of a video."""

    mlp_matrices = 3
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **QwenVL.parts,
        "projector": ("model.visual.merger", "model.visual.downsample"),
    }
    towers = ("glm4v_text",)
    image_word = "<|image|>"
    image_text = "<|begin_of_image|><|image|><|end_of_image|>"
    video_text = ""
    video_word = "<|video|>"
    reserved = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>",
                "<|video|>")  # fmt: skip
    control_words = (*QwenVL.control_words, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]",
                     "<sop>")  # fmt: skip
    counts_frames = True

    def _widths(self, vision: Any) -> tuple[int, int]:
        return vision.hidden_size, vision.out_hidden_size

    def _merger_flops(self, config: Any, tokens: int) -> float:
        vision = config.vision_config
        down = self.merge**2 * vision.hidden_size * vision.out_hidden_size
        return 2.0 * tokens * (down + vision.out_hidden_size**2 + 3 * vision.out_hidden_size * vision.intermediate_size)

    def clips(self, video: Video, options: VideoSettings) -> tuple[Clip, ...]:
        """Frames as images: the pieces and times of GLM's own videos are not built."""
        return Family.clips(self, video, options)

    def _resized(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """As in Qwen-VL; an image that is narrower than a block grows first until it is not."""
        block = self.patch * self.merge
        if min(width, height) < block:
            scale = max(block / height, block / width)
            width, height = int(width * scale), int(height * scale)
        return QwenVL._resized(self, width, height, budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4VMoe(Glm4V):
    towers = ("glm4v_moe_text",)
