"""Qwen-VL checkpoints as they are released: older names, flat configurations, tied heads, experts stored the other way
round. Each loads as the same model, and is saved as it came."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from family_cases import build_family
from safetensors.torch import load_file, save_file

from foveate.models.checkpoint.safetensors_io import read_headers, read_tensor, weight_files
from foveate.models.policy import load_policy, save_policy
from foveate.models.sharded import allocate, load_sharded, meta_policy
from foveate.tools.model_facts import model_facts

HEAD = "lm_head.weight"


def old_names(weights):
    """Of Qwen2.5-VL before transformers 4.52, and of the Hub."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in weights.items()
    }


def new_names(weights):
    named = {name: f"model.{name}" for name in weights if name.startswith("visual.")}
    named |= {name: name.replace("model.", "model.language_model.") for name in weights if name.startswith("model.")}
    return {named.get(name, name): tensor for name, tensor in weights.items()}


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


def experts_turned(weights):
    """(expert, in, out), as Qwen3-VL-30B-A3B and 235B-A22B are released."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in weights.items()
    }


def flat(config):
    """The text model's settings among the outer ones, as Qwen2.5-VL is released."""
    outer = dict(config)
    text = dict(outer.pop("text_config"))
    rope = text.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    return {**text, **old, **outer}


def tied(config, outer=True, inner=True):
    text = {**config["text_config"], "tie_word_embeddings": True}
    said = {**config, "text_config": text, "tie_word_embeddings": True}
    if not outer:
        del said["tie_word_embeddings"]
    if not inner:
        del text["tie_word_embeddings"]
    return said


def same(value):
    return value


CASES = {
    "qwen2_5_vl, old names": ("qwen2_5_vl", old_names, same),
    "qwen2_5_vl, new names": ("qwen2_5_vl", new_names, same),
    "qwen2_5_vl, old names, flat": ("qwen2_5_vl", old_names, flat),
    "qwen2_5_vl, new names, flat": ("qwen2_5_vl", new_names, flat),
    "qwen2_5_vl, old names, flat, tied": (
        "qwen2_5_vl", lambda w: without_head(old_names(w)), lambda c: {**flat(c), "tie_word_embeddings": True},
    ),
    "qwen2_5_vl, tied": ("qwen2_5_vl", without_head, tied),
    "qwen2_5_vl, tied by text_config": ("qwen2_5_vl", without_head, lambda c: tied(c, outer=False)),
    "qwen3_vl, tied": ("qwen3_vl", without_head, tied),
    "qwen3_vl, tied by the outer config": ("qwen3_vl", without_head, lambda c: tied(c, inner=False)),
    "qwen3_vl, tied by text_config": ("qwen3_vl", without_head, lambda c: tied(c, outer=False)),
    "qwen3_5, tied": ("qwen3_5", without_head, tied),
    "qwen3_vl_moe, experts as released": ("qwen3_vl_moe", experts_turned, same),
    "qwen3_vl_moe, experts as transformers 5 has them": ("qwen3_vl_moe", same, same),
    "qwen3_vl_moe, tied, experts as released": ("qwen3_vl_moe", lambda w: without_head(experts_turned(w)), tied),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in made:
            made[name] = build_family(root / name, name)
        return made[name]

    return folder


@pytest.fixture(params=CASES)
def released(request, folders, tmp_path):
    """(folder in the layout of a release, the same model as transformers 5 writes it)."""
    name, change_weights, change_config = CASES[request.param]
    folder = shutil.copytree(folders(name), tmp_path / "released")
    save_file(change_weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    config = change_config(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    return folder, folders(name)


def test_a_released_layout_is_the_same_model(released):
    folder, plain = released
    policy, other = load_policy(str(folder)), load_policy(str(plain))
    weights, wanted = policy.model.state_dict(), other.model.state_dict()
    assert weights.keys() == wanted.keys()
    is_tied = HEAD not in load_file(folder / "model.safetensors")
    assert (policy.part("head").weight is policy.model.get_input_embeddings().weight) == is_tied
    for name, tensor in wanted.items():
        assert torch.equal(weights[name], tensor) or (is_tied and name == HEAD), name


def test_a_trained_model_is_saved_in_the_layout_it_came_in(released, tmp_path):
    folder, _ = released
    policy = load_policy(str(folder))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(2)
    given = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    before = load_file(folder / "model.safetensors")
    for target, state in (("own", None), ("given", given)):
        save_policy(policy, tmp_path / target, state)
        saved = load_file(tmp_path / target / "model.safetensors")
        assert saved.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(saved[name], 2 * tensor), name
        assert json.loads((tmp_path / target / "config.json").read_text()) == json.loads(
            (folder / "config.json").read_text()
        )


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_layers_for_multi_token_prediction_are_not_loaded_and_travel_along(name, folders, tmp_path, caplog):
    folder = shutil.copytree(folders(name), tmp_path / "released")
    mtp = {"mtp.fc.weight": torch.arange(6.0).view(2, 3).bfloat16(), "mtp.norm.weight": torch.ones(2)}
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **mtp}, folder / "model.safetensors", {"format": "pt"})
    policy, spread = load_policy(str(folder)), meta_policy(str(folder))
    allocate(spread, spread.model, "cpu")
    load_sharded(spread)
    for key, tensor in policy.model.state_dict().items():
        assert torch.equal(spread.model.state_dict()[key], tensor), key
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(2)
    save_policy(policy, tmp_path / "saved")
    assert "2 tensors (mtp.*) are copied" in caplog.text
    again = load_policy(str(tmp_path / "saved"))
    assert model_facts(again)["not trained"] == "2 tensors, mtp.fc.weight, ...: copied when saved"
    save_policy(again, tmp_path / "again")
    for saved in (tmp_path / "saved", tmp_path / "again"):
        found = read_headers(weight_files(saved))
        assert found.keys() == weights.keys() | mtp.keys()
        for key, tensor in mtp.items():
            assert torch.equal(read_tensor(found[key]), tensor)
        for key, tensor in weights.items():
            assert torch.equal(read_tensor(found[key]), 2 * tensor), key


def test_experts_that_are_stored_joined_are_saved_joined_also_by_ranks(folders, tmp_path):
    """As Qwen3.5's mixtures are released."""
    folder = shutil.copytree(folders("qwen3_5_moe"), tmp_path / "released")
    state = load_policy(str(folder)).model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    for name, policy in (("whole", load_policy(str(folder))), ("filled", meta_policy(str(folder)))):
        if policy.is_meta:
            allocate(policy, policy.model, "cpu")
            load_sharded(policy)
        save_policy(policy, tmp_path / name)
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], tensor) for key, tensor in state.items())
