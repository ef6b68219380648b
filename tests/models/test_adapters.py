"""Adapters on disk in peft's layout: plain peft reads them, training begins from them, other kinds are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save_file
from test_forward import padded_logprobs, plain_model, random_group

from foveate.config.model import LoraSettings, ModelSettings
from foveate.config.train import OptimSettings
from foveate.errors import DataError
from foveate.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, trained_tensors, write_adapter
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.forward import token_logprobs
from foveate.models.lora import train_parts
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack
from foveate.train.worker import Worker

PARTS = ("vision", "projector", "language")
LORA = LoraSettings(rank=2, alpha=6)


@pytest.fixture(scope="module")
def groups(tiny_policy):
    generator = torch.Generator().manual_seed(5)
    return [random_group(tiny_policy, generator, tiles, 7, 9, answers) for tiles, answers in ((2, (5, 3)), (1, (4,)))]


def trained(folder, lora=LORA, parts=PARTS):
    """A policy whose adapters and projector have moved."""
    policy = load_policy(str(folder))
    train_parts(policy, parts, lora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in trained_tensors(policy).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return policy


def written(policy, folder, lora=LORA):
    write_adapter(policy, lora, folder, trained_tensors(policy))
    return folder


@torch.no_grad()
def logprobs(policy, groups):
    return token_logprobs(policy, pack(groups))[0]


def test_plain_peft_loads_what_was_trained(tiny_folder, groups, tmp_path):
    policy = trained(tiny_folder)
    folder = written(policy, tmp_path / "adapter")
    model = PeftModel.from_pretrained(plain_model(tiny_folder), str(folder)).eval()
    with torch.no_grad():
        plain = padded_logprobs(model, groups, "right")[0]
    torch.testing.assert_close(plain, logprobs(policy, groups), rtol=1e-5, atol=2e-5)
    assert (plain - logprobs(load_policy(str(tiny_folder)), groups)).abs().max() > 1e-2


def test_training_begins_from_an_adapter_of_foveate_and_from_one_of_peft(tiny_folder, groups, tmp_path):
    policy = trained(tiny_folder)
    ours = written(policy, tmp_path / "ours")
    again = load_policy(str(tiny_folder))
    train_parts(again, PARTS, LORA.model_copy(update={"adapter": str(ours)}))
    assert torch.equal(logprobs(again, groups), logprobs(policy, groups))
    assert trained_tensors(again).keys() == trained_tensors(policy).keys()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    theirs = get_peft_model(plain_model(tiny_folder), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    lora = LoraSettings(rank=2, alpha=6, targets=("q_proj", "v_proj"), adapter=str(tmp_path / "theirs"))
    own = load_policy(str(tiny_folder))
    train_parts(own, ("language",), lora)
    with torch.no_grad():
        plain = padded_logprobs(theirs.eval(), groups, "right")[0]
    torch.testing.assert_close(logprobs(own, groups), plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora is True; foveate trains plain LoRA, with False there"),
        ({"use_rslora": True}, "use_rslora is True; foveate trains plain LoRA"),
        ({"use_next_year": True}, "use_next_year is True; foveate trains plain LoRA, with False there"),
        ({"bias": "all"}, "bias is 'all'; foveate trains plain LoRA, with 'none' there"),
        ({"r": 4}, "r is 4, and model.lora.rank 2; set model.lora.rank=4"),
        ({"lora_alpha": 8}, "lora_alpha is 8, and model.lora.alpha 6; set model.lora.alpha=8"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_the_setting_that_differs(tiny_folder, tmp_path, change, said):
    policy = trained(tiny_folder)
    folder = written(policy, tmp_path / "adapter")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=said):
        load_adapter(policy, LORA, str(folder))


def test_an_adapter_of_other_layers_is_refused(tiny_folder, tmp_path):
    folder = written(trained(tiny_folder), tmp_path / "adapter")
    with pytest.raises(DataError, match=r"also holds .* more; use the model.trainable and model.lora.targets that it"):
        train_parts(load_policy(str(tiny_folder)), ("language",), LORA.model_copy(update={"adapter": str(folder)}))
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"lacks model\."):
        train_parts(load_policy(str(tiny_folder)), PARTS, LORA.model_copy(update={"adapter": str(folder)}))
    with pytest.raises(DataError, match=r"no adapter in peft's layout"):
        train_parts(load_policy(str(tiny_folder)), PARTS, LORA.model_copy(update={"adapter": str(tmp_path / "none")}))


def test_an_adapter_of_another_model_of_the_same_shapes_is_told(tiny_folder, tmp_path, caplog):
    folder = written(trained(tiny_folder), tmp_path / "adapter")
    lora = LORA.model_copy(update={"adapter": str(folder)})
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    train_parts(load_policy(str(other)), PARTS, lora)
    assert not caplog.records
    weights = load((other / "model.safetensors").read_bytes())
    weights[min(weights)] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    train_parts(load_policy(str(other)), PARTS, lora)
    [record] = caplog.records
    assert f"was trained over the weights of {tiny_folder}, and those of {other} are others" in record.message


def test_a_damaged_adapter_is_refused(tiny_folder, tmp_path):
    folder = written(trained(tiny_folder), tmp_path / "adapter")
    content = (folder / ADAPTER_WEIGHTS).read_bytes()
    matrices = load(content)
    lora = LORA.model_copy(update={"adapter": str(folder)})
    (folder / ADAPTER_WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=ADAPTER_WEIGHTS):
        train_parts(load_policy(str(tiny_folder)), PARTS, lora)
    matrices[min(matrices)][0, 0] = float("nan")
    save_file(matrices, folder / ADAPTER_WEIGHTS)
    with pytest.raises(DataError, match=r"holds numbers that are not finite; it is damaged"):
        train_parts(load_policy(str(tiny_folder)), PARTS, lora)


@pytest.mark.parametrize("save", ["merged", "adapter", "both"])
def test_a_worker_exports_what_was_asked_for(tiny_folder, groups, tmp_path, save):
    lora = LORA.model_copy(update={"save": save})
    worker = Worker(ModelSettings(path=str(tiny_folder), lora=lora), OptimSettings(lr=0.01), 1024)
    worker.update_sft(groups, "token", 12.0, 0.01)
    worker.export(tmp_path / "final")
    wanted = logprobs(worker.policy, groups)
    if save != "adapter":
        whole = load_policy(str(tmp_path / "final"))
        torch.testing.assert_close(logprobs(whole, groups), wanted, rtol=1e-5, atol=3e-5)
    assert (tmp_path / "final" / "adapter").is_dir() == (save == "both")
    if save == "merged":
        return
    again = load_policy(str(tiny_folder))
    train_parts(again, PARTS, lora.model_copy(update={"adapter": str(tmp_path / "final")}))
    assert torch.equal(logprobs(again, groups), wanted)
    if save == "adapter":
        with pytest.raises(DataError, match=r"is an adapter of .*; name that model \(model.path\) and this fold"):
            inspect_model_folder(str(tmp_path / "final"))


def test_dora_is_no_setting_of_an_adapter():
    with pytest.raises(ValueError, match="use_dora"):
        LoraSettings.model_validate({"use_dora": True})
