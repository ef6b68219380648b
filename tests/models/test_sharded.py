"""A model that is filled tensor by tensor is the one that is loaded at once, whole or cut over ranks."""

from __future__ import annotations

import shutil

import pytest
import torch
from family_cases import VISION_MODELS, build_family, build_internvl
from rank_cases import spawn, whole
from safetensors.torch import load_file, save_file
from slow_cases import slow_but

from foveate.config.cluster import ClusterSettings
from foveate.errors import DataError
from foveate.models.checkpoint.convert import convert
from foveate.models.policy import load_policy
from foveate.models.sharded import allocate, load_sharded, meta_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.parallel.fsdp import LogProbs, mesh_of, shard

OTHERS = [*VISION_MODELS, "qwen3", "qwen3_moe", "gpt_oss"]
TIED = ["internvl, tied", "qwen3_vl, tied", "qwen3, tied"]
TINY = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, head_dim=16, ffn=96)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """InternVL in its layouts, the other families, and some of each with tied embeddings."""
    root = tmp_path_factory.mktemp("folders")
    made = {name: build_family(root / name, name) for name in OTHERS}
    made["internvl"] = build_tiny(root / "hf", TINY)
    made["internvl, chat"] = root / "chat"
    convert(made["internvl"], root / "chat", "chat", shard_bytes=100_000)
    tied = {"tie_word_embeddings": True}
    made["internvl, tied"] = build_internvl(root / "tied", TINY, text=tied, vision={})
    return made | {f"{name}, tied": build_family(root / f"{name}-tied", name, **tied) for name in ("qwen3_vl", "qwen3")}


def tensors_of(policy):
    return {**policy.model.state_dict(), **dict(policy.model.named_buffers())}


def require_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("name", ["internvl", "internvl, chat", *OTHERS, *TIED])
def test_a_filled_model_is_the_loaded_one_bit_for_bit(folders, name, dtype):
    loaded = load_policy(str(folders[name]), dtype=dtype)
    policy = meta_policy(str(folders[name]), dtype=dtype)
    assert policy.is_meta
    allocate(policy, policy.model, "cpu")
    load_sharded(policy)
    require_same(tensors_of(policy), tensors_of(loaded))
    assert policy.is_tied == loaded.is_tied == (name in TIED)
    names = [[name for name, _ in one.model.named_parameters()] for one in (policy, loaded)]
    assert names[0] == names[1]  # tied weights are one
    assert policy.model.training == loaded.model.training


def filled_shares(_rank, ranks, _folder, folders):
    """Every tensor of each model as the ranks hold it together, and the numbers that this one holds of it."""
    found = {}
    for name, folder in folders.items():
        for kind, changes in {"full": {}, "hybrid": {"nodes": 2, "shard": "hybrid"}}.items():
            cluster = ClusterSettings(**{"gpus_per_node": ranks // changes.get("nodes", 1), **changes})
            policy = meta_policy(str(folder))
            root = shard(LogProbs(policy), mesh_of(cluster, "cpu"), cluster)
            allocate(policy, root, "cpu")
            load_sharded(policy)
            held = sum(parameter.to_local().numel() for parameter in policy.model.parameters())
            found[name, kind] = {key: whole(tensor).clone() for key, tensor in tensors_of(policy).items()}, held
    return found


@pytest.mark.slow
def test_ranks_fill_their_shares_with_the_same_weights(tmp_path, folders):
    chosen = {name: folders[name] for name in ("internvl, chat", "qwen3_vl_moe", "qwen2_5_vl", "qwen3", *TIED)}
    results = spawn(filled_shares, 4, tmp_path, chosen)
    for name, folder in chosen.items():
        loaded = load_policy(str(folder))
        count = sum(parameter.numel() for parameter in loaded.model.parameters())
        for kind, shards in {"full": 4, "hybrid": 2}.items():
            for result in results:
                require_same(result[name, kind][0], tensors_of(loaded))
            held = [result[name, kind][1] for result in results]
            assert sum(held) == count * 4 // shards
            assert max(held) < 1.05 * count / shards


def changed(folder, to, change):
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    return to


@pytest.mark.parametrize("name", ["internvl", "qwen3"])
def test_weights_that_do_not_fit_are_refused_by_name(folders, name, tmp_path):
    def without(state):
        del state[next(key for key in state if key.endswith("layers.1.mlp.down_proj.weight"))]

    def with_more(state):
        state["strange.weight"] = torch.zeros(2)

    def turned(state):
        key = next(key for key in state if key.endswith("layers.1.mlp.down_proj.weight"))
        state[key] = state[key].T.contiguous()

    def not_finite(state):
        state[next(key for key in state if key.endswith("layers.1.mlp.down_proj.weight"))][1, 2] = float("nan")

    for change, message in (
        (not_finite, r"layers\.1\.mlp\.down_proj\.weight holds numbers that are not finite in float32"),
        (without, r"the weights lack .*layers\.1\.mlp\.down_proj\.weight"),
        (with_more, r"the weights also hold strange\.weight"),
        (turned, r"shape \(\d+, \d+\),? .*asks for"),
    ):
        policy = meta_policy(str(changed(folders[name], tmp_path / change.__name__, change)))
        allocate(policy, policy.model, "cpu")
        with pytest.raises(DataError, match=message):
            load_sharded(policy)
