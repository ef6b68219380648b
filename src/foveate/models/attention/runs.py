"""Which tokens of a forest attend to which, as the calls of a kernel: runs of tokens, batched by like size.

Every segment against itself, and the descendants of a segment, which stand together in the row, against it. With a
sliding window, segments are cut into chunks of a window's length: each against itself, and against what lies before.
A long causal run is halved, again and again: a kernel computes much of the half of its scores that a causal mask hides,
and nothing is hidden where the second half attends to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.records import Forest

_LONGEST_CAUSAL = 256
"""Tokens of a causal run that is not halved."""
_ROUND = 64
"""Halves are multiples of this many tokens, so that those of segments of other lengths share calls."""


def path_positions(forest: Forest) -> Tensor:
    """How many tokens each token has before it on its path from the root, int64 (T,)."""
    begin = _path_begins(forest)
    return torch.cat([torch.arange(b, b + n) for b, n in zip(begin, forest.length, strict=True)])


def _path_begins(forest: Forest) -> list[int]:
    """The path position of each segment's first token."""
    begin: list[int] = []
    for parent in forest.parent:
        begin.append(0 if parent < 0 else begin[parent] + forest.length[parent])
    return begin


def depths(forest: Forest) -> list[int]:
    """How many segments each segment has above it."""
    depth: list[int] = []
    for parent in forest.parent:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    return depth


def subtree_ends(forest: Forest) -> list[int]:
    """The place in the row behind the last descendant of each segment."""
    ends = [start + length for start, length in zip(forest.start, forest.length, strict=True)]
    for segment in reversed(range(len(ends))):
        parent = forest.parent[segment]
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[segment])
    return ends


@dataclass(frozen=True, slots=True)
class Spaced:
    """Where runs of equal length begin that stand at equal distances in the row: `first`, `first + step`, ..."""

    first: int
    step: int


@dataclass(frozen=True, slots=True)
class Runs:
    """B runs of L tokens, as a (B, H, L, ...) batch for the flash kernel.

    Spaced ones are views of the row, taken without a copy. Others are taken by index, the shorter ones filled up with
    copies of their last token, whose scores and log-sum-exp are finite."""

    batch: int
    length: int
    at: Spaced | Tensor  # an index (n,) of the true tokens, where they are not spaced
    filled: Tensor | None  # index (B * L,), None where they are
    real: Tensor | None  # (B * L,) marks the true tokens, None where all are true
    kept: Tensor | None = None  # (n,) their places, None where all are true

    def take(self, rows: Tensor) -> Tensor:
        """Rows (T, H, ...) of these runs, as (B, H, L, ...); a view where they are spaced."""
        if isinstance(self.at, Spaced):
            size, stride = (self.batch, self.length, *rows.shape[1:]), (self.at.step * rows.stride(0), *rows.stride())
            taken = rows.as_strided(size, stride, rows.storage_offset() + self.at.first * rows.stride(0))
        else:
            taken = rows.index_select(0, self.filled).unflatten(0, (self.batch, self.length))  # type: ignore[arg-type]
        return taken.transpose(1, 2)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """The values (B, H, L, ...) of the true tokens, in place of their rows."""
        if isinstance(self.at, Spaced):
            self.take(rows).copy_(values)
        else:
            rows[self.at] = self._flat(values)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """The same, on top of their rows. Runs may share tokens."""
        if isinstance(self.at, Spaced):
            self.take(rows).add_(values)
        else:
            rows.index_add_(0, self.at, self._flat(values))

    def _flat(self, values: Tensor) -> Tensor:
        rows = values.transpose(1, 2).flatten(0, 1)
        return rows if self.kept is None else rows.index_select(0, self.kept)


