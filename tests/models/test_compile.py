"""Blocks that torch has compiled compute what they compute without."""

from __future__ import annotations

import shutil

import pytest
import torch
from family_cases import build_family
from torch._dynamo.utils import counters

from foveate.config.cluster import ClusterSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.encoding.encode import Encoder
from foveate.models.policy import load_policy
from foveate.records import PackedGroup, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.worker import Worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the compiler
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def folder_of(tiny_folder, tmp_path):
    return lambda name: tiny_folder if name == "internvl" else build_family(tmp_path / name, name)


def learned(worker, packed_groups):
    """The metrics of an update per group of answers, and what the model says afterwards."""
    records = [worker.update_sft([packed], "token", float(packed.trained_tokens), 1e-3) for packed in packed_groups]
    return [(record["loss/total"], record["optim/grad_norm"]) for record in records], torch.cat(
        worker.logprobs(packed_groups)
    )


@pytest.mark.parametrize("name", ["internvl", "qwen3_moe", "qwen3_5"])
def test_compiled_blocks_learn_and_answer_as_others(name, folder_of, make_task, make_image):
    folder = str(folder_of(name))
    policy = load_policy(folder, device=DEVICE)
    encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
    pictures = [[make_image(56 + 40 * i, 60)] if policy.family.unit else [] for i in range(6)]
    prompts = [
        encode(make_task("<image> " * len(own) + "Where is it? " + "one " * i, *own)) for i, own in enumerate(pictures)
    ]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    groups = NativeEngine(policy, encode.decode).generate(requests, SamplingParams(3, 7))
    packed_groups = [
        PackedGroup.of_tokens(p, tuple(one.token_ids for one in group))
        for p, group in zip(prompts, groups, strict=True)
    ]
    parts = {} if policy.family.unit else {"trainable": ("language",)}
    settings, place = OptimSettings(lr=1e-3), ClusterSettings(device=DEVICE)
    plain = Worker(ModelSettings(path=folder, **parts), settings, 4096, cluster=place)
    compiled = Worker(ModelSettings(path=folder, compile=True, **parts), settings, 4096, cluster=place)
    again = NativeEngine(compiled.policy, encode.decode).generate(requests, SamplingParams(3, 7))
    assert [[one.token_ids for one in group] for group in again] == [[o.token_ids for o in group] for group in groups]
    records, wanted = learned(plain, packed_groups[:2])
    close = 5e-5 if name == "qwen3_5" else 1e-5  # a recurrence rounds at every token
    torch.testing.assert_close(learned(compiled, packed_groups[:2])[0], records, rtol=close, atol=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    records, wanted = learned(plain, packed_groups[2:])
    found, said = learned(compiled, packed_groups[2:])
    torch.testing.assert_close(found, records, rtol=20 * close, atol=1e-5)  # AdamW magnifies it
    torch.testing.assert_close(said, wanted, rtol=100 * close, atol=1e-4)
    if DEVICE == "cpu":  # rows of other lengths and forests take no new ones; on GPUs, FlexAttention's count, too
        assert counters["stats"]["unique_graphs"] <= graphs + (name == "qwen3_5")  # one more for the recurrence
