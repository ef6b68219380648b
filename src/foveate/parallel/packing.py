"""Groups to packed rows: a forest per micro-batch, within a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.encoding.family import DummyImage
from foveate.records import Answer, Batch, Forest, ImageSlot, ImageSource, PackedGroup, Prompt


def positions(length: int, slots: Sequence[ImageSlot], begin: int = 0) -> Tensor:
    """The position of each of `length` tokens behind `begin` others, int64 (length,); (3, length) for time, row and
    column where an image has a `grid`: its tokens share the time at which it begins, those of a video the `times`
    behind it. What follows stands behind the largest of them (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1)."""
    if all(slot.grid is None for slot in slots):
        return torch.arange(begin, begin + length)
    pieces: list[Tensor] = []
    first, place = 0, begin
    for slot in slots:
        assert slot.grid is not None
        rows, columns = slot.grid
        pieces.append((torch.arange(slot.position - first) + place).expand(3, -1))
        place += slot.position - first
        times = slot.times or (0,)
        time = torch.tensor(times).repeat_interleave(rows * columns)
        row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        pieces.append(torch.stack([time, row.repeat(len(times)), column.repeat(len(times))]) + place)
        first, place = slot.position + slot.count, place + max(rows, columns, times[-1] + 1)
    pieces.append((torch.arange(length - first) + place).expand(3, -1))
    return torch.cat(pieces, 1)


def prompt_end(prompt: Prompt) -> int:
    """The position of the first token of an answer: one more than the largest of the prompt."""
    return int(positions(len(prompt), prompt.slots).max()) + 1


def next_position(prompt: Prompt, answer: Answer | None) -> int:
    """The position of the token that comes behind an answer so far, or behind the prompt."""
    end = prompt_end(prompt)
    if answer is None or not len(answer):
        return end
    return int(positions(len(answer), answer_slots(answer), end).max()) + 1


def grids_of(slot: ImageSlot) -> tuple[tuple[int, ...], ...]:
    """The grids that are encoded for an image, as in `Batch.grids`: one for each of the times of a video, and for each
    tile where some may be compressed, or its layout; none where positions are not 3-D otherwise."""
    if slot.layout is not None:
        return (slot.layout,)
    if slot.grid is None:
        return tuple((side, side) for side in slot.sides)
    return ((*slot.grid, slot.frames),) * len(slot.times) if slot.times else (slot.grid,)


class _Images:
    """The images of a row, in order. Pixels that are the same tensor are encoded once, wherever they stand, unless
    other tiles of them are compressed."""

    def __init__(self) -> None:
        self._sources: list[ImageSource] = []
        self._first: dict[tuple[Any, ...], int] = {}
        self._index: list[Tensor] = []
        self._features = 0

    def add(self, slots: Sequence[ImageSlot], pixels: Tensor | None) -> None:
        """The next images, with their pixels side by side."""
        count = sum(slot.count for slot in slots)
        key = id(pixels), *(slot.sides for slot in slots)
        first = self._features if pixels is None else self._first.setdefault(key, self._features)
        if first == self._features:
            self._features += count
            if pixels is not None:
                self._sources.append(ImageSource(pixels, tuple(grid for slot in slots for grid in grids_of(slot))))
        self._index.append(torch.arange(first, first + count))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `Batch` about them."""
        index = _cat(self._index)
        return {
            "pixels": torch.cat([one.pixels for one in self._sources]) if self._sources else None,
            "grids": tuple(grid for one in self._sources for grid in one.grids),
            "images": tuple(self._sources),
            "feature_index": None if len(index) == self._features else index,
        }