@dataclass(frozen=True, slots=True)
class RunPair:
    """Tokens `q` .. `q + q_length` attending to tokens `k` .. `k + k_length`. The first query stands `distance` tokens
    behind the first key on its path (0: not needed, there is no window)."""

    q: int
    q_length: int
    k: int
    k_length: int
    distance: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One call of the flash kernel: B runs of queries, each against one of B runs of keys. The `first` calls, of runs
    against themselves, cover every token of the row exactly once.

    `bias` (B, 1, 1 or L_q, L_k) is -inf at the copies that fill up shorter runs of keys, and outside of the window;
    None where nothing is masked. The same as `runs` of the true tokens, () where a window hides some of their keys."""

    query: Runs
    key: Runs
    first: bool
    causal: bool
    bias: Tensor | None
    runs: tuple[RunPair, ...]


def _own_runs(forest: Forest, window: int | None, *, bidirectional: bool) -> list[RunPair]:
    """Each segment of one kind against itself; causal ones in chunks of a window's length."""
    return [
        RunPair(start + first, min(step, length - first), start + first, min(step, length - first))
        for start, length, kind in zip(forest.start, forest.length, forest.bidirectional, strict=True)
        if kind == bidirectional
        for step in [length if window is None or bidirectional else window]
        for first in range(0, length, step)
    ]


def _halved(runs: list[RunPair]) -> tuple[list[RunPair], list[list[RunPair]]]:
    """Causal runs against themselves as short ones, and the second half of each against its first, by depth: the
    halves of halves have tokens of their own."""
    short: list[RunPair] = []
    levels: list[list[RunPair]] = []
    while runs:
        short += [run for run in runs if run.q_length <= _LONGEST_CAUSAL]
        pairs = [_halves(run) for run in runs if run.q_length > _LONGEST_CAUSAL]
        levels.append([RunPair(second.q, second.q_length, first.k, first.k_length) for first, second in pairs])
        runs = [half for pair in pairs for half in pair]
    return short, levels


