"""A model cut over ranks computes what one process computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rank_cases import start_ranks
from torch.distributed.tensor import DTensor

from foveate.config.cluster import ClusterSettings
from foveate.models.forward import token_logprobs, token_terms, token_values
from foveate.models.policy import freeze_except, load_policy
from foveate.parallel import fsdp
from foveate.parallel.fsdp import LogProbs, Values, blocks, mesh_of, shard
from foveate.parallel.packing import pack
from foveate.records import ImageSlot, PackedGroup, Prompt

RANKS = 2
CASES = {
    "full": {},
    "checkpointing": {"checkpointing": True},
    "offload": {"offload": True, "checkpointing": True},
    "none": {"shard": "none"},
    "kept": {"reshard": False},
    "kept, checkpointing": {"reshard": False, "checkpointing": True},
    "hybrid": {"nodes": 2, "gpus_per_node": 1, "shard": "hybrid"},
    "frozen vision": {"trainable": ["projector", "language"]},
}


def batch_of(rank, image_token):
    """Every rank has other lengths, one image each."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 200, (40,), generator=generator).tolist()
    prompt = (*ids[:3], *[image_token] * 4, *ids[3 : 8 + 3 * rank])
    pixels = torch.randn(1, 3, 56, 56, generator=generator)
    answers = (tuple(ids[20:27]), tuple(ids[27 : 30 + rank]))
    return pack([PackedGroup.of_tokens(Prompt(prompt, (ImageSlot(3, 4, 1),), pixels, ()), answers)])


def loss_of(logp_M, entropy_M):
    weight_M = torch.linspace(0.5, 1.5, len(logp_M))
    return (weight_M * logp_M).sum() / 20 - 0.1 * entropy_M.sum() / 20


def gradients(policy):
    found = {}
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def on_one_process(folder, train):
    policy = load_policy(folder)
    freeze_except(policy, train)
    losses = [loss_of(*token_logprobs(policy, batch_of(rank, policy.family.image_token_id))) for rank in range(RANKS)]
    torch.stack(losses).sum().backward()
    return losses, gradients(policy)


def on_rank(rank, folder, meeting, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    for case, changes in CASES.items():
        changes = {"gpus_per_node": RANKS, **changes}
        train = changes.pop("trainable", ["vision", "projector", "language"])
        checkpointing = changes.pop("checkpointing", False)
        cluster = ClusterSettings(**changes)
        policy = load_policy(folder)
        freeze_except(policy, train)
        step = shard(LogProbs(policy), mesh_of(cluster, "cpu"), cluster, checkpointing=checkpointing)
        batch = batch_of(rank, policy.family.image_token_id)
        loss = loss_of(*step(batch))
        loss.backward()
        whole = gradients(policy)
        shapes = {n: tuple(p.to_local().shape) for n, p in policy.model.named_parameters()}
        torch.save((loss.detach(), whole, shapes), f"{out}/{case}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    start_ranks(on_rank, RANKS, str(tiny_folder), str(out / "meeting"), str(out))
    return out


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_over_ranks_are_those_of_one_process(results, tiny_folder, case):
    train = CASES[case].get("trainable", ["vision", "projector", "language"])
    losses, expected = on_one_process(str(tiny_folder), train)
    for rank in range(RANKS):
        loss, found, _ = torch.load(results / f"{case}-{rank}.pt")
        torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-5, atol=0)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


def test_each_weight_is_on_one_rank_and_each_rank_holds_about_half(results, tiny_policy):
    whole = {name: parameter.numel() for name, parameter in tiny_policy.model.named_parameters()}
    held = [torch.load(results / f"full-{rank}.pt")[2] for rank in range(RANKS)]
    counts = [{name: torch.Size(shape).numel() for name, shape in shapes.items()} for shapes in held]
    assert {name: counts[0][name] + counts[1][name] for name in whole} == whole
    assert sum(counts[0].values()) < 0.51 * sum(whole.values())


def test_blocks_are_those_of_the_vision_tower_and_of_the_language_model(tiny_policy):
    assert len(blocks(tiny_policy.model)) == 2 + 3


@pytest.mark.parametrize("sequence", [None, "a group"])
def test_what_a_sharded_module_returns_has_memory_of_its_own(tiny_policy, monkeypatch, sequence):
    """FSDP hooks into its outputs, and an operation in place on a view would lose the hook."""
    batch, width = batch_of(0, tiny_policy.family.image_token_id), tiny_policy.part("head").weight.shape[1]
    critic = replace(tiny_policy, model=copy.deepcopy(tiny_policy.model))
    critic.model.lm_head = torch.nn.Linear(width, 1, bias=False)
    monkeypatch.setattr(fsdp, "token_terms_split", lambda *a: torch.stack(token_terms(*a[:4]), -1).unbind(-1))
    monkeypatch.setattr(fsdp, "token_values_split", lambda *a: token_values(*a[:2]))
    for root in (LogProbs(tiny_policy, sequence), Values(critic, sequence)):
        outputs = root(batch)
        for output in outputs if isinstance(outputs, tuple) else [outputs]:
            assert output.requires_grad
            assert not output._is_view()
