from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from foveate.cli.evaluate import _scoring
from foveate.config.recipe import SHIPPED, find_recipe, flatten, load_recipe, read_values, to_yaml
from foveate.config.runs import RLSettings, SFTSettings
from foveate.errors import ConfigError

RECIPE = """\
run: runs/a
model: {path: demo}
data:
  train: [a.parquet]
  test:
    - b.parquet
optim:
  lr: 1e-6
train:
  steps: 10
"""


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problem(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides, RLSettings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_sets_what_it_names_and_leaves_the_rest(tmp_path):
    settings = load_recipe(write(tmp_path, RECIPE), [], RLSettings)
    assert settings.optim.lr == 1e-6
    assert settings.data.test == ("b.parquet",)
    assert settings.rollout.samples == 8


def test_overrides_apply_in_order_and_keep_their_types(tmp_path):
    overrides = [
        "rollout.samples=16",
        "optim.lr=3e-6",
        "model.gradient_checkpointing=true",
        "data.train=[b.parquet, 'c d.parquet']",
        "data.system=You are: # a [helper]",
        "run='12'",
        "data.image_root=/tmp",
        "data.image_root=",
        "reward.settings={alpha: 0.25}",
        "train.steps=20",
        "train.steps = 30",
    ]
    settings = load_recipe(write(tmp_path, RECIPE), overrides, RLSettings)
    assert settings.rollout.samples == 16
    assert settings.optim.lr == 3e-6
    assert settings.model.gradient_checkpointing is True
    assert settings.data.train == ("b.parquet", "c d.parquet")
    assert settings.data.system == "You are: # a [helper]"
    assert settings.run == "12"
    assert settings.data.image_root is None
    assert settings.reward.settings == {"alpha": 0.25}
    assert settings.train.steps == 30


def test_a_base_comes_first_and_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, RECIPE, "root.yaml")
    write(tmp_path, "base: root.yaml\ntrain: {steps: 20, prompts_per_step: 64}\n", "middle.yaml")
    path = write(tmp_path / "deep", "base: ../middle.yaml\ntrain:\n  steps: 30\n")
    settings = load_recipe(path, [], RLSettings)
    assert (settings.train.steps, settings.train.prompts_per_step, settings.optim.lr) == (30, 64, 1e-6)


def test_bases_in_a_circle_are_refused(tmp_path):
    write(tmp_path, "base: x.yaml\n", "y.yaml")
    said = problem(write(tmp_path, "seed: 1\nbase: y.yaml\n"))
    assert said.startswith(f"{tmp_path}/y.yaml:1: base goes in a circle: ")
    assert "x.yaml -> " in said


def test_a_base_is_not_looked_for_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, RECIPE, "root.yaml")
    (tmp_path / "deep").mkdir()
    assert "no recipe 'root.yaml'" in problem(write(tmp_path / "deep", "base: root.yaml\n"))


def test_a_missing_base_is_named_with_its_line(tmp_path):
    assert f"x.yaml:2: base is relative to {tmp_path}/: no recipe 'gone.yaml'" in problem(
        write(tmp_path, "seed: 1\nbase: gone.yaml\n")
    )


def test_naming_another_algorithm_drops_the_settings_of_the_former(tmp_path):
    path = write(tmp_path, RECIPE + "algorithm:\n  name: gspo\n  loss: {clip_high: 1.0}\n")
    assert load_recipe(path, ["algorithm=dapo"], RLSettings).algorithm.loss == {}
    assert load_recipe(path, ["algorithm=gspo"], RLSettings).algorithm.loss == {"clip_high": 1.0}
    both = load_recipe(path, ["algorithm=dapo", "algorithm.loss.clip_low=0.5"], RLSettings).algorithm
    assert (both.name, both.loss) == ("dapo", {"clip_low": 0.5})


