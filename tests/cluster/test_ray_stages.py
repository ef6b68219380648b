"""Stages that learn from what is there already, over Ray: two ranks learn what one process learns."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_ray import lose_a_rank_at
from toy import cascade_settings, make_data, make_pairs, mpo_settings, rl_settings, sft_settings

from foveate.config.cluster import ClusterSettings
from foveate.log import read_metrics
from foveate.run_folder import RunFolder
from foveate.train.cascade import run_cascade
from foveate.train.mpo import run_mpo
from foveate.train.rl import run_rl
from foveate.train.sft import run_sft

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of ray itself
ray = pytest.importorskip("ray")
TWO = {"gpus_per_node": 2, "device": "cpu", "timeout": 240}


@pytest.fixture(scope="module", autouse=True)
def _patience():
    """Ray gives up within half a minute on a machine that is busy with other tests."""
    os.environ["RAY_raylet_start_wait_time_s"] = "240"  # noqa: SIM112
    os.environ["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def require_same(run, alone, names):
    first, other = read_metrics(run.metrics), read_metrics(alone.metrics)
    assert [record["step"] for record in first] == [record["step"] for record in other]
    for name in names:
        assert first[0][name] == pytest.approx(other[0][name], rel=1e-4, abs=1e-5), name
        assert first[-1][name] == pytest.approx(other[-1][name], rel=0.02, abs=0.02), name  # AdamW at its start


def test_supervised_training_on_two_ranks_is_that_of_one(tmp_path, tiny_folder, data):
    train = {"save_async": True, "weighting": "square"}
    run = run_sft(sft_settings(tmp_path / "two", tiny_folder, data, cluster=TWO, train=train))
    alone = run_sft(sft_settings(tmp_path / "one", tiny_folder, data, train={"weighting": "square"}))
    require_same(run, alone, ("loss/total", "loss/nll", "loss/entropy", "optim/grad_norm", "optim/lr"))
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["latest", "step_000002", "step_000003"]
    assert (run.final / "model.safetensors").exists()
    go_on = run_sft(sft_settings(tmp_path / "two", tiny_folder, data, train={**train, "steps": 4}))
    assert [record["step"] for record in read_metrics(go_on.metrics)] == [1, 2, 3, 4]


def test_supervised_training_that_loses_a_rank_ends_as_the_one_that_did_not(tmp_path, tiny_folder, data, monkeypatch):
    train = {"steps": 4, "save_async": True}
    whole = run_sft(sft_settings(tmp_path / "whole", tiny_folder, data, cluster=TWO, train=train))
    lost = lose_a_rank_at(monkeypatch, {6, 14})
    run = run_sft(sft_settings(tmp_path / "run", tiny_folder, data, cluster=TWO, train=train))
    assert lost
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2, 3, 4]
    own, other = (load_file(folder.final / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_preference_optimisation_on_two_ranks_is_that_of_one(tmp_path, tiny_folder, data):
    pairs = make_pairs(data)
    run = run_mpo(mpo_settings(tmp_path / "two", tiny_folder, pairs, cluster=TWO))
    alone = run_mpo(mpo_settings(tmp_path / "one", tiny_folder, pairs))
    require_same(
        run, alone, ("loss/total", "loss/dpo", "loss/bco", "loss/sft", "reward/margin", "reward/shift", "loss/entropy")
    )


def test_a_critic_and_adapters_learn_on_two_ranks(tmp_path, tiny_folder, data):
    changes = {
        "model": {"path": str(tiny_folder), "lora": {"rank": 2}},
        "algorithm": {"name": "ppo", "critic": {"lr": 1e-3}},
        "train": {"steps": 2},
        "eval": {"every": 0},
    }
    run = run_rl(rl_settings(tmp_path / "two", tiny_folder, data, cluster=TWO, **changes))
    alone = run_rl(rl_settings(tmp_path / "one", tiny_folder, data, **changes))
    require_same(run, alone, ("reward/mean", "loss/policy", "optim/grad_norm", "critic/grad_norm", "answer/length"))


def test_a_cascade_runs_all_its_stages_on_two_ranks(tmp_path, data):
    settings = cascade_settings(tmp_path / "run", data).model_copy(update={"cluster": ClusterSettings(**TWO)})
    run = run_cascade(settings)
    assert len(read_metrics(run.metrics)) == 7
    for stage in ("sft", "mpo", "rl"):
        assert RunFolder(run.path / stage).final.exists()