def pack_tails(tails: Sequence[tuple[Prompt, Answer, int]]) -> Batch:
    """One row of the last tokens of some answers, each from a place of the answer on, with the images among them; what
    stands before them is elsewhere."""
    ids, position, slot_index = (list[Tensor]() for _ in range(3))
    images = _Images()
    start, length = list[int](), list[int]()
    for prompt, answer, begin in tails:
        first = start[-1] + length[-1] if start else 0
        start.append(first)
        length.append(len(answer) - begin)
        ids.append(answer_ids(answer)[begin:])
        position.append(positions(len(answer), answer_slots(answer), prompt_end(prompt))[..., begin:])
        place = first - begin
        for segment in answer.segments:
            if place >= first:
                slot_index += [torch.arange(s.count) + place + s.position for s in segment.slots]
                images.add(segment.slots, segment.tiles)
            place += len(segment)
    if any(own.ndim == 2 for own in position):
        position = [own.expand(3, -1) for own in position]
    nothing = _cat([])
    return Batch(
        token_ids_T=torch.cat(ids),
        position_T=torch.cat(position, -1),
        forest=Forest(tuple(start), tuple(length), (-1,) * len(start)),
        slot_index=_cat(slot_index),
        target_M=nothing,
        source_M=nothing,
        sample_M=nothing,
        samples=0,
        **images.fields,
    )


def pack(groups: Sequence[PackedGroup], cuts: Mapping[int, Sequence[int]] = MappingProxyType({})) -> Batch:
    """One row of all groups. A prompt and its images stand once per group; samples are numbered in the order of the
    answers. `cuts`: by sample, places in its answer where one segment of the forest ends and another continues it.

    The tokens of segments that are not trained are read like those of a prompt. The first token of an answer is
    predicted by the last token of its prompt.
    """
    token_ids: list[Tensor] = []
    start, length, parent, bidirectional = list[int](), list[int](), list[int](), list[bool]()
    position, slot_index, target, source, sample = (list[Tensor]() for _ in range(5))
    images, samples = _Images(), 0

    def grow(ids: Tensor, own: Sequence[ImageSlot], above: int, begin: int, cut: Sequence[int] = ()) -> int:
        """A segment of the forest with its images, behind `begin` positions; its first token. Images that are seen both
        ways are segments of their own, each below what stands before it, and so is what stands behind a cut."""
        first = start[-1] + length[-1] if start else 0
        for tokens, both_ways in _pieces(len(ids), own, cut):
            start.append(start[-1] + length[-1] if start else 0)
            length.append(tokens)
            bidirectional.append(both_ways)
            parent.append(above)
            above = len(start) - 1
        token_ids.append(ids)
        position.append(positions(len(ids), own, begin))
        slot_index.extend(torch.arange(first + s.position, first + s.position + s.count) for s in own)
        return first

    for group in groups:
        begin = grow(torch.tensor(group.prompt.token_ids), group.prompt.slots, -1, 0)
        root = len(start) - 1
        end = int(position[-1].max()) + 1
        images.add(group.prompt.slots, group.prompt.pixels)
        last = begin + len(group.prompt) - 1
        for answer in group.answers:
            first = grow(answer_ids(answer), answer_slots(answer), root, end, cuts.get(samples, ()))
            for segment in answer.segments:
                images.add(segment.slots, segment.tiles)
            target.append(first + trained_places(answer))
            source.append(torch.where(target[-1] == first, last, target[-1] - 1))
            sample.append(torch.full_like(target[-1], samples))
            samples += 1
    if any(own.ndim == 2 for own in position):
        position = [own.expand(3, -1) for own in position]
    return Batch(
        token_ids_T=torch.cat(token_ids),
        position_T=torch.cat(position, -1),
        forest=Forest(tuple(start), tuple(length), tuple(parent), tuple(bidirectional)),
        slot_index=_cat(slot_index),
        target_M=_cat(target),
        source_M=_cat(source),
        sample_M=_cat(sample),
        samples=samples,
        routed_experts=_routed_experts(groups),
        **images.fields,
    )


