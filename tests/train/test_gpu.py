"""What runs on a GPU: on machines without one, or unless FOVEATE_TEST_GPU is set, on one that is pretended
(`pretend_gpu.py`), which tests where tensors are; else on the real one."""

from __future__ import annotations

import pytest
import torch
from family_cases import QUICK, TEXT_MODELS, VISION_MODELS, build_family
from pretend_gpu import OnGpu, pretend_gpu
from safetensors.torch import load_file
from slow_cases import slow_but
from torch.autograd.graph import saved_tensors_hooks
from toy import make_data, make_pairs, mpo_settings, rl_settings, sft_settings

from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError
from foveate.log import read_metrics
from foveate.models import offload
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train import session
from foveate.train.mpo import run_mpo
from foveate.train.rl import run_rl
from foveate.train.sft import run_sft


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


REAL = torch.cuda.is_available()


@pytest.fixture
def gpu(monkeypatch):
    if REAL:
        yield
        return
    monkeypatch.setattr(session, "has_gpu", lambda: True)
    with pretend_gpu(monkeypatch):
        yield


def require_same(run, alone, names, rel=1e-5):
    records, others = read_metrics(run.metrics), read_metrics(alone.metrics)
    assert [record["step"] for record in records] == [record["step"] for record in others]
    for record, other in zip(records, others, strict=True):
        for name in names:
            assert record[name] == pytest.approx(other[name], rel=rel, abs=1e-6), name


@pytest.mark.skipif(REAL, reason="a GPU is there")
@pytest.mark.usefixtures("gpu")
def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    there, here = torch.ones(3, device="cuda", requires_grad=True), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here, there])
    with pytest.raises(TypeError, match="numpy"):
        there.detach().numpy()
    (there * here.to("cuda") * 2).sum().backward()
    assert isinstance(there.grad, OnGpu)
    assert there.grad.tolist() == [2.0, 2.0, 2.0]
    assert there[torch.tensor([0, 2])].device.type == "cuda"


VARIANTS = {
    "gspo": {"eval": {"every": 2, "samples": 2, "gallery": 2}},
    "reference": {"algorithm": {"name": "grpo", "loss": {"kl_coefficient": 0.1}}},
    "critic": {"algorithm": {"name": "ppo", "critic": {"lr": 1e-3}}},
    "marks": {"algorithm": "clip_cov"},
}


@pytest.mark.parametrize("name", slow_but(["gspo"], VARIANTS))
@pytest.mark.usefixtures("gpu")
def test_a_run_on_a_gpu_is_that_on_a_cpu(tmp_path, tiny_folder, data, name):
    changes = {"eval": {"every": 0}, "train": {"steps": 2}, **VARIANTS[name]}
    run = run_rl(rl_settings(tmp_path / "gpu", tiny_folder, data, cluster={"device": "cuda"}, **changes))
    alone = run_rl(rl_settings(tmp_path / "cpu", tiny_folder, data, cluster={"device": "cpu"}, **changes))
    require_same(run, alone, ("reward/mean", "loss/policy", "optim/grad_norm", "loss/entropy", "answer/length"))


@pytest.mark.usefixtures("gpu")
def test_adapters_learn_on_a_gpu_and_go_on_from_a_checkpoint(tmp_path, tiny_folder, data):
    model = {"path": str(tiny_folder), "lora": {"rank": 2}}
    changes = {"model": model, "cluster": {"device": "cuda"}, "eval": {"every": 0}, "train": {"steps": 2}}
    run_rl(rl_settings(tmp_path / "gpu", tiny_folder, data, **{**changes, "train": {"steps": 1}}))
    run = run_rl(rl_settings(tmp_path / "gpu", tiny_folder, data, **changes))
    alone = run_rl(rl_settings(tmp_path / "cpu", tiny_folder, data, **{**changes, "cluster": {"device": "cpu"}}))
    require_same(run, alone, ("reward/mean", "loss/policy", "optim/grad_norm"))


@pytest.mark.usefixtures("gpu")
def test_inputs_of_blocks_wait_in_host_memory_for_the_backward_pass(tmp_path, tiny_folder, data, monkeypatch):
    moved = []

    def spy(tensor):
        kept = offload._to_host(tensor)
        moved.append(tensor.shape if callable(kept) else None)
        return kept

    monkeypatch.setattr(offload.HostActivations, "__init__", lambda self: saved_tensors_hooks.__init__(self, spy, back))
    back = offload._from_host
    model = {"path": str(tiny_folder), "gradient_checkpointing": True}
    changes = {"eval": {"every": 0}, "train": {"steps": 1}}
    own = {"model": {**model, "offload_activations": True}, "cluster": {"device": "cuda"}}
    run = run_rl(rl_settings(tmp_path / "gpu", tiny_folder, data, **changes, **own))
    alone = run_rl(rl_settings(tmp_path / "cpu", tiny_folder, data, **changes, model=model, cluster={"device": "cpu"}))
    require_same(run, alone, ("reward/mean", "loss/policy", "optim/grad_norm"))
    text = load_policy(str(tiny_folder)).model.config.text_config
    inputs = [shape for shape in moved if shape is not None and len(shape) == 3 and shape[-1] == text.hidden_size]
    assert len(inputs) >= text.num_hidden_layers


