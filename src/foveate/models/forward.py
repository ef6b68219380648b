"""One packed row through the model: image features scattered by position, log-probs of the trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.encoding.family import Features
from foveate.models.attention.kernels import KeyValueCache, SequenceParallelAttention
from foveate.models.logprobs import LOGP_ENTROPY, Term, chunked_terms
from foveate.models.policy import Policy
from foveate.models.routing import Routing
from foveate.records import Batch


def embed(
    policy: Policy, batch: Batch, split: SequenceParallelAttention | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Input embeddings (T, D): token embeddings, with image features at the slots; each image is encoded once. And
    the language model's further inputs: features that enter behind its first layers, and where.

    Features beyond those of the slots are of a dummy image, which keeps the ranks of a sharded model in step: they
    enter with weight 0, so that the vision tower is in the graph."""
    language: Any = policy.part("language")
    embeddings = language.get_input_embeddings()(batch.token_ids_T)
    if batch.pixels is None:
        return embeddings, {}
    if split is not None:
        seen = split.see(policy)
    elif policy.features is not None and batch.images:
        seen = policy.features.of(policy, batch.images)
    elif batch.patches is not None:
        seen = policy.family.of_patches(policy.model, batch.patches, batch.grids)
    else:
        seen = policy.family.features(policy.model, batch.pixels, batch.grids)
    if batch.feature_index is not None and split is None:
        kept = [features.index_select(0, batch.feature_index) for features in (seen.embeddings, *seen.deeper)]
        seen = Features(kept[0], tuple(kept[1:]))
    index, dummy_image = batch.slot_index, len(seen.embeddings) - len(batch.slot_index)
    assert dummy_image == 0 or (dummy_image > 0 and batch.dummy_image), (
        f"{len(seen.embeddings)} image features for {len(index)} image tokens"
    )
    embeddings = embeddings.index_copy(0, index, seen.embeddings[: len(index)].to(embeddings.dtype))
    for features in (seen.embeddings, *seen.deeper) if dummy_image else ():
        embeddings = embeddings + 0 * features[len(index) :].sum().to(embeddings.dtype)
    if not seen.deeper:
        return embeddings, {}
    mask = torch.zeros(1, len(embeddings), dtype=torch.bool, device=index.device).index_fill(1, index, True)
    deeper = [features[: len(index)] for features in seen.deeper]
    return embeddings, {"visual_pos_masks": mask, "deepstack_visual_embeds": deeper}


def hidden_states(
    policy: Policy,
    batch: Batch,
    cache: KeyValueCache | None = None,
    split: SequenceParallelAttention | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Final hidden states (T, D) of a packed row. A `cache` sees the keys and values of every layer; with a
    `split`, the row is one rank's part. `routing`: what routers do, by default with the experts of the batch."""
    embeddings, more = embed(policy, batch, split)
    if routing is None and batch.routed_experts is not None:
        routing = Routing(batch.routed_experts)
    out = policy.part("language")(
        inputs_embeds=embeddings[None],
        position_ids=batch.position_T[..., None, :],
        forest=batch.forest,
        cache=cache,
        split=split,
        routing=routing,
        use_cache=False,
        **more,
    )
    assert routing is None or routing.reached, "follow_routers comes before a routing"
    return out.last_hidden_state[0]


def token_logprobs(policy: Policy, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (M,) of the trained tokens, under softmax(logits / temperature)."""
    logp_M, entropy_M = token_terms(policy, batch, LOGP_ENTROPY, temperature)
    return logp_M, entropy_M


def token_terms(
    policy: Policy, batch: Batch, terms: Sequence[Term], temperature: float = 1.0, routing: Routing | None = None
) -> tuple[Tensor, ...]:
    """The `terms` of `foveate.models.logprobs.chunked_terms`, each (M,), of the trained tokens."""
    hidden = hidden_states(policy, batch, routing=routing)
    weight = policy.part("head").weight
    assert isinstance(weight, Tensor)
    return chunked_terms(hidden[batch.source_M], weight, batch.token_ids_T[batch.target_M], temperature, terms)


def trained_states(policy: Policy, batch: Batch) -> Tensor:
    """Final hidden states (M, D) before each trained token."""
    return hidden_states(policy, batch)[batch.source_M]


def token_values(policy: Policy, batch: Batch) -> Tensor:
    """The output of a head of one number before each trained token: (M,)."""
    return policy.part("head")(hidden_states(policy, batch)[batch.source_M])[:, 0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module set back afterwards to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
