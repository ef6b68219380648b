"""Whole runs on two ranks are those of one. Each rank runs the page itself, in place of a driver over Ray."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from rank_cases import spawn
from test_ranks import Calls
from toy import make_data, make_pairs, mpo_settings, rl_settings, sft_settings

import foveate.train.mpo
import foveate.train.offline
import foveate.train.rl
import foveate.train.sft
from foveate.cluster.local import LocalWorkers
from foveate.log import read_metrics

ADAPTED = {"lora": {"rank": 2}, "trainable": ("vision", "language")}
PAGES = {
    "sft": (foveate.train.sft, "run_sft", sft_settings, {"train": {"save_async": True, "weighting": "square"}}),
    "mpo": (foveate.train.mpo, "run_mpo", mpo_settings, {"optim": {"lr": 1e-4}}),
    "rl": (
        foveate.train.rl,
        "run_rl",
        rl_settings,
        {"algorithm": {"name": "ppo", "critic": {"lr": 1e-4}}, "train": {"steps": 2}, "optim": {"lr": 1e-4}},
    ),
}
SAME = {
    "sft": ("loss/total", "loss/nll", "loss/entropy", "optim/grad_norm"),
    "mpo": ("loss/total", "loss/bco", "loss/sft", "loss/entropy", "optim/grad_norm"),
    "rl": ("reward/mean", "answer/length", "loss/policy", "optim/grad_norm", "critic/grad_norm", "loss/entropy"),
}
TWO = {"gpus_per_node": 2, "device": "cpu"}


def settings_of(page, run, model, data, **more):
    *_, make, changes = PAGES[page]
    source = data / "pairs.parquet" if page == "mpo" else data
    adapted = {"model": {"path": str(model), **ADAPTED}} if page == "rl" else {}
    return make(run, model, source, **changes, **adapted, **more)


def runs_on(rank, ranks, out, model, data):
    found = {}
    for page, (module, run, *_) in PAGES.items():

        @contextmanager
        def start(_cluster, build, **_):
            workers = Calls(build(), rank, ranks, 1)
            workers.call = partial(of_all, workers)
            yield workers

        module.start_workers = foveate.train.offline.start_workers = start
        made = vars(module)[run](settings_of(page, Path(out) / f"{page}-{rank}", model, Path(data), cluster=TWO))
        found[page] = read_metrics(made.metrics), made
    return found


def of_all(workers, method, arguments):
    """The results of all ranks, each from its own."""
    return workers.worker.ranks.gather(LocalWorkers(workers.worker).call(method, [arguments[workers.rank]])[0])


@pytest.mark.slow
def test_whole_runs_on_two_ranks_are_those_of_one(tmp_path, tiny_folder):
    data = make_data(tmp_path / "shapes")
    make_pairs(data)
    (tmp_path / "two").mkdir()
    results = spawn(runs_on, 2, tmp_path / "two", str(tiny_folder), str(data))
    for page, (module, run, *_) in PAGES.items():
        alone = read_metrics(vars(module)[run](settings_of(page, tmp_path / page, tiny_folder, data)).metrics)
        for result in results:
            metrics, _ = result[page]
            assert [record["step"] for record in metrics] == [record["step"] for record in alone]
            for name in SAME[page]:
                assert metrics[0][name] == pytest.approx(alone[0][name], rel=1e-4, abs=1e-6), (page, name)
                assert metrics[-1][name] == pytest.approx(alone[-1][name], rel=0.05, abs=0.02), (page, name)
        made = results[0][page][1]
        steps = [path.name for path in sorted(made.checkpoints.glob("step_*"))]
        assert steps == [f"step_{step:06d}" for step in range(len(alone) - 1, len(alone) + 1)]
        assert (made.final / "model.safetensors").exists()
