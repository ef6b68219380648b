"""Ulysses sequence parallelism (arXiv 2309.14509): neighbouring ranks share one packed row.

Each rank holds an equal run of the row's tokens in every layer. For attention they exchange: a rank gives away its
tokens' other heads and gets all tokens of its own heads, so that the kernels see the whole forest and know nothing of
ranks. Images are shared out as whole tiles (whole images, in families that do not tile them), and their features are
gathered. Every rank ends with the log-probs of all trained tokens, and computes the same loss; in backward each carries
the gradient of its own tokens alone, so that gradients are added over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from foveate.encoding.family import Features
from foveate.errors import ConfigError
from foveate.models.attention.gated_delta_net import ForestGatedDeltaNet
from foveate.models.attention.kernels import AttentionOptions
from foveate.models.forward import hidden_states
from foveate.models.logprobs import Divergence, Term, chunked_terms
from foveate.models.policy import Policy
from foveate.records import Batch, Forest


def check_heads(policy: Policy, ranks: int) -> None:
    """Raise ConfigError unless the attention heads of the language model can be shared out evenly."""
    config: Any = policy.model.config
    recurrent = {layer.key_heads for layer in policy.model.modules() if isinstance(layer, ForestGatedDeltaNet)}
    heads = sorted({config.get_text_config().num_attention_heads, *recurrent})
    if any(count % ranks for count in heads):
        common = math.gcd(*heads)
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ConfigError(
            f"cluster.sequence_parallel is {ranks}, but {policy.family.name} at {policy.folder} has "
            f"{' and '.join(map(str, heads))} attention heads, which are shared out evenly; use one of {allowed}"
        )


def token_terms_split(
    policy: Policy, batch: Batch, terms: Sequence[Term], temperature: float, group: ProcessGroup
) -> tuple[Tensor, ...]:
    """`token_terms` of one row on all ranks of `group`, which call it together with the same batch and terms."""
    weight = policy.part("head").weight
    assert isinstance(weight, Tensor)

    def head(hidden: Tensor, trained: Tensor) -> Tensor:
        own: list[Term] = [term.rows(trained) if isinstance(term, Divergence) else term for term in terms]
        target = batch.token_ids_T[batch.target_M[trained]]
        return torch.stack(chunked_terms(hidden, weight, target, temperature, own), -1)

    return _of_trained(policy, batch, group, head).unbind(-1)


def trained_states_split(policy: Policy, batch: Batch, group: ProcessGroup) -> Tensor:
    """`trained_states` of one row, on all ranks of `group`, which call it together with the same batch."""
    return _of_trained(policy, batch, group, lambda hidden, _: hidden)


def token_values_split(policy: Policy, batch: Batch, group: ProcessGroup) -> Tensor:
    """`token_values` of one row on all ranks of `group`, which call it together with the same batch."""
    return _of_trained(policy, batch, group, lambda hidden, _: policy.part("head")(hidden))[:, 0]


def _of_trained(policy: Policy, batch: Batch, group: ProcessGroup, head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The output of `head` for all trained tokens of the row: (M, ...). It is given hidden states (m, D), and the
    indices (m,) of the trained tokens that they predict."""
    part = RowShare.of(batch, policy, group)
    hidden = hidden_states(policy, part.batch, split=part)
    own = head(hidden[part.batch.source_M], part.trained[part.rank])
    everything = _gathered(own, [len(one) for one in part.trained], group, is_shared=True)
    return everything[torch.cat(part.trained).argsort()]


