"""Lists of what there is to choose from."""

from pathlib import Path

import pytest

from foveate.algorithms.table import ALGORITHMS
from foveate.config.recipe import SHIPPED
from foveate.environments import ENVIRONMENTS, TOOLS
from foveate.errors import ConfigError
from foveate.rewards import REWARDS
from foveate.tools.listing import (
    algorithms_list,
    environments_list,
    recipes_list,
    rewards_list,
    settings_list,
    settings_page,
)

PAGE = Path(__file__).parents[2] / "docs/settings.md"


def test_the_page_of_settings_is_current():
    assert PAGE.read_text().strip() == settings_page().strip(), "run: foveate settings --markdown > docs/settings.md"


def test_every_setting_says_what_it_does():
    assert [one.name for one in settings_list("rl") if not one.text] == []


def test_a_setting_shows_values_default_and_meaning():
    [one] = settings_list("rl", "rollout.samples")
    assert (one.kind, one.default) == ("whole number", "default 8")
    assert str(one).startswith("rollout.samples  (whole number, default 8)\n    Answers per prompt")
    critic = [choice.name for choice in settings_list("rl", "algorithm.critic")]
    assert {"algorithm.critic", "algorithm.critic.lr"} <= {*critic}


def test_an_unknown_group_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no setting 'optin' in stage rl; did you mean 'optim'"):
        settings_list("rl", "optin")


def test_every_recipe_reward_and_algorithm_is_listed_with_a_sentence():
    recipes = recipes_list()
    assert [one.name for one in recipes] == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert [one.name for one in rewards_list()] == [*REWARDS]
    named = [one.name for one in algorithms_list()]
    assert {f"algorithm {name}" for name in ALGORITHMS} <= {*named}
    for one in (*recipes, *rewards_list()):
        assert one.text.endswith((".", ":")) or one.text, one.name


def test_every_environment_and_tool_is_listed_with_its_settings():
    listed = {one.name: one for one in environments_list()}
    assert {*ENVIRONMENTS, *(f"tool {name}" for name in TOOLS)} <= {*listed}
    assert listed["tools"].kind.startswith("tools, frame='model', max_calls=4")
    assert listed["tool zoom"].kind == "tile=448, min_side=16"
    assert listed["every environment"].kind.startswith("max_turns=8, ")
    assert all(one.text for one in listed.values())


def test_a_recipe_is_shown_as_it_stands():
    assert recipes_list("shapes_gspo") == (SHIPPED / "shapes_gspo.yaml").read_text()


def test_one_name_is_listed_alone_and_an_unknown_one_with_the_nearest():
    [one] = rewards_list("EXACT")
    assert one.name == "exact"
    assert len(one.text) > len(next(entry.text for entry in rewards_list() if entry.name == "exact"))
    assert [entry.name for entry in algorithms_list("grpo")] == ["algorithm grpo", "advantage grpo", "loss grpo"]
    assert [entry.name for entry in environments_list("zoom")] == ["tool zoom"]
    for listed, name in ((rewards_list, "exat"), (algorithms_list, "grpoo"), (environments_list, "gym")):
        with pytest.raises(ConfigError, match=rf"'{name}'.*[Kk]nown: "):
            listed(name)
