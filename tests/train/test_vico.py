from __future__ import annotations

import json
import math
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from pydantic import ValidationError

from foveate.algorithms.supervised import sft_total
from foveate.api.training import Recipe
from foveate.config.model import ModelSettings
from foveate.config.runs import VicoSettings
from foveate.config.train import OptimSettings
from foveate.encoding.encode import Encoder
from foveate.encoding.routes import routed
from foveate.errors import ConfigError
from foveate.log import read_metrics
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.forward import hidden_states
from foveate.models.policy import load_policy
from foveate.parallel.packing import pack
from foveate.plan.workload import workload_of
from foveate.records import PackedGroup
from foveate.train.consistency import ConsistencyRow, ConsistencyWorker
from foveate.train.vico import _route, run_vico


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("vico") / "flash"
    write_flash(str(tiny_folder), target)
    return target


@pytest.fixture
def rows(folder, make_task, make_image):
    """Three rows with images of several tiles, one of them without an image."""
    policy = load_policy(str(folder))
    encode = Encoder(policy.tokenizer, policy.family, 6, 1024)
    tasks = [
        make_task("<image>?", make_image(130, 70, 1)),
        make_task("none"),
        make_task("<image>, <image>", make_image(60, 60, 2), make_image(70, 200, 3)),
    ]
    found = []
    for number, task in enumerate(tasks):
        prompt, answer = encode(task), (tuple(range(20, 26 + number)),)
        routes = [[(number + tile) % 2 == 0 for tile in range(slot.tiles)] for slot in prompt.slots]
        whole = [[False] * slot.tiles for slot in prompt.slots]
        seen, full = (routed(prompt, one, policy.family.sides) for one in (routes, whole))
        found.append(ConsistencyRow(PackedGroup.of_tokens(seen, answer), PackedGroup.of_tokens(full, answer)))
    return found


def worker_of(folder, budget=4096):
    optim = OptimSettings(lr=1e-3, max_grad_norm=1e9)
    return ConsistencyWorker(ModelSettings(path=str(folder)), optim, budget)


def plain_divergence(policy, reference, row):
    """KL(reference || policy) at each token with all logits in memory, each row by itself."""
    logits = []
    for model, group in ((reference, row.reference), (policy, row.policy)):
        batch = pack([group])
        logits.append((hidden_states(model, batch)[batch.source_M] @ model.part("head").weight.T).log_softmax(-1))
    return (logits[0].exp() * (logits[0] - logits[1])).sum(-1)


def test_the_divergence_is_that_of_whole_distributions_behind_different_prompts(folder, rows):
    worker, policy = worker_of(folder), load_policy(str(folder))
    with torch.no_grad():
        wanted = [plain_divergence(policy, policy, row) for row in rows]
    for found, own in zip(worker.divergences(rows), wanted, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    assert wanted[0].min() > 1e-4  # compression changes something
    assert wanted[1].abs().max() < 1e-5  # and nothing where there is no image


@pytest.mark.parametrize("trainable", [("projector", "language"), ("vision", "projector", "language")])
def test_a_vision_tower_that_both_have_sees_the_tiles_once(folder, rows, trainable, monkeypatch):
    settings = ModelSettings(path=str(folder), trainable=trainable)
    worker = ConsistencyWorker(settings, OptimSettings(lr=1e-3), 4096)
    passes: list[int] = []
    for model in (worker.policy.model, worker._start.model):
        model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    shared = worker.divergences(rows)
    assert len(passes) == (1 if "vision" not in trainable else 2)
    monkeypatch.setattr(worker, "_one_tower", False)
    for own, apart in zip(shared, worker.divergences(rows), strict=True):
        assert torch.equal(own, apart)


def test_a_reference_of_another_kind_has_a_tower_of_its_own(folder, tiny_folder, rows):
    settings = ModelSettings(path=str(folder), trainable=("projector",))
    one, other = (
        ConsistencyWorker(settings, OptimSettings(lr=1e-3), budget, start=str(tiny_folder)) for budget in (4096, 30)
    )
    assert not one._one_tower
    for own, alone in zip(one.divergences(rows), other.divergences(rows), strict=True):
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)


def test_rows_with_one_reference_ask_it_once(folder, rows):
    worker = worker_of(folder)
    pairs = [pair for row in rows for pair in (row, ConsistencyRow(row.reference, row.reference))]
    asked: list[int] = []
    worker._start.register_forward_hook(lambda _, given, __: asked.append(len(given[0].token_ids_T)))
    found = worker.divergences(pairs)
    assert asked == [sum(row.reference.tokens for row in rows)]
    for one, own in zip(worker.divergences(rows), found[::2], strict=True):
        torch.testing.assert_close(one, own, rtol=1e-5, atol=1e-6)
    assert max(kl_M.abs().max().item() for kl_M in found[1::2]) < 1e-5


