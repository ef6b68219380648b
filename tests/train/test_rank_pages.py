"""Whole runs on two ranks are those of one. Each rank runs the page itself, in place of a driver over Ray."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from family_cases import build_family
from rank_cases import spawn
from test_online import rows_of
from test_ranks import Calls
from toy import make_data, make_pairs, mpo_settings, rl_settings, sft_settings
from worlds import HERE as WORLDS
from worlds import with_short_turns

import foveate.train.mpo
import foveate.train.offline
import foveate.train.rl
import foveate.train.sft
from foveate.cluster.local import LocalWorkers
from foveate.log import read_metrics

TURNS = {
    "environment": {"name": f"{WORLDS}:Corners", "workers": 0},
    "rollout": {"samples": 4, "max_tokens": 200},
    "train": {"steps": 2, "prompts_per_step": 2, "tokens_per_micro_batch": 1024},
    "optim": {"lr": 1e-4},
}
"""Answers of up to three turns, with crops between them."""
SHARES = {"rows by themselves": 1, "shared rows": 2}
"""The ranks that share a row."""
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


def take_part(module, rank, ranks, row=1):
    """Have the runs of a module be this rank's part of those of all; `row`: the ranks that share a row."""

    @contextmanager
    def start(_cluster, build, **_):
        workers = Calls(build(), rank, ranks, row)
        workers.call = partial(of_all, workers)
        yield workers

    module.start_workers = foveate.train.offline.start_workers = start


def runs_on(rank, ranks, out, model, data):
    found = {}
    for page, (module, run, *_) in PAGES.items():
        take_part(module, rank, ranks)
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


def conversations_on(rank, ranks, out, model, data):
    found = {}
    for name, row in SHARES.items():
        take_part(foveate.train.rl, rank, ranks, row)
        cluster = {**TWO, "sequence_parallel": row}
        settings = rl_settings(Path(out) / f"{name}-{rank}", Path(model), Path(data), cluster=cluster, **TURNS)
        found[name] = foveate.train.rl.run_rl(settings)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_whole_runs_with_environments_on_two_ranks_are_those_of_one(family, tmp_path, tiny_folder):
    """Images within answers are on one rank only, or lie across the cut of a row that two share."""
    data = make_data(tmp_path / "shapes")
    folder = tiny_folder if family == "internvl" else build_family(tmp_path / family, family)
    model = with_short_turns(folder, tmp_path / "short")
    alone = foveate.train.rl.run_rl(rl_settings(tmp_path / "alone", model, data, **TURNS))
    expected = read_metrics(alone.metrics)
    assert expected[0]["turns/mean"] > 1.2
    (tmp_path / "two").mkdir()
    results = spawn(conversations_on, 2, tmp_path / "two", str(model), str(data))
    assert all((run.final / "model.safetensors").exists() for run in results[0].values())
    for result in results:
        for share, run in result.items():
            metrics = read_metrics(run.metrics)
            assert len(metrics) == len(expected) == 2
            assert rows_of(run, 1) == rows_of(alone, 1), share
            assert max(record["engine/logprob_difference_max"] for record in metrics) < 1e-4
            for name in ("reward/mean", "answer/length", "turns/mean", "tool/calls", "loss/policy", "optim/grad_norm"):
                assert metrics[0][name] == pytest.approx(expected[0][name], rel=1e-4, abs=1e-6), (share, name)
                assert metrics[1][name] == pytest.approx(expected[1][name], rel=0.05, abs=0.02), (share, name)