@pytest.mark.parametrize(
    ("group", "base", "override", "left"),
    [
        ("environment", "{name: tools, settings: {tools: [zoom]}, workers: 3}", "environment.name=gui", {}),
        ("environment", "{name: tools, settings: {tools: [zoom]}, workers: 3}", "environment=gui", {}),
        ("environment", "{name: gui, settings: {side: 112}}", "environment=GUI", {"side": 112}),
        ("environment", "gui", "environment.settings.side=112", {"side": 112}),
        ("reward", "{name: iou, settings: {a: 1}}", "reward.name=math", {}),
        ("optim", "{name: muon, settings: {a: 1}}", "optim.name=adamw", {}),
        ("optim", "{settings: {a: 1}}", "optim.name=muon", {}),
        ("optim", "{settings: {a: 1}}", "optim.name=adamw", {"a": 1}),
    ],
)
@pytest.mark.parametrize("way", ["override", "base"])
def test_every_choice_by_name_drops_the_settings_of_the_former(tmp_path, group, base, override, left, way):
    recipe = RECIPE.replace("optim:\n  lr: 1e-6\n", "")
    path, overrides = write(tmp_path, f"{recipe}{group}: {base}\n"), [override]
    if way == "base":
        names, _, value = override.partition("=")
        upper = "\n".join(f"{'  ' * depth}{name}:" for depth, name in enumerate(names.split(".")))
        path, overrides = write(tmp_path, f"base: {path.name}\n{upper} {value}\n", "upper.yaml"), []
    settings = load_recipe(path, overrides, RLSettings)
    found = {"environment": settings.environment, "reward": settings.reward, "optim": settings.optim}[group]
    assert found.settings == left
    if "workers" in base:
        assert (found.name, found.workers) == ("gui", None)


def test_another_engine_drops_the_settings_of_the_former_and_nothing_else(tmp_path):
    path = write(tmp_path, RECIPE + "rollout: {engine: vllm, engine_settings: {servers: 2}, samples: 4}\n")
    rollout = load_recipe(path, ["rollout.engine=native"], RLSettings).rollout
    assert (rollout.engine, rollout.engine_settings, rollout.samples) == ("native", {}, 4)


def test_overrides_of_one_command_do_not_drop_each_other(tmp_path):
    path = write(tmp_path, RECIPE)
    given = ["environment.settings.side=112", "environment.name=gui", "optim.settings.a=1", "optim.name=muon"]
    for overrides in (given, given[::-1]):
        settings = load_recipe(path, [*overrides, "algorithm.loss.clip_low=0.5", "algorithm=dapo"], RLSettings)
        assert settings.environment.settings == {"side": 112}
        assert settings.optim.settings == {"a": 1}
        assert settings.algorithm.loss == {"clip_low": 0.5}


def test_settings_of_the_default_algorithm_survive_naming_it(tmp_path):
    path = write(tmp_path, RECIPE + "algorithm:\n  loss: {clip_high: 1.0}\n")
    assert load_recipe(path, ["algorithm=gspo"], RLSettings).algorithm.loss == {"clip_high": 1.0}
    assert load_recipe(path, ["algorithm=dapo"], RLSettings).algorithm.loss == {}


def test_names_in_the_settings_of_a_function_may_have_dots(tmp_path):
    rewards = {"MMPR-v1.2": "math", "a.b/c": {"name": "math"}}
    path = write(tmp_path, f"{RECIPE}reward:\n  name: by_source\n  settings:\n    rewards: {json.dumps(rewards)}\n")
    loaded = load_recipe(path, [], RLSettings)
    assert loaded.reward.settings == {"rewards": rewards}
    given = load_recipe(path, ['reward.settings.rewards={"x-v1.5": math}'], RLSettings)
    assert given.reward.settings["rewards"] == {**rewards, "x-v1.5": "math"}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(loaded))
    assert load_recipe(again, [], RLSettings) == loaded


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("rollout:\n  sample: 4\n", ":12: unknown setting rollout.sample; did you mean rollout.samples?"),
        ("max_tokens: 4\n", ":11: unknown setting max_tokens; did you mean rollout.max_tokens?"),
        ("samples: 4\n", ":11: unknown setting samples; did you mean eval.samples or rollout.samples?"),
        ("rolout: {samples: 4}\n", ":11: unknown setting rolout; did you mean rollout?"),
        ("rollout: {zzz: 4}\n", ":11: unknown setting rollout.zzz; rollout has engine, engine_settings, check_every,"),
        ("rollout: {samples: many}\n", ":11: rollout.samples must be a whole number, found 'many'"),
        ("rollout: {top_p: 1.5}\n", ":11: rollout.top_p must be at most 1.0, found 1.5"),
        ("rollout: 3\n", ":11: rollout must be a mapping of settings, found 3"),
        ("rollout:\n  top_k:\n    - 1\n", ":12: rollout.top_k must be a whole number, found [1]"),
        ("seed: no\n", ":11: seed must be a whole number, found 'no'"),
        ("eval: {prompts: 4}\n", ":11: eval.gallery is 16, more than eval.prompts=4"),
        ("algorithm: 3\n", ":11: algorithm must be a mapping of settings, found 3"),
        ("reward: {name: 3}\n", ":11: reward.name must be a string, found 3"),
        ("seed: 1\nseed: 2\n", ":12: seed is set twice, first at"),
        ("rollout.samples: 4\n", ":11: dotted names are for the command line; write `rollout:` and, indented,"),
        ("rollout: *a\n", ":11: not valid YAML: aliases are not allowed"),
        ("seed: !env SEED\n", ":11: the tag !env is not allowed"),
        ("seed: [1\n", ":12: not valid YAML:"),
        ("? [a]\n: 1\n", ":11: the name of a setting must be a plain word"),
        ("---\nseed: 1\n", ":11: not valid YAML:"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, added, said):
    path = write(tmp_path, RECIPE + added)
    assert problem(path).startswith(f"{path}{said}")


