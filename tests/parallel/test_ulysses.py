"""A row that ranks share is computed as one process computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from family_cases import build_family
from rank_cases import gradients, loss_of, rows, spawn
from slow_cases import slow_but
from torch.distributed.device_mesh import init_device_mesh

from foveate.config.cluster import ClusterSettings
from foveate.errors import ConfigError
from foveate.models.forward import token_logprobs, token_terms
from foveate.models.logprobs import LOGP_ENTROPY, Divergence, TeacherTopK
from foveate.models.policy import load_policy
from foveate.models.routing import follow_routers
from foveate.parallel.fsdp import LogProbs, mesh_of, shard
from foveate.parallel.ulysses import check_heads, token_terms_split

MODELS = ("internvl", "qwen3_vl_moe", "qwen3_moe", "gpt_oss", "qwen3_5")
"""Dense with images, mixture of experts with images and DeepStack, without images, with windows and sinks; and with
recurrent layers."""


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {"internvl": tiny_folder} | {name: build_family(folder / name, name) for name in MODELS[1:]}


def with_bidirectional_prompts(batch):
    """The batch, every prompt of which sees itself in both directions."""
    return replace(batch, forest=replace(batch.forest, bidirectional=tuple(k < 0 for k in batch.forest.parent)))


def with_replayed_experts(batch):
    """The batch of a mixture of three layers with arbitrary two of four experts for each token."""
    ranked = torch.rand(batch.forest.tokens, 3, 4, generator=torch.Generator().manual_seed(4)).argsort(-1)
    return replace(batch, routed_experts=ranked[..., :2].to(torch.int16))


def alone(folder, data_ranks, attention, of_row=lambda batch: batch):
    policy = load_policy(str(folder), attention=attention)
    follow_routers(policy.model)
    losses = [loss_of(*token_logprobs(policy, of_row(batch))) for batch in rows(policy.family, ranks=data_ranks)]
    torch.stack(losses).sum().backward()
    return [loss.item() for loss in losses], gradients(policy.model)


def shared(rank, ranks, _, folders, attention, sequence, of_row=None):
    """Loss and gradients of each model on `ranks`, which are cut into groups of `sequence` that share a row."""
    mesh = init_device_mesh("cpu", (ranks // sequence, sequence), mesh_dim_names=("data", "sequence"))
    group = mesh["sequence"].get_group()
    found = {}
    for name, folder in folders.items():
        policy = load_policy(str(folder), attention=attention)
        follow_routers(policy.model)
        batch = rows(policy.family, ranks=ranks // sequence)[rank // sequence]
        batch = batch if of_row is None else of_row(batch)
        if ranks == sequence:
            loss = loss_of(*token_terms_split(policy, batch, LOGP_ENTROPY, 1.0, group))
            loss.backward()
            for parameter in policy.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        else:
            cluster = ClusterSettings(gpus_per_node=ranks, sequence_parallel=sequence)
            step = shard(LogProbs(policy, group), mesh_of(cluster, "cpu"), cluster, checkpointing=True)
            loss = loss_of(*step(batch))
            loss.backward()
        found[name] = loss.item(), gradients(policy.model)
    return found


def require_equal(found, losses, expected, sequence):
    zero = 1e-4 * max(gradient.abs().max() for gradient in expected.values())  # such as biases of keys, always 0
    for rank, (loss, own) in enumerate(found):
        assert loss == pytest.approx(losses[rank // sequence], rel=1e-5)
        assert own.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = max(gradient.abs().max(), zero)
            assert (own[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("attention", slow_but(["sdpa"], ["sdpa", "reference"]))
def test_two_ranks_that_share_a_row_compute_what_one_computes(tmp_path, folders, attention):
    found = spawn(shared, 2, tmp_path, folders, attention, 2)
    for name, folder in folders.items():
        require_equal([own[name] for own in found], *alone(folder, 1, attention), sequence=2)


def test_two_ranks_share_a_row_with_bidirectional_segments(tmp_path, folders):
    chosen = {name: folders[name] for name in ("internvl", "gpt_oss")}
    found = spawn(shared, 2, tmp_path, chosen, "sdpa", 2, with_bidirectional_prompts)
    for name, folder in chosen.items():
        losses, expected = alone(folder, 1, "sdpa", with_bidirectional_prompts)
        require_equal([own[name] for own in found], losses, expected, sequence=2)
        assert losses != alone(folder, 1, "sdpa")[0]


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [1, 2])
def test_two_ranks_replay_experts_in_shared_rows_and_in_shared_weights(sequence, tmp_path, folders):
    chosen = {name: folders[name] for name in ("qwen3_vl_moe", "gpt_oss")}
    found = spawn(shared, 2, tmp_path, chosen, "sdpa", sequence, with_replayed_experts)
    for name, folder in chosen.items():
        losses, expected = alone(folder, 2 // sequence, "sdpa", with_replayed_experts)
        require_equal([own[name] for own in found], losses, expected, sequence=sequence)
        assert losses != alone(folder, 2 // sequence, "sdpa")[0]


def divergence(_rank, ranks, _folder, model):
    """The divergence of each token of a shared row to a teacher that the ranks know whole."""
    policy = load_policy(str(model))
    (batch,) = rows(policy.family, ranks=1)
    group = dist.group.WORLD if ranks > 1 else None
    generator = torch.Generator().manual_seed(0)
    top = torch.randn(len(batch.target_M), 200, generator=generator).log_softmax(-1).topk(4)
    terms = ("logp", Divergence("reverse_kl", TeacherTopK(top.indices, top.values)))
    with torch.no_grad():
        if group is not None:
            return token_terms_split(policy, batch, terms, 0.7, group)
        return token_terms(policy, batch, terms, 0.7)


def test_ranks_that_share_a_row_share_the_teacher_of_its_tokens(tmp_path, folders):
    alone_terms = divergence(0, 1, None, folders["internvl"])
    for found in spawn(divergence, 2, tmp_path, folders["internvl"]):
        for got, wanted in zip(found, alone_terms, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_four_ranks_share_key_value_heads_of_which_there_are_two(tmp_path, folders):
    found = spawn(shared, 4, tmp_path, {name: folders[name] for name in ("internvl", "gpt_oss")}, "sdpa", 4)
    for name in ("internvl", "gpt_oss"):
        require_equal([own[name] for own in found], *alone(folders[name], 1, "sdpa"), sequence=4)


@pytest.mark.slow
def test_rows_shared_by_two_of_four_ranks_that_share_the_weights(tmp_path, folders):
    chosen = {name: folders[name] for name in ("internvl", "qwen3_vl_moe", "qwen3_5")}
    found = spawn(shared, 4, tmp_path, chosen, "sdpa", 2)
    for name, folder in chosen.items():
        require_equal([own[name] for own in found], *alone(folder, 2, "sdpa"), sequence=2)


def test_ranks_that_do_not_divide_the_heads_are_refused(tiny_policy):
    check_heads(tiny_policy, 4)
    with pytest.raises(ConfigError, match=r"sequence_parallel is 3, but internvl at .* has 4 attention heads.*1, 2, 4"):
        check_heads(tiny_policy, 3)


def test_ranks_that_do_not_divide_the_heads_of_recurrent_layers_are_refused(folders):
    with pytest.raises(
        ConfigError, match=r"sequence_parallel is 4, but qwen3_5 at .* has 2 and 4 attention .*of 1, 2$"
    ):
        check_heads(load_policy(str(folders["qwen3_5"])), 4)
