"""The seam of model families: a `Family` declares all that differs between models, so that no caller asks which one it
is. `foveate.models.families` has the table of families."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from foveate.config.data import VideoSettings
from foveate.encoding.chat import ANSWER_STARTS, CONTENT_WORDS, CORRECTED_TEMPLATE, TURN_WORDS, template_of
from foveate.errors import ConfigError, DataError
from foveate.records import ImageSlot, Video

PER_MILLE = (1000, 1000)
"""The frame of boxes in thousandths of the image's sides."""


@dataclass(frozen=True, slots=True)
class ImageShape:
    """The size of an image in a prompt: `tokens` placeholder tokens and `entries` of the pixel tensor (tiles or
    patches). `grid` (rows, columns) is how the tokens lie in the image where positions are 3-D, else None. `runs`: the
    runs of placeholder tokens, equally long, that stand apart. `layout`: entries, tokens, and what else a family with
    `image_layouts` must know of an image to make its features. `times`, `frames`: as in `ImageSlot`."""

    tokens: int
    entries: int
    grid: tuple[int, int] | None = None
    runs: int = 1
    layout: tuple[int, ...] | None = None
    times: tuple[int, ...] = ()
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of a video that enter a prompt together, like an image, behind `text`. size: width and height after
    resizing, None for one frame that is seen as an image of its own; times: the place of each grid in time."""

    video: Video
    frames: tuple[int, ...]
    text: str = ""
    size: tuple[int, int] | None = None
    times: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DummyImage:
    """Pixels and grids, as in `Batch`, of an image that nothing depends on."""

    pixels: Tensor
    grids: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ImagePiece:
    """The piece of an image that plans count in: a tile, or a square that gives as many tokens where images keep their
    own shape. `pixels` is the shape of its part of `Batch.pixels`; `flops` is the arithmetic of a forward pass of it
    through vision tower and projector; `grid` and `layout` as in `ImageShape`."""

    tokens: int
    pixels: tuple[int, ...]
    grid: tuple[int, int] | None
    flops: float
    layout: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """Image features (tokens, D) that stand in for the embeddings of placeholder tokens; and `deeper` ones of the same
    shape, which are added at these tokens behind the first, second, ... layer of the language model (DeepStack)."""

    embeddings: Tensor
    deeper: tuple[Tensor, ...] = ()


VLLM_EXPERTS = "beside adapters, vLLM computes experts by kernels that GPUs alone have"
"""Why it is handed mixtures of experts with their adapters merged."""
NO_PREFIXES = "--no-enable-prefix-caching"


@dataclass(frozen=True, slots=True)
class ServedAs:
    """How a server of another project takes the models of a family: their small files and the names of their weights
    in `layout`, how those names begin in the module in memory and there (`prefixes`), `options` on its command line,
    and tokenizer_config.json without the settings `hidden` and with the tokens `lent`, which are the end token where
    the vocabulary has none. no_adapters: why adapters of the language model are merged into its weights, or "" where
    the server applies them by itself."""

    layout: Literal["hf", "chat"] = "hf"
    options: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    lent: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    no_adapters: str = ""

    def recurrent(self) -> ServedAs:
        """The same of a model with Gated DeltaNet on vLLM: its cache of prefixes asks for prompts in pieces, which
        servers on CPUs do not take."""
        return replace(
            self,
            options=(*self.options, NO_PREFIXES),
            no_adapters="beside adapters, vLLM computes Gated DeltaNet by kernels that GPUs alone have",
        )

    def weight_name(self, name: str) -> str:
        """The server's name of a weight of the module in memory."""
        for own, other in self.prefixes:
            if name.startswith(own):
                return other + name.removeprefix(own)
        return name

    def tokenizer_config(self, settings: Mapping[str, Any], end_token: Any) -> dict[str, Any]:
        """tokenizer_config.json for the server."""
        kept = {key: value for key, value in settings.items() if key not in self.hidden}
        extra = settings.get("extra_special_tokens") or {}
        return {**kept, **{key: end_token for key in self.lent if key not in kept and key not in extra}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models, with the facts of one checkpoint. The defaults are those of a model without images.

    Facts: `name`; `stop_ids` end an answer, the first ends demonstrations; `image_token_id` is the token that image
    features replace, -1 for none, and `video_token_id` that of clips with a size;
    `placeholder_ids` may never be sampled; `budget` is the tiles (without the thumbnail)
    or pixels of one image that the checkpoint was made for; `proof` is the largest difference to transformers, in nats,
    that was found at load, None where tests alone hold it.

    Declarations:
        parts: `vision`, `projector`, `language`, `head` -> names of submodules, the first of them the main one. A
            submodule inside another part belongs to the inner part alone.
        towers: `model_type` of the language models that it may stand on; empty where the model is its own.
        image_text, video_text: stand for one image, and for one clip with a size, in the text, before it grows to its
            number of tokens; empty for none.
        video_frames: the frames of a video, by default, of a family that sees them as images.
        reserved: placeholders of images and videos, which only the encoder writes; in a row or a request they are text.
        control_words: words that are text, and not tokens, where a row or a request holds them: of turns, images,
            videos, ends and padding (`all_control_words` adds what the tokenizer says of itself).
        content_words: words with tokens of their own that everybody may write.
        unit: the size of an image is limited in `tiles` or `pixels`, or "" for no images.
        bidirectional_images: whether the tokens of an image attend to each other both ways.
        image_layouts: whether `features` is given the layout of each image in place of its grid.
        template, template_name, template_token: the chat template for a checkpoint without one, its name in sentences,
            and a token that it needs.
        thinking_system: the system message of its thinking mode, where that is switched by one.
        answer_starts: how demonstrated answers begin, by the end of a prompt, as `ANSWER_STARTS`.
        auto_class: transformers' class that loads the model.
        github_type: `model_type` of its GitHub layout. foveate maps the layouts of such a family itself; transformers
            reads and writes those of the others (None).
        untrained: how the names of tensors begin that checkpoints hold and transformers does not load, such as layers
            for speculative decoding. They are copied to what is saved.
        transposed_experts: whether checkpoints may hold the matrices of experts as (expert, in, out), which
            transformers turns as it loads and not as it saves.
        servers: the servers that take it ("vllm", "sglang"), and how.
        vision_depth: the number of blocks of the vision tower, by its name in vision_config.
    """

    name: str
    stop_ids: tuple[int, ...]
    image_token_id: int = -1
    video_token_id: int = -1
    placeholder_ids: tuple[int, ...] = ()
    budget: int = 0
    proof: float | None = None

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("model",), "head": ("lm_head",)}
    towers: ClassVar[tuple[str, ...]] = ()
    image_text: ClassVar[str] = ""
    video_text: ClassVar[str] = ""
    video_frames: ClassVar[int] = 32
    reserved: ClassVar[tuple[str, ...]] = ()
    control_words: ClassVar[tuple[str, ...]] = TURN_WORDS
    content_words: ClassVar[tuple[str, ...]] = CONTENT_WORDS
    unit: ClassVar[Literal["tiles", "pixels", ""]] = ""
    bidirectional_images: ClassVar[bool] = False
    image_layouts: ClassVar[bool] = False
    template: ClassVar[str] = CORRECTED_TEMPLATE
    template_name: ClassVar[str] = "the corrected InternVL template"
    template_token: ClassVar[str] = "<|im_start|>"
    thinking_system: ClassVar[str | None] = None
    answer_starts: ClassVar[Mapping[str, tuple[str, str]]] = ANSWER_STARTS
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    github_type: ClassVar[str | None] = None
    untrained: ClassVar[tuple[str, ...]] = ()
    transposed_experts: ClassVar[bool] = False
    servers: ClassVar[Mapping[str, ServedAs]] = {}
    vision_depth: ClassVar[str] = "num_hidden_layers"

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Self]:
        """transformers' configuration of a model folder, and the facts of the family, from its small files. Raises
        DataError naming what is missing or does not fit."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is read")

    @classmethod
    def planned(cls, config: Any) -> Self:
        """The family of a model that has a configuration alone, for plans: without tokens and without the image
        processor. Raises ConfigError for a family that is not planned."""
        raise ConfigError(f"{config.model_type} is not planned; docs/families.md says which families are")

    def piece(self, config: Any) -> ImagePiece:
        """The piece of an image that plans count in."""
        raise NotImplementedError(f"{self.name} is planned and does not say in which pieces of an image")

    def part_of(self, name: str) -> str:
        """The part that a parameter or a submodule belongs to, by its name."""
        places = {place: part for part, modules in self.parts.items() for place in modules}
        inside = [place for place in places if f"{name}.".startswith(f"{place}.")]
        return places[max(inside, key=len)]

    def shallow_tower(self, config: Any, blocks: int) -> dict[str, Any]:  # noqa: ARG002
        """The settings of a vision tower with fewer blocks, for plans."""
        return {self.vision_depth: blocks}

    def uneven_blocks(self, config: Any) -> int:  # noqa: ARG002
        """How many blocks at the beginning of the vision tower and of the language model do more than the others
        (DeepStack), in a model with a shallow tower."""
        return 0

    @property
    def sees_images(self) -> bool:
        return bool(self.image_text)

    @property
    def default_system(self) -> str | None:
        """The system message that the family's own conversations begin with; None: it is not known, or there is none
        but what the chat template writes."""
        return None

    def all_control_words(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The words of the vocabulary that may not become tokens where a row or a request holds them: those declared,
        special tokens that the chat template writes, and the tokens of ends, padding and placeholders."""
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        template = template_of(tokenizer, self.template)
        ends = map(str, (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token))
        known = map(str, tokenizer.convert_ids_to_tokens([*self.stop_ids, *self.placeholder_ids]))
        written = (word for word, special in added.items() if special and word in template)
        found = {*self.control_words, *self.reserved, *ends, *known, *written}
        return tuple(sorted(word for word in found & added.keys() if word not in self.content_words))

    @property
    def dummy_image(self) -> DummyImage | None:
        """The smallest image, for ranks that have none while others have; None for a family without images."""
        return None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Tokens along a side of a tile, and of one that is compressed; None: it compresses none."""
        return None

    @property
    def router_thresholds(self) -> tuple[float, float] | None:
        """The relative and the absolute threshold of its router; None: it has none."""
        return None

    def unseen(self, sides: Collection[int]) -> tuple[str, ...]:  # noqa: ARG002
        """Submodules that no image goes through where the tiles of all have these `sides` (`ImageSlot`)."""
        return ()

    def share(self, budget: int, images: int) -> int:  # noqa: ARG002
        """The part of a budget for each of several images of a prompt: a function of nothing else."""
        return budget

    def frame_budget(self, budget: int) -> int:
        """The budget of a frame of a video, however many there are."""
        return budget

    def clips(self, video: Video, options: VideoSettings) -> tuple[Clip, ...]:
        """The clips of a video, in order: by default single frames from the middles of equal parts, a line each,
        `Frame1: `. Raises DataError, without a place, for options that the family does not have."""
        if options.max_pixels is not None:
            raise DataError(f"data.video.max_pixels is {options.max_pixels}, but {self.name} sees frames as images")
        frames = middle_frames(video, options, self.video_frames)
        return tuple(
            Clip(video, (frame,), f"{chr(10) * (number > 1)}Frame{number}: ")
            for number, frame in enumerate(frames, start=1)
        )

    def clip_shape(self, clip: Clip) -> ImageShape:
        """The size in a prompt of a clip with a size."""
        raise NotImplementedError(f"{self.name} has clips with a size and does not say how they are seen")

    def clip_pixels(self, frame: Image.Image, clip: Clip) -> Tensor:
        """The patches of one frame, an RGB image, of a clip with a size: float32 (N, 3, H, W)."""
        raise NotImplementedError(f"{self.name} has clips with a size and does not say how they are seen")

    def box_frame(self, width: int, height: int, budget: int) -> tuple[int, int]:  # noqa: ARG002
        """The largest x and y of boxes as the family writes them: `PER_MILLE`, or the size of the resized image."""
        return PER_MILLE

    def image_summary(self) -> str:
        """How the family sees images, in one line."""
        return "none, it is a text-only model"

    def shape(self, width: int, height: int, budget: int) -> ImageShape:  # noqa: ARG002
        """The size in a prompt of an image of that size in pixels, from these alone. Raises DataError, without a place,
        for an image that cannot be seen."""
        raise self._text_only()

    def written(self, width: int, height: int, budget: int) -> str:  # noqa: ARG002
        """The text that an image of that size becomes, with a placeholder for each of its runs."""
        return self.image_text

    def pixels(self, image: Image.Image, budget: int) -> Tensor:  # noqa: ARG002
        """The tiles or patches of an RGB image, float32 (N, 3, H, W)."""
        raise self._text_only()

    def features(self, model: nn.Module, pixels: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:  # noqa: ARG002
        """Features of all images in the order of their placeholder tokens. `grids` as in `Batch`."""
        raise self._text_only()

    def of_patches(self, model: nn.Module, patches: Tensor, grids: Sequence[tuple[int, ...]]) -> Features:
        """`features` of pixels of which the output of the vision tower is known, as `Batch.patches`."""
        raise NotImplementedError(f"{self.name} does not say what its vision tower passes on")

    def vllm_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, tuple[Tensor, str]]:  # noqa: ARG002
        """One image, the entries (N, 3, H, W) of its slot, as the multimodal fields that vLLM passes to the model: each
        with how the values of several images are joined (`flat`, `batched` or `shared`)."""
        raise self._text_only()

    def sglang_fields(self, pixels: Tensor, slot: ImageSlot) -> dict[str, Tensor]:  # noqa: ARG002
        """One image, the entries (N, 3, H, W) of its slot, as SGLang passes it to the model: its `feature`, and what
        the model also reads of an image, in a row."""
        raise self._text_only()

    def _text_only(self) -> DataError:
        return DataError(f"{self.name} is a text-only model and sees no images")


def middle_frames(video: Video, options: VideoSettings, default: int) -> list[int]:
    """Indices of frames in the middles of equal parts of a video.

    By number, as in `load_video` of InternVL's model cards: of parts of (frames - 1) / number; a number above that of
    the frames repeats some. By rate, as in InternVL's training (`get_frame_indices`, `fps`): in the middle of each
    1 / fps seconds; by number where that gives more than `options.frames`, or none."""
    if options.fps is not None:
        step = 1 / options.fps
        seconds = np.arange(step / 2, video.frames / video.fps + step / 2, step)
        found = [index for index in np.around(seconds * video.fps).astype(int).tolist() if index < video.frames]
        if found and len(found) <= (options.frames or len(found)):
            return found
    number = options.frames or default
    part = (video.frames - 1) / number
    return [int(part / 2 + round(part * index)) for index in range(number)]


def budget_of(family: Family, *, max_tiles: int | None, max_pixels: int | None) -> int:
    """The budget of one prompt: the limit that was set, else the checkpoint's own. Raises DataError for a limit in a
    unit that the family does not have."""
    limits = {"tiles": max_tiles, "pixels": max_pixels}
    for unit, limit in limits.items():
        if limit is not None and unit != family.unit:
            instead = f"set max_{family.unit}" if family.sees_images else "it sees no images"
            raise DataError(f"max_{unit} is {limit}, but {family.name} has no limit in {unit}; {instead}")
    limit = limits.get(family.unit)
    return family.budget if limit is None else limit