@pytest.mark.parametrize("cluster", [{"device": "cpu"}, {}])
def test_inputs_of_blocks_of_a_cpu_have_nowhere_to_go(tmp_path, tiny_folder, data, cluster):
    model = {"path": str(tiny_folder), "gradient_checkpointing": True, "offload_activations": True}
    with pytest.raises(ValueError, match=r"offload_activations.* is true, but"):
        run_rl(rl_settings(tmp_path / "run", tiny_folder, data, model=model, cluster=cluster))
    with pytest.raises(ValueError, match=r"offload_activations.* set model.gradient_checkpointing=true"):
        rl_settings(tmp_path / "run", tiny_folder, data, model={**model, "gradient_checkpointing": False})


@pytest.mark.parametrize("save_async", slow_but([True], [False, True]))
@pytest.mark.usefixtures("gpu")
def test_supervised_training_on_a_gpu_is_that_on_a_cpu(tmp_path, tiny_folder, data, save_async):
    train = {"save_async": save_async}
    run = run_sft(sft_settings(tmp_path / "gpu", tiny_folder, data, cluster={"device": "cuda"}, train=train))
    alone = run_sft(sft_settings(tmp_path / "cpu", tiny_folder, data, cluster={"device": "cpu"}))
    require_same(run, alone, ("loss/total", "loss/nll", "loss/entropy", "optim/grad_norm"))


@pytest.mark.parametrize("loss", slow_but(["mpo"], ["mpo", "dpo", "ipo", "bco", "sft"]))
@pytest.mark.usefixtures("gpu")
def test_preference_optimisation_on_a_gpu_is_that_on_a_cpu(tmp_path, tiny_folder, data, loss):
    pairs = make_pairs(data)
    run = run_mpo(mpo_settings(tmp_path / "gpu", tiny_folder, pairs, cluster={"device": "cuda"}, loss=loss))
    alone = run_mpo(mpo_settings(tmp_path / "cpu", tiny_folder, pairs, cluster={"device": "cpu"}, loss=loss))
    require_same(run, alone, ("loss/total", "optim/grad_norm", "loss/entropy"))


@pytest.mark.parametrize("name", slow_but(QUICK, [*VISION_MODELS, *TEXT_MODELS]))
@pytest.mark.usefixtures("gpu")
def test_every_family_computes_and_samples_on_a_gpu(tmp_path, name, make_image, make_task):
    folder = build_family(tmp_path / "model", name)
    found = []
    for device in ("cuda", "cpu"):
        policy = load_policy(str(folder), device=device)
        encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)
        pictures = [make_image(130, 70, 1), make_image(60, 90, 2)] if policy.family.unit else []
        prompt = encode(make_task("<image> " * len(pictures) + "What is two and three?", *pictures))
        group = NativeEngine(policy, encode.decode).generate([Request(prompt, 5)], SamplingParams(2, 6))[0]
        logp, _ = token_logprobs(
            policy, pack([PackedGroup.of_tokens(prompt, tuple(one.token_ids for one in group))]).to(policy.device)
        )
        (logp * 0.5).sum().backward()
        grads = {key: p.grad.cpu() for key, p in policy.model.named_parameters() if p.grad is not None}
        found.append((group, logp.detach().cpu(), grads))
    (group, logp, grads), (other, wanted, plain) = found
    assert [one.token_ids for one in group] == [one.token_ids for one in other]
    torch.testing.assert_close(logp, wanted, rtol=1e-4 if REAL else 1e-5, atol=1e-6)
    assert grads.keys() == plain.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, plain[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_rank_computes_in_another_type_near_float32(tmp_path, tiny_folder, data, dtype):
    changes = {"eval": {"every": 0}, "train": {"steps": 2}}
    run = run_rl(rl_settings(tmp_path / dtype, tiny_folder, data, cluster={"dtype": dtype}, **changes))
    alone = run_rl(rl_settings(tmp_path / "float32", tiny_folder, data, **changes))
    record, other = read_metrics(run.metrics)[0], read_metrics(alone.metrics)[0]
    assert record["loss/entropy"] == pytest.approx(other["loss/entropy"], rel=0.02)
    assert record["loss/entropy"] != other["loss/entropy"]
    assert record["engine/logprob_difference"] < 0.02  # the engine computes in it as well
    kept = load_file(run.final / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.skipif(REAL, reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, tiny_folder, data):
    with pytest.raises(ConfigError, match=r"cluster\.device=cuda: PyTorch sees no GPU"):
        run_rl(rl_settings(tmp_path / "run", tiny_folder, data, cluster={"device": "cuda"}))
