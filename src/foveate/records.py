"""The records that flow through foveate, one frozen dataclass per stage: a record is complete when it exists.

Suffixes name the axes of a tensor: T packed tokens, M trained tokens, S samples (answers), K segments, N image tiles,
G members of a group, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Image:
    """One picture, by path or by encoded bytes (exactly one of them), with its size in pixels from the header, as it is
    shown: after the EXIF rotation, which every reader of pixels applies."""

    path: Path | None
    data: bytes | None
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Video(Image):
    """A video file, with the size, the number and the constant rate, a second, of its frames."""

    frames: int
    fps: float


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. In the content `<image>` marks the task's next image, `<video>` its next video."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt with its images and its ground truth. `where` names file and row for error messages."""

    id: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[Image, ...]
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    videos: tuple[Video, ...] = ()
    conversational: bool = False  # the prompt came as TRL's messages, which TRL's rewards get


@dataclass(frozen=True, slots=True)
class Demo:
    """A task and the answer that supervised training imitates."""

    task: Task
    response: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A task with a better and a worse answer, for preference learning."""

    task: Task
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """Where the features of one image stand in a prompt: `count` placeholder tokens from token index `position` on.
    `tiles` counts the image's entries in the pixels: square tiles, or the patches of models that see an image whole.
    `grid` (rows, columns): how they lie, for 3-D positions; `layout`: of families with `image_layouts`;
    `bidirectional`: they see each other. `times`: of a video with 3-D positions, those of its grids, of `frames` frames
    each. `sides`: tokens along a side of each tile, of a model that compresses some."""

    position: int
    count: int
    tiles: int
    grid: tuple[int, int] | None = None
    bidirectional: bool = False
    layout: tuple[int, ...] | None = None
    times: tuple[int, ...] = ()
    frames: int = 1
    sides: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource:
    """The images of one prompt or observation: their pixels, the tensor that is the prompt's, and their grids as in
    `Batch.grids`."""

    pixels: Tensor
    grids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task as token ids. `token_ids` holds every image expanded to its placeholder tokens, `engine_ids` one
    placeholder per image (the form that served engines expand themselves). `pixels` is the (N, 3, H, W) float32
    tiles, or patches, of all images in order, or None for a prompt without images."""

    token_ids: tuple[int, ...]
    slots: tuple[ImageSlot, ...]
    pixels: Tensor | None
    engine_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How answers are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    samples: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of an answer's tokens from one source: sampled by the policy and trained, or observed (a tool's result,
    possibly with images) and only read.

    token_ids: int64 (L,), every image expanded to its placeholder tokens; engine_ids: int64, one placeholder per image
    (the form that served engines expand themselves). logprobs: float32 (L,), of sampled tokens under softmax(logits /
    temperature) over the whole vocabulary (temperature 1 where greedy), whatever top-k, top-p and bans did to the draw;
    (0,) for tokens that no engine sampled. slots: positions of images, counted from the segment's first token; tiles:
    their pixels, as in `Prompt`. versions: (version of the weights, tokens that it sampled) in order. reward: of an
    environment's step that ended here. routed_experts: int16 (L, layers with a router, experts per token), where an
    engine tells; -1 for tokens that it has not computed, such as the last one."""

    token_ids: np.ndarray
    engine_ids: np.ndarray
    logprobs: np.ndarray
    trained: bool
    slots: tuple[ImageSlot, ...] = ()
    tiles: Tensor | None = None
    versions: tuple[tuple[int, int], ...] = ()
    reward: float | None = None
    routed_experts: np.ndarray | None = None

    @classmethod
    def sampled(cls, token_ids: Sequence[int], logprobs: Sequence[float], version: int) -> Segment:
        """Text that the policy sampled with the weights of one version."""
        ids = np.asarray(token_ids, np.int64)
        return cls(ids, ids, np.asarray(logprobs, np.float32), True, versions=((version, len(ids)),))

    @classmethod
    def written(cls, token_ids: Sequence[int]) -> Segment:
        """Text that the policy trains on but did not sample: a demonstration, or an answer of a preference pair."""
        ids = np.asarray(token_ids, np.int64)
        return cls(ids, ids, np.zeros(0, np.float32), True)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        own, theirs = ((one.trained, one.slots, one.versions, one.reward) for one in (self, other))
        same = np.array_equal(self.token_ids, other.token_ids) and np.array_equal(self.logprobs, other.logprobs)
        return own == theirs and same

    def continued_by(self, more: Segment) -> Segment:
        """Both as one, where both are sampled text."""
        ids = np.concatenate([self.token_ids, more.token_ids])
        logprobs, versions = np.concatenate([self.logprobs, more.logprobs]), _joined((*self.versions, *more.versions))
        experts = [one.routed_experts for one in (self, more) if one.routed_experts is not None]
        routed = np.concatenate(experts) if sum(map(len, experts)) == len(ids) and experts else None
        return Segment(ids, ids, logprobs, True, versions=versions, routed_experts=routed)


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for version, tokens in spans:
        before = found.pop()[1] if found and (found[-1][0] == version or not found[-1][1]) else 0
        found += [(version, before + tokens)] if before + tokens or not found else []
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt: segments, of which the policy sampled those that are trained. `text` is what it wrote in
    its last turn, without the stop token. `finish` is "stop" or "length", or "abort" where it was interrupted, by a
    pause or by `rollout.time_limit`: within a turn or behind it, before its observation. `prompt_experts`: int16
    (P, layers, experts per token), as `Segment.routed_experts`, of its prompt."""

    segments: tuple[Segment, ...]
    text: str
    finish: str
    prompt_experts: np.ndarray | None = field(default=None, compare=False)

    @classmethod
    def sampled(
        cls, token_ids: Sequence[int], logprobs: Sequence[float], text: str, finish: str, version: int
    ) -> Answer:
        """One turn, sampled with the weights of one version; its log-probs include the stop token's."""
        return cls((Segment.sampled(token_ids, logprobs, version),), text, finish)

    @classmethod
    def written(cls, token_ids: Sequence[int]) -> Answer:
        """An answer to imitate or to compare, which is not read as text any more."""
        return cls((Segment.written(token_ids),), "", "stop")

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for segment in self.segments for token in segment.token_ids.tolist())

    @property
    def logprobs(self) -> np.ndarray:
        """Log-probs of the trained tokens as the engine reported them, float32 (M,)."""
        return np.concatenate([segment.logprobs for segment in self.segments if segment.trained])

    @property
    def trained_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments if segment.trained)

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """(version, tokens) of all weights that sampled it, in order."""
        return _joined(span for segment in self.segments for span in segment.versions)

    @property
    def version(self) -> int:
        """The oldest weights that sampled any of it."""
        return min(version for version, _ in self.versions)

    def continued_by(self, more: Answer, text: str) -> Answer:
        """This answer, interrupted, and what was sampled after it; `text` is that of the last turn."""
        (*before, last), (first, *rest) = self.segments, more.segments
        joined = [last.continued_by(first)] if last.trained else [last, *[first] * bool(len(first))]
        experts = more.prompt_experts if self.prompt_experts is None else self.prompt_experts
        return Answer((*before, *joined, *rest), text, more.finish, experts)


