"""Metrics to trackers: TensorBoard's own reader, and libraries that write down how they are called."""

from __future__ import annotations

import json
import sys

import pytest
from pydantic import ValidationError

from foveate.config.train import LogSettings
from foveate.log import OPENERS, MetricsWriter, read_metrics

FAKE = """
import json, pathlib
CALLS = pathlib.Path(__file__).with_suffix(".calls")
def note(*arguments, **named):
    with CALLS.open("a") as file:
        file.write(json.dumps([*arguments, named], default=str) + chr(10))
def log(metrics, step): note("log", metrics, step)
def log_metrics(metrics, step): note("log", metrics, step)
def set_experiment(name): note("experiment", name)
def start_run(**named): note("start", **named)
class Run:
    log = staticmethod(log)
def init(**named):
    note("init", **named)
    return Run
"""


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_gets_every_step_and_continues_as_one_run(tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        MetricsWriter(tmp_path / "run" / "metrics.jsonl", (name,)).write(
            step, {"loss": 0.5, "bad": float("nan"), "n": 3}
        )
    calls = [json.loads(line) for line in (tmp_path / f"{name}.calls").read_text().splitlines()]
    assert [call[1:3] for call in calls if call[0] == "log"] == [
        [{"loss": 0.5, "n": 3.0}, 1],
        [{"loss": 0.5, "n": 3.0}, 2],
    ]
    opened = [call[-1] for call in calls if call[0] in ("init", "start")]
    assert len(opened) == 2
    assert opened[0] == opened[1]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_was_written_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((1, 2, 3), (2, 3, 4)):  # killed after 3, continued from the checkpoint of 1
        writer = MetricsWriter(tmp_path / "metrics.jsonl", ("tensorboard",))
        for step in steps:
            writer.write(step, {"reward/mean": step + 10 * steps[0]})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("reward/mean")] == [
        (1, 11.0),
        (2, 22.0),
        (3, 23.0),
        (4, 24.0),
    ]


def test_a_tracker_that_is_not_installed_is_refused_with_the_settings(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert LogSettings.model_validate({"to": []}).to == ()
    with pytest.raises(ValidationError, match=r"log\.to names trackio, which is not installed; run pip"):
        LogSettings.model_validate({"to": ["trackio"]})
    with pytest.raises(ValidationError):
        LogSettings.model_validate({"to": ["comet"]})
    assert set(OPENERS) == {"tensorboard", "wandb", "mlflow", "trackio"}
