from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors import safe_open

from foveate.config.data import DataSettings
from foveate.encoding.encode import Encoder
from foveate.encoding.routes import routed, seen_share
from foveate.errors import ConfigError, DataError
from foveate.evaluate.predict import load_engine
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.flash import begin_as_mean, compressible, patches_of, projected, route_by
from foveate.models.flash_routes import with_router
from foveate.models.forward import embed, token_logprobs
from foveate.models.policy import load_on_meta, load_policy, save_policy
from foveate.parallel.packing import pack, positions
from foveate.records import PackedGroup, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine


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
    parts = {policy.family.part_of(name) for name, _ in policy.model.named_parameters()}
    assert parts == {"vision", "projector", "router", "language", "head"}
    assert policy.family.part_of("model.mlp2.1.weight") == "projector"


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


def test_the_types_of_a_comparison_are_those_of_the_released_code():
    """It compares a router in bfloat16 with a quantile that is computed in float32 and then rounded."""
    first, second, third = (1 - step / 256 for step in (3, 2, 1))  # neighbours in bfloat16
    found = torch.tensor([third, first, second, third, third, third, third], dtype=torch.bfloat16)
    bound = torch.quantile(found.float(), 0.1)  # 0.6 of the way from the first to the second
    assert first < bound < second
    assert route_by(found, (0.1, 0.5)) == [True, False, False, True, True, True, True]
    assert route_by(found.float(), (0.1, 0.5)) == [True, False, True, True, True, True, True]
    low = torch.tensor([0.5, 0.69921875, 0.8], dtype=torch.bfloat16)  # the second is the number nearest to 0.7
    assert route_by(low, (0.0, 0.7)) == [False, True, True]
    assert route_by(low.float(), (0.0, 0.7)) == [False, False, True]


def test_only_an_internvl_becomes_a_flash_model_and_only_once(folder, tmp_path):
    with pytest.raises(DataError, match="is a Flash model already"):
        write_flash(str(folder), tmp_path / "again")
    with pytest.raises(DataError, match="exists; choose another folder"):
        write_flash("demo", folder)
    inspect_model_folder(str(folder))


# ------------------------------------------------------------------------------------- the released code, stated anew


def released_prompt(tensors, config, model, ids, pixels, image_id):
    """`generate_flash` of the modelling code that comes with InternVL3_5-*-Flash, for one prompt, up to the language
    model: embeddings (L, D), the tokens that are kept (bool), and the gate of each tile. By the tensors of the
    checkpoint's own names."""

    def linear(x, name):
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def attend(query, keys, name):
        module = torch.nn.MultiheadAttention(keys.shape[-1], 16, batch_first=True)
        own = {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own)
        return module(query, keys, keys)[0]

    def shuffled(x, scale):
        n, w, h, c = x.shape
        x = x.reshape(n, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3)
        x = x.reshape(n, int(h * scale), int(w * scale), int(c / scale**2)).permute(0, 2, 1, 3)
        return x.flatten(1, 2)

    gelu = torch.nn.functional.gelu
    seen = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    side = int(seen.shape[1] ** 0.5)
    square = seen.unflatten(1, (side, side))
    pooled = tensors["pooling_before_gating.query_token"].expand(len(seen), 1, -1)
    for name in ("1", "2", "2", "2"):
        pooled = norm(attend(pooled, seen, f"pooling_before_gating.attn{name}"), f"pooling_before_gating.norm{name}")
    gate = pooled[:, 0]
    for block in (1, 2, 3, 4):
        inner = linear(gelu(linear(gate, f"gating.block{block}.0")), f"gating.block{block}.3")
        gate = gate + norm(inner, f"gating.block{block}.5")
    gate = linear(norm(gate, "gating.gate.0"), "gating.gate.1").softmax(-1)[:, 0]
    small = norm(shuffled(square, 0.25), "mlp2.0")
    small = linear(gelu(linear(gelu(linear(small, "mlp2.1")), "mlp2.4")), "mlp2.7")
    large = linear(gelu(linear(norm(shuffled(square, 0.5), "mlp1.0"), "mlp1.1")), "mlp1.3")
    bound = torch.quantile(gate, config["flash_relative_threshold"])
    compressed = (gate > bound) & (gate >= config["flash_absolute_threshold"])
    each, few = large.shape[1], small.shape[1]
    kept = torch.ones(len(ids), dtype=torch.bool)
    places = (ids == image_id).nonzero()[:, 0].reshape(-1, each)  # of one tile after the other
    for own, is_compressed in zip(places, compressed.tolist(), strict=True):
        if is_compressed:
            kept[own[few:]] = False
    features = torch.cat([small[i] if flag else large[i] for i, flag in enumerate(compressed.tolist())])
    embeddings = tensors["language_model.model.embed_tokens.weight"][ids[kept]]
    embeddings[ids[kept] == image_id] = features
    return embeddings, kept, compressed


