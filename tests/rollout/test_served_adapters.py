"""Adapters that servers apply by themselves: what travels when, over a base that goes once."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from test_engine_conformance import Case, start
from test_engine_families import build
from test_server_engine import FakeEngine, requests_of

from foveate.cluster.weights import Incoming, Outgoing
from foveate.config.model import LoraSettings
from foveate.encoding.encode import Encoder
from foveate.encoding.family import ServedAs
from foveate.errors import DataError, EngineError
from foveate.models.lora import merged_state, train_parts
from foveate.models.policy import load_policy
from foveate.records import SamplingParams
from foveate.rollout.build import weights_for
from foveate.rollout.check import check_engine
from foveate.rollout.server.adapters import all_adapters, language_adapters, served_adapters
from foveate.rollout.server.weights import frozen_weights, served_weights

ALL = ("vision", "projector", "language")
LORA = LoraSettings(rank=3, alpha=7)


def adapted(folder, parts=ALL, lora=LORA, seed=1):
    policy = load_policy(str(folder))
    train_parts(policy, parts, lora)
    learn(policy, seed)
    return policy


@torch.no_grad()
def learn(policy, seed):
    """Change what trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def test_a_server_gets_once_what_stays_and_each_time_the_matrices_and_what_trains_beside_them(tiny_folder):
    policy = adapted(tiny_folder)
    adapters, wanted = language_adapters(policy), merged_state(policy.model)
    once, each = dict(frozen_weights(policy.model, adapters)), dict(served_weights(policy.model, adapters))
    assert not once.keys() & each.keys()
    part_of = policy.family.part_of
    assert {part_of(name) for name in each if ".lora_" not in name} == {"vision", "projector"}
    assert {part_of(name) for name in once} == {"language", "head"}
    state = {**once, **{name: tensor for name, tensor in each.items() if ".lora_" not in name}}
    for layer in adapters.layers:
        first, second = each[f"{layer}.lora_A.weight"], each[f"{layer}.lora_B.weight"]
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + adapters.alpha / adapters.rank * (second @ first)
    assert state.keys() == dict(served_weights(policy.model)).keys()
    assert all(torch.allclose(state[name], wanted[name], atol=1e-6) for name in state)
    before = {name: tensor.clone() for name, tensor in once.items()}
    learn(policy, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen_weights(policy.model, adapters))


def test_a_publish_is_as_large_as_the_adapters_and_a_server_that_starts_again_gets_all(tiny_folder):
    policy, engine = adapted(tiny_folder, ("language",)), FakeEngine()
    try:
        engine._policy, engine.adapters = policy, language_adapters(policy)
        found = engine.publish(8, weights_for(engine, policy))
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        assert found == {"engine/publish_bytes": sum(parameter.nbytes for parameter in trained)}
        assert {".lora_" in name for name in engine.published[-1][1]} == {True}
        os.kill(engine.state()["pid"], signal.SIGKILL)
        assert engine.generate(requests_of(1), SamplingParams())[0][0].version == 8
        whole = {*dict(frozen_weights(policy.model, engine.adapters)), *engine.published[-2][1]}
        assert {*engine.published[-1][1]} == whole
    finally:
        engine.close()


def test_adapters_that_a_server_cannot_apply_are_merged_and_the_log_says_why(tiny_folder, caplog):
    policy, served = adapted(tiny_folder), ServedAs()
    assert served_adapters(policy, "vllm", served, "auto", 3) is not None
    assert served_adapters(policy, "vllm", served, "merged", 3) is None
    assert served_adapters(load_policy(str(tiny_folder)), "vllm", served, "auto", 3) is None
    assert not caplog.records
    cases = [
        (policy, replace(served, no_adapters="the reason"), 3, "the reason"),
        (policy, served, 2, "their rank of 3 is above 2, the largest that the server takes"),
        (adapted(tiny_folder, ("vision",)), served, 3, "those of the language model alone are applied by servers"),
    ]
    with caplog.at_level(logging.WARNING):
        for one, how, rank, why in cases:
            assert served_adapters(one, "vllm", how, "auto", rank) is None
            assert f"engine vllm: adapters are published merged into the weights: {why}" in caplog.messages[-1]


