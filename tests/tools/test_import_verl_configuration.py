"""The configuration of a launch is that of its program or its options, with the files that its defaults name."""

from __future__ import annotations

import pytest
import yaml

from foveate.errors import ConfigError
from foveate.tools.import_verl import import_script

NEEDED = (
    "actor_rollout_ref.model.path=m data.train_files=a.parquet data.val_files=b.parquet data.train_batch_size=64 "
    "actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.name=vllm"
)
MAIN = """import hydra
@hydra.main(config_path="config", config_name="mine", version_base=None)
def main(config): ...
"""
MINE = """
hydra: {searchpath: [file://verl/trainer/config]}
defaults: [ppo_trainer, _self_]
data: {max_response_length: 99, gen_batch_size: "${data.train_batch_size}"}
algorithm: {adv_estimator: rloo}
"""


@pytest.fixture
def imported(tmp_path):
    """The recipe of a launch, and its account, with these files around the script."""

    def run(command, files=(), settings=NEEDED):
        for name, text in dict(files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        script = tmp_path / "mine" / "launch.sh"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"python3 {command} {settings}\n")
        found = import_script(script, {"PWD": str(tmp_path)}, 640)
        return yaml.safe_load(found.recipe), found

    return run


@pytest.mark.parametrize(
    "command",
    ["-m recipe.mine.main", "mine/main.py", "-m recipe.mine.main algorithm.adv_estimator=rloo"],
)
def test_a_program_begins_with_the_configuration_that_it_declares(imported, command):
    files = {"mine/main.py": MAIN, "mine/config/mine.yaml": MINE}
    recipe, found = imported(command, files)
    assert recipe["rollout"]["max_tokens"] == 99
    assert recipe["algorithm"]["name"] == "rloo"
    assert recipe["train"]["steps"] == 10 * 30
    assert any(line.endswith("mine/config/mine.yaml") for line in found.notes)
    assert any("a program of its own" in line for line in found.refused)


def test_settings_of_the_launch_go_before_those_of_its_configuration(imported):
    files = {"mine/main.py": MAIN, "mine/config/mine.yaml": MINE}
    recipe, _ = imported("-m recipe.mine.main data.max_response_length=7", files)
    assert recipe["rollout"]["max_tokens"] == 7


@pytest.mark.parametrize(
    "options",
    [
        "--config-path=config --config-name=mine",
        "--config-path recipe/mine/config --config-name mine.yaml",
        "--config-path=base_dir/recipe/mine/config --config-name=mine",
        "--config-dir=$PWD/mine/config --config-name=mine",
    ],
)
def test_a_configuration_is_found_by_its_options_around_the_script(imported, options):
    recipe, _ = imported(f"-m verl.trainer.main_ppo {options}", {"mine/config/mine.yaml": MINE})
    assert recipe["rollout"]["max_tokens"] == 99


def test_a_configuration_that_is_not_here_is_missed(imported):
    with pytest.raises(ConfigError, match=r"takes its settings from config/mine\.yaml, which is not here"):
        imported("-m verl.trainer.main_ppo --config-name=mine")
    with pytest.raises(ConfigError, match=r"--config-path was not read .*, and names the other settings"):
        imported("-m verl.trainer.main_ppo --config-path=$(date) --config-name=mine")


def test_the_files_of_defaults_are_composed_in_their_order(imported):
    files = {
        "mine/config/mine.yaml": "defaults: [first, actor@actor_rollout_ref.actor: small, _self_, last, absent]\n"
        "data: {max_prompt_length: 2, max_response_length: 2}\n",
        "mine/config/first.yaml": "data: {max_prompt_length: 1, max_response_length: 1, seed: 1}\n",
        "mine/config/actor/small.yaml": "grad_clip: 0.5\n",
        "mine/config/last.yaml": "data: {max_response_length: 3}\n",
    }
    recipe, found = imported("-m verl.trainer.main_ppo --config-path=config --config-name=mine", files)
    assert (recipe["data"]["max_prompt_tokens"], recipe["rollout"]["max_tokens"], recipe["seed"]) == (2, 3, 1)
    assert recipe["optim"]["max_grad_norm"] == 0.5
    assert any("absent.yaml, which its defaults name, is not here" in line for line in found.refused)


def test_a_needed_value_that_is_empty_is_refused(imported):
    with pytest.raises(ConfigError, match=r"a recipe needs model\.path, and the launch gives it empty"):
        imported("-m verl.trainer.main_ppo", settings=NEEDED + ' actor_rollout_ref.model.path=""')


@pytest.mark.parametrize(("seed", "other"), [("${data.other}", "${data.seed}"), ("${data.seed}", "1")])
def test_settings_that_refer_to_each_other_without_end_are_named(imported, seed, other):
    settings = f"{NEEDED} 'data.seed={seed}' '+data.other={other}'"
    assert "seed" not in imported("-m verl.trainer.main_ppo", settings=settings)[0]
