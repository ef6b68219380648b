"""Every shipped recipe can be run: it loads, and what it names exists and takes its settings."""

from __future__ import annotations

import pytest

from foveate.config.recipe import SHIPPED, load_recipe, read_values
from foveate.config.runs import CascadeSettings, MPOSettings, RLSettings, SFTSettings, VicoSettings, VirSettings
from foveate.registry import resolve
from foveate.rewards.build import build_reward
from foveate.rollout import ENGINES
from foveate.train.algorithm import build_algorithm
from foveate.train.mpo import build_preference_loss
from foveate.train.rl import new_engine
from foveate.train.session import check_cluster

RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def settings_of(name: str) -> RLSettings | SFTSettings | MPOSettings | CascadeSettings:
    """Kinds are told by groups that only one of them has, in the recipe or its base."""
    values = read_values(SHIPPED / f"{name}.yaml")
    while "base" in values:
        values = {**read_values(SHIPPED / f"{values.pop('base')}"), **values}
    kinds = {"mpo": CascadeSettings, "rollout": RLSettings, "loss": MPOSettings}
    train = values.get("train", {})
    offline = VicoSettings if "compressed" in train else VirSettings if "quantile" in train else SFTSettings
    return load_recipe(name, [], next((kind for group, kind in kinds.items() if group in values), offline))


def test_there_are_recipes():
    assert {"shapes_cascade", "shapes_coldstart", "shapes_gspo"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_loads_and_what_it_names_takes_its_settings(name):
    settings = settings_of(name)
    if isinstance(settings, CascadeSettings):
        assert build_preference_loss(settings.mpo.loss)
        settings = settings.stage("rl", "model")
    if isinstance(settings, RLSettings):
        assert build_algorithm(settings.algorithm, 1).name == settings.algorithm.name
        build_reward(settings.reward.name, settings.reward.settings)
        resolve(ENGINES, settings.rollout.engine, "engine")
        check_cluster(settings)
        new_engine(settings)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_says_what_it_is_for(name):
    assert (SHIPPED / f"{name}.yaml").read_text().startswith("# ")
