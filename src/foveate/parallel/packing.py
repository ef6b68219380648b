"""Groups -> packed rows: a forest per micro-batch, within a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from foveate.models.families.internvl import DummyImage
from foveate.records import Batch, Forest, Prompt


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A prompt with the answers that share it: one root and its children. Every answer has at least one token."""

    prompt: Prompt
    answers: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.answer_tokens

    @property
    def answer_tokens(self) -> int:
        return sum(len(answer) for answer in self.answers)


def pack(packed_groups: Sequence[PackedGroup]) -> Batch:
    """One row of all trees. Prompt and images stand once per tree; samples are numbered in the order of the answers.

    All answer tokens are trained. The first token of an answer is predicted by the last token of its prompt.
    """
    token_ids: list[int] = []
    start: list[int] = []
    length: list[int] = []
    parent: list[int] = []
    position, slot_index, target, source, sample = (list[torch.Tensor]() for _ in range(5))
    samples = 0

    def grow(ids: tuple[int, ...], above: int) -> int:
        first = len(token_ids)
        start.append(first)
        length.append(len(ids))
        parent.append(above)
        token_ids.extend(ids)
        return first

    for packed in packed_groups:
        root, size = len(start), len(packed.prompt)
        begin = grow(packed.prompt.token_ids, -1)
        own = packed.prompt.positions
        position.append(own)
        end = int(own.max()) + 1
        for slot in packed.prompt.slots:
            slot_index.append(torch.arange(begin + slot.position, begin + slot.position + slot.count))
        for answer in packed.answers:
            first, n = grow(answer, root), len(answer)
            position.append(torch.arange(end, end + n))
            target.append(torch.arange(first, first + n))
            source.append(torch.cat([torch.tensor([begin + size - 1]), torch.arange(first, first + n - 1)]))
            sample.append(torch.full((n,), samples))
            samples += 1
    pixels = [packed.prompt.pixels for packed in packed_groups if packed.prompt.pixels is not None]
    grids = [slot.grid for packed in packed_groups for slot in packed.prompt.slots]
    if any(own.ndim == 2 for own in position):
        position = [own.expand(3, -1) for own in position]
    return Batch(
        token_ids_T=torch.tensor(token_ids),
        position_T=torch.cat(position, -1),
        forest=Forest(tuple(start), tuple(length), tuple(parent)),
        pixels=torch.cat(pixels) if pixels else None,
        slot_index=_cat(slot_index),
        target_M=_cat(target),
        source_M=_cat(source),
        sample_M=_cat(sample),
        samples=samples,
        grids=tuple(grid for grid in grids if grid is not None),
    )


def pad_with_dummy_image(batch: Batch, dummy_image: DummyImage | None) -> Batch:
    """The batch as one rank of several computes it: with a blank picture where it has none, because all ranks of a
    sharded model have to make the same calls."""
    if dummy_image is None or batch.pixels is not None:
        return batch
    return replace(batch, pixels=dummy_image.pixels, grids=dummy_image.grids, dummy_image=True)


def empty(dummy_image: DummyImage | None) -> Batch:
    """What a rank computes that has nothing left while others have: one token, nothing trained."""
    return pad_with_dummy_image(pack([PackedGroup(Prompt((0,), (), None, ()), ())]), dummy_image)


def _cat(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def micro_batches(packed_groups: Sequence[PackedGroup], token_budget: int) -> list[list[int]]:
    """Indices of the trees of each micro-batch, in order, at most `token_budget` tokens each.

    A tree longer than the budget stands alone. Neighbours keep their order, so that the result does not depend on
    anything but the lengths.
    """
    batches: list[list[int]] = []
    room = 0
    for index, packed in enumerate(packed_groups):
        if not batches or packed.tokens > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= packed.tokens
    return batches


def split(packed: PackedGroup, token_budget: int) -> list[PackedGroup]:
    """The tree itself if it fits the budget, else as few trees as needed, with the answers dealt out in order. Each
    repeats the prompt, so that this is done only when it must be."""
    if packed.tokens <= token_budget:
        return [packed]
    parts: list[list[tuple[int, ...]]] = []
    room = 0
    for answer in packed.answers:
        if not parts or len(answer) > room:
            parts.append([])
            room = token_budget - len(packed.prompt)
        parts[-1].append(answer)
        room -= len(answer)
    return [PackedGroup(packed.prompt, tuple(answers)) for answers in parts]