def _halves(run: RunPair) -> tuple[RunPair, RunPair]:
    first = -(-run.q_length // (2 * _ROUND)) * _ROUND
    rest = run.q_length - first
    return RunPair(run.q, first, run.k, first), RunPair(run.q + first, rest, run.k + first, rest)


def _inner_runs(forest: Forest) -> list[list[RunPair]]:
    """The descendants of each inner segment against it, by depth, because the queries of nested segments overlap and
    may not share a call."""
    depth = depths(forest)
    inner: list[list[RunPair]] = [[] for _ in range(max(depth, default=0))]
    for k, below in enumerate(subtree_ends(forest)):
        start, length = forest.start[k], forest.length[k]
        if below > start + length:
            inner[depth[k]].append(RunPair(start + length, below - start - length, start, length))
    return inner


def _window_runs(forest: Forest, window: int) -> list[list[RunPair]]:
    """Chunks of each segment against the nearest piece before them, the one before that, ...: pieces are chunks of the
    same path, cut where segments end, as far as the window reaches."""
    levels: list[list[RunPair]] = []
    begin = _path_begins(forest)
    for k, length in enumerate(forest.length):
        for first in range(0, length, window):
            query, size = forest.start[k] + first, min(window, length - first)
            for level, (key, keys, distance) in enumerate(_before(forest, begin, k, first, window)):
                if level == len(levels):
                    levels.append([])
                seeing = min(size, keys - 1 + window - distance)  # queries further on see nothing of this piece
                levels[level].append(RunPair(query, seeing, key, keys, distance))
    return levels


def _before(forest: Forest, begin: list[int], k: int, first: int, window: int) -> Iterator[tuple[int, int, int]]:
    """The pieces that token `first` of segment `k` sees before it on its path, outside of a segment that is
    bidirectional; nearest first, each as its first token, its length, and how far back its first token is."""
    where, segment, end = begin[k] + first, k, 0 if forest.bidirectional[k] else first
    while segment >= 0:
        reach = max(0, where - window + 1 - begin[segment])
        if reach < end:
            yield forest.start[segment] + reach, end - reach, where - begin[segment] - reach
        if reach > 0:
            return
        segment = forest.parent[segment]
        end = forest.length[segment]


def _buckets(runs: list[RunPair]) -> Iterator[list[RunPair]]:
    """Runs of like size together, so that padding wastes at most about a third of the work of a run and of a call."""
    bucket: list[RunPair] = []
    work = 0
    for run in sorted(runs, key=lambda r: (r.q_length, r.k_length), reverse=True):
        queries = max([run.q_length, *(r.q_length for r in bucket[:1])])
        keys = max([run.k_length, *(r.k_length for r in bucket)])
        own = run.q_length * run.k_length
        work += own
        cells = queries * keys
        # the allowance is about what one more call costs
        if bucket and (cells > 1.5 * own + 4096 or cells * (len(bucket) + 1) > 1.5 * work + 4096):
            yield bucket
            bucket, work = [], own
        bucket.append(run)
    if bucket:
        yield bucket


def _as_batch(starts: list[int], lengths: list[int], device: torch.device) -> Runs:
    batch, longest = len(starts), max(lengths)
    step = starts[1] - starts[0] if batch > 1 else longest
    if step >= longest == min(lengths) and starts == [starts[0] + i * step for i in range(batch)]:
        return Runs(batch, longest, Spaced(starts[0], step), None, None)
    offsets, length = torch.arange(longest), torch.tensor(lengths)[:, None]
    filled = (torch.tensor(starts)[:, None] + offsets.minimum(length - 1)).flatten()
    real = (offsets < length).flatten()
    if bool(real.all()):
        filled = filled.to(device)
        return Runs(batch, longest, filled, filled, None)
    kept = real.nonzero()[:, 0]
    return Runs(batch, longest, filled[kept].to(device), filled.to(device), real.to(device), kept.to(device))


def _part(bucket: list[RunPair], device: torch.device, window: int | None, *, first: bool, causal: bool) -> Part:
    bucket = sorted(bucket, key=lambda run: run.q)
    query = _as_batch([run.q for run in bucket], [run.q_length for run in bucket], device)
    key = _as_batch([run.k for run in bucket], [run.k_length for run in bucket], device)
    bias = None
    if causal:  # the copies stand after every true query
        return Part(query, key, first, causal, None, tuple(bucket))
    if key.real is not None:
        bias = torch.zeros(key.real.shape, device=device).masked_fill(~key.real, float("-inf"))
        bias = bias.view(key.batch, 1, 1, key.length)
    if window is None or first:
        return Part(query, key, first, causal, bias, tuple(bucket))
    band = _band(bucket, query.length, key.length, window).to(device)
    return Part(query, key, first, causal, band if bias is None else band + bias, ())


def _band(bucket: list[RunPair], queries: int, keys: int, window: int) -> Tensor:
    """Bias (B, 1, L_q, L_k): -inf where a key is `window` tokens or more behind on the path. Copies that fill up a run
    of queries see what its last query sees, so that no row is without keys."""
    last = torch.tensor([run.q_length - 1 for run in bucket])[:, None]
    distance = torch.tensor([run.distance for run in bucket])[:, None]
    offset = torch.arange(queries).minimum(last) + distance
    hidden = offset[:, :, None] - torch.arange(keys) >= window
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None]


def parts(forest: Forest, device: torch.device, window: int | None = None, *, whole: bool = False) -> tuple[Part, ...]:
    """The kernel calls for a forest, the `first` ones in front; `whole`: causal runs are not halved."""
    if window is not None:
        longest = max(begin + length for begin, length in zip(_path_begins(forest), forest.length, strict=True))
        window = window if window < longest else None
    return _parts(forest, device, window, whole)


@lru_cache(maxsize=64)
def _parts(forest: Forest, device: torch.device, window: int | None, whole: bool) -> tuple[Part, ...]:
    own = _own_runs(forest, window, bidirectional=False)
    causal, halves = (own, []) if whole else _halved(own)
    calls = [
        _part(bucket, device, None, first=True, causal=is_causal)
        for is_causal, runs in ((True, causal), (False, _own_runs(forest, window, bidirectional=True)))
        for bucket in _buckets(runs)
    ]
    above = _inner_runs(forest) if window is None else _window_runs(forest, window)
    for levels, band in ((halves, None), (above, window)):
        calls += [
            _part(bucket, device, band, first=False, causal=False) for runs in levels for bucket in _buckets(runs)
        ]
    return tuple(calls)
