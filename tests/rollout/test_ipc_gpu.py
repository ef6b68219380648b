"""Weights to a process on the same GPU, by the trainer's and the plug-in's own code: run with FOVEATE_TEST_GPU=1 where
there is a GPU. vLLM itself is not needed: what the plug-in takes from it is made up here."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import multiprocessing

from foveate.rollout.server.weights import handles, plan_buckets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or FOVEATE_TEST_GPU is not set")

PARTS = (
    "distributed.weight_transfer", "distributed.weight_transfer.base", "model_executor.model_loader.reload",
    "v1.sample.sampler",
)  # fmt: skip


class Base:
    def __class_getitem__(cls, _):
        return cls


class Model:
    def __init__(self):
        self.found = {}

    def load_weights(self, weights):
        own = dict(weights)
        self.found |= own  # as vLLM does, which reads them when it has all of a layer
        return own.keys()


def receive(pipe):
    """A server: told of buckets, it loads them; told nothing, it says what it has."""
    for name in PARTS:
        module = types.ModuleType(f"vllm.{name}")
        module.__getattr__ = lambda _: Base
        sys.modules[module.__name__] = module
    from foveate.rollout.vllm.plugin import Receiver, UpdateInfo

    receiver = Receiver()
    receiver.device, receiver.model = torch.device("cuda:0"), Model()
    while update := pipe.recv():
        try:
            receiver.receive_weights(UpdateInfo(**update))
            pipe.send("")
        except RuntimeError as error:
            pipe.send(str(error))
    pipe.send({name: tensor.float().cpu().numpy() for name, tensor in receiver.model.found.items()})


@pytest.fixture
def server():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs,), daemon=True)
    process.start()
    yield ours
    process.kill()
    process.join()


def announced(bucket):
    tensors = [(name, str(t.dtype).removeprefix("torch."), list(t.shape), at) for name, t, at in bucket.tensors]
    return bucket.size, tensors


def test_weights_reach_a_process_on_the_same_gpu_and_a_damaged_bucket_is_refused(server):
    weights = [
        (f"layer.{i}", torch.randn(40 + i, 1000, device="cuda", dtype=torch.bfloat16 if i % 2 else torch.float32))
        for i in range(30)
    ]
    buckets = plan_buckets(weights, 1 << 20)
    assert len(buckets) > 3
    for number, (bucket, handle) in enumerate(handles(buckets, torch.device("cuda:0"))):
        server.send({"buckets": [announced(bucket)], "handle": handle, "number": number})
        assert server.recv() == ""
    [(bucket, handle)] = handles(buckets[:1], torch.device("cuda:0"))
    server.send({"buckets": [announced(bucket)], "handle": handle, "number": 5})
    assert "not as 5" in server.recv()
    server.send(None)
    found = server.recv()
    assert found.keys() == dict(weights).keys()
    for name, tensor in weights:
        assert torch.equal(torch.from_numpy(found[name]), tensor.float().cpu())
