"""The door for Python: public names, lazily, and settings from recipes."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys

import cloudpickle
import pytest

import foveate
from foveate import api
from foveate.cli.app import VERBS
from foveate.config.recipe import SHIPPED, read_recipe
from foveate.config.runs import STAGES, CascadeSettings, MPOSettings, RLSettings, SFTSettings, VicoSettings, VirSettings
from foveate.errors import ConfigError


@pytest.mark.parametrize("name", foveate.PUBLIC)
def test_every_public_name_is_there(name):
    found = foveate.__getattr__(name)
    assert found.__name__ == name
    assert name in dir(foveate)


def test_every_function_of_the_door_is_public():
    functions = {
        name for name, value in vars(api).items() if inspect.isfunction(value) and value.__module__ == api.__name__
    }
    assert {name for name in functions if not name.startswith("_")} <= foveate.PUBLIC.keys()


@pytest.mark.parametrize("name", ["evaluate", "plan", "report", "serve"])
def test_a_public_function_can_be_called_also_where_a_part_of_its_name_is_imported(name, monkeypatch):
    part = importlib.import_module(f"foveate.{name}")
    assert getattr(foveate, name) is part
    monkeypatch.setattr(api, name, lambda request: f"{name} of {request}")
    assert getattr(foveate, name)(3) == f"{name} of 3"
    assert pickle.loads(cloudpickle.dumps(part)) is part
    assert pickle.loads(cloudpickle.dumps(lambda: foveate))() is foveate


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'foveate' has no attribute 'train_by_magic'"):
        _ = foveate.train_by_magic  # pyright: ignore[reportAttributeAccessIssue]


def test_the_door_itself_is_light():
    code = "import sys; from foveate import api; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_can_be_run_as_a_module():
    ended = subprocess.run([sys.executable, "-m", "foveate", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: foveate" in ended.stdout


@pytest.mark.parametrize("recipe", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_tells_its_stage(recipe):
    settings = api.from_recipe(recipe.stem).settings
    expected = {
        "coldstart": SFTSettings,
        "mpo": MPOSettings,
        "gspo": RLSettings,
        "cascade": CascadeSettings,
        "vico": VicoSettings,
        "_vir": VirSettings,
        "_prm": SFTSettings,
    }
    assert isinstance(settings, next((cls for word, cls in expected.items() if word in recipe.stem), RLSettings))


def test_overrides_count_for_the_stage_and_a_stage_may_be_given(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("run: a\nmodel: {path: demo}\ndata: {train: [a.jsonl]}\noptim: {lr: 1e-5}\ntrain: {steps: 3}\n")
    assert isinstance(read_recipe(path, []), SFTSettings)
    assert isinstance(read_recipe(path, ["rollout.samples=4"]), RLSettings)
    assert isinstance(read_recipe(path, ["train.pairs_per_step=4"]), MPOSettings)
    assert isinstance(api.from_recipe(path, stage="mpo").settings, MPOSettings)
    with pytest.raises(ConfigError, match=r"unknown setting train\.stepps; did you mean train\.steps"):
        api.from_recipe(path, "train.stepps=3")


def test_a_plan_of_several_stages_is_refused():
    with pytest.raises(ConfigError, match="has several stages; plan the recipe of one stage at a time"):
        api.plan(api.from_recipe("shapes_cascade").settings, "8xH100-80")


def test_every_stage_has_a_command_and_a_call():
    verbs = {name for panel in VERBS.values() for name in panel}
    assert STAGES.keys() <= verbs
    assert {f"train_{name}" for name in STAGES if name != "cascade"} <= foveate.PUBLIC.keys()
