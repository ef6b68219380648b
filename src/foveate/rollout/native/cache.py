"""The memory that layers have of the sequences of a running batch, a `SequenceState` for each layer.

A batch is a row of B tokens in each step, one of each live answer. Answers join and leave while it runs: what has come
in the meantime is packed into one row of tokens (`foveate.parallel.packing.pack`), goes through the model once, and
goes on as rows of the batch; an answer that is done leaves its row and its slot to others. Layers see all that by four
calls: `prefill` with the packed row of newcomers, `fork` when these become rows, `extend` in every step, `drop` when
rows leave or move. `BatchCache` drives the states of all layers and does not know their kinds; `Rows` is what all of
them share: which row belongs to which prompt, how far each has come, and where it lies.

Sequences lie in slots on shelves (`foveate.rollout.native.rows`). A prompt has a slot for itself, which all of its
answers read. An answer has another one, for its own tokens; a short prompt with a single answer is kept in front of it,
in the same slot. The slots of a shelf have one size, a power of two, and lie side by side in one tensor, so that a step
meets each shelf in one product; an answer that has filled its slot moves to the next larger one. So a row has a length
of its own, short answers do not pay for long ones, a batch of equal lengths is one shelf without padding, and a token
is copied once per doubling. Slots in use are always the first of their shelf: the last ones fill the gaps of those that
leave. Rows stand in the order of their slots, and nothing is gathered to meet them.

An answer's output is computed in two parts, prompt and own tokens, and merged by the log-sum-exp. Prompts are met by
the queries of all their answers at once.

What a kind of layer has to do: keep apart in `prefill` what newcomers need (a prefill that fails must leave the other
rows as they were), append it to its rows in `fork`, and in both `fork` and `drop` order its rows by `Moves.source`: a
recurrence needs no more, `state = torch.cat([state, new])[moves.source]` with `new` the states at `Rows.last_B`. A kind
that keeps something per token also follows `Moves.copies` and `Moves.arrivals`, as `KeysAndValues` does. It has a door
like `BatchCache.attend` by which transformers' modules reach it. An answer that was begun elsewhere, that was put back
for others, joins with its prompt: its tokens are a segment below it in the packed row, whatever they are and with the
images among them.

An answer that waits for an observation leaves its row and keeps its memory: its slot moves to a shelf that no step
meets. The observation is a packed row of its own, whose tokens meet the prompt, the answer so far, and those before
them; with it the answer becomes a row again. A turn costs its new tokens, whatever came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.models.attention.kernels import PLAIN, AttentionOptions
from foveate.models.policy import Policy
from foveate.models.sizes import key_value_numbers
from foveate.records import Forest
from foveate.rollout.native.recurrent import Recurrence
from foveate.rollout.native.rows import Own, Rows, Shared
from foveate.rollout.native.shelves import Copy, Kept, Moves, Shelf

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_MANY = 64
"""Keys from which on the flash kernel is faster than plain operations."""


def cached_numbers(policy: Policy) -> int:
    """Numbers that a token has as keys and values in all layers of the language model."""
    config: Any = policy.model.config
    return key_value_numbers(config.get_text_config())


class SequenceState(Protocol):
    """A layer's memory of each sequence: keys and values, or the state of a recurrence. It is made with the `Rows` of
    its batch. The inputs of its methods are those of the layer's kind; B answers are the rows of a step."""

    def prefill(self, *inputs: Any, **named: Any) -> None:
        """Keep what newcomers need of the packed row of prompts and of begun answers; the layer itself computes its
        output there. Rows that are there already stay untouched."""
        ...

    def fork(self, moves: Moves) -> None:
        """Newcomers are rows now. Each continues from the last token of its prompt, or of what was begun of it."""
        ...

    def extend(self, *inputs: Any, **named: Any) -> Tensor:
        """Take in one token of each of the B answers; the layer's output for them. While steps are recorded, it is the
        same operations on the same tensors every time."""
        ...

    def drop(self, moves: Moves) -> None:
        """Rows have left or moved, and some wait from now on. `Rows` is already that of the others."""
        ...

    def observe(self, *inputs: Any, **named: Any) -> Tensor:
        """Take in the packed row of the answers in `Rows.returns`, and keep what `fork` will add to their memory; the
        layer's output for it."""
        ...


