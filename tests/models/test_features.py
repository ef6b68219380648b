"""Features of images that a frozen tower sees are computed once, kept within a limit, and change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from foveate.config.model import FeatureCacheSettings, LoraSettings
from foveate.errors import ConfigError
from foveate.models.features import FeatureStore, with_kept_features
from foveate.models.forward import token_logprobs
from foveate.models.lora import train_parts
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack
from foveate.records import Answer, PackedGroup, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine


@pytest.fixture
def policy(tiny_folder):
    loaded = load_policy(str(tiny_folder))
    train_parts(loaded, ["language"], None)
    return loaded


@pytest.fixture
def packed_groups(encode, make_task, make_image):
    """Prompts with one image, none, two, and another one; two answers to each."""
    shown = ((make_image(90, 60, 1),), (), (make_image(50, 70, 2), make_image(56, 56, 3)), (make_image(120, 40, 4),))
    prompts = [encode(make_task("<image>" * len(images) + " what?", *images)) for images in shown]
    ids = torch.randint(20, 200, (len(prompts), 2, 5), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        PackedGroup(prompt, tuple(Answer.sampled(one, [0.0] * 5, "", "length", 0) for one in own))
        for prompt, own in zip(prompts, ids, strict=True)
    ]


def calls_of(policy):
    """The tiles that go through the vision tower, call by call."""
    calls = []
    policy.part("vision").register_forward_pre_hook(
        lambda _, given, named: calls.append(len(named.get("pixel_values", *given[:1]))), with_kwargs=True
    )
    return calls


def kept(policy, folder, gigabytes=1.0):
    return with_kept_features(policy, FeatureCacheSettings(gigabytes=gigabytes, folder=str(folder)))


def gradients(policy, groups):
    policy.model.zero_grad()
    logp, entropy = token_logprobs(policy, pack(groups))
    (logp.mean() + 0.1 * entropy.mean()).backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return logp.detach(), found


def test_each_image_goes_through_the_tower_once_for_all_passes_rows_and_processes(policy, packed_groups, tmp_path):
    calls, first = calls_of(policy), kept(policy, tmp_path / "kept")
    images = [group for group in packed_groups if group.prompt.pixels is not None]
    assert len(images) > 1
    for groups in (packed_groups, packed_groups[::-1], images[:1], images):
        token_logprobs(first, pack(groups))
    assert sorted(calls) == sorted(len(group.prompt.pixels) for group in images)
    token_logprobs(kept(policy, tmp_path / "kept"), pack(packed_groups))  # as another run would
    assert len(calls) == len(images)


def test_kept_features_change_no_log_prob_and_no_gradient(policy, packed_groups, tmp_path):
    expected, wanted = gradients(policy, packed_groups)
    with_store = kept(policy, tmp_path / "kept")
    for _ in range(2):  # computed, and read
        found, got = gradients(with_store, packed_groups)
        assert (found - expected).abs().max() < 1e-5
        assert got.keys() == wanted.keys()
        assert all(torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)


def test_features_are_the_same_bits_computed_or_read_alone_or_beside_others(policy, packed_groups, tmp_path):
    images = pack(packed_groups).images
    computed = kept(policy, tmp_path / "kept").features
    together = computed.of(policy, images).embeddings
    again = kept(policy, tmp_path / "kept").features.of(policy, images).embeddings
    alone = torch.cat(
        [kept(policy, tmp_path / "other").features.of(policy, [one]).embeddings for one in images[::-1]][::-1]
    )
    assert torch.equal(together, again)
    assert torch.equal(together, alone)


def test_the_folder_stays_within_its_limit_and_what_has_no_room_is_computed_again(policy, packed_groups, tmp_path):
    images = pack(packed_groups).images
    store = kept(policy, tmp_path / "whole").features
    store.of(policy, images)
    sizes = [file.stat().st_size for file in store.folder.iterdir()]
    limit = sum(sizes) - 1
    calls = calls_of(policy)
    for _ in range(2):
        kept(policy, tmp_path / "kept", limit / 1e9).features.of(policy, images)
    files = [*(tmp_path / "kept").glob("*/*")]
    assert len(files) == len(images) - 1
    assert sum(file.stat().st_size for file in files) <= limit
    assert len(calls) == len(images) + 1


def test_other_weights_pixels_or_numbers_have_other_features(policy, packed_groups, tmp_path):
    source = pack(packed_groups).images[0]
    store = kept(policy, tmp_path / "kept").features
    first = store.of(policy, [source]).embeddings
    brighter = store.of(policy, [replace(source, pixels=source.pixels + 0.1)]).embeddings
    assert not torch.allclose(first, brighter)
    with torch.no_grad():
        next(policy.part("projector").parameters()).mul_(1.5)
    other = kept(policy, tmp_path / "kept").features
    assert other.folder != store.folder
    assert not torch.allclose(first, other.of(policy, [source]).embeddings)
    policy.model.to(torch.bfloat16)
    assert kept(policy, tmp_path / "kept").features.folder not in (store.folder, other.folder)


def test_weights_of_the_language_model_share_what_is_kept(policy, tmp_path):
    store = kept(policy, tmp_path / "kept").features
    with torch.no_grad():
        next(policy.part("language").parameters()).mul_(1.5)
    assert kept(policy, tmp_path / "kept").features.folder == store.folder


def test_the_engine_reads_what_the_trainer_has_computed(policy, packed_groups, tmp_path):
    with_store = kept(policy, tmp_path / "kept")
    token_logprobs(with_store, pack(packed_groups))
    calls = calls_of(policy)
    requests = [Request(group.prompt, number) for number, group in enumerate(packed_groups)]
    found = NativeEngine(with_store, lambda _: "").generate(requests, SamplingParams(1, 4))
    assert calls == []
    plain = NativeEngine(policy, lambda _: "").generate(requests, SamplingParams(1, 4))
    assert [one.token_ids for (one,) in found] == [one.token_ids for (one,) in plain]


def test_an_engine_with_weights_of_its_own_computes_features_itself(policy, tmp_path):
    assert NativeEngine.copy_of(kept(policy, tmp_path / "kept"), lambda _: "").policy.features is None


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_parts_that_are_trained_have_no_kept_features(policy, tmp_path, part):
    train_parts(policy, ["language", part], None)
    with pytest.raises(ConfigError, match=f"{part} is trained"):
        FeatureStore(policy, tmp_path, 1e9)


def test_adapters_of_the_language_model_leave_features_as_they_are(policy, tmp_path):
    pytest.importorskip("peft")
    train_parts(policy, ["language"], LoraSettings(rank=2))
    assert FeatureStore(policy, tmp_path, 1e9).folder.parent == tmp_path


@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone", "other"])
def test_damaged_files_are_computed_and_written_again(policy, packed_groups, tmp_path, caplog, damage):
    images = pack(packed_groups).images[:1]
    store = kept(policy, tmp_path / "kept").features
    expected = store.of(policy, images).embeddings
    [file] = store.folder.iterdir()
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "other":
        save_file({"weight": torch.zeros(2)}, file)
    else:
        file.write_bytes(
            whole[:40] if damage == "cut" else whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
        )
    assert torch.equal(store.of(policy, images).embeddings, expected)
    assert (f"{file}: damaged features" in caplog.text) == (damage != "gone")
    assert file.read_bytes() == whole


def test_scales_of_quantised_towers_are_weights_too(tiny_folder, tmp_path):
    folders = set()
    for factor in (1, 3):
        loaded = load_policy(str(tiny_folder), quantization="int8")
        train_parts(loaded, ["language"], LoraSettings(rank=2))
        for name, buffer in loaded.model.named_buffers():
            if loaded.family.part_of(name) == "vision" and name.endswith("scale"):
                buffer.mul_(factor)
        folders.add(FeatureStore(loaded, tmp_path, 1e9).folder)
    assert len(folders) == 2


def test_a_folder_may_be_of_the_home_and_hold_links_to_nothing(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kept" / "model").mkdir(parents=True)
    (tmp_path / "kept" / "model" / "one.safetensors").symlink_to("nothing")
    store = with_kept_features(policy, FeatureCacheSettings(gigabytes=1, folder="~/kept")).features
    assert store.folder.parent == tmp_path / "kept"


def test_a_disk_without_room_ends_the_keeping_and_not_the_run(policy, packed_groups, tmp_path, caplog):
    (tmp_path / "kept").write_text("no folder")
    store = kept(policy, tmp_path / "kept").features
    images = pack(packed_groups).images
    assert len(store.of(policy, images).embeddings)
    store.of(policy, images)
    assert caplog.text.count("no more image features are kept") == 1
