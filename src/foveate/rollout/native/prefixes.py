"""Answers of a group that begin alike, which are continued: what they have in common goes through the model once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foveate.records import Answer, PackedGroup


@dataclass(frozen=True, slots=True)
class Beginnings:
    """Groups without the answers that another one of their group begins with, or that stand there twice. `held`: for
    each answer of each group in order, the number of the one in its new group that holds it, and its own tokens.
    `cuts`: by the running number of an answer of the new groups the places where others end in it."""

    groups: list[PackedGroup]
    held: list[list[tuple[int, int]]]
    cuts: dict[int, list[int]]


def shared_beginnings(groups: Sequence[PackedGroup]) -> Beginnings:
    """The answers of each group as a tree below its prompt. Answers with images of their own, or with experts that they
    are to be computed with, share nothing."""
    found = Beginnings([], [], {})
    samples = 0
    for group in groups:
        held = _held(group.answers)
        kept = list(dict.fromkeys(number for number, _ in held))
        places = {number: place for place, number in enumerate(kept)}
        found.groups.append(replace(group, answers=tuple(group.answers[number] for number in kept)))
        found.held.append([(places[number], tokens) for number, tokens in held])
        for number, tokens in held:
            if tokens < len(group.answers[number]):
                found.cuts.setdefault(samples + places[number], []).append(tokens)
        samples += len(kept)
    return Beginnings(found.groups, found.held, {key: sorted(set(own)) for key, own in found.cuts.items()})


def _held(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """For each answer the number of one that begins with it, and its tokens. In falling order of their tokens, an
    answer comes right behind those that begin with it."""
    held = [(number, len(answer)) for number, answer in enumerate(answers)]
    plain = [number for number, answer in enumerate(answers) if _is_plain(answer)]
    ids = {number: answers[number].token_ids for number in plain}
    holder = -1
    for number in sorted(plain, key=lambda one: (ids[one], -one), reverse=True):
        if holder < 0 or ids[holder][: len(ids[number])] != ids[number]:
            holder = number
        held[number] = holder, len(ids[number])
    return held


def _is_plain(answer: Answer) -> bool:
    return all(not segment.slots and segment.routed_experts is None for segment in answer.segments)
