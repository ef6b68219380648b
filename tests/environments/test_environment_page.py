"""Everything that docs/environments.md shows is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from foveate.environments import ENVIRONMENTS, TOOLS
from foveate.environments.build import build_environment
from foveate.environments.calls import ToolCall, hermes_call, parse_calls
from foveate.environments.observe import encoded
from foveate.environments.pool import Environments
from foveate.environments.protocol import EnvironmentLimits
from foveate.records import Message, Task

PAGE = (Path(__file__).parents[2] / "docs/environments.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
RECIPES = [yaml.safe_load(text)["environment"] for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
TASK = Task("t", "s", (Message("user", "<image>\n?"),), (encoded(Image.new("RGB", (60, 40))),), None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(name):
    return [line for line in CODE[name].splitlines() if line.strip()]


def test_a_tool_takes_ten_lines(folder):
    assert folder
    assert len(lines("my_tools.py")) <= 10
    (settings,) = [one["settings"] for one in RECIPES if "my_tools.py" in str(one)]
    with Environments("tools", settings, workers=0) as pool:
        assert [tool["function"]["name"] for tool in pool.tools] == ["zoom", "contrast"]
        pool.open(TASK, 0, "a").result()
        step = pool.step("a", hermes_call("contrast", {"image": 1, "box": [0, 0, 500, 500]})).result()
        assert (step.messages[0].images[0].width, step.messages[0].images[0].height) == (30, 20)


def test_an_environment_takes_twenty_five_lines(folder):
    assert folder
    assert len(lines("dock.py")) <= 25
    (found,) = [one for one in RECIPES if "dock.py" in one["name"]]
    with Environments(found["name"], found["settings"], workers=1) as pool:
        for seed in range(3):
            pool.open(TASK, seed, seed).result(60)
            rewards = []
            for _ in range(12):
                step = pool.step(seed, "I say right.").result(60)
                rewards.append(step.reward)
                if step.done:
                    break
            assert len(rewards) == 12 or rewards == [0.0] * (len(rewards) - 1) + [1.0]


def test_every_recipe_of_the_page_is_taken(folder):
    assert folder
    assert len(RECIPES) == 4
    for one in RECIPES:
        build_environment(one["name"], one["settings"])


def test_the_page_has_every_environment_tool_and_limit():
    for name in (*ENVIRONMENTS, *TOOLS):
        assert f"| `{name}` |" in PAGE
    for name in ("max_turns", "max_text", "max_images", "max_pixels"):
        found = re.search(rf"\b{name}`[^|\n]*\| (\d+) \|", PAGE)
        assert found
        assert int(found[1]) == getattr(EnvironmentLimits(), name)


def test_the_call_of_the_page_is_one():
    (text,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert parse_calls(text) == [ToolCall("zoom", {"image": 1, "box": [400, 300, 500, 400]})]
