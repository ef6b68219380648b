"""RL on Flash models: a route that is computed once per prompt stands in every pass, and the router stays as it is."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from toy import HERE, rl_settings

import foveate.models.flash_routes
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.encoding.encode import Encoder
from foveate.log import read_metrics
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.flash_routes import with_router
from foveate.models.policy import load_policy, save_policy
from foveate.records import PackedGroup, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.rl import run_rl
from foveate.train.worker import Worker


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A random Flash model whose router tells tiles apart."""
    root = tmp_path_factory.mktemp("flash_rl")
    write_flash(str(tiny_folder), root / "start")
    policy, generator = load_policy(str(root / "start")), torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "mlp2" in name or "gating" in name:  # the names of both parts of the router hold it
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name)
    save_policy(policy, root / "model")
    return root / "model"


def test_the_engine_and_all_passes_of_the_trainer_read_the_route_in_the_slots(folder, make_task, make_image):
    worker = Worker(ModelSettings(path=str(folder)), OptimSettings(), 400, reference=True)
    policy = worker.policy
    encode = with_router(Encoder(policy.tokenizer, policy.family, 12, 2048), policy)
    prompts = [encode(make_task("<image>?", make_image(250, 70 + 30 * seed, seed))) for seed in range(3)]
    assert {side for one in prompts for slot in one.slots for side in slot.sides} == {1, 2}
    groups = NativeEngine(policy, encode.decode).generate(
        [Request(prompt, seed) for seed, prompt in enumerate(prompts)], SamplingParams(3, max_tokens=6)
    )
    packed = [PackedGroup(*one) for one in zip(prompts, groups, strict=True)]
    sampled = [torch.from_numpy(np.concatenate([answer.logprobs for answer in group])) for group in groups]
    for is_reference in (False, True):
        for found, wanted in zip(worker.logprobs(packed, is_reference), sampled, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [{}, pytest.param({"staleness": 1}, marks=pytest.mark.slow)])
def test_a_run_routes_each_prompt_once_and_trains_all_but_the_router(folder, tmp_path, monkeypatch, more):
    lines = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 60 + 60 * number, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"question": "<image>?", "image": f"{number}.png", "answer": str(number)}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    route_of, routes = foveate.models.flash_routes.route_of, []
    monkeypatch.setattr(
        foveate.models.flash_routes, "route_of", lambda *asked: routes.append(route_of(*asked)) or routes[-1]
    )
    changes = {"correction": {"mode": "token-truncate"}} if more else {}
    run = run_rl(
        rl_settings(
            tmp_path / "run", folder, tmp_path, data={"train": [str(tmp_path / "train.jsonl")], "test": []},
            eval={"every": 0, "gallery": 0, "samples": 0}, rollout={"samples": 3, "max_tokens": 6, **more},
            algorithm={"name": "gspo", "loss": {"kl_coefficient": 0.1}, **changes},
            reward={"name": f"{HERE}:text_length", "workers": 0}, train={"steps": 2, "prompts_per_step": 2},
        )
    )  # fmt: skip
    assert len(routes) == 4
    assert {flag for route in routes for flag in route} == {False, True}
    metrics = read_metrics(run.metrics)
    assert metrics[-1]["step"] == 2
    if not more:  # later answers are of older weights
        assert all(row["engine/logprob_difference_max"] < 1e-5 for row in metrics)
    start, final = (load_policy(str(one)).model.state_dict() for one in (folder, run.final))
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, final[name])}
    assert not {name for name in changed if name.startswith(("model.gating", "model.pooling_before_gating"))}
    assert {"model.mlp2.1.weight", "model.multi_modal_projector.linear_1.weight", "lm_head.weight"} <= changed
