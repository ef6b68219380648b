"""Settings, metrics and answers to trackers: TensorBoard's own reader, and libraries that note how they are called."""

from __future__ import annotations

import json
import sys

import PIL.Image
import pytest
from pydantic import ValidationError
from toy import rl_settings

from foveate.config.train import LogSettings
from foveate.data.images import read_image
from foveate.log import MetricsWriter, read_metrics
from foveate.records import Answer, Group, Message, Prompt, Score, Task
from foveate.train.trackers import OPENERS, Trackers

FAKE = """
import json, pathlib
CALLS = pathlib.Path(__file__).with_suffix(".calls")
def note(*arguments, **named):
    with CALLS.open("a") as file:
        file.write(json.dumps([*arguments, named], default=str) + chr(10))
class Image:
    def __init__(self, picture, caption=""): self.size, self.caption = picture.size, caption
    def __str__(self): return f"image {self.size[0]}x{self.size[1]} {self.caption}".strip()
class Table:
    def __init__(self, columns=(), data=(), dataframe=None):
        if dataframe is not None: columns, data = dataframe.columns, dataframe.rows
        self.rows = [list(columns), *data]
    def add(self, columns, rows): self.rows = [columns, *rows]
    def __str__(self): return json.dumps(self.rows, default=str)
class echarts: Table = Table
def log(data, step): note("log", {k: [*map(str, v)] if isinstance(v, list) else v for k, v in data.items()}, step)
def log_metrics(metrics, step): note("log", metrics, step)
def log_params(params): note("params", params)
def log_dict(config, file): note("dict", config, file)
def log_table(data, file):
    assert len({isinstance(value, Image) for value in data["image"]}) == 1  # MLflow refuses a mix
    note("table", data, file)
def set_experiment(name): note("experiment", name)
def start_run(**named): note("start", **named)
class Run: log = staticmethod(log)
def init(**named):
    note("init", **named)
    return Run
"""
PANDAS = """
class DataFrame:
    def __init__(self, rows, columns): self.rows, self.columns = rows, columns
"""


@pytest.fixture
def groups(tmp_path):
    """A prompt with an image, and one without whose answer was not graded."""
    PIL.Image.new("RGB", (800, 600), "red").save(tmp_path / "red.png")
    image = read_image(str(tmp_path / "red.png"), [tmp_path])
    found = []
    for images, score in (((image,), Score(0.5)), ((), Score(None, note="no"))):
        task = Task("one", "toy", (Message("user", "Which\n|colour|?"),), images, "red", where="row 0")
        answer = Answer.sampled((5, 6), (-0.1, -0.2), "green", "stop", 0)
        found.append(Group(task, Prompt((1,), (), None, (1,)), (answer,), (score,)))
    return found


def settings_of(tmp_path, name):
    found = rl_settings(tmp_path / "run", tmp_path, tmp_path)
    log = LogSettings.model_construct(to=(name,))
    reward = found.reward.model_copy(update={"settings": {"api_key": "sk-secret"}})
    return found.model_copy(update={"log": log, "reward": reward})


@pytest.fixture(params=["wandb", "mlflow", "trackio", "swanlab"])
def calls_of(request, tmp_path, monkeypatch, groups):
    """(name of a library, its calls) in a run that takes two steps, one in each start."""
    name = request.param
    (tmp_path / f"{name}.py").write_text(FAKE)
    (tmp_path / "pandas.py").write_text(PANDAS)
    monkeypatch.syspath_prepend(tmp_path)
    for module in (name, "pandas"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        trackers = Trackers(settings_of(tmp_path, name), tmp_path / "run")
        metrics = {"loss": 0.5, "bad": float("nan"), "n": 3}
        MetricsWriter(tmp_path / "run" / "metrics.jsonl", trackers.log).write(step, metrics)
        trackers.show(step, groups)
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    calls = [json.loads(line) for line in (tmp_path / f"{name}.calls").read_text().splitlines()]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    return name, calls


def test_a_tracker_gets_every_step_and_continues_as_one_run(calls_of):
    _, calls = calls_of
    assert [call[1:3] for call in calls if call[0] == "log" and "loss" in call[1]] == [
        [{"loss": 0.5, "n": 3.0}, 1],
        [{"loss": 0.5, "n": 3.0}, 2],
    ]
    opened = [call[-1] for call in calls if call[0] in ("init", "start")]
    assert len(opened) == 2
    assert opened[0] == opened[1]


def test_a_tracker_gets_the_settings_without_secrets(calls_of):
    name, calls = calls_of
    told = next(call for call in calls if call[0] == ("params" if name == "mlflow" else "init"))
    if name == "mlflow":
        assert told[1]["optim.lr"] == "0.001"
    else:
        assert told[-1]["config"]["optim"]["lr"] == 0.001
    assert "sk-secret" not in json.dumps(calls)


def test_a_tracker_gets_answers_with_prompt_image_and_reward_of_the_first_step(calls_of):
    name, calls = calls_of
    shown = [call for call in calls if call[0] == "table" or (call[0] == "log" and "answers" in call[1])]
    assert len(shown) == 1
    said = json.dumps(shown)
    for word in ("one", "colour", "green", "red", "0.5", "image 400x300"):
        assert word in said
    if name in ("wandb", "trackio"):
        columns, first, second = json.loads(shown[0][1]["answers"])
        assert columns == ["id", "image", "prompt", "answer", "ground truth", "reward"]
        assert (first[1], first[-1], second[1], second[-1]) == ("image 400x300", 0.5, None, None)


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_was_written_once(tmp_path, groups):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((1, 2, 3), (2, 3, 4)):  # killed after 3, continued from the checkpoint of 1
        trackers = Trackers(settings_of(tmp_path, "tensorboard"), tmp_path)
        writer = MetricsWriter(tmp_path / "metrics.jsonl", trackers.log)
        for step in steps:
            writer.write(step, {"reward/mean": step + 10 * steps[0]})
            trackers.show(step, groups)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("reward/mean")] == [
        (1, 11.0),
        (2, 22.0),
        (3, 23.0),
        (4, 24.0),
    ]
    [table] = events.Tensors("answers/text_summary")
    assert b"| one | Which<br>\\|colour\\|? | green | red | 0.5 |" in table.tensor_proto.string_val[0]
    [image] = events.Images("answers/0")
    assert (image.width, image.height) == (400, 300)
    assert b"lr: 0.001" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_a_tracker_that_is_not_installed_is_refused_with_the_settings(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert LogSettings.model_validate({"to": []}).to == ()
    with pytest.raises(ValidationError, match=r"log\.to names trackio, which is not installed; run pip"):
        LogSettings.model_validate({"to": ["trackio"]})
    with pytest.raises(ValidationError):
        LogSettings.model_validate({"to": ["comet"]})
    assert set(OPENERS) == {"tensorboard", "wandb", "mlflow", "trackio", "swanlab"}
