"""Where the sequences of a running batch lie: which rows and prompts, on which shelves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from foveate.records import Forest
from foveate.rollout.native import shelves
from foveate.rollout.native.shelves import (
    Arrival,
    Copy,
    Kept,
    Moves,
    Return,
    Shelf,
    first_room,
    slot_size,
)

_HIDDEN = -1e30
"""The bias of a key that is out of sight."""
_PLACES = 256
"""A step that is recorded meets so many places of each answer, or a multiple."""


@dataclass(slots=True, eq=False)
class Own:
    """The rows `begin : end` in one shelf; the first of them was `born` at one step, the `latest` at another. `before`:
    the tokens of their prompts that stand before theirs, if any do."""

    shelf: Shelf
    begin: int
    end: int
    born: int
    latest: int
    slot: Tensor
    before: Tensor | None
    biases: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Shared:
    """Prompts of one shelf and their readers. `grid` (G, n): the row at each place of the groups, any row where the
    place is empty; `is_ordered`: it holds all rows in order; `lengths` (G,)."""

    shelf: Shelf
    longest: int
    grid: Tensor
    is_ordered: bool
    lengths: Tensor
    bias: Tensor | None
    biases: dict[int | None, Tensor] = field(default_factory=dict)


class Rows:
    """Which sequences the rows of a running batch are, and in which slots they lie.

    Row r is the answer `kept[r]`; `length_B` counts its tokens in memory. Rows stand in the order of their shelves, so
    that those of a shelf are neighbours (`own`); `shared` are the shelves of prompts. `place_B` finds each row among
    the places of all grids, and `without_prompt_B` is -inf for those whose prompts lie in their own slots (None: there
    are not both kinds). `step` counts the steps of the batch. `last_B`: of newcomers, the place in the packed row of
    the token that each continues. `waiting` are the shelves of answers without rows, which wait for an observation;
    `returns` those of them that are coming back.

    Where steps are `recorded`, prompts have slots of their own: answers then fill theirs together, and few steps
    differ. After `fix` a step does the same on tensors of the same shapes as the one before, so that it can be
    recorded: it meets places of the answers that are still to be filled, too, behind a bias.
    """

    def __init__(self, device: torch.device, recorded: bool = False) -> None:
        self.device, self.recorded = device, recorded
        self.step = 0
        self.answers: dict[int, Shelf] = {}
        self.prompts: dict[int, Shelf] = {}
        self.waiting: dict[int, Shelf] = {}
        self.returns: list[Return] = []
        self.kept: list[Kept] = []
        self.own: list[Own] = []
        self.shared: list[Shared] = []
        self.places: dict[int, int] | None = None
        self.length_B = torch.zeros(0, dtype=torch.int64, device=device)
        self.last_B = self.place_B = self.length_B
        self.without_prompt_B: Tensor | None = None
        self._newcomers: list[Kept] = []

    # ------------------------------------------------------------------------------------------------- who is there

    @property
    def count(self) -> int:
        return self.own[-1].end if self.own else 0

    @property
    def held(self) -> int:
        """Places in use, of prompts and answers."""
        return sum(len(shelf.members) * shelf.places for shelf in self._shelves())

    def _shelves(self) -> Iterator[Shelf]:
        for kind in (self.answers, self.prompts, self.waiting):
            yield from kind.values()

    def shares_slot(self, prompt: int, answers: int) -> bool:
        """Whether a prompt of so many tokens lies in the slot of its answer, before it."""
        return not self.recorded and answers == 1 and prompt <= shelves.SHORT

    def full(self, own: Own) -> list[Kept]:
        """The answers of a shelf that have filled their slots and may become longer."""
        if self.step - own.born < own.shelf.size:
            return []
        return [
            one for one in own.shelf.members if self.step - one.born >= own.shelf.size and one.limit > own.shelf.size
        ]

    # -------------------------------------------------------------------------------------------- joining and leaving

    def announce(
        self,
        forest: Forest,
        lengths: Sequence[int],
        limits: Sequence[Sequence[int]],
        held: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        """Who joins: `forest` is that of the packed row. A root with the segments that continue it is a prompt, as far
        as its length says; what follows are the answers that were begun, and others come behind these. Answer i to
        prompt g takes in at most `limits[g][i]` tokens, those that were begun included. `held[g][i]`: the number of the
        begun answer in the row whose first tokens are those of answer i, and how many; without it each is there."""
        starts = [start for start, above in zip(forest.start, forest.parent, strict=True) if above < 0]
        stops = [*starts[1:], forest.tokens]
        group_at = {start + length: g for g, (start, length) in enumerate(zip(starts, lengths, strict=True))}
        firsts: list[list[int]] = [[] for _ in starts]
        for start, above in zip(forest.start, forest.parent, strict=True):
            end = forest.start[above] + forest.length[above]
            if above >= 0 and end in group_at:
                firsts[group_at[end]].append(start)
        self._newcomers, last = [], []
        for g, (begin, length, own, stop, most) in enumerate(zip(starts, lengths, firsts, stops, limits, strict=True)):
            if self.shares_slot(length, len(most)):  # what was begun follows it in the row
                tokens = stop - begin
                born = self.step - tokens
                self._newcomers.append(Kept(begin, tokens, length + most[0], born=born, before=length))
                last.append(stop - 1)
                continue
            prompt = Kept(begin, length, length)
            begun = [(first, after - first) for first, after in pairwise([*own, stop])]
            if held:
                begun = [(own[number], tokens) for number, tokens in held[g]]
            fresh = [(begin + length - 1, 0)] * (len(most) - len(begun))
            for (first, tokens), limit in zip([*begun, *fresh], most, strict=True):
                self._newcomers.append(Kept(first, tokens, limit, prompt, self.step - tokens))
                last.append(first + max(tokens - 1, 0))
        self.last_B = torch.tensor(last, device=self.device)

    def join(self) -> Moves:
        """Those who were announced become rows."""
        arriving: dict[Shelf, list[int]] = {}
        prompts = list(dict.fromkeys(one.prompt for one in self._newcomers if one.prompt is not None))
        for number, one in enumerate(self._newcomers):
            one.row = self.count + number
            size = slot_size(first_room(one.length, one.limit))
            shelf = self.answers.setdefault(size, Shelf(size))
            arriving.setdefault(shelf, []).append(shelf.add(one))
        for one in prompts:
            size = slot_size(one.length)
            shelf = self.prompts.setdefault(size, Shelf(size))
            arriving.setdefault(shelf, []).append(shelf.add(one))
        self._newcomers = []
        return self._moves([], [self._arrival(shelf, slots) for shelf, slots in arriving.items()])

    def _arrival(self, shelf: Shelf, slots: list[int]) -> Arrival:
        """Places of the packed row for these slots; behind the end of a sequence, any."""
        start = torch.tensor([shelf.members[slot].start for slot in slots])
        length = torch.tensor([shelf.members[slot].length for slot in slots])
        offset = torch.arange(int(length.max())).minimum((length[:, None] - 1).clamp(min=0))
        return Arrival(shelf, slots, (start[:, None] + offset).to(self.device))

    def drop(self, live: Sequence[int], park: Sequence[int] = (), gone: Sequence[Kept] = ()) -> Moves:
        """Only the answers in the rows `live` are left, and their prompts. Those in the rows `park` wait without rows
        from now on; those of them that are `gone` wait no longer."""
        stay, copies = set(live), list[Copy]()
        parked = tuple((self.kept[row], row) for row in park)
        waits = {one for one, _ in parked}
        for shelf in self.answers.values():
            slots = [slot for slot, one in enumerate(shelf.members) if one in waits]
            if slots:
                aside = self.waiting.setdefault(shelf.size, Shelf(shelf.size))
                copies.append(Copy(shelf, slots, aside, [aside.add(shelf.members[slot]) for slot in slots]))
            self._remove(shelf, lambda one: one.row not in stay, copies)
        for one, _ in parked:
            one.length = self.step - one.born
        for shelf in self.waiting.values():
            self._remove(shelf, set(gone).__contains__, copies)
        held = (*self.answers.values(), *self.waiting.values())
        read = {one.prompt for shelf in held for one in shelf.members}
        for shelf in self.prompts.values():
            self._remove(shelf, lambda one: one not in read, copies)
        return self._moves(copies, [], parked)

    def announce_return(self, ones: Sequence[Kept], tokens: Sequence[int]) -> None:
        """Which answers come back from waiting, each with so many tokens of the packed row, in order."""
        self.returns, start = [], 0
        for one, more in zip(ones, tokens, strict=True):
            prompt = None if one.prompt is None else _find(self.prompts, one.prompt)
            self.returns.append(Return(one, start, more, _find(self.waiting, one), prompt))
            start += more
        last = [back.start + back.tokens - 1 for back in self.returns]
        self.last_B = torch.tensor(last, device=self.device)

    def come_back(self) -> Moves:
        """Those whose return was announced are rows again."""
        copies, arrivals = list[Copy](), list[Arrival]()
        for number, back in enumerate(self.returns):
            one, before = back.one, back.one.length
            one.length += back.tokens
            one.born, one.row = self.step - one.length, self.count + number
            size = slot_size(first_room(one.length, one.limit))
            shelf = self.answers.setdefault(size, Shelf(size))
            slot = shelf.add(one)
            copies.append(Copy(back.own[0], [back.own[1]], shelf, [slot]))
            index = torch.arange(back.start, back.start + back.tokens, device=self.device)
            arrivals.append(Arrival(shelf, [slot], index[None], before))
        back_again = {back.one for back in self.returns}
        for shelf in self.waiting.values():
            self._remove(shelf, back_again.__contains__, copies)
        self.returns = []
        return self._moves(copies, arrivals)

    def promote(self) -> Moves | None:
        """Answers that have filled their slots move to larger ones, if there are any."""
        full = [(own.shelf, found) for own in self.own if (found := set(self.full(own)))]
        copies: list[Copy] = []
        for shelf, found in reversed(full):  # the largest first: what leaves a shelf makes room for what comes
            larger = self.answers.setdefault(2 * shelf.size, Shelf(2 * shelf.size))
            slots = [slot for slot, one in enumerate(shelf.members) if one in found]
            copies.append(Copy(shelf, slots, larger, [larger.add(shelf.members[slot]) for slot in slots]))
            self._remove(shelf, found.__contains__, copies)
        return self._moves(copies, []) if full else None

    @staticmethod
    def _remove(shelf: Shelf, leaves: Callable[[Kept], bool], copies: list[Copy]) -> None:
        gaps, movers = shelf.remove(leaves)
        if gaps:
            copies.append(Copy(shelf, movers, shelf, gaps))

    def _moves(self, copies: list[Copy], arrivals: list[Arrival], parked: tuple[tuple[Kept, int], ...] = ()) -> Moves:
        """Number the rows anew, and arrange what a step needs."""
        for kind in (self.answers, self.prompts, self.waiting):
            for size in [size for size, shelf in kind.items() if not shelf.members]:
                del kind[size]
        self.loosen()
        self.kept = ordered = [one for size in sorted(self.answers) for one in self.answers[size].members]
        source = torch.tensor([one.row for one in ordered], dtype=torch.int64, device=self.device)
        for row, one in enumerate(ordered):
            one.row = row
        lengths = [self.step - one.born - one.before for one in ordered]
        self.length_B = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self._arrange_answers()
        self._arrange_prompts(ordered)
        return Moves(source, copies, arrivals, parked)

    def _arrange_answers(self) -> None:
        self.own, begin = [], 0
        for size in sorted(self.answers):
            shelf = self.answers[size]
            born = [one.born for one in shelf.members]
            end, slot = begin + len(born), torch.arange(len(born), device=self.device)
            before = torch.tensor([one.before for one in shelf.members])
            own = before.to(self.device) if bool(before.any()) else None
            self.own.append(Own(shelf, begin, end, min(born), max(born), slot, own))
            begin = end

    def _arrange_prompts(self, ordered: Sequence[Kept]) -> None:
        self.shared, first = [], 0
        places = [0] * len(ordered)
        readers: dict[Kept | None, list[int]] = {}
        for one in ordered:
            readers.setdefault(one.prompt, []).append(one.row)
        for size in sorted(self.prompts):
            shelf = self.prompts[size]
            filled = [readers.get(one, []) for one in shelf.members]
            width = max(map(len, filled))
            if not width:  # all of their answers wait for observations
                continue
            for group, rows in enumerate(filled):
                for place, row in enumerate(rows):
                    places[row] = first + group * width + place
            padded = [rows + [0] * (width - len(rows)) for rows in filled]
            grid = torch.tensor(padded, device=self.device)
            is_full = all(len(rows) == width for rows in filled)
            is_ordered = is_full and [row for rows in filled for row in rows] == [*range(len(ordered))]
            lengths, longest = torch.tensor([one.length for one in shelf.members]), max(o.length for o in shelf.members)
            outside, bias = torch.arange(longest) >= lengths[:, None], None
            if bool(outside.any()):
                zeros = torch.zeros(outside.shape)
                bias = zeros.masked_fill(outside, float("-inf"))[:, None, None].to(self.device)
            self.shared.append(Shared(shelf, longest, grid, is_ordered, lengths.to(self.device), bias))
            first += grid.numel()
        self.place_B = torch.tensor(places, dtype=torch.int64, device=self.device)
        alone = torch.tensor([one.prompt is None for one in ordered])
        self.without_prompt_B = None
        if self.shared and bool(alone.any()):
            self.without_prompt_B = torch.zeros(len(ordered)).masked_fill(alone, float("-inf")).to(self.device)

    # --------------------------------------------------------------------------------------------------------- steps

    def fix(self) -> None:
        """Until rows join, leave or move, or `is_fixed` says no more, steps meet the same places."""
        self.places = {
            own.shelf.size: min(own.shelf.places, -(-(self.step - own.born + _PLACES // 4) // _PLACES) * _PLACES)
            for own in self.own
        }

    def loosen(self) -> None:
        """Steps meet the places that are filled."""
        self.places = None

    @property
    def steady(self) -> int:
        """For how many steps what was fixed stays so."""
        assert self.places is not None
        return min(self.places[own.shelf.size] - self.step + own.born for own in self.own)

    @property
    def is_fixed(self) -> bool:
        """Whether the next step does what the one before it did."""
        return self.places is not None and self.steady > 0

    def begin_step(self) -> None:
        for view in (*self.own, *self.shared):
            view.biases.clear()

    def advance(self) -> None:
        """A token of each answer went through all layers."""
        self.step += 1
        self.length_B += 1

    def filled(self, own: Own) -> Tensor:
        """The places that are filled of each row of a shelf (B,)."""
        length_B = self.length_B[own.begin : own.end]
        return length_B if own.before is None else length_B + own.before

    def seen(self, own: Own, window: int | None) -> slice:
        """The places of a shelf that a step meets, those of the new tokens included."""
        if self.places is not None:
            return slice(0, self.places[own.shelf.size])
        shortest = self.step - own.latest + 1
        return slice(0 if window is None else max(0, shortest - window), self.step - own.born + 1)

    def own_bias(self, own: Own, window: int | None) -> Tensor | None:
        """Hides from the answers' new tokens, which stand behind those that are there, what is no token of them and
        what the window has left behind: (b, 1, 1, places seen)."""
        if self.places is None and own.born == own.latest:
            return None
        if window not in own.biases:
            seen = self.seen(own, window)
            places = torch.arange(seen.start, seen.stop, device=self.device)
            length = self.filled(own)[:, None]
            hidden = places > length
            if window is not None:
                hidden |= places <= length - window
            own.biases[window] = _bias(hidden, float("-inf"))[:, None, None]
        return own.biases[window]

    def prompt_bias(self, shared: Shared, window: int | None, repeat: int) -> Tensor | None:
        """Hides from the answers' new tokens, of the prompts, padding and what the window has left behind (G, 1, 1 or
        n x repeat, L). That may be all; a finite bias then gives a log-sum-exp that counts for nothing."""
        if window is None:
            return shared.bias
        if window not in shared.biases:
            lengths = shared.lengths[:, None, None]
            places = torch.arange(shared.longest, device=self.device)
            own = self.length_B[shared.grid][..., None]
            hidden = (places >= lengths) | (lengths + own - places >= window)
            shared.biases[window] = _bias(hidden, _HIDDEN).repeat_interleave(repeat, 1)[:, None]
        return shared.biases[window]


def _find(shelves: Mapping[int, Shelf], one: Kept) -> tuple[Shelf, int]:
    return next((shelf, shelf.members.index(one)) for shelf in shelves.values() if one in shelf.members)


def _bias(hidden: Tensor, value: float) -> Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, value)
