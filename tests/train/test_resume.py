"""A run that was interrupted, at whatever moment, and started again ends as the uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
from family_cases import build_family
from slow_cases import slow_but
from toy import make_data, rl_settings, sft_settings

import foveate.train.checkpoint
import foveate.train.worker
from foveate.config.recipe import to_yaml
from foveate.config.runs import RLSettings, SFTSettings
from foveate.data.table import open_tasks, write_rows
from foveate.datasets.prepared import infer_schema, task_row
from foveate.errors import DataError
from foveate.evaluate.predictions import read_evaluations
from foveate.log import read_metrics
from foveate.rollout.native.engine import NativeEngine
from foveate.run_folder import RunFolder
from foveate.train.rl import run_rl
from foveate.train.sft import run_sft

# Where a run stops: the function in which it does, and whether before the call or after it.
MOMENTS = {
    "before the first step": (NativeEngine, "generate", 2, "before"),
    "while it generates": (NativeEngine, "generate", 8, "before"),
    "between gradients and update": (foveate.train.worker, "apply_gradients", 6, "before"),
    "between two updates of a step": (foveate.train.worker, "apply_gradients", 5, "after"),
    "while it writes a checkpoint": (foveate.train.checkpoint, "save", 2, "after"),
    "before the first checkpoint": (foveate.train.checkpoint, "save", 1, "before"),
    "while it writes the model": (foveate.train.worker, "save_policy", 1, "after"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def settings_in(folder: Path, model: Path, data: Path) -> RLSettings:
    """Everything that has a state: several updates a step, a frozen reference, a schedule, evaluation in between."""
    return rl_settings(
        folder,
        model,
        data,
        algorithm={"name": "grpo", "loss": {"kl_coefficient": 0.05}},
        optim={"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 1, "schedule": "cosine"},
        train={"steps": 5, "prompts_per_step": 6, "updates_per_step": 2, "save_every": 2},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, data):
    """The uninterrupted run."""
    return run_rl(settings_in(tmp_path_factory.mktemp("runs") / "whole", tiny_folder, data))


def stop_at(patch: pytest.MonkeyPatch, moment: str, stop: Callable[[], None]) -> None:
    """Let the run call `stop` at a moment of MOMENTS."""
    owner, name, at, when = MOMENTS[moment]
    original = vars(owner)[name]
    calls = 0

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and when == "before":
            stop()
        result = original(*arguments, **keywords)
        if calls == at and when == "after":
            stop()
        return result

    patch.setattr(owner, name, stopping)


def interrupt() -> None:
    raise KeyboardInterrupt


def without_times(run: RunFolder) -> list[dict[str, Any]]:
    timed = ("time/",)
    return [{name: v for name, v in row.items() if not name.startswith(timed)} for row in read_metrics(run.metrics)]


def assert_equal(run: RunFolder, whole: RunFolder) -> None:
    assert (run.final / "model.safetensors").read_bytes() == (whole.final / "model.safetensors").read_bytes()
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(1, len(read_metrics(whole.metrics)) + 1))
    assert without_times(run) == without_times(whole)
    for file in whole.rollouts.iterdir():
        assert (run.rollouts / file.name).read_bytes() == file.read_bytes()
    assert read_evaluations(run.path) == read_evaluations(whole.path)
    assert not list(run.path.rglob("*.tmp"))


QUICK = ("between gradients and update", "while it writes a checkpoint")


@pytest.mark.parametrize("moment", slow_but(QUICK, MOMENTS))
def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path, tiny_folder, data, whole, moment):
    settings = settings_in(tmp_path / "run", tiny_folder, data)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_rl(settings)
    assert not (tmp_path / "run" / "final").exists()
    assert_equal(run_rl(settings), whole)


def with_two_sources(data: Path, folder: Path) -> Path:
    """The training rows of `make_data`, a third of them of another source."""
    tasks = [
        replace(task, source="few" if i % 3 == 0 else "many")
        for i, task in enumerate(open_tasks(data / "train.parquet"))
    ]
    rows = [task_row(task) for task in tasks]
    write_rows(folder / "two.parquet", rows, infer_schema({**row, "images": []} for row in rows))
    return folder / "two.parquet"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_shares_and_rlcs_together_resume_as_the_uninterrupted_run(tmp_path, tiny_folder, data, workers):
    rows = with_two_sources(data, tmp_path)

    def settings(name: str, steps: int) -> RLSettings:
        chosen = {"train": [str(rows)], "shares": {"few": 1, "many": 2}, "rlcs": {}, "image_workers": workers}
        train = {"steps": steps, "prompts_per_step": 6, "save_every": 1}
        return rl_settings(tmp_path / name, tiny_folder, data, data=chosen, train=train, eval={"every": 1})

    for steps in (1, 3, 4):
        run = run_rl(settings("resumed", steps))
    whole = run_rl(settings("whole", 4))
    assert_equal(run, whole)
    for row in read_metrics(whole.metrics):
        assert (row["source/few/answers"], row["source/many/answers"]) == (8, 16)
        assert row["data/rows_seen"] == min(6 * row["step"] - 6, 16) or row["step"] > 3


def test_a_finished_run_may_be_started_again_and_continued_by_more_steps(tmp_path, tiny_folder, data):
    short, longer = (rl_settings(tmp_path / "run", tiny_folder, data, train={"steps": steps}) for steps in (2, 4))
    ended = run_rl(short)
    model = (ended.final / "model.safetensors").read_bytes()
    assert (run_rl(short).final / "model.safetensors").read_bytes() == model
    at_once = run_rl(rl_settings(tmp_path / "at once", tiny_folder, data, train={"steps": 4}))
    assert_equal(run_rl(longer), at_once)


def test_an_interrupted_supervised_run_ends_as_the_uninterrupted_one(tmp_path, tiny_folder, data):
    def settings(name: str) -> SFTSettings:
        changes = {"optim": {"lr": 1e-3, "schedule": "linear"}, "train": {"steps": 6, "save_every": 2}}
        return sft_settings(tmp_path / name, tiny_folder, data, **changes)

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "between gradients and update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_sft(settings("interrupted"))
    assert_equal(run_sft(settings("interrupted")), run_sft(settings("at once")))


def test_changed_data_are_refused_by_a_run_that_continues(tmp_path, tiny_folder, data):
    copy = tmp_path / "data"
    copy.mkdir()
    for file in data.glob("*.parquet"):
        (copy / file.name).write_bytes(file.read_bytes())
    settings = rl_settings(tmp_path / "run", tiny_folder, copy)
    run_rl(settings)
    (copy / "train.parquet").write_bytes((data / "test.parquet").read_bytes())
    with pytest.raises(DataError, match=r"from other inputs: data.train rows was 16, now 6; data.train sampled"):
        run_rl(settings)


KILLED = """
import os, signal, sys
import pytest, torch
torch.set_num_threads(1)
from test_resume import stop_at
stop_at(pytest.MonkeyPatch(), sys.argv.pop(1), lambda: os.kill(os.getpid(), signal.SIGKILL))
from foveate.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["while it generates", "between gradients and update", "while it writes a checkpoint"]
)
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path, tiny_folder, data, whole, moment):
    kill_and_resume(tmp_path, tiny_folder, data, moment)
    assert_equal(RunFolder(tmp_path / "run"), whole)


@pytest.mark.slow
def test_a_killed_run_with_recurrent_layers_ends_as_the_uninterrupted_one(tmp_path, data):
    folder = build_family(tmp_path / "model", "qwen3_5")
    kill_and_resume(tmp_path, folder, data, "between gradients and update")
    assert_equal(RunFolder(tmp_path / "run"), run_rl(settings_in(tmp_path / "whole", folder, data)))


def kill_and_resume(tmp_path, folder, data, moment):
    """Let processes of their own begin the run `tmp_path / "run"` until the moment, and end it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(settings_in(tmp_path / "run", folder, data)))
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    support = os.pathsep.join([str(Path(toy.__file__).parent), str(Path(__file__).parent), *before])
    places = {**os.environ, "PYTHONPATH": support}
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, "rl", str(recipe)], env=places)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "final").exists()
    again = [sys.executable, "-c", "from foveate.cli.app import main; main()", "rl", str(recipe)]
    subprocess.run(again, check=True, capture_output=True)
