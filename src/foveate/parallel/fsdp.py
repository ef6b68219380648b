"""One model over many ranks with PyTorch's FSDP2, applied from outside to a model that knows nothing of it.

Every rank runs the same blocks in the same order, so a rank must not skip the vision tower while others run it: a batch
without images beside others with them needs a dummy one (`foveate.parallel.packing.pad_with_dummy_image`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.modeling_layers import GradientCheckpointingLayer

from foveate.config.cluster import ClusterSettings
from foveate.models.attention.gated_delta_net import leave_recurrence
from foveate.models.attention.kernels import keep_from_compiler
from foveate.models.forward import token_terms, token_values, trained_states
from foveate.models.logprobs import LOGP_ENTROPY, TeacherStates, TeacherTopK, Term, chunked_top_k
from foveate.models.policy import DTYPES, Policy
from foveate.models.routing import Routing
from foveate.parallel.ulysses import token_terms_split, token_values_split, trained_states_split
from foveate.records import Batch


class _OfPolicy(nn.Module):
    """A module around the model of a policy."""

    def __init__(
        self, policy: Policy, sequence: ProcessGroup | None = None, autocast: torch.dtype | None = None
    ) -> None:
        """`sequence`: the ranks that share each row with this one; `autocast`: what the only rank computes in."""
        super().__init__()
        self.model = policy.model
        self.policy = policy
        self.sequence = sequence
        self.autocast = autocast


class LogProbs(_OfPolicy):
    """`token_terms` of a policy as the forward of one module, because FSDP gathers weights around a forward: also
    those that belong to no block (the head, whose logits are never whole, and the embedding)."""

    def forward(
        self,
        batch: Batch,
        temperature: float = 1.0,
        terms: Sequence[Term] = LOGP_ENTROPY,
        routing: Routing | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probs and entropies, or other terms, each (M,), of the trained tokens of this rank's batch. `routing`, of
        a rank with rows of its own: what routers do, by default with the experts of the batch."""
        if self.sequence is not None:
            found = token_terms_split(self.policy, batch, terms, temperature, self.sequence)
            return tuple(map(own_memory, found))
        with _computing_in(self.autocast, self.policy):
            return token_terms(self.policy, batch, terms, temperature, routing)


class Values(_OfPolicy):
    """`token_values` of a critic, as `LogProbs` is `token_terms` of a policy."""

    def forward(self, batch: Batch) -> Tensor:
        """Values (M,) before the trained tokens of this rank's batch."""
        if self.sequence is not None:
            return own_memory(token_values_split(self.policy, batch, self.sequence))
        with _computing_in(self.autocast, self.policy):
            return own_memory(token_values(self.policy, batch))


class TeacherOutput(_OfPolicy):
    """The output of a frozen teacher at the trained tokens of a batch, to compare a policy with
    (`foveate.models.logprobs.Divergence`)."""

    def forward(
        self, batch: Batch, temperature: float, top_k: int | None, vocabulary: int
    ) -> TeacherStates | TeacherTopK:
        """Hidden states (M, D) with the head, or the `top_k` log-probs among the first `vocabulary` tokens. The head
        is that of the module, which stays gathered when this returns."""
        if self.sequence is not None:
            hidden = trained_states_split(self.policy, batch, self.sequence)
        else:
            with _computing_in(self.autocast, self.policy):
                hidden = trained_states(self.policy, batch)
        weight = self.policy.part("head").weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()[:vocabulary]
        return TeacherStates(hidden, weight) if top_k is None else chunked_top_k(hidden, weight, temperature, top_k)


def own_memory(output: Tensor) -> Tensor:
    """The output of a module that is sharded, or a copy of it where it is a view: an operation in place on a view would
    lose the hook by which FSDP gathers weights for the backward pass."""
    return output.clone() if output._is_view() else output


def _computing_in(dtype: torch.dtype | None, policy: Policy) -> AbstractContextManager[object]:
    """Weights and activations of the products within are rounded to `dtype`; None: they stay as they are."""
    return nullcontext() if dtype is None else torch.autocast(policy.device.type, dtype)


Root = TypeVar("Root", LogProbs, Values, TeacherOutput)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the vision tower and of the language model, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_blocks(model: nn.Module, *, sharded: bool = False) -> None:
    """Let torch compile what a block does around its attention, for rows of any length. One that will be `sharded` is
    compiled for the first length and then for any: told at once that lengths vary, PyTorch takes the numbers of such a
    module for lengths, too, and cannot look up the compiled code in its cache a second time."""
    keep_from_compiler()
    leave_recurrence()
    for block in blocks(model):
        block.compile(dynamic=None if sharded else True, recompile_limit=64)


def mesh_of(cluster: ClusterSettings, device: str) -> DeviceMesh:
    """All ranks; where a copy of the weights is on fewer than all, as (copies, ranks of a copy)."""
    copies = cluster.ranks // cluster.shards
    shape, names = ((copies, cluster.shards), ("copy", "shard")) if copies > 1 else ((cluster.ranks,), ("shard",))
    return init_device_mesh(device, shape, mesh_dim_names=names)


def shard(root: Root, mesh: DeviceMesh, cluster: ClusterSettings, *, checkpointing: bool = False) -> Root:
    """Cut the weights of what computes log-probs or values over the ranks of `mesh`, in place.

    Each block is gathered for its forward and again for its backward, and freed in between unless `cluster.reshard` is
    false; what is in no block stays gathered from forward to backward. Gradients are added over ranks, in float32, and
    not averaged: a loss divides by the totals of the whole step. With `checkpointing`, blocks keep nothing but their
    inputs. The weights may be on the meta device, then nothing is allocated. Called once, before an optimizer is made.
    """
    if checkpointing:
        model: Any = root.model
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; the models have no dropout
    precision = MixedPrecisionPolicy(DTYPES[cluster.dtype] if cluster.dtype else None, reduce_dtype=torch.float32)
    rest = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cluster.offload else OffloadPolicy()
    cut = partial(_cut, cluster.shards)
    settings = {"mesh": mesh, "mp_policy": precision, "offload_policy": rest, "shard_placement_fn": cut}
    if not cluster.reshard:
        settings["reshard_after_forward"] = False
    for module in (*blocks(root.model), root):
        full_tensor = fully_shard(module, **settings)
        assert isinstance(full_tensor, FSDPModule)
        full_tensor.set_gradient_divide_factor(1.0)
        full_tensor.set_force_sum_reduction_for_comms(True)  # gloo has no sum that scales
    return root


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, or all of one that is cut over ranks, which call this together and talk where they compute."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)
    return there.full_tensor()


def _cut(ranks: int, weight: nn.Parameter) -> Shard | None:
    """The dimension along which a weight is cut: its first, unless only another can be cut evenly. There are fewer
    experts than ranks in a large run, and cut by experts half the ranks would hold twice their share."""
    even = [dim for dim, size in enumerate(weight.shape) if size % ranks == 0]
    return Shard(even[0]) if even else None