class KeysAndValues:
    """The state of an attention layer, with or without a sliding window and sinks.

    On each shelf lie keys and values, (slots, H_kv, places, d) each. A step computes its output in two parts, whose
    softmaxes are merged by their log-sum-exp: all answers of a group against their one prompt in one product, and each
    answer against itself.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._new: tuple[Tensor, ...] = ()
        self.shelves: dict[Shelf, list[Tensor]] = {}

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """Key and value (H_kv, T, d) of the packed row."""
        self._new = key, value

    def fork(self, moves: Moves) -> None:
        self.drop(moves)
        for arrival in moves.arrivals:
            length = arrival.index.shape[1]
            slots = _as_slice(arrival.target)
            span = slice(arrival.begin, arrival.begin + length)
            for kept, new in zip(self._room(arrival.shelf), self._new, strict=True):
                kept[slots, :, span] = new[:, arrival.index].transpose(0, 1)
        self._new = ()

    def drop(self, moves: Moves) -> None:
        for copy in moves.copies:
            self._copy(copy)
        rows = self._rows
        present = {*rows.answers.values(), *rows.prompts.values(), *rows.waiting.values()}
        for shelf in [*self.shelves]:
            if shelf not in present:
                del self.shelves[shelf]
            elif 2 * len(shelf.members) < len(self.shelves[shelf][0]):
                self.shelves[shelf] = [kept[: len(shelf.members)].clone() for kept in self.shelves[shelf]]

    def _copy(self, copy: Copy) -> None:
        origin, kept = self.shelves[copy.origin], self._room(copy.shelf)
        places = min(origin[0].shape[2], kept[0].shape[2])
        for new, old in zip(kept, origin, strict=True):
            new[copy.target, :, :places] = old[copy.source, :, :places]

    def _room(self, shelf: Shelf) -> list[Tensor]:
        """The tensors of a shelf, with as many slots and places as it has now, and a quarter more slots where there
        were some before. What is in no use is 0, or was in use: a finite number."""
        kept, slots = self.shelves.get(shelf), len(shelf.members)
        if kept is None:
            like = self._new or [memory[0] for memory in next(iter(self.shelves.values()))]
            self.shelves[shelf] = [one.new_zeros(slots, len(one), shelf.places, one.shape[2]) for one in like]
        elif len(kept[0]) < slots or kept[0].shape[2] < shelf.places:
            grown = len(kept[0]) if len(kept[0]) >= slots else slots + slots // 4
            places = max(shelf.places - kept[0].shape[2], 0)
            self.shelves[shelf] = [pad(old, (0, 0, 0, places, 0, 0, 0, grown - len(old))) for old in kept]
        return self.shelves[shelf]

    def extend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions) -> Tensor:
        """Query (H, B, d), key and value (H_kv, B, d); returns (H, B, d)."""
        heads, rows, width = query.shape
        rows_query = query.to(value.dtype).transpose(0, 1).reshape(rows, key.shape[0], -1, width)
        new = key.transpose(0, 1), value.transpose(0, 1)
        out, lse = _joined([self._attend_own(o, rows_query, new, scale, options.window) for o in self._rows.own])
        if self._rows.shared:
            prompt, prompt_lse = self._attend_prompts(rows_query, scale, options.window)
            out = torch.lerp(out.float(), prompt.float(), torch.sigmoid(prompt_lse - lse)[..., None])
            lse = lse if options.sinks is None else torch.logaddexp(prompt_lse, lse)
        if options.sinks is not None:
            out = out.float() * torch.sigmoid(lse - options.sinks.float().view(lse.shape[1:]))[..., None]
        return out.to(value.dtype).reshape(rows, heads, width).transpose(0, 1)

    def observe(self, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions) -> Tensor:
        """Query (H, T, d), key and value (H_kv, T, d) of the packed row; returns (H, T, d)."""
        out = torch.empty_like(query, dtype=value.dtype)
        for back in self._rows.returns:
            new = slice(back.start, back.start + back.tokens)
            path = [self._slot(*back.own, back.one.length), [key[:, new], value[:, new]]]
            if back.one.prompt is not None and back.prompt is not None:
                path.insert(0, self._slot(*back.prompt, back.one.prompt.length))
            keys, values = (torch.cat(parts, 1) for parts in zip(*path, strict=True))
            out[:, new] = _attend_path(query[:, new].to(value.dtype), keys, values, scale, options)
        self._new = key, value
        return out

    def _slot(self, shelf: Shelf, slot: int, length: int) -> list[Tensor]:
        return [memory[slot, :, :length] for memory in self.shelves[shelf]]

    def _attend_prompts(self, query: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """Query (B, H_kv, H / H_kv, d) against the prompts. Rows whose prompts stand in their own slots meet any, with
        a log-sum-exp that counts for nothing."""
        rows = self._rows
        out, lse = _joined([self._attend_prompt(shared, query, scale, window) for shared in rows.shared])
        if not rows.shared[0].is_ordered:
            out, lse = out[rows.place_B], lse[rows.place_B]
        return out, lse if rows.without_prompt_B is None else lse + rows.without_prompt_B[:, None, None]

    def _attend_prompt(self, shared: Shared, query: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """The queries of a group meet its keys in one product. Output (places of the grid, H_kv, H / H_kv, d)."""
        groups, places = shared.grid.shape
        _, kv_heads, repeat, width = query.shape
        grid = query.unflatten(0, (groups, places)) if shared.is_ordered else query[shared.grid]
        grid = grid.transpose(1, 2).reshape(groups, kv_heads, places * repeat, width)
        key, value = (kept[:groups, :, : shared.longest] for kept in self.shelves[shared.shelf])
        out, lse = partial_attention(grid, key, value, scale, self._rows.prompt_bias(shared, window, repeat))
        out = out.view(groups, kv_heads, places, repeat, width).transpose(1, 2)
        lse = lse.view(groups, kv_heads, places, repeat).transpose(1, 2)
        return out.reshape(-1, kv_heads, repeat, width), lse.reshape(-1, kv_heads, repeat)

    def _attend_own(
        self, own: Own, query: Tensor, new: Sequence[Tensor], scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Query (B, H_kv, H / H_kv, d) of the rows of a shelf against the tokens of their own answers. Those of the
        step, `new` (B, H_kv, d), are put behind them first."""
        rows, span, seen = self._rows, slice(own.begin, own.end), self._rows.seen(own, window)
        kept = self.shelves[own.shelf]
        if rows.places is None and own.born == own.latest:
            for memory, tokens in zip(kept, new, strict=True):
                memory[: own.end - own.begin, :, rows.step - own.born] = tokens[span]
        else:  # rows that are done may stand behind the last place while steps are recorded
            at = rows.filled(own).clamp(max=seen.stop - 1)
            for memory, tokens in zip(kept, new, strict=True):
                memory[own.slot, :, at] = tokens[span]
        key, value = (memory[: own.end - own.begin, :, seen] for memory in kept)
        return partial_attention(query[span], key, value, scale, rows.own_bias(own, window))


