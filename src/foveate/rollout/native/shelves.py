"""Slots for the sequences of a running batch, in sizes of powers of two, and what moves between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

SMALLEST, FIRST_ROOM = 32, 256
"""Places of the smallest slots, and of those in which an answer begins that may become longer."""
SHORT = 512
"""The longest prompt (tokens) that is cheaper in the slot of its only answer than as a second product of each step."""


def slot_size(tokens: int) -> int:
    """The places of the slot for so many tokens: a power of two."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


def first_room(begun: int, limit: int) -> int:
    """The places of the slot in which an answer begins, of which `begun` of at most `limit` tokens are there."""
    return min(slot_size(max(begun + 1, min(limit, FIRST_ROOM))), max(limit, 1))


@dataclass(slots=True, eq=False)
class Kept:
    """A prompt or an answer in memory. `length`: its tokens when it came; `limit`: at most. `start`: its first token in
    the packed row that it came with. Of an answer, `prompt` is its prompt, `born` the step at which it would have begun
    here, and `row` its row; while it waits for an observation, `length` counts its tokens in memory. Without a
    `prompt`, its first `before` tokens are its prompt."""

    start: int
    length: int
    limit: int
    prompt: Kept | None = None
    born: int = 0
    row: int = -1
    before: int = 0

    @property
    def answer_length(self) -> int:
        """`length` without its prompt."""
        return self.length - self.before


@dataclass(slots=True, eq=False)
class Shelf:
    """Slots of one size for prompts, or for answers: slot i holds `members[i]`. `places` of a slot are in use."""

    size: int
    members: list[Kept] = field(default_factory=list)
    places: int = 0

    def add(self, one: Kept) -> int:
        self.members.append(one)
        self.places = max(self.places, min(self.size, max(one.limit, 1)))
        return len(self.members) - 1

    def remove(self, leaves: Callable[[Kept], bool]) -> tuple[list[int], list[int]]:
        """Members from the end fill the slots of those that leave: these slots, and those that they came from."""
        stay = [slot for slot, one in enumerate(self.members) if not leaves(one)]
        count = len(stay)
        gaps = sorted(set(range(count)).difference(stay))
        movers = stay[count - len(gaps) :]
        for gap, mover in zip(gaps, movers, strict=True):
            self.members[gap] = self.members[mover]
        del self.members[count:]
        if not count:
            self.places = 0
        return gaps, movers


@dataclass(frozen=True, slots=True)
class Copy:
    """Slots `source` of a shelf are copied to slots `target` of another or the same."""

    origin: Shelf
    source: list[int]
    shelf: Shelf
    target: list[int]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Places `index` (n, L) of the packed row come to slots `target` of a shelf, behind `begin` others."""

    shelf: Shelf
    target: list[int]
    index: Tensor
    begin: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Return:
    """An answer that comes back from waiting with `tokens` new ones, which stand in the packed row from `start` on; the
    slots that it and its prompt have, which may be one."""

    one: Kept
    start: int
    tokens: int
    own: tuple[Shelf, int]
    prompt: tuple[Shelf, int] | None


@dataclass(frozen=True, slots=True)
class Moves:
    """How the rows change. `source` (B,): for each row its former row; newcomers are numbered behind all former rows,
    in the order of `Rows.last_B`. `copies` and `arrivals`, in this order, are the same for what lies in slots.
    `parked`: answers that wait from now on, with their former rows."""

    source: Tensor
    copies: list[Copy]
    arrivals: list[Arrival]
    parked: tuple[tuple[Kept, int], ...] = ()