def test_packets_bring_everything_once_and_then_what_training_changes(tiny_folder):
    policy, other = adapted(tiny_folder), adapted(tiny_folder, seed=5)
    outgoing, incoming = Outgoing(policy.model, limit=1 << 16), Incoming(other.model, all_adapters(other.model))

    def sent(form):
        first, found = True, []
        while (packet := outgoing.packet(first, form)) is not None:
            first = False
            incoming.take(packet)
            found += [name for name, *_ in packet.tensors]
        return found

    assert len(sent("separate")) == len({name for name, _ in policy.model.named_parameters()})
    incoming.finish()
    learn(policy, 3)
    assert {*sent("changing")} == all_adapters(policy.model).changing
    incoming.finish()
    own = dict(other.model.named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in policy.model.named_parameters())
    with pytest.raises(DataError, match=r"published weights lack .*lora_A.*, and \d+ more"):
        incoming.finish()


# ------------------------------------------------------------------------------------------------------ real servers

SERVED = [
    *(("vllm", name, ALL) for name in ("chat", "qwen2_5_vl", "qwen3_vl", "qwen2_vl", "smolvlm", "idefics3")),
    *(("vllm", name, ("language",)) for name in ("chat-tied", "qwen2-nine-tied", "qwen3", "llama")),
    *(("sglang", name, ("language",)) for name in ("qwen2-nine-tied", "qwen3")),
    *(("sglang", name, ALL) for name in ("chat", "chat-tied", "qwen2_5_vl", "qwen3_vl")),
]
THROUGH_A_FILE = ("llama",)


@pytest.fixture(scope="module", params=SERVED, ids=lambda one: "-".join(one[:2]))
def case(request, tmp_path_factory, make_image, make_task):
    engine, name, parts = request.param
    policy = load_policy(str(build(tmp_path_factory.mktemp(name), name)))
    train_parts(policy, parts, LORA)
    encoder = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
    tasks = [make_task("the big blue square"), make_task("a red circle above it")]
    if policy.family.unit:
        tasks += [make_task("<image>\nWhat is shown?", make_image(168, 56, 1))]
    running = start(engine, policy, encoder, transfer="disk" if name in THROUGH_A_FILE else "broadcast")
    assert running.adapters is not None
    yield AdapterCase(running, policy, encoder, [encoder(task) for task in tasks])
    running.close()


class AdapterCase(Case):
    def publish(self):
        self.version += 1
        self.engine.publish(self.version, weights_for(self.engine, self.policy))


@pytest.mark.slow
def test_logprobs_are_the_trainers_after_every_publish_of_adapters(case):
    """Seeds and prompts repeat, so that a stale prefix or image would show."""
    assert case.largest_difference() < 1e-4
    for seed in range(5):
        learn(case.policy, seed)
        assert case.largest_difference() > 1e-3
        case.publish()
        assert case.largest_difference(SamplingParams(4, 16, temperature=0.7)) < 1e-4
    assert check_engine(case.engine, case.policy, case.encoder, 1.0, case.version) < 1e-5


@pytest.mark.slow
def test_a_server_that_is_killed_gets_the_base_and_the_adapter_again(case):
    learn(case.policy, 9)
    case.publish()
    case.engine.servers[0].kill()
    assert case.largest_difference() < 1e-4
    learn(case.policy, 10)
    case.publish()
    assert case.largest_difference() < 1e-4


@pytest.mark.slow
def test_a_matrix_that_has_no_place_in_the_server_ends_the_publish_with_its_name(case):
    """The last test of a server: it does not live on."""
    if case.policy.family.name != "qwen3" or type(case.engine).__name__ != "VLLMEngine":
        pytest.skip("of one server")
    weights = dict(weights_for(case.engine, case.policy))
    name = next(name for name in weights if ".lora_A." in name)
    layer = name.partition(".lora_")[0]
    for side in "AB":
        weights[f"{layer}_other.lora_{side}.weight"] = weights[f"{layer}.lora_{side}.weight"]
    with pytest.raises(EngineError, match="_other"):
        case.engine.publish(case.version + 1, weights.items())
