from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY
from pydantic import ValidationError

from foveate.config.runs import VirSettings
from foveate.errors import ConfigError
from foveate.log import read_metrics
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.policy import load_policy
from foveate.models.tiny import build_tiny
from foveate.train.consistency import RouterRow, RouterWorker
from foveate.train.vir import SlidingQuantile, run_vir


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("vir") / "flash"
    write_flash(str(tiny_folder), target)
    return target


def settings_of(run, folder, data, reference, **train):
    return VirSettings.model_validate(
        {
            "run": str(run),
            "model": {"path": str(folder), "max_tiles": 4},
            "data": {"train": [str(data)], "test": [str(data)]},
            "optim": {"lr": 5e-3, "warmup_steps": 0},
            "train": {"steps": 12, "samples_per_step": 8, "threads": 1, "reference": str(reference), **train},
            "eval": {"every": 12},
            "cluster": {"device": "cpu"},
        }
    )


@pytest.fixture
def data(tmp_path):
    """Plain pictures, which lose nothing when their tokens are averaged, and noise, which does."""
    lines = []
    for number in range(8):
        draw = np.random.default_rng(number)
        shape = (60, 60 + 40 * (number % 3), 3)
        plain = np.full(shape, 40 + 20 * number, np.uint8)
        noise = draw.integers(0, 256, shape, dtype=np.uint8)
        PIL.Image.fromarray(plain if number % 2 else noise).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"question": "<image>?", "image": f"{number}.png", "response": f"It is {number}."}))
    lines.append(json.dumps({"question": "Without?", "response": "None."}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_the_threshold_is_the_quantile_of_the_latest_ratios_and_continues():
    quantile = SlidingQuantile(0.25, 6)
    assert quantile.value == np.inf
    assert quantile.add([4.0, 1.0, 3.0, 2.0]) == np.quantile([4, 1, 3, 2], 0.25)
    assert quantile.add([9.0, 8.0, 7.0]) == np.quantile([1, 3, 2, 9, 8, 7], 0.25)
    other = SlidingQuantile(0.25, 6)
    other.restore(json.loads(json.dumps(quantile.state())))
    assert other.add([0.5]) == quantile.add([0.5])


def test_a_step_is_cross_entropy_of_the_router_alone(folder):
    settings = settings_of("x", folder, "a", folder)
    worker = RouterWorker(settings.model, settings.optim, 4096, start=str(folder))
    named = dict(worker.policy.model.named_parameters())
    assert {name.split(".")[1] for name, one in named.items() if one.requires_grad} == {
        "pooling_before_gating",
        "gating",
    }
    generator = torch.Generator().manual_seed(0)
    rows = [RouterRow(torch.randn(n, 3, 56, 56, generator=generator), bool(n % 2)) for n in (1, 2, 3)]
    model = load_policy(str(folder)).model
    loss = torch.zeros(())
    for row in rows:
        patches = model.model.vision_tower(pixel_values=row.pixels).last_hidden_state[:, 1:]
        said = model.model.gating(model.model.pooling_before_gating(patches))
        loss = loss - said[:, 0 if row.compressible else 1].log().sum() / 6
    loss.backward()
    worker._step = lambda _policy, _optimizer, losses, *_: losses
    losses = worker.update_router(rows, 6, 1e-3)
    assert sum(one["loss/total"][0] for one in losses) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if named[name].requires_grad and parameter.grad is not None:
            torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    dead = "model.pooling_before_gating.attn3.in_proj_weight"
    assert named[dead].grad is None


def test_a_router_learns_which_pictures_lose_nothing_and_a_run_resumes(folder, tiny_folder, data, tmp_path):
    settings = settings_of(tmp_path / "a", folder, data, tiny_folder, save_every=6, keep_checkpoints=9)
    run = run_vir(settings)
    metrics = read_metrics(run.metrics)
    assert metrics[-1]["eval/accuracy"] >= 0.9
    shares = {metrics[-1][name] for name in metrics[-1] if name.endswith("/image_tokens")}
    assert len(shares) == 1  # of all rows, and of their only source
    assert 0.25 < shares.pop() < 1
    assert metrics[-1]["loss/total"] < metrics[0]["loss/total"] if "loss/total" in metrics[0] else True
    start, final = (load_policy(str(one)).model.state_dict() for one in (folder, run.final))
    for name, tensor in start.items():
        of_router = name.startswith(("model.gating", "model.pooling_before_gating"))
        dead = any(part in name for part in ("attn3", "attn4", "norm3", "norm4"))
        assert torch.equal(tensor, final[name]) != (of_router and not dead), name
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b" / "final")
    shutil.rmtree(sorted((tmp_path / "b" / "checkpoints").glob("step_*"))[-1])
    again = run_vir(settings.model_copy(update={"run": str(tmp_path / "b")}))
    for name, tensor in load_policy(str(again.final)).model.state_dict().items():
        assert torch.equal(tensor, final[name]), name


def test_a_reference_with_another_tokenizer_is_refused(folder, data, tmp_path):
    build_tiny(tmp_path / "other", replace(TINY, vocabulary=300))
    with pytest.raises(ConfigError, match=r"train\.reference: the tokenizer of .*other is another than the model's"):
        run_vir(settings_of(tmp_path / "a", folder, data, tmp_path / "other"))


def test_parts_that_would_not_be_trained_are_refused():
    values = settings_of("x", "m", "a", "m").model_dump()
    with pytest.raises(ValidationError, match="vir trains the router alone"):
        VirSettings.model_validate(values | {"model": {"path": "m", "trainable": ["vision"]}})


def test_rows_without_images_are_refused(folder, tiny_folder, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"question": "What?", "response": "It."}))
    with pytest.raises(ConfigError, match=r"data\.train: no row of .*text\.jsonl has an image"):
        run_vir(settings_of(tmp_path / "a", folder, tmp_path / "text.jsonl", tiny_folder))


def test_a_model_without_a_router_is_refused(tiny_folder, data, tmp_path):
    with pytest.raises(ConfigError, match="internvl cannot compress tiles; foveate flash"):
        run_vir(settings_of(tmp_path / "a", tiny_folder, data, tiny_folder))
