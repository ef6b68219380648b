"""Visual consistency learning and the training of a router on two ranks are those on one."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from rank_cases import spawn
from test_rank_pages import of_all
from test_ranks import Calls

import foveate.train.offline
from foveate.config.runs import VicoSettings, VirSettings
from foveate.log import read_metrics
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.policy import load_policy
from foveate.train.vico import run_vico
from foveate.train.vir import run_vir

PAGES = {"vico": (VicoSettings, run_vico), "vir": (VirSettings, run_vir)}
SAME = {
    "vico": ("loss/total", "loss/kl", "optim/grad_norm", "vico/image_tokens", "eval/kl"),
    "vir": ("loss/total", "vir/threshold", "vir/ratio", "optim/grad_norm", "eval/image_tokens"),
}
"""Not the losses of held-out rows of the router: here they are those that the threshold comes from, so that a ratio may
be equal to it, and a row's label turns with the last digit."""
SHAPES = {"two ranks": {}, "a row on both": {"sequence_parallel": 2}}


def settings_of(page, run, folder, start, data, **cluster):
    """Two rows a step, so that in some steps a rank has no image, or none of a kind of tiles."""
    values = {
        "run": str(run),
        "model": {"path": str(folder), "max_tiles": 4},
        "data": {"train": [str(data)], "test": [str(data)], "max_prompt_tokens": 60},
        # a larger eps: AdamW moves a weight by the whole rate, where its gradient is rounding alone
        "optim": {"lr": 1e-4, "weight_decay": 0.1, "settings": {"eps": 1e-6}},
        "train": {"steps": 4, "samples_per_step": 2, "threads": 1, "save_every": 2, "tokens_per_micro_batch": 60},
        "eval": {"every": 2},
        "cluster": {"device": "cpu", **cluster},
    }
    if page == "vir":
        values["train"]["reference"] = str(start)
    return PAGES[page][0].model_validate(values)


def runs_on(rank, ranks, out, folder, start, data):
    found = {}
    for page, (_, run) in PAGES.items():
        for name, more in SHAPES.items():
            row = more.get("sequence_parallel", 1)

            @contextmanager
            def start_workers(_cluster, build, *, row=row, **_):
                workers = Calls(build(), rank, ranks, row)
                workers.call = partial(of_all, workers)
                yield workers

            foveate.train.offline.start_workers = start_workers
            where = Path(out) / f"{page}-{name}-{rank}"
            made = run(settings_of(page, where, folder, start, data, gpus_per_node=ranks, **more))
            found[page, name] = read_metrics(made.metrics), str(made.final)
    return found


@pytest.mark.slow
def test_runs_of_flash_models_on_two_ranks_are_those_of_one(tmp_path, tiny_folder):
    folder, lines = tmp_path / "flash", []
    write_flash(str(tiny_folder), folder)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 60 + 40 * (number % 3), 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"question": "<image>?", "image": f"{number}.png", "response": f"It is {number}."}))
    lines.append(json.dumps({"question": "Without?", "response": "None."}))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    (tmp_path / "two").mkdir()
    results = spawn(runs_on, 2, tmp_path / "two", str(folder), str(tiny_folder), str(data))
    for page, (_, run) in PAGES.items():
        alone = run(settings_of(page, tmp_path / page, folder, tiny_folder, data))
        wanted = read_metrics(alone.metrics)
        start, trained = (load_policy(str(one)).model.state_dict() for one in (folder, alone.final))
        for name in SHAPES:
            metrics, _ = results[0][page, name]
            assert [record["step"] for record in metrics] == [record["step"] for record in wanted]
            for key in SAME[page]:
                pairs = [(own[key], other[key]) for own, other in zip(metrics, wanted, strict=True) if key in other]
                assert pairs[0][0] == pytest.approx(pairs[0][1], rel=1e-4, abs=1e-6), (page, name, key)
                for own, other in pairs[1:]:  # the first steps of AdamW make much of differences between tiny gradients
                    assert own == pytest.approx(other, rel=0.05, abs=0.02), (page, name, key)
            found = load_policy(results[0][page, name][1]).model.state_dict()
            moved, apart = (
                torch.cat([(trained[key] - other[key]).flatten() for key in trained]) for other in (start, found)
            )
            assert apart.norm() <= 0.1 * moved.norm(), (page, name)
