from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY
from safetensors import safe_open

from foveate.encoding.encode import Encoder
from foveate.encoding.routes import routed
from foveate.errors import DataError
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.flash import begin_as_mean, compressible, patches_of, projected
from foveate.models.forward import embed, token_logprobs
from foveate.models.policy import load_on_meta, load_policy, part_of, save_policy
from foveate.parallel.packing import pack, positions
from foveate.records import PackedGroup


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("flash") / "tiny"
    write_flash(str(tiny_folder), target, seed=3)
    return target


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(str(folder))


@pytest.fixture
def prompt(policy, make_task, make_image):
    encode = Encoder(policy.tokenizer, policy.family, 6, 1024)
    return encode(make_task("<image> or <image>?", make_image(130, 70, 1), make_image(50, 60, 2)))


def test_a_flash_model_has_the_names_of_the_released_one_and_the_weights_of_its_start(folder, tiny_policy, policy):
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= {*tensors.keys()}
    assert {"mlp1.1.weight", "mlp2.0.weight", "mlp2.1.bias", "mlp2.4.weight", "mlp2.7.weight"} <= names
    assert {"pooling_before_gating.query_token", "pooling_before_gating.attn4.in_proj_weight"} <= names
    assert {"gating.block3.3.weight", "gating.block4.5.bias", "gating.gate.1.weight"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert (config["flash_mode"], config["flash_relative_threshold"], config["model_type"]) == (
        True, 0.1, "internvl_chat",
    )  # fmt: skip
    assert (policy.family.name, policy.family.sides) == ("internvl_flash", (2, 1))
    own = policy.model.state_dict()
    for name, tensor in tiny_policy.model.state_dict().items():
        assert torch.equal(own[name], tensor), name


def test_a_flash_model_is_the_same_after_every_way_to_disk_and_back(policy, folder, tmp_path):
    save_policy(policy, tmp_path / "saved")
    convert(folder, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "chat")
    for name in ("saved", "hf", "back"):
        again = load_policy(str(tmp_path / name))
        assert again.family.name == "internvl_flash"
        own = again.model.state_dict()
        for key, tensor in policy.model.state_dict().items():
            assert torch.equal(own[key], tensor), (name, key)
    assert load_on_meta(str(tmp_path / "saved")).is_meta
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["flash_absolute_threshold"] == 0.5


def test_every_parameter_has_its_part_and_no_stage_trains_the_router(policy):
    parts = {part_of(policy.family, name) for name, _ in policy.model.named_parameters()}
    assert parts == {"vision", "projector", "router", "language", "head"}
    assert part_of(policy.family, "model.mlp2.1.weight") == "projector"


def test_a_route_takes_tokens_away_and_is_recorded(policy, prompt):
    sides = policy.family.sides
    tiles = [slot.tiles for slot in prompt.slots]
    whole = routed(prompt, [[False] * n for n in tiles], sides)
    assert whole.token_ids == prompt.token_ids
    assert [slot.sides for slot in whole.slots] == [(2,) * n for n in tiles]
    mixed = routed(prompt, [[True, False, True], [True]], sides)
    assert [slot.count for slot in mixed.slots] == [1 + 4 + 1, 1]
    assert [slot.sides for slot in mixed.slots] == [(1, 2, 1), (1,)]
    assert len(mixed) == len(prompt) - 9
    marked = [policy.family.image_token_id in (token,) for token in mixed.token_ids]
    for slot in mixed.slots:
        assert all(marked[slot.position : slot.position + slot.count])
    others = [token for token in prompt.token_ids if token != policy.family.image_token_id]
    assert [token for token in mixed.token_ids if token != policy.family.image_token_id] == others
    assert positions(len(mixed), mixed.slots).ndim == 1


def test_compressed_tiles_have_the_features_of_the_second_projector(policy, prompt):
    routes = [[True, False, True], [False]]
    mixed = routed(prompt, routes, policy.family.sides)
    batch = pack([PackedGroup.of_tokens(mixed, [(5, 6)]), PackedGroup.of_tokens(mixed, [(7,)])])
    with torch.no_grad():
        found, _ = embed(policy, batch)
        patches = patches_of(policy.model, prompt.pixels)
        plain = policy.model.get_image_features(pixel_values=prompt.pixels).pooler_output
        torch.testing.assert_close(projected(policy.model, patches, compressed=False), plain)
        small = projected(policy.model, patches, compressed=True)
    flags = [flag for route in routes for flag in route]
    wanted = torch.cat([small[i] if flag else plain[i] for i, flag in enumerate(flags)])
    torch.testing.assert_close(found[batch.slot_index], torch.cat([wanted, wanted]))


def test_without_compression_it_answers_as_the_model_it_was_made_of(policy, tiny_policy, prompt):
    groups = [PackedGroup.of_tokens(prompt, [(5, 6, 7), (8,)])]
    whole = routed(prompt, [[False] * slot.tiles for slot in prompt.slots], policy.family.sides)
    same = [PackedGroup.of_tokens(whole, [(5, 6, 7), (8,)])]
    with torch.no_grad():
        wanted = token_logprobs(tiny_policy, pack(groups))[0]
        for own in (groups, same):
            torch.testing.assert_close(token_logprobs(policy, pack(own))[0], wanted, rtol=1e-5, atol=1e-5)


def test_the_second_projector_begins_as_the_first_one_of_the_mean(folder):
    policy = load_policy(str(folder))
    begin_as_mean(policy.model)
    patches = torch.randn(3, 1, 1, 2, 2, TINY.vision_width).expand(3, 2, 2, 2, 2, -1)  # four equal tokens a tile
    patches = patches.permute(0, 1, 3, 2, 4, 5).reshape(3, 4, 4, TINY.vision_width)
    with torch.no_grad():
        first = projected(policy.model, patches, compressed=False)
        second = projected(policy.model, patches, compressed=True)
    assert first.shape[1:] == (4, TINY.width)
    assert second.shape[1:] == (1, TINY.width)
    torch.testing.assert_close(second, first[:, :1], rtol=1e-4, atol=1e-4)


def test_the_router_says_a_probability_for_each_tile_by_itself(policy, prompt):
    with torch.no_grad():
        patches = patches_of(policy.model, prompt.pixels)
        every = compressible(policy.model, patches)
        alone = torch.cat([compressible(policy.model, one[None]) for one in patches])
    assert ((every > 0) & (every < 1)).all()
    torch.testing.assert_close(every, alone)


def test_only_an_internvl_becomes_a_flash_model_and_only_once(folder, tmp_path):
    with pytest.raises(DataError, match="is no InternVL without a second projector"):
        write_flash(str(folder), tmp_path / "again")
    with pytest.raises(DataError, match="exists; choose another folder"):
        write_flash("demo", folder)
    inspect_model_folder(str(folder))
