"""Runs of mixtures whose experts are replayed and balanced, and what refuses that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_cases import build_family
from pydantic import ValidationError
from rank_cases import spawn
from test_ranks import Calls
from toy import make_data, rl_settings
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from foveate.algorithms.supervised import sft_total
from foveate.cluster.base import scatter
from foveate.cluster.local import LocalWorkers
from foveate.config.cluster import ClusterSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.log import read_metrics
from foveate.models.forward import hidden_states
from foveate.models.routing import ROUTERS
from foveate.parallel.fsdp import full_tensor
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.rl import run_rl
from foveate.train.worker import Worker


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return build_family(tmp_path_factory.mktemp("mixture") / "model", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def groups_of(lengths):
    prompts = [Prompt(ids, (), None, ids) for ids in (tuple(range(20, 29)), tuple(range(40, 55)))]
    return [
        PackedGroup.of_tokens(prompt, [tuple(range(30 + i, 30 + i + n)) for i, n in enumerate(lengths)])
        for prompt in prompts
    ]


def router_weights(worker):
    return [module.weight for module in worker.policy.model.modules() if type(module).__name__ in ROUTERS]


def worker_of(folder, **settings):
    worker = Worker(ModelSettings(path=str(folder), **settings), OptimSettings(lr=1e-3), 4096)
    worker.optimizer, worker.max_grad_norm = torch.optim.SGD([*worker.policy.model.parameters()], lr=1.0), 1e6
    return worker


def test_the_gradient_of_an_update_is_that_of_the_loss_and_of_the_balance(mixture):
    groups = groups_of((7, 4))
    coefficient, moved = 0.3, {}
    for own in (0.0, coefficient):
        worker = worker_of(mixture, router_aux_loss_coef=own)
        before = [weight.detach().clone() for weight in router_weights(worker)]
        record = worker.update_sft(groups, "token", sft_total(groups, "token"), 1.0)
        moved[own] = [old - new.detach() for old, new in zip(before, router_weights(worker), strict=True)]
        assert ("loss/router_aux" in record) == bool(own)
    plain = worker_of(mixture)
    logits, routers = [], [m for m in plain.policy.model.modules() if type(m).__name__ in ROUTERS]
    for router in routers:
        router.register_forward_hook(lambda _, __, out: logits.append(out[0]))
    hidden_states(plain.policy, pack(groups))
    balance = load_balancing_loss_func(tuple(logits), routers[0].num_experts, routers[0].top_k)
    assert record["loss/router_aux"] == pytest.approx(balance.item(), rel=1e-5)
    grads = torch.autograd.grad(balance, [router.weight for router in routers])
    for with_it, without, grad in zip(moved[coefficient], moved[0.0], grads, strict=True):
        torch.testing.assert_close(with_it - without, coefficient * grad, rtol=1e-3, atol=1e-6)


def test_what_a_router_decides_anew_changes_the_update_and_what_is_replayed_does_not(mixture):
    """Old log-probs after the routers have moved: by the sampler's experts, and by their own."""
    worker = worker_of(mixture)
    prompt = groups_of((1,))[0].prompt
    engine = NativeEngine(worker.policy, str, record_experts=True)
    [answers] = engine.generate([Request(prompt, 1)], SamplingParams(4, 12))
    free = PackedGroup.of_tokens(prompt, [answer.token_ids for answer in answers])
    group = PackedGroup(prompt, answers)
    [replayed], [own] = worker.logprobs([group]), worker.logprobs([free])
    torch.testing.assert_close(replayed, own, rtol=1e-5, atol=1e-5)
    assert np.abs(replayed.numpy() - np.concatenate([answer.logprobs for answer in answers])).max() < 1e-4
    with torch.no_grad():
        for weight in router_weights(worker):
            weight.copy_(weight.roll(1, 0))  # the same probabilities, of other experts
    [replayed], [own] = worker.logprobs([group]), worker.logprobs([free])
    assert (replayed - own).abs().max() > 0.05


@pytest.mark.parametrize("more", [{}, {"rollout": {"samples": 4, "max_tokens": 8, "staleness": 1, "partial": True}}])
def test_a_run_replays_and_balances(mixture, data, tmp_path, more):
    changes = {
        "algorithm": {"router_replay": True, "correction": {"mode": "sequence-truncate"}},
        "train": {"steps": 2, "updates_per_step": 2},
        "eval": {"every": 0},
        **more,
    }
    settings = rl_settings(tmp_path / "run", mixture, data, model={"router_aux_loss_coef": 0.01}, **changes)
    records = read_metrics(run_rl(settings).metrics)
    assert len(records) == 2
    for record in records:
        assert record["loss/router_aux"] > 1
        assert not record["optim/update_skipped"]
        assert record["engine/logprob_difference_max"] < (1e-4 if not more else 5)


def test_settings_of_mixtures_are_refused_where_they_cannot_act(tiny_folder, mixture, data, tmp_path):
    model = ModelSettings(path=str(tiny_folder), router_aux_loss_coef=0.1)
    with pytest.raises(ConfigError, match="router_aux_loss_coef needs a mixture of experts, but the model is none"):
        Worker(model, OptimSettings(lr=1e-3), 64)
    with pytest.raises(ConfigError, match="router_replay needs a mixture of experts, but the model is none"):
        Worker(ModelSettings(path=str(tiny_folder)), OptimSettings(lr=1e-3), 64, router_replay=True)
    told = {"engine": "vllm", "samples": 4, "engine_settings": {"record_experts": False}}
    settings = rl_settings(tmp_path / "run", mixture, data, algorithm={"router_replay": True}, rollout=told)
    with pytest.raises(ConfigError, match="engine vllm does not tell which experts it chose; use native"):
        run_rl(settings)
    split = {"cluster": {"device": "cpu", "gpus_per_node": 2, "sequence_parallel": 2}}
    balanced = {"path": str(mixture), "router_aux_loss_coef": 0.1}
    with pytest.raises(ValidationError, match="balances whole rows, of which ranks see parts"):
        rl_settings(tmp_path / "split", mixture, data, model=balanced, **split)


def balanced(rank, ranks, _, folder):
    """An update on rows of one group each: what it says, and the routers behind it."""
    cluster = ClusterSettings(device="cpu", gpus_per_node=ranks) if ranks > 1 else None
    model = ModelSettings(path=folder, router_aux_loss_coef=0.3)
    worker = Worker(model, OptimSettings(lr=1e-3), 16, cluster=cluster)
    worker.optimizer = torch.optim.SGD([*worker.policy.model.parameters()], lr=1.0)
    workers = LocalWorkers(worker) if cluster is None else Calls(worker, rank, ranks, 1)
    groups = [*groups_of((7, 4)), *groups_of((3, 9))]
    rest = "token", sft_total(groups, "token"), 1e-2
    record = next(scatter(workers, Worker.update_sft, groups, [1.0] * len(groups), *rest))[1]
    return record, [full_tensor(weight.detach()).cpu() for weight in router_weights(worker)]


@pytest.mark.slow
def test_two_ranks_balance_as_one_does(mixture, tmp_path):
    record, wanted = balanced(0, 1, None, str(mixture))
    for said, weights in spawn(balanced, 2, tmp_path, str(mixture)):
        assert said["loss/router_aux"] == pytest.approx(record["loss/router_aux"], rel=1e-5)
        assert said["optim/grad_norm"] == pytest.approx(record["optim/grad_norm"], rel=1e-4)
        for got, weight in zip(weights, wanted, strict=True):
            torch.testing.assert_close(got, weight, rtol=1e-5, atol=1e-6)
