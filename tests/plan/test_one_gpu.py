"""What one GPU holds: quantised layers, a teacher, a server, and the table of what fits."""

from __future__ import annotations

import pytest
import torch
from test_plan import ALL, work_of
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.config.model import LoraSettings
from foveate.models.policy import load_policy
from foveate.models.quantize import linear_layers, quantized_layers
from foveate.models.sizes import published_config
from foveate.plan import memory
from foveate.plan.memory import memory_of, sizes_of
from foveate.plan.table import MEMORIES, fits_table
from foveate.plan.trace import StepMemory, traced_policy


@pytest.fixture(scope="module")
def config(tiny_policy):
    return tiny_policy.model.config


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_takes_the_planned_bytes(tiny_folder, kind):
    policy = load_policy(str(tiny_folder), quantization=kind)
    held = {tensor.data_ptr(): tensor for tensor in (*policy.model.parameters(), *policy.model.buffers())}
    for layer in quantized_layers(policy.model).values():
        if kind == "nf4":
            state = layer.weight.quant_state
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            held |= {id(part): part for part in parts}
    lora = LoraSettings(rank=4)
    planned = memory_of(work_of(policy.model.config, lora=lora, quantization=kind)).weights
    rotations = sum(tensor.nbytes for name, tensor in policy.model.named_buffers() if "scale" not in name)
    assert planned == pytest.approx(sum(tensor.nbytes for tensor in held.values()) - rotations, rel=0.02)
    assert planned < memory_of(work_of(policy.model.config, lora=lora)).weights


@pytest.mark.slow
def test_four_bits_take_at_most_29_percent_of_bfloat16():
    work = {"lora": LoraSettings(), "dtype": torch.bfloat16}
    for size in ("1B", "8B"):
        config = published_config(size)
        whole, packed = (memory_of(work_of(config, quantization=kind, **work)).weights for kind in (None, "nf4"))
        policy = traced_policy(config, torch.bfloat16, "auto")
        linear = sum(2 * layer.weight.numel() for _, layer in linear_layers(policy.model, policy.family))
        assert whole - packed >= 0.71 * linear
        assert packed - (whole - linear) <= 0.29 * linear


def test_a_teacher_and_a_server_on_the_same_gpu_are_counted(config):
    alone, other = memory_of(work_of(config)), published_config("1B")
    taught = memory_of(work_of(config, teachers=(other,), teacher_dtype=torch.bfloat16))
    total = sizes_of(other, ("language",)).total
    assert taught.weights - alone.weights == 2 * total
    served = memory_of(work_of(config, served=True))
    assert served.engine == 2 * sizes_of(config, ALL).total
    assert alone.engine == 0


@pytest.mark.slow
def test_the_table_says_the_smallest_gpu_of_each_way(monkeypatch):
    monkeypatch.setattr(memory, "activation_memory", lambda _: StepMemory(2 * 2**30, 2**28, 2**30))
    monkeypatch.setattr("foveate.train.optim.find_spec", lambda _: True)
    head, _, row = fits_table(["InternVL3_5-8B"])
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    needed = {name: float(cell.partition("(")[2].rstrip("|) ")) for name, cell in cells.items() if "(" in cell}
    assert needed["QLoRA"] < needed["LoRA"] < needed["whole, 8-bit AdamW"] < needed["whole"]
    assert needed["LoRA, vLLM"] == pytest.approx(needed["LoRA"] + 2 * 8.53e9 / 2**30, abs=1.6)
    assert int(cells["QLoRA"].partition(" ")[0]) in MEMORIES


def test_the_command_refuses_a_recipe_beside_the_table():
    refused = CliRunner().invoke(app, ["plan", "shapes_gspo", "--table"])
    assert refused.exit_code != 0
    assert CliRunner().invoke(app, ["plan", "shapes_gspo"]).exit_code != 0
