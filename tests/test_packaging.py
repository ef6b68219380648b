"""What the package says of itself, and what it needs to be imported."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_all_extras_are_in_all():
    extras = PROJECT["optional-dependencies"]
    [everything] = extras["all"]
    named = set(re.fullmatch(r"foveate\[(.*)\]", everything)[1].split(","))
    assert named == extras.keys() - {"all", "dev", "docs"}


def test_the_version_is_the_same_everywhere():
    import foveate

    assert foveate.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()


def test_a_message_names_an_extra_that_there_is():
    named = {
        (path.name, extra)
        for path in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"foveate\[([a-z,]+)\]", path.read_text())
    }
    assert {extra for _, extra in named} <= PROJECT["optional-dependencies"].keys()
    assert named


def test_foveate_is_imported_where_modules_of_unix_are_missing():
    code = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):\n"
        "    sys.modules[name] = None\n"
        "import foveate as fv\n"
        "fv.train_rl, fv.from_recipe, fv.settings_list()\n"
        "from foveate.cli import app\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