def _routed_experts(groups: Sequence[PackedGroup]) -> Tensor | None:
    """As `Batch` holds them; None where no answer says which experts it was computed with. A prompt has those of the
    first of its answers that knows them."""
    runs = list[tuple[int, np.ndarray | None]]()
    for group in groups:
        prompts = (answer.prompt_experts for answer in group.answers)
        runs.append((len(group.prompt), next((experts for experts in prompts if experts is not None), None)))
        runs += [(len(segment), segment.routed_experts) for answer in group.answers for segment in answer.segments]
    shape = next((experts.shape[1:] for _, experts in runs if experts is not None), None)
    if shape is None:
        return None
    unknown = np.full((max(tokens for tokens, _ in runs), *shape), -1, np.int16)
    return torch.from_numpy(np.concatenate([unknown[:n] if own is None else own for n, own in runs]))


def _pieces(length: int, slots: Sequence[ImageSlot], cuts: Sequence[int] = ()) -> Iterator[tuple[int, bool]]:
    """The pieces of so many tokens that attend alike, none across a cut: their tokens, and whether they attend both
    ways."""
    both_ways = {slot.position: slot.position + slot.count for slot in slots if slot.bidirectional}
    for first, end in pairwise(sorted({0, *cuts, *both_ways, *both_ways.values(), length})):
        yield end - first, first in both_ways


def answer_ids(answer: Answer) -> Tensor:
    """The tokens of all segments, int64 (L,)."""
    return torch.cat([torch.from_numpy(segment.token_ids) for segment in answer.segments])


def engine_logprobs(group: PackedGroup) -> Tensor:
    """Log-probs of the trained tokens of all answers as the engine reported them, float32 (M,)."""
    return torch.cat([torch.from_numpy(answer.logprobs) for answer in group.answers])


def trained_places(answer: Answer) -> Tensor:
    """Which tokens of an answer are trained, int64 (M,), counted from its first token."""
    trained = torch.tensor([segment.trained for segment in answer.segments])
    lengths = torch.tensor([len(segment) for segment in answer.segments])
    return trained.repeat_interleave(lengths).nonzero()[:, 0]


def answer_slots(answer: Answer) -> list[ImageSlot]:
    """The images of all segments, their positions counted from the answer's first token."""
    found: list[ImageSlot] = []
    before = 0
    for segment in answer.segments:
        found += [replace(slot, position=slot.position + before) for slot in segment.slots]
        before += len(segment)
    return found


def pad_with_dummy_image(batch: Batch, dummy_image: DummyImage | None) -> Batch:
    """The batch as one rank of several computes it: with a dummy image where it has none, because all ranks of a
    sharded model have to make the same calls."""
    if dummy_image is None or batch.pixels is not None:
        return batch
    return replace(batch, pixels=dummy_image.pixels, grids=dummy_image.grids, dummy_image=True)


def empty(dummy_image: DummyImage | None) -> Batch:
    """The batch of a rank that has nothing left while others have: one token, nothing trained."""
    return pad_with_dummy_image(pack([PackedGroup(Prompt((0,), (), None, ()), ())]), dummy_image)


def _cat(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def micro_batches(groups: Sequence[PackedGroup], token_budget: int) -> list[list[int]]:
    """Indices of the groups of each micro-batch, in order, at most `token_budget` tokens each.

    A group longer than the budget stands alone. Neighbours keep their order, so that the result depends on the lengths
    alone.
    """
    batches: list[list[int]] = []
    room = 0
    for index, group in enumerate(groups):
        if not batches or group.tokens > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= group.tokens
    return batches


def split_answers(group: PackedGroup, token_budget: int) -> list[slice]:
    """The answers of a group that fit the budget together with their prompt: all of them, or as few parts as needed, in
    order. Each part repeats the prompt, so that a group is split only when it must be."""
    if group.tokens <= token_budget:
        return [slice(0, len(group.answers))]
    begins: list[int] = []
    room = 0
    for number, answer in enumerate(group.answers):
        if not begins or len(answer) > room:
            begins.append(number)
            room = token_budget - len(group.prompt)
        room -= len(answer)
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(group.answers)], strict=True)]