@dataclass(frozen=True, slots=True)
class RowShare:
    """One rank's part of a row that a group of ranks shares.

    batch: its own tokens with the forest of the whole row, its own tiles, and the slots of its own image tokens.
    features: the indices of its own image tokens among the features of the row; shares: how many image tokens each
    rank's tiles give; trained: for each rank, which of the M trained tokens it predicts.
    """

    batch: Batch
    group: ProcessGroup
    rank: int
    features: Tensor
    shares: list[int]
    trained: list[Tensor]

    @classmethod
    def of(cls, batch: Batch, policy: Policy, group: ProcessGroup) -> RowShare:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        placed = batch.feature_index
        slots = len(batch.slot_index) if placed is None else int(placed.max()) + 1
        batch = _padded(batch, ranks)
        size = batch.forest.tokens // ranks
        own = slice(rank * size, (rank + 1) * size)
        mine = (batch.slot_index // size == rank).nonzero()[:, 0]
        owner_M = batch.source_M // size
        trained = [(owner_M == one).nonzero()[:, 0] for one in range(ranks)]
        pixels, grids, shares = _shared_images(batch, slots, policy, rank, ranks)
        part = replace(
            batch,
            token_ids_T=batch.token_ids_T[own],
            position_T=batch.position_T[..., own],
            routed_experts=None if batch.routed_experts is None else batch.routed_experts[own],
            pixels=pixels,
            grids=grids,
            dummy_image=not shares[rank],
            slot_index=batch.slot_index[mine] - own.start,
            feature_index=None,
            source_M=batch.source_M[trained[rank]] - own.start,
        )
        return cls(part, group, rank, mine if placed is None else placed[mine], shares, trained)

    def see(self, policy: Policy) -> Features:
        """The features of this rank's image tokens, from tiles that all ranks have encoded; and behind them those of
        a dummy image, where this rank had no tile to encode."""
        assert self.batch.pixels is not None
        seen = policy.family.features(policy.model, self.batch.pixels, self.batch.grids)

        def own(values: Tensor) -> Tensor:
            count = self.shares[self.rank]
            if not any(self.shares):
                return values
            everything = _gathered(values[:count], self.shares, self.group, is_shared=False)
            return torch.cat([everything[self.features], values[count:]])

        return Features(own(seen.embeddings), tuple(map(own, seen.deeper)))

    def attend(
        self,
        kernel: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forest: Forest,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        """`kernel` on all tokens and this rank's share of the heads. Query (H, T / ranks, d); key and value (H_kv,
        T / ranks, d), whose heads are repeated as often as makes their number a multiple of the ranks."""
        ranks = len(self.trained)
        repeat = math.lcm(len(key), ranks) // len(key)
        key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
        if options.sinks is not None:
            options = replace(options, sinks=self.own_heads(options.sinks))
        rows = [self.exchange(tensor, to_heads=True) for tensor in (query, key, value)]
        return self.exchange(kernel(*rows, forest, scale, options), to_heads=False)

    def exchange(self, rows: Tensor, *, to_heads: bool) -> Tensor:
        """(H, T / ranks, d) of all heads to (H / ranks, T, d) of this rank's heads, or back."""
        return _Exchange.apply(rows, self.group, to_heads)

    def own_heads(self, values: Tensor) -> Tensor:
        """Of values (H, ...) of all heads those of this rank's."""
        return values.chunk(len(self.trained))[self.rank]


def _padded(batch: Batch, ranks: int) -> Batch:
    """The row, made a multiple of `ranks` long by a root that nothing else sees."""
    forest, more = batch.forest, -batch.forest.tokens % ranks
    if not more:
        return batch
    experts = batch.routed_experts
    return replace(
        batch,
        routed_experts=None if experts is None else torch.cat([experts, experts[:1].expand(more, -1, -1)]),
        token_ids_T=torch.cat([batch.token_ids_T, batch.token_ids_T.new_zeros(more)]),
        position_T=torch.cat([batch.position_T, batch.position_T.new_zeros(*batch.position_T.shape[:-1], more)], -1),
        forest=Forest(
            (*forest.start, forest.tokens),
            (*forest.length, more),
            (*forest.parent, -1),
            (*forest.bidirectional, False),
        ),
    )


def _shared_images(
    batch: Batch, slots: int, policy: Policy, rank: int, ranks: int
) -> tuple[Tensor | None, tuple[tuple[int, ...], ...], list[int]]:
    """The pixels and grids of this rank, and how many image tokens the pixels of each rank give. Tiles, or whole
    images, go in runs of about equal tokens; a rank that gets none encodes a dummy image, so that all make the same
    calls.
    """
    dummy_image = policy.family.dummy_image
    if dummy_image is None:
        return None, (), [0] * ranks
    pixels = batch.pixels
    if pixels is None or batch.dummy_image:
        return dummy_image.pixels.to(batch.token_ids_T.device), dummy_image.grids, [0] * ranks
    if policy.family.image_layouts:
        tokens, units = [layout[1] for layout in batch.grids], [layout[0] for layout in batch.grids]
    elif batch.grids:
        tokens = [rows * columns for rows, columns, *_ in batch.grids]
        seen = [math.prod(grid) for grid in batch.grids]  # each frame of a piece of a video has entries of its own
        are_tiles = len(batch.grids) == len(pixels)
        units = [1 if are_tiles else count * (len(pixels) // sum(seen)) for count in seen]
    else:
        tokens, units = [slots // len(pixels)] * len(pixels), [1] * len(pixels)
    middles = [end - own / 2 for end, own in zip(accumulate(tokens), tokens, strict=True)]
    owner = [min(ranks - 1, int(middle * ranks / slots)) for middle in middles]
    shares = [sum(own for own, one in zip(tokens, owner, strict=True) if one == other) for other in range(ranks)]
    if rank not in owner:
        return dummy_image.pixels.to(pixels.device), dummy_image.grids, shares
    pieces = [piece for piece, one in zip(pixels.split(units), owner, strict=True) if one == rank]
    grids = tuple(grid for grid, one in zip(batch.grids, owner, strict=False) if one == rank)
    return torch.cat(pieces), grids, shares


class _Exchange(torch.autograd.Function):
    """(H, T / n, d) on each of n ranks to (H / n, T, d), or back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchanged(rows, group, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(grads[0], ctx.group, not ctx.to_heads), None, None


def _exchanged(rows: Tensor, group: ProcessGroup, to_heads: bool) -> Tensor:
    ranks = dist.get_world_size(group)
    sent = torch.stack(rows.chunk(ranks, 0 if to_heads else 1))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), 1 if to_heads else 0)


def _gathered(values: Tensor, counts: Sequence[int], group: ProcessGroup, *, is_shared: bool) -> Tensor:
    """The rows of all ranks in their order, `counts` of each. is_shared: every rank makes the same use of the result,
    so that the gradient of its own rows is whole on each; otherwise the gradients of the ranks are added."""
    return _Gathered.apply(values, tuple(counts), group, is_shared)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: tuple[int, ...], group: ProcessGroup, is_shared: bool) -> Tensor:
        ctx.counts, ctx.group, ctx.is_shared = counts, group, is_shared
        longest = max(counts)
        filled = torch.cat([values, values.new_zeros(longest - len(values), *values.shape[1:])])
        everything = [torch.empty_like(filled) for _ in counts]
        dist.all_gather(everything, filled, group=group)
        return torch.cat([rows[:count] for rows, count in zip(everything, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        if not ctx.is_shared:
            grad = grad.clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.counts)[dist.get_rank(ctx.group)], None, None, None