def _attend_path(query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions) -> Tensor:
    """Query (H, t, d) of the last t tokens of a path, against all L of them, (H_kv, L, d)."""
    heads, tokens, width = query.shape
    kv_heads, length = key.shape[:2]
    places = torch.arange(length, device=key.device)
    own = places[-tokens:, None]
    hidden = places > own
    if options.window is not None:
        hidden |= own - places >= options.window
    bias = torch.zeros(hidden.shape, device=key.device).masked_fill(hidden, float("-inf"))
    bias = bias.repeat(heads // kv_heads, 1)[None, None]
    out, lse = partial_attention(query.reshape(1, kv_heads, -1, width), key[None], value[None], scale, bias)
    out, lse = out.reshape(heads, tokens, width), lse.reshape(heads, tokens)
    if options.sinks is not None:
        out = out.float() * torch.sigmoid(lse.float() - options.sinks.float()[:, None])[..., None]
    return out.to(value.dtype)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return parts[0] if len(parts) == 1 else (torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]))


def _as_slice(slots: Sequence[int]) -> slice:
    """Slots that follow each other, as those of newcomers do."""
    return slice(slots[0], slots[-1] + 1)


class BatchCache:
    """The states of all layers of a running batch.

    Between `announce` and `join` the language model is given the packed row of newcomers, between `announce_return` and
    `join` that of answers which have waited, otherwise one token of each of B live answers, in the order of `rows`.
    `extend` ends a step; `drop` lets finished answers leave. The changes of the rows that are returned are those of
    `Moves.source`.
    """

    def __init__(self, device: torch.device, recorded: bool = False) -> None:
        self.rows = Rows(device, recorded)
        self.states: dict[int, SequenceState] = {}
        self._joining: Literal["", "new", "back"] = ""

    def announce(
        self,
        forest: Forest,
        lengths: Sequence[int],
        limits: Sequence[Sequence[int]],
        held: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        """As `Rows.announce`. The packed row comes next; should it fail, nothing has happened."""
        self.rows.announce(forest, lengths, limits, held)
        self._joining = "new"

    def announce_return(self, ones: Sequence[Kept], tokens: Sequence[int]) -> None:
        """As `Rows.announce_return`, and else as `announce`."""
        self.rows.announce_return(ones, tokens)
        self._joining = "back"

    def join(self) -> Tensor:
        """Those who were announced become rows."""
        moves = self.rows.join() if self._joining == "new" else self.rows.come_back()
        self._joining = ""
        for state in self.states.values():
            state.fork(moves)
        return moves.source

    def abandon(self) -> None:
        """The packed row has failed: those who were announced do not come."""
        self._joining = ""

    def extend(self) -> None:
        """The row that went through all layers is now part of the answers."""
        self.rows.advance()

    def drop(self, live: Sequence[int], park: Sequence[int] = (), gone: Sequence[Kept] = ()) -> Tensor:
        """As `Rows.drop`."""
        return self._move(self.rows.drop(live, park, gone))

    def promote(self) -> Tensor | None:
        """Answers that have filled their slots get larger ones. Comes before each step that is not fixed."""
        moves = self.rows.promote()
        return None if moves is None else self._move(moves)

    def _move(self, moves: Moves) -> Tensor:
        for state in self.states.values():
            state.drop(moves)
        return moves.source

    def call_layer(
        self, layer: int, kind: Callable[[Rows], SequenceState], kept: Sequence[Any], given: Sequence[Any]
    ) -> Any:
        """One call of a layer with a state of this kind. While newcomers are computed the state keeps `kept` and the
        answer is None; in steps, and for answers that have waited, it is the state's output for what is `given`. Layers
        come in order."""
        if self._joining == "back":
            return self.states[layer].observe(*given)
        if self._joining:
            if layer not in self.states:
                self.states[layer] = kind(self.rows)
            return self.states[layer].prefill(*kept)
        if layer == 0:
            self.rows.begin_step()
        return self.states[layer].extend(*given)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, options: AttentionOptions = PLAIN
    ) -> Tensor | None:
        """The door of `foveate.models.attention.kernels.KeyValueCache`: query (H, T, d), key and value (H_kv, T, d).
        Returns None while newcomers are computed, else the output in the shape of `query`."""
        key = key.to(value.dtype)
        return self.call_layer(layer, KeysAndValues, (key, value), (query, key, value, scale, options))

    def recur(self, layer: int, kept: Sequence[Any], given: Sequence[Any]) -> Any:
        """The door of recurrent layers, see `foveate.models.attention.kernels.KeyValueCache`."""
        return self.call_layer(layer, Recurrence, kept, given)


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a part of the keys, with what is needed to merge it with other parts.

    query (b, h, Q, d), key and value (b, h, L, d), bias broadcast to (b, h, Q, L) or None; returns the output (b, h, Q,
    d) and the log-sum-exp of the scores (b, h, Q) in float32. Many keys are met by PyTorch's flash kernel on a CPU.
    """
    if key.shape[2] >= _MANY and query.device.type == "cpu" and query.dtype == key.dtype == torch.float32:
        return _flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    return plain_partial_attention(query, key, value, scale, bias)


def plain_partial_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`partial_attention` in plain operations. The log-sum-exp comes from the largest probability p of a row, which is
    exp(largest score - log-sum-exp) and at least 1 / L: no second pass of exponentials."""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    if bias is not None:
        scores += bias
    probs = scores.softmax(-1)
    lse = scores.amax(-1) - probs.amax(-1).log()
    return probs.to(value.dtype) @ value, lse
