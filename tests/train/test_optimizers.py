"""Every optimizer of the table: it builds, begins, steps, saves, resumes and takes the memory that is planned."""

from __future__ import annotations

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rank_cases import spawn, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from foveate.config.cluster import ClusterSettings
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError
from foveate.files import sealed
from foveate.parallel.ranks import Ranks
from foveate.train.adamw8bit import ADAMW8BIT
from foveate.train.checkpoint import load_checkpoint, save_checkpoint, tensors_of
from foveate.train.optim import (
    OPTIMIZERS,
    OptimizerSpec,
    apply_gradients,
    build_optimizer,
    check_optimizer,
    set_lr,
    state_bytes,
)

WITH_BNB = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=WITH_BNB) if name == "adamw8bit" else name for name in OPTIMIZERS]
)
ONE, TWO = ClusterSettings(device="cpu"), ClusterSettings(device="cpu", gpus_per_node=2)


class Net(nn.Module):
    """An embedding, two blocks of which the second may stay without gradients, and a head."""

    def __init__(self, seed: int = 0, width: int = 64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(10, width)
            self.blocks = nn.ModuleList([nn.Linear(width, 2 * width), nn.Linear(2 * width, width)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10, bias=False)

    def forward(self, ids):
        hidden = self.blocks[1](self.blocks[0](self.embedding(ids)))
        return self.head(self.norm(hidden))


def settings_of(name, **more):
    return OptimSettings(name=name, lr=0.01, weight_decay=0.1, **more)


def trained(name, steps=0, seed=0, **more):
    model = Net(seed)
    optimizer = build_optimizer(model, settings_of(name, **more))
    learn(model, optimizer, steps)
    return model, optimizer


def learn(model, optimizer, steps):
    for step in range(steps):
        model((torch.arange(6) + step) % 10).log_softmax(-1)[:, 3].mean().neg().backward()
        apply_gradients(optimizer, 0.01, 1.0)


def same(one, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@EACH
def test_an_optimizer_lowers_the_loss(name):
    def loss(model):
        return -model(torch.arange(6)).log_softmax(-1)[:, 3].mean().item()

    assert loss(trained(name, 5)[0]) < loss(Net()) - 0.1


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw8bit", marks=WITH_BNB)])  # for muon see below
def test_the_first_state_is_the_one_that_the_optimizer_would_make_itself(name):
    (model, optimizer), (other, bare) = trained(name), trained(name)
    bare.state.clear()
    learn(model, optimizer, 3)
    learn(other, bare, 3)
    assert same(model, other)


@EACH
def test_an_optimizer_resumes_bitwise_also_where_parameters_had_no_gradient_yet(name, tmp_path):
    model, optimizer = trained(name)
    model.blocks[1].requires_grad_(False)  # without gradients, while the optimizer has it
    learn(model, optimizer, 2)
    path = save_checkpoint(tmp_path, 2, tensors_of({"": (model, optimizer)}), {}, keep=1)
    other, its_optimizer = trained(name, seed=1)
    assert load_checkpoint(path, {"": (other, its_optimizer)}) == {"step": 2}
    assert [group["updates"] for group in its_optimizer.param_groups] == [2] * len(its_optimizer.param_groups)
    model.blocks[1].requires_grad_(True)
    for one, its in ((model, optimizer), (other, its_optimizer)):
        learn(one, its, 3)
    assert same(model, other)


@EACH
def test_every_group_follows_the_learning_rate(name):
    model, optimizer = trained(name, 1)
    before = copy.deepcopy(model)
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    model(torch.arange(6)).sum().backward()
    apply_gradients(optimizer, 0.0, 1.0)
    assert same(model, before)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planned_bytes_are_those_of_the_state(name, dtype):
    planned = state_bytes(Net(width=128).to(device="meta", dtype=dtype), settings_of(name))
    model = Net(width=128).to(dtype)
    optimizer = build_optimizer(model, settings_of(name))
    model(torch.arange(6)).sum().backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert planned == sum(value.nbytes for value in tensors if value.ndim)
    per_parameter = planned / sum(p.numel() for p in model.parameters())
    size = dtype.itemsize
    lowest, highest = {"adamw": (2 * size, 2 * size), "adamw8bit": (2, 2.5), "muon": (size, 1.2 * size)}[name]
    assert lowest <= per_parameter <= highest


@EACH
def test_an_unknown_setting_is_refused_before_a_run_starts(name):
    with pytest.raises(ConfigError, match=f"optimizer {name}: unknown setting 'speed'"):
        check_optimizer(settings_of(name, settings={"speed": 1}), ONE)


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("adamw", {"eps": 0}, "eps must be at least 1e-20"),  # a weight without a gradient would become 0 / 0
        ("adamw", {"eps": -1.0}, "eps must be at least 1e-20"),
        ("adamw", {"eps": float("inf")}, "eps must be a finite number"),
        pytest.param("adamw8bit", {"min_8bit_size": -5}, "min_8bit_size must be at least 0", marks=WITH_BNB),
        ("muon", {"lr_scale": -1}, "lr_scale must be greater than 0"),
        ("muon", {"lr_scale": float("nan")}, "lr_scale must be"),
        ("muon", {"momentum": 1.5}, "momentum must be less than 1"),
        ("muon", {"momentum": -3}, "momentum must be at least 0"),
        ("muon", {"ns_steps": 0}, "ns_steps must be at least 1"),
        ("muon", {"ns_steps": 100}, "ns_steps must be less than 100"),
    ],
)
def test_a_setting_that_would_ruin_the_weights_is_refused(name, setting, said):
    with pytest.raises(ConfigError, match=rf"optimizer {name}: {said}"):
        check_optimizer(settings_of(name, settings=setting), ONE)


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown optimizer 'adam'; did you mean 'adamw'\?"):
        check_optimizer(settings_of("adam"), ONE)


def test_an_optimizer_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("foveate.train.optim.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed; run pip install bitsandbytes"):
        check_optimizer(settings_of("adamw8bit"), ONE)


@WITH_BNB
def test_pages_of_moments_are_refused_on_a_cpu():
    optim = OptimSettings(name="adamw8bit", lr=1e-3, settings={"paged": True})
    with pytest.raises(ConfigError, match="paged: true}, but pages are those of a GPU"):
        build_optimizer(torch.nn.Linear(2, 2), optim)


def test_an_optimizer_that_cannot_be_sharded_is_refused_on_several_ranks(monkeypatch):
    spec = OptimizerSpec(torch.optim.SGD, lambda *_: {}, sharded=False)
    monkeypatch.setattr("foveate.train.optim._bound", lambda *_: None)
    monkeypatch.setitem(OPTIMIZERS, "alone", spec)
    check_optimizer(settings_of("alone"), ONE)
    with pytest.raises(ConfigError, match=r"optim.name=alone cannot train weights that are sharded over 2 ranks"):
        check_optimizer(settings_of("alone"), TWO)
    assert not ADAMW8BIT.sharded


# ------------------------------------------------------------------------------------------------------------- Muon


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    model, optimizer = trained("muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    assert groups == [
        ["blocks.0.weight", "blocks.1.weight"],
        ["embedding.weight", "head.weight"],
        ["blocks.0.bias", "blocks.1.bias", "norm.weight", "norm.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_muon_is_torchs_with_adamw_beside_it():
    model, optimizer = trained("muon", 3, settings={"momentum": 0.9, "lr_scale": 0.5})
    other = Net()
    matrices = [block.weight for block in other.blocks]
    ids = {id(p) for p in matrices}
    rest = [p for p in other.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(matrices, lr=0.005, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    for step in range(3):
        other((torch.arange(6) + step) % 10).log_softmax(-1)[:, 3].mean().neg().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for one in (muon, adamw):
            one.step()
            one.zero_grad()
    for name, value in model.state_dict().items():  # the norm of all gradients is summed in another order
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-6, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.005


def learn_given(model, optimizer, steps):
    """Steps with the same gradients of full rank for whole and for sharded weights."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        apply_gradients(optimizer, 0.01, 1e9)


def _on_two_ranks(_rank, _ranks, folder, name):
    members = Ranks.of(TWO)
    model = Net()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=members.mesh)
    optimizer = build_optimizer(model, settings_of(name))
    learn_given(model, optimizer, 3)
    after = {key: whole(value) for key, value in model.state_dict().items()}
    save_checkpoint(Path(folder) / "checkpoints", 3, tensors_of({"": (model, optimizer)}), {}, 1, members)
    return after


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_of_sharded_weights_is_that_of_whole_ones_and_one_rank_resumes_it(name, tmp_path):
    [first, second] = spawn(_on_two_ranks, 2, tmp_path, name)
    model, optimizer = trained(name)
    learn_given(model, optimizer, 3)
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, second[key]) for key, value in model.state_dict().items())
    other, its_optimizer = trained(name, seed=1)
    load_checkpoint(tmp_path / "checkpoints" / "step_000003", {"": (other, its_optimizer)})
    for one, its in ((model, optimizer), (other, its_optimizer)):
        learn(one, its, 2)
    assert same(model, other)


# ------------------------------------------------------------------------------------- checkpoints that are refused


def test_state_that_is_bound_to_a_number_of_ranks_is_refused_by_name_on_another(tmp_path):
    path = save_checkpoint(tmp_path, 2, tensors_of({"": trained("adamw", 1)}), {}, keep=1)
    load_checkpoint(path, {"": trained("adamw")}, bound_to_ranks="mine")
    content = json.loads((path / "state.json").read_text())
    del content["checksum"]
    (path / "state.json").write_text(sealed({**content, "ranks": 4}))
    load_checkpoint(path, {"": trained("adamw")})
    with pytest.raises(ConfigError, match=r"was saved by 4 ranks; the state of optimizer mine cannot be resumed by 1"):
        load_checkpoint(path, {"": trained("adamw")}, bound_to_ranks="mine")


@pytest.mark.parametrize("schema", [None, 1, 2, 4])
def test_a_checkpoint_of_another_schema_is_refused_in_one_line(schema, tmp_path):
    path = save_checkpoint(tmp_path, 2, tensors_of({"": trained("adamw", 1)}), {}, keep=1)
    content = json.loads((path / "state.json").read_text())
    assert content.pop("schema") == 3
    del content["checksum"]
    (path / "state.json").write_text(json.dumps(content if schema is None else {**content, "schema": schema}))
    with pytest.raises(ConfigError, match=f"has schema {schema or 0}, this version of foveate reads 3") as caught:
        load_checkpoint(path, {"": trained("adamw")})
    assert "\n" not in str(caught.value)
