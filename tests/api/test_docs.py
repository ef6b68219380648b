"""The first block of docs/python.md runs as it is printed, and the figures of README are those of their sources."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from foveate import api

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/python.md"
MEMORY = re.findall(
    r"^\| `(geo3k_\w+)` \|[^|]*\| ([\d.]+) GiB \| (\d+) GB \|$", (ROOT / "README.md").read_text(), re.MULTILINE
)
GPUS = {"24": "RTX4090-24", "48": "L40S-48", "80": "H100-80"}


@pytest.mark.slow
def test_the_example_of_the_page_runs_as_printed(tmp_path):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / "example.py").write_text(block[1])
    ended = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "'reward/mean'" in ended.stdout
    assert (tmp_path / "runs/brief/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "gib", "card"), MEMORY)
def test_readme_says_of_recipes_for_one_gpu_what_the_planner_says(recipe, gib, card):
    plan = api.plan(api.from_recipe(recipe).settings, f"1x1x{GPUS[card]}")
    assert f"{plan.memory.training / 2**30:.1f}" == gib
    assert "\nfits" in api.plan_report(plan)


def test_readme_says_it_of_every_recipe_for_one_gpu():
    assert {name for name, *_ in MEMORY} == {path.stem for path in (ROOT / "src/foveate/recipes").glob("geo3k_*.yaml")}


def test_a_page_begins_with_the_command_that_most_readers_come_for():
    without = {"decisions", "families", "log", "performance", "security"}
    pages = {path.stem: path.read_text().split("\n\n")[1] for path in (ROOT / "docs").glob("*.md")}
    assert {name for name, first in pages.items() if not first.startswith(("    ", "```"))} <= without