def test_a_routed_prompt_is_that_of_the_released_code(folder, tmp_path, make_task, make_image):
    """A random Flash model whose gates differ: equal embeddings, masks and next-token log-probs, of one call each."""
    policy = load_policy(str(folder))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "mlp2" in name or "gating" in name:  # the released names of both parts of the router hold it
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name)
    save_policy(policy, tmp_path / "random")
    policy = load_policy(str(tmp_path / "random"))
    tensors = {}
    for file in (tmp_path / "random").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    config = json.loads((tmp_path / "random" / "config.json").read_text())
    plain = Encoder(policy.tokenizer, policy.family, 12, 2048)
    encode = with_router(plain, policy)
    alone, mixed = load_policy(str(tmp_path / "random")).model, 0
    alone.set_attn_implementation("eager")
    for seed in range(4):
        task = make_task("<image> or <image>?", make_image(250, 70 + 30 * seed, seed), make_image(50, 60, seed + 9))
        whole, got = plain(task), encode(task)
        ids = torch.tensor(whole.token_ids)
        with torch.no_grad():
            embeddings, kept, compressed = released_prompt(
                tensors, config, policy.model, ids, whole.pixels, policy.family.image_token_id
            )
            assert got.token_ids == tuple(ids[kept].tolist())
            assert [side == 1 for slot in got.slots for side in slot.sides] == compressed.tolist()
            batch = pack([PackedGroup.of_tokens(got, [(5,), (9,)])])
            ours, _ = embed(policy, batch)
            torch.testing.assert_close(ours[: len(got)], embeddings, rtol=1e-4, atol=1e-4)
            logits = alone(inputs_embeds=embeddings[None], use_cache=False).logits[0, -1].log_softmax(-1)
            found, _ = token_logprobs(policy, batch)
        torch.testing.assert_close(found, logits[[5, 9]], rtol=1e-4, atol=1e-4)
        assert plain.length(task) == len(whole) >= len(got)
        mixed += len(set(compressed.tolist())) == 2
    assert mixed >= 2
    engine = NativeEngine(policy, plain.decode)
    [[answer]] = engine.generate([Request(got, 3)], SamplingParams(max_tokens=5))
    again, _ = token_logprobs(policy, pack([PackedGroup(got, (answer,))]))
    torch.testing.assert_close(again.detach(), torch.from_numpy(answer.logprobs), rtol=1e-4, atol=1e-4)


def test_thresholds_that_are_none_are_told_by_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"flash_relative_threshold": 2}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json: flash_relative_threshold is 2 .* numbers from 0 to 1"):
        inspect_model_folder(str(tmp_path / "odd"))


def test_models_that_answer_are_routed_and_others_are_not(folder, tiny_folder, make_task, make_image):
    data = DataSettings(train=("x",), max_prompt_tokens=2048)
    engine, encode = load_engine(str(folder), data, 6)
    prompt = encode(make_task("<image>?", make_image(200, 60, 1)))
    assert {*prompt.slots[0].sides} <= {1, 2}
    assert engine.generate([Request(prompt, 1)], SamplingParams(max_tokens=2))
    assert encode(make_task("no image")).slots == ()
    for tiles, side in (("whole", 2), ("compressed", 1)):
        slots = load_engine(str(folder), data, 6, tiles=tiles)[1](make_task("<image>?", make_image(200, 60, 1))).slots
        assert {*slots[0].sides} == {side}
        assert seen_share([Prompt((), slots, None, ())], (2, 1)) == (1 if side == 2 else 0.25)
    with pytest.raises(ConfigError, match=r"--tiles whole: internvl at .* compresses none; leave it out"):
        load_engine(str(tiny_folder), data, 6, tiles="whole")
    assert load_engine(str(tiny_folder), data, 6)[1].route is None