@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_the_gradient_is_that_of_the_plain_loss_over_any_packing(folder, rows, weighting):
    policy, reference = load_policy(str(folder)), load_policy(str(folder))
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.gating", "model.pooling")))
    total = sft_total([row.policy for row in rows], weighting)
    loss = torch.zeros(())
    for row in rows:
        kl_M = plain_divergence(policy, reference, row)
        loss = loss + kl_M.sum() / (len(kl_M) if weighting == "sample" else 1) / total
    loss.backward()
    wanted = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert "model.mlp2.1.weight" in wanted
    for budget in (4096, 60):
        worker = worker_of(folder, budget)
        worker._step = lambda *_: {}
        worker.update_consistency(rows, weighting, total, 1e-3)
        named = worker.policy.model.named_parameters()
        taken = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        assert taken.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(taken[name], grad, rtol=2e-3, atol=2e-6, msg=name)


def test_routes_compress_half_of_the_tiles_and_often_all_together(tiny_policy, make_task, make_image):
    prompt = Encoder(tiny_policy.tokenizer, tiny_policy.family, 6, 1024)(
        make_task("<image>, <image>", make_image(130, 70, 1), make_image(50, 60, 2))
    )
    draw = np.random.default_rng(0)
    for compressed, whole in (("tiles", 0.2), ("prompts", 0.5)):
        settings = settings_of("x", "m", ["a"], train={"steps": 1, "compressed": compressed})
        routes = [_route(prompt, settings, draw) for _ in range(2000)]
        assert [len(one) for one in routes[0]] == [3, 1]
        every = np.array([[flag for one in route for flag in one] for route in routes])
        assert every.mean() == pytest.approx(0.5, abs=0.03)
        assert every.all(1).mean() == pytest.approx(whole, abs=0.04)  # a uniform share of 4 tiles: 1 in 5


def settings_of(run, folder, data, /, **changes):
    values = {
        "run": str(run),
        "model": {"path": str(folder), "max_tiles": 4},
        "data": {"train": [str(one) for one in data]},
        "optim": {"lr": 5e-3, "warmup_steps": 0},
        "train": {"steps": 6, "samples_per_step": 4, "threads": 1},
        "cluster": {"device": "cpu"},
    }
    return VicoSettings.model_validate({**values, **changes})


@pytest.fixture
def data(tmp_path):
    lines = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 60 + 40 * (number % 3), 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"question": "<image>?", "image": f"{number}.png", "response": f"It is {number}."}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_a_run_lowers_the_divergence_and_resumes_bit_for_bit(folder, data, tmp_path):
    settings = settings_of(tmp_path / "a", folder, [data], eval={"every": 30}, data={
        "train": [str(data)], "test": [str(data)],
    }, train={"steps": 30, "samples_per_step": 4, "threads": 1, "save_every": 15, "keep_checkpoints": 9})  # fmt: skip
    run = run_vico(settings)
    metrics = read_metrics(run.metrics)
    first, last = metrics[0]["eval/kl"], metrics[-1]["eval/kl"]
    assert last < 0.7 * first, (first, last)
    assert 0.25 <= min(row["vico/image_tokens"] for row in metrics[1:]) < 1
    final = load_policy(str(run.final))
    assert final.family.name == "internvl_flash"
    start = load_policy(str(folder)).model.state_dict()
    trained = final.model.state_dict()
    assert not torch.equal(trained["model.mlp2.1.weight"], start["model.mlp2.1.weight"])
    assert torch.equal(trained["model.gating.gate.1.weight"], start["model.gating.gate.1.weight"])
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b" / "final")
    shutil.rmtree(sorted((tmp_path / "b" / "checkpoints").glob("step_*"))[-1])
    again = run_vico(settings.model_copy(update={"run": str(tmp_path / "b")}))
    for name, tensor in load_policy(str(again.final)).model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert math.isclose(read_metrics(again.metrics)[-1]["loss/kl"], metrics[-1]["loss/kl"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"path": "m", "lora": {"rank": 2}}}, "whole weights are trained here"),
        ({"train": {"steps": 1, "trained_turns": "all"}}, "the last turn alone is compared"),
    ],
)
def test_settings_that_would_not_act_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        settings_of("x", "m", ["a"], **changes)


def test_a_model_that_cannot_compress_is_refused_with_the_command_that_makes_one(tiny_folder, data, tmp_path):
    with pytest.raises(
        ConfigError, match="internvl cannot compress tiles; foveate flash FOLDER OUT makes a Flash model"
    ):
        run_vico(settings_of(tmp_path / "a", tiny_folder, [data]))


def test_rows_without_images_are_refused(folder, tmp_path):
    rows = [json.dumps({"question": f"What is {n}?", "response": f"It is {n}."}) for n in range(4)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    settings = settings_of(tmp_path / "a", folder, [tmp_path / "text.jsonl"])
    with pytest.raises(ConfigError, match=r"data\.train: no row of .*text\.jsonl has an image, so nothing can be comp"):
        run_vico(settings)
    assert not list((tmp_path / "a").glob("final"))


def test_a_dry_run_and_a_plan_know_the_stage(folder, tiny_folder, data, tmp_path):
    settings = settings_of(tmp_path / "a", folder, [data])
    assert "vico: 6 steps of 4 demonstrations, by sample" in Recipe(settings).dry_run()
    with pytest.raises(ConfigError, match="cannot compress tiles"):
        Recipe(settings_of(tmp_path / "a", tiny_folder, [data])).dry_run()
    planned = workload_of(settings, 100, 20, 2)
    assert (planned.reference, planned.forwards, planned.generates) == (True, 1, False)