@dataclass(frozen=True, slots=True)
class Score:
    """A reward: the value that is trained on, named parts for the metrics, and a note where a grader gave nothing.
    value None: the answer could not be graded, and is left out of baseline and loss. trace: the grader's traceback."""

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    trace: str = ""

    def __post_init__(self) -> None:  # a grader's exception may quote any text of a model
        object.__setattr__(self, "note", printable(self.note[:2_000])[:2_000])


@dataclass(frozen=True, slots=True)
class Group:
    """All answers to one prompt with their scores: the unit of GRPO and GSPO. `baseline`: that of the greedy one, for
    ReMax; `turns`: what was said in each (`foveate.environments.turns.Turn`), of answers with an environment."""

    task: Task
    prompt: Prompt
    answers: tuple[Answer, ...]
    scores: tuple[Score, ...]
    baseline: Score | None = None
    turns: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Forest:
    """A forest of token segments packed into one row of T tokens.

    Segment k covers tokens `start[k] : start[k] + length[k]`; `parent[k]` is the segment it continues, or -1 for a
    root. A token sees itself, the tokens before it in its own segment, and all tokens of the segments above. Segments
    stand in depth-first order, so that the descendants of a segment directly follow it. Packing is several roots; a
    group is one root (the prompt) with n children (the answers).
    Where `bidirectional[k]` is true, the tokens of segment k see all tokens of that segment, also those after them and
    those outside a layer's sliding window (the tokens of an image in Gemma 3). Empty: all segments are causal.
    """

    start: tuple[int, ...]
    length: tuple[int, ...]
    parent: tuple[int, ...]
    bidirectional: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.bidirectional:  # one form of each forest: it is a key of caches
            object.__setattr__(self, "bidirectional", (False,) * len(self.start))

    @property
    def tokens(self) -> int:
        return self.start[-1] + self.length[-1] if self.start else 0


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedGroup:
    """A prompt with the answers, each of a token or more, that share it: one root of a forest and its children."""

    prompt: Prompt
    answers: tuple[Answer, ...]

    @classmethod
    def of_tokens(cls, prompt: Prompt, answers: Iterable[Sequence[int]]) -> PackedGroup:
        """With answers that were not sampled, as token ids."""
        return cls(prompt, tuple(map(Answer.written, answers)))

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all answers."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def trained_tokens(self) -> int:
        return sum(answer.trained_tokens for answer in self.answers)

    @property
    def lengths(self) -> list[int]:
        return [answer.trained_tokens for answer in self.answers]

    @property
    def tile_sides(self) -> frozenset[int]:
        """Tokens along a side of the tiles of its images, 0 for images without such a number; none without images."""
        seen = (part.slots for answer in self.answers for part in answer.segments)
        return frozenset(side for slots in (self.prompt.slots, *seen) for slot in slots for side in slot.sides or (0,))


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed row, the input of a model: the same for SFT, MPO and RL.

    token_ids_T, position_T: int64 (T,); position_T is (3, T) where an image has 3-D positions.
    pixels: (N, 3, H, W) float32 or None; slot_index: int64, the token indices that receive the image features;
    feature_index: which feature each of them receives, None where they are in order: images that stand in several
    places are encoded once; grids: rows and columns of the tokens of each encoded image, and of a piece of a video the
    number of its frames, or its layout; dummy_image: whether the last image has no slots (`Family.dummy_image`).
    target_M: int64, indices of the trained tokens; source_M: the token whose hidden state predicts it;
    sample_M: the sample (0 .. samples - 1) that each trained token belongs to. M is ordered by sample, then position.
    routed_experts: int16 (T, layers, experts per token), the experts to compute with, -1 where the router chooses.
    patches: the output of the vision tower for the pixels, (N, side, side, D), where it is known (`Family.of_patches`).
    images: what the pixels were put together from, in order, wherever the batch goes.
    """

    token_ids_T: Tensor
    position_T: Tensor
    forest: Forest
    pixels: Tensor | None
    slot_index: Tensor
    target_M: Tensor
    source_M: Tensor
    sample_M: Tensor
    samples: int
    grids: tuple[tuple[int, ...], ...] = ()
    dummy_image: bool = False
    feature_index: Tensor | None = None
    routed_experts: Tensor | None = None
    patches: Tensor | None = None
    images: tuple[ImageSource, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        optional = (self.pixels, self.feature_index, self.routed_experts, self.patches)
        pixels, features, experts, patches = (None if one is None else one.to(device) for one in optional)
        return replace(
            self, token_ids_T=self.token_ids_T.to(device), position_T=self.position_T.to(device), pixels=pixels,
            slot_index=self.slot_index.to(device), target_M=self.target_M.to(device), feature_index=features,
            source_M=self.source_M.to(device), sample_M=self.sample_M.to(device), routed_experts=experts,
            patches=patches,
        )  # fmt: skip
