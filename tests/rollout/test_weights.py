"""Weights on their way to a server, and the check that they arrived."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from family_cases import build_family
from safetensors.torch import load_file
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from foveate.config.model import LoraSettings
from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, EngineError
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.names import to_hf
from foveate.models.families import served_as
from foveate.models.families.text import TextOnly
from foveate.models.lora import add_adapters
from foveate.models.policy import load_policy
from foveate.rollout.build import WeightCheck, choose_engine
from foveate.rollout.check import check_engine
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.launch import write_launch_files
from foveate.rollout.server.weights import (
    ALIGNMENT,
    TRAILER,
    Sender,
    WeightsFile,
    pack_bucket,
    plan_buckets,
    served_weights,
)
from foveate.rollout.sglang.engine import chat_weights

WEIGHTS = [
    ("a", torch.arange(3, dtype=torch.float32)),
    ("b", torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)),
    ("c", torch.randn(100, generator=torch.Generator().manual_seed(1))),
    ("d", torch.tensor(2.5)),
]


def filled(bucket, number=0):
    return pack_bucket(torch.full((bucket.size + TRAILER,), 7, dtype=torch.uint8), bucket, number)


def unpacked(bucket, flat):
    for name, tensor, offset in bucket.tensors:
        size = tensor.numel() * tensor.element_size()
        yield name, flat[offset : offset + size].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("limit", [1, 64, 128, 10_000])
def test_buckets_hold_every_tensor_once_in_order_and_within_the_limit(limit):
    buckets = plan_buckets(WEIGHTS, limit)
    found = [pair for bucket in buckets for pair in unpacked(bucket, filled(bucket))]
    assert [name for name, _ in found] == ["a", "b", "c", "d"]
    assert all(torch.equal(tensor, expected) for (_, tensor), (_, expected) in zip(found, WEIGHTS, strict=True))
    assert all(bucket.size <= limit or len(bucket.tensors) == 1 for bucket in buckets)
    assert all(offset % ALIGNMENT == 0 for bucket in buckets for _, _, offset in bucket.tensors)
    assert plan_buckets([], limit) == []


def test_a_bucket_ends_with_the_sum_of_its_words_which_any_single_changed_bit_changes_and_its_number():
    flat = filled(plan_buckets(WEIGHTS, 10_000)[0], number=3)
    words = flat.view(torch.int64)
    assert int(words[:-2].sum()) == int(words[-2])
    assert int(words[-1]) == 3
    flat[37] ^= 4
    assert int(words[:-2].sum()) != int(words[-2])


def test_weights_arrive_at_every_worker():
    sender = Sender("127.0.0.1", 3, torch.device("cpu"), 30)
    buckets = plan_buckets(WEIGHTS, 128)
    assert [bucket.alone for bucket in buckets] == [False, True, False]

    def worker(rank):
        store = PrefixStore("weights", TCPStore(sender.host, sender.port, is_master=False))
        group = ProcessGroupGloo(store, rank, 3, timedelta(seconds=30))
        received = []
        for number, bucket in enumerate(buckets):
            flat = torch.empty(bucket.size + TRAILER, dtype=torch.uint8)
            for part in (flat[:-TRAILER], flat[-TRAILER:]) if bucket.alone else (flat,):
                group.broadcast(part, 0).wait()
            assert torch.equal(flat, filled(bucket, number))
            received += unpacked(bucket, flat)
        return received

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(worker, rank) for rank in (1, 2)]
        sender.connect("weights")
        sender.send(buckets)
        for received in (future.result() for future in workers):
            assert [name for name, _ in received] == [name for name, _ in WEIGHTS]
            assert all(torch.equal(one, other) for (_, one), (_, other) in zip(received, WEIGHTS, strict=True))
    sender.close()


def test_names_of_the_github_layout_fuse_what_it_fuses_and_lose_nothing(tiny_policy):
    weights = dict(tiny_policy.model.named_parameters())
    found = chat_weights(list(weights.items()))
    rebuilt = {}
    for name, tensor in found:
        names = to_hf(name, "chat")
        rebuilt |= zip(names, tensor.tensor_split(len(names)), strict=True)
    assert rebuilt.keys() == weights.keys()
    assert all(torch.equal(rebuilt[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_vl"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_tied_head_is_sent_once_as_the_embedding_also_with_adapters(name, adapters, tmp_path):
    folder = build_family(tmp_path / "model", name, tie_word_embeddings=True)
    policy, expected = load_policy(str(folder)), dict(load_policy(str(folder)).model.named_parameters())
    assert policy.is_tied
    if adapters:
        add_adapters(policy, LoraSettings(rank=2), ("language",))
    sent = dict(served_weights(policy.model))
    assert sent.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent.items())
    written = WeightsFile(tmp_path / "file").write(1, sent.items()) / "model.safetensors"
    assert load_file(written).keys() == expected.keys()


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", ["hf", "chat"])
def test_a_server_reads_wherever_it_looks_whether_the_trainers_head_is_the_embedding(
    layout, server, inner, outer, tiny_folder, tmp_path
):
    """Folders may say it in one place, in neither, or in both and not the same."""
    folder, text = tiny_folder, {"hf": "text_config", "chat": "llm_config"}[layout]
    if layout == "chat":
        folder = tmp_path / "chat"
        convert(tiny_folder, folder, "chat")
    config = json.loads((folder / "config.json").read_text())
    for part, value in ((config, outer), (config[text], inner)):
        del part["tie_word_embeddings"]
        part |= {} if value is None else {"tie_word_embeddings": value}
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "config.json").write_text(json.dumps(config))
    policy = load_policy(str(changed))
    served = served_as(policy.family, server)
    (tmp_path / "launch").mkdir()
    found, _ = write_launch_files(tmp_path / "launch", policy, served, Path(__file__), server, "group")
    config = json.loads((found / "config.json").read_text())
    text = {"hf": "text_config", "chat": "llm_config"}[served.layout]
    assert config["tie_word_embeddings"] is config[text]["tie_word_embeddings"] is policy.is_tied


# ----------------------------------------------------------------------------------------------------------- the proof


@pytest.fixture
def parts(tiny_folder):
    policy = load_policy(str(tiny_folder))
    return policy, Encoder(policy.tokenizer, policy.family, 12, 1024)


def test_an_engine_with_the_trainers_weights_passes(parts):
    policy, encoder = parts
    engine = NativeEngine.copy_of(policy, encoder.decode, version=4)
    assert check_engine(engine, policy, encoder, 0.7, 4) < 1e-5


@pytest.mark.slow
def test_the_first_thing_that_differs_is_named(parts):
    policy, encoder = parts
    engine = NativeEngine.copy_of(policy, encoder.decode, version=4)
    with pytest.raises(EngineError, match="the engine answers with weights 4, the trainer is at 5"):
        check_engine(engine, policy, encoder, 1.0, 5)
    with torch.no_grad():
        for parameter in policy.part("vision").parameters():
            parameter.mul_(1.2)
    with pytest.raises(EngineError, match=r"at weights 4 .* and 1 images differ from the trainer's .* Token ids"):
        check_engine(engine, policy, encoder, 1.0, 4)
    engine.prompt_ids = lambda prompt: tuple(t for t in prompt.token_ids if t != policy.family.image_token_id)
    with pytest.raises(EngineError, match=r"gives 1 images 0 tokens, the trainer .*: they tile differently"):
        check_engine(engine, policy, encoder, 1.0, 4)
    engine.prompt_ids = lambda prompt: (*prompt.token_ids[:5], 0, *prompt.token_ids[6:])
    with pytest.raises(EngineError, match="they first differ at token 5"):
        check_engine(engine, policy, encoder, 1.0, 4)


class OwnWeights:
    """An engine that is no NativeEngine, and forgets to take over weights."""

    def __init__(self, policy, decode, *, version=0, longest=None):
        self.native = NativeEngine.copy_of(policy, decode, version=version)
        self.version, self.longest = version, longest
        self.generate, self.prompt_ids = self.native.generate, self.native.prompt_ids

    def publish(self, version, _weights):
        self.version = self.native.version = version


def test_weights_that_do_not_arrive_end_the_run_at_the_next_check(parts):
    policy, encoder = parts
    engine = OwnWeights(policy, encoder.decode)
    proof = WeightCheck(engine, policy, encoder, RolloutSettings(check_every=2))
    with torch.no_grad():
        policy.part("head").weight.mul_(1.1)
    for version in (1, 2):
        engine.publish(version, policy.model.named_parameters())
        if version == 1:
            assert proof.after_publish() == {}
    with pytest.raises(EngineError, match="at weights 2 the engine's log-probs"):
        proof.after_publish()


def test_an_engine_gets_its_settings_and_the_length_that_it_asks_for(parts):
    policy, encoder = parts
    own = RolloutSettings(engine=f"{__file__}:OwnWeights", max_tokens=100)
    assert choose_engine(own, 28)(policy, encoder.decode, version=1).longest == 128
    given = own.model_copy(update={"engine_settings": {"longest": 7}})
    assert choose_engine(given, 28)(policy, encoder.decode, version=1).longest == 7
    with pytest.raises(ConfigError, match=r"engine native: unknown setting 'token_budgt'; did you mean 'token_budget'"):
        choose_engine(RolloutSettings(engine_settings={"token_budgt": 3}), 28)
    with pytest.raises(ConfigError, match="engine vllm: servers must be a whole number"):
        choose_engine(RolloutSettings(engine="vllm", engine_settings={"servers": "two"}), 28)


def test_a_program_that_is_not_there_is_named(parts):
    policy, encoder = parts
    for name in ("vllm", "sglang"):
        settings = RolloutSettings(engine=name, engine_settings={"program": "no-such-program"})
        with pytest.raises(ConfigError, match=f"engine {name}: no program 'no-such-program'"):
            choose_engine(settings, 28)(policy, encoder.decode)
        visible = {"program": "true", "devices": ["0"], "servers": 2}
        with pytest.raises(ConfigError, match="devices names the GPUs of 1 servers, there are 2"):
            choose_engine(RolloutSettings(engine=name, engine_settings=visible), 28)(policy, encoder.decode)
    other = replace(policy, family=TextOnly(name="other", stop_ids=policy.family.stop_ids))
    with pytest.raises(ConfigError, match="engine vllm: does not know other; it serves internvl"):
        choose_engine(RolloutSettings(engine="vllm"), 28)(other, encoder.decode)