def test_a_mistake_in_a_base_names_the_base(tmp_path):
    base = write(tmp_path, RECIPE + "rollout: {sample: 4}\n", "base.yaml")
    assert problem(write(tmp_path, "base: base.yaml\n")).startswith(f"{base}:11: unknown setting rollout.sample;")


def test_entries_of_a_list_are_counted(tmp_path):
    path = write(tmp_path, RECIPE)
    said = problem(path, "model.trainable=[vision, head]")
    allowed = "'vision', 'projector' or 'language'"
    assert said == f"override 'model.trainable=[vision, head]': model.trainable entry 2 must be {allowed}, found 'head'"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.step=5", "unknown setting train.step; did you mean train.steps?"),
        ("train.steps=5.5", "train.steps must be a whole number, found 5.5"),
        ("train.steps", "an override is written group.name=value, such as train.steps=100"),
        ("train..steps=5", "an override is written group.name=value, such as train.steps=100"),
        ("data.train=5", "data.train must be a list, such as [a, b], found 5"),
        ("data.train=[a", "not valid YAML:"),
        ("model.path.x=5", "model.path must be a string, found {'x': 5}"),
        ("rollout.temperature=0", "rollout.temperature is 0, which gives equal answers"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(tmp_path, override, said):
    assert problem(write(tmp_path, RECIPE), override).startswith(f"override {override!r}: {said}")


def test_of_several_problems_the_first_is_told_and_the_others_counted_unknown_names_first(tmp_path):
    path = write(tmp_path, RECIPE.replace("steps: 10", "step: 10"))
    assert problem(path) == f"{path}:10: unknown setting train.step; did you mean train.steps? (and 1 more)"


def test_a_required_setting_that_is_missing_is_named(tmp_path):
    path = write(tmp_path, RECIPE.replace("  steps: 10\n", "  save_every: 5\n"))
    assert problem(path) == f"{path}:9: train.steps is missing"
    assert problem(path, "train.threads=1") == f"{path}:9: train.steps is missing"


def test_a_required_group_that_is_missing_is_named_with_the_recipe(tmp_path):
    path = write(tmp_path, RECIPE.replace("model: {path: demo}\n", ""))
    assert problem(path, "seed=3") == f"{path}: model.path is missing"


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_recipe_misses_what_is_required(tmp_path, text):
    path = write(tmp_path, text)
    assert problem(path) == f"{path}: run is missing (and 3 more)"


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    path = write(tmp_path, "- a\n")
    assert problem(path).startswith(f"{path}:1: a recipe is a mapping of settings")


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert problem(path).startswith(f"{path}: cannot be read as a recipe: ")


@pytest.mark.parametrize("name", ["toy", "toy.yaml", "recipes/toy", "recipes/toy.yaml"])
def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    shipped = write(tmp_path / "shipped", RECIPE, "toy.yaml")
    assert find_recipe(name, tmp_path / "shipped") == shipped


def test_a_file_goes_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    write(tmp_path / "shipped", RECIPE, "toy.yaml")
    write(tmp_path, RECIPE, "toy.yaml")
    assert find_recipe("toy.yaml", tmp_path / "shipped") == Path("toy.yaml")


def test_an_unknown_recipe_names_the_nearest_shipped_one(tmp_path):
    write(tmp_path, RECIPE, "shapes_gspo.yaml")
    with pytest.raises(ConfigError, match=r"no recipe 'shape_gspo'; did you mean 'shapes_gspo'\? Give the path"):
        find_recipe("shape_gspo", tmp_path)


def test_shipped_recipes_lie_in_the_package():
    assert SHIPPED.parent.name == "foveate"


def test_written_settings_are_a_recipe_for_the_same_settings(tmp_path):
    overrides = ["run=a: b", "data.system='1e-6'", "optim.lr=1e-06", "data.train=['null', 'yes', '1.5', é]"]
    overrides += ["algorithm=dapo", "algorithm.loss={a: .inf, b: 'true', c: null}"]
    settings = load_recipe(write(tmp_path, RECIPE), overrides, RLSettings)
    again = load_recipe(write(tmp_path, to_yaml(settings), "again.yaml"), [], RLSettings)
    assert again == settings
    assert again.data.system == "1e-6"
    assert again.algorithm.loss == {"a": math.inf, "b": "true", "c": None}


def test_values_follow_yaml_1_2(tmp_path):
    text = "a: 1e-6\nb: .5\nc: no\nd: 1:30\ne: 2024-01-01\nf: 1_000\ng: '1'\nh: ~\ni: -3\nj: 1.\nk: true\nl:\n"
    assert read_values(write(tmp_path, text)) == {
        "a": 1e-6,
        "b": 0.5,
        "c": "no",
        "d": "1:30",
        "e": "2024-01-01",
        "f": "1_000",
        "g": "1",
        "h": None,
        "i": -3,
        "j": 1.0,
        "k": True,
        "l": None,
    }


def test_flat_values_go_by_dotted_path():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_a_supervised_recipe_has_settings_of_its_own(tmp_path):
    text = RECIPE.replace("  test:\n    - b.parquet\n", "").replace("steps: 10", "steps: 10\n  weighting: sample")
    assert load_recipe(write(tmp_path, text), [], SFTSettings).train.weighting == "sample"


def test_settings_on_other_command_lines_are_written_like_overrides():
    given = ["threshold=1e-2", "form=no", "names=[a, b]", 'kinds={"x-v1.5": math}', "time=1:30", "none="]
    settings = {"threshold": 0.01, "form": "no", "names": ["a", "b"], "kinds": {"x-v1.5": "math"}, "time": "1:30"}
    assert _scoring("grounding", "exact", given, None, None) == ("exact", {**settings, "none": None})
    with pytest.raises(ConfigError, match=r"^names=\[a: not valid YAML"):
        _scoring("grounding", "exact", ["names=[a"], None, None)


def test_a_warm_up_of_the_recipe_is_shortened_with_the_run_and_one_of_the_override_is_not(caplog):
    caplog.set_level("INFO")
    recipe = load_recipe("shapes_gspo", ["train.steps=2"], RLSettings)
    assert (recipe.train.steps, recipe.optim.warmup_steps) == (2, 0)
    assert "optim.warmup_steps is 5 in the recipe, more than train.steps=2: shortened to 0" in caplog.text
    assert load_recipe("shapes_gspo", ["train.steps=5"], RLSettings).optim.warmup_steps == 5
    assert "optim.warmup_steps is 3, more than train.steps=2" in problem(
        "shapes_gspo", "train.steps=2", "optim.warmup_steps=3"
    )


def test_a_bare_model_or_file_stands_for_its_path(tmp_path):
    path = write(tmp_path, "run: r\nmodel: demo\ndata: [a.jsonl, b.jsonl]\ntrain: {steps: 3}\n")
    found = load_recipe(path, ["model.trainable=language", "data.hold_out=0.1"], RLSettings)
    assert (found.model.path, found.model.trainable) == ("demo", ("language",))
    assert (found.data.train, found.data.hold_out) == (("a.jsonl", "b.jsonl"), 0.1)


def test_a_file_of_rows_is_no_recipe_and_its_content_is_not_shown(tmp_path):
    path = write(tmp_path, '[{"question": "q", "answer": "secret"}]', "rows.json")
    said = problem(path)
    assert (
        said == f"{path} holds rows, and a recipe is wanted, a YAML file: give one, and the rows as data.train={path}"
    )
