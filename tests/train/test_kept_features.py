"""Whole runs whose image features are kept on disk."""

from __future__ import annotations

import shutil

import pytest
from pydantic import ValidationError
from test_resume import assert_equal, interrupt, stop_at
from test_rl import metrics_of
from toy import make_data, rl_settings

from foveate.config.runs import CascadeSettings
from foveate.train.rl import run_rl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_run_with_kept_features_ends_as_the_one_that_computes_them_and_as_the_interrupted_one(
    tmp_path, tiny_folder, data, monkeypatch
):
    def settings(name, **more):
        model = {"path": str(tiny_folder), "trainable": ["language"], **more}
        train = {"steps": 4, "save_every": 2, "updates_per_step": 2}
        return rl_settings(tmp_path / name, tiny_folder, data, model=model, train=train, eval={"every": 0})

    def kept(folder):
        return {"feature_cache": {"gigabytes": 1, "folder": str(tmp_path / folder)}}

    plain = metrics_of(run_rl(settings("plain")))
    whole = run_rl(settings("whole", **kept("features")))
    for record, expected in zip(metrics_of(whole), plain, strict=True):
        assert record["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=1e-3)
    with monkeypatch.context() as patch:
        stop_at(patch, "while it writes a checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_rl(settings("run", **kept("others")))
    shutil.rmtree(tmp_path / "others")  # what was read is computed again
    assert_equal(run_rl(settings("run", **kept("others"))), whole)


@pytest.mark.parametrize(
    ("model", "cluster", "says"),
    [
        ({}, {}, "but model.trainable has vision and projector; set model.trainable=\\[language\\]"),
        ({"trainable": ["language"]}, {"gpus_per_node": 2, "device": "cpu"}, "the 2 ranks share the vision tower"),
    ],
)
def test_kept_features_are_refused_where_they_would_change_or_ranks_wait(
    tmp_path, tiny_folder, data, model, cluster, says
):
    model = {"path": str(tiny_folder), "feature_cache": {"gigabytes": 1}, **model}
    with pytest.raises(ValidationError, match=f"model.feature_cache.*{says}"):
        rl_settings(tmp_path / "run", tiny_folder, data, model=model, cluster=cluster)


def test_a_cascade_keeps_features_in_the_stages_whose_tower_is_frozen():
    rows, optim, train = {"train": ["x.parquet"]}, {"lr": 1e-4}, {"steps": 2}
    settings = CascadeSettings.model_validate(
        {
            "run": "r",
            "model": {"path": "m", "trainable": ["language"], "feature_cache": {"gigabytes": 1}},
            "data": {**rows, "hold_out": 0.1, "max_prompt_tokens": 100},
            "reward": {"name": "grounding"},
            "rollout": {"max_tokens": 50, "samples": 2},
            "mpo": {"optim": optim, "train": {**train, "tokens_per_micro_batch": 4096}},
            "rl": {"optim": optim, "train": train},
            "vico": {"data": rows, "optim": optim, "train": train},
            "vir": {"optim": optim, "train": train},
        }
    )
    kept = {name: settings.stage(name, "m", ("p",), "r").model.feature_cache is not None for name in settings.stages}
    assert kept == {"mpo": True, "rl": True, "vico": False, "vir": False}
