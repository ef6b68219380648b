"""A new user's first runs: what README and docs/first_runs.md print, typed as it stands, in a folder outside the clone.

`make journeys` runs all; `.ci/run` one and a notebook each time, in turn by commit (FOVEATE_TEST_TURN). With
FOVEATE_JOURNEY_PYTHON they run in the environment of that interpreter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from zlib import crc32

import pytest
from journeys import ROOT, run_in_clone, run_notebook, run_section, sections

PAGE = sections(ROOT / "docs/first_runs.md")
README = sections(ROOT / "README.md")
LAPTOP = "On a laptop CPU"
OWN_ROWS = "Your own rows and reward, in Python"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TURN = os.environ.get("FOVEATE_TEST_TURN")
JOURNEYS = {LAPTOP: README[LAPTOP], OWN_ROWS: README[OWN_ROWS], **PAGE}


def turn(names: list[str]) -> list[str]:
    """The one whose turn it is, all where no turn is said."""
    return [names[crc32(TURN.encode()) % len(names)]] if TURN else names


def rewards(folder: Path) -> list[float]:
    """The mean reward of each step of the RL run in a folder."""
    [metrics] = [path for path in folder.glob("runs/*/metrics.jsonl") if '"reward/mean"' in path.read_text()]
    return [json.loads(line)["reward/mean"] for line in metrics.read_text().splitlines()]


def test_the_pages_have_the_journeys():
    assert set(JOURNEYS) == {
        LAPTOP,
        OWN_ROWS,
        "LLaVA conversations: SFT, then RL",
        "A datasets folder with images, and TRL's reward",
        "EasyR1's parquet, and verl's compute_score",
    }
    assert "docs/first_runs.md" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.parametrize("name", turn([*JOURNEYS]))
def test_a_journey_ends_with_a_higher_reward_a_report_and_a_model(name, tmp_path):
    if "import datasets" in "".join(block.code for block in JOURNEYS[name]):
        pytest.importorskip("datasets")
    place = tmp_path / "foveate" if name == LAPTOP else tmp_path
    if name == LAPTOP:
        printed = run_in_clone(JOURNEYS[name][0], tmp_path)
    elif name == OWN_ROWS:  # one cell of a notebook
        [python] = [block for block in JOURNEYS[name] if block.language == "python"]
        nbformat = pytest.importorskip("nbformat")
        cell = nbformat.v4.new_code_cell(python.code)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "own.ipynb")
        outputs = run_notebook(tmp_path / "own.ipynb", tmp_path)
        printed = "".join(output.get("text", "") for output in outputs)
    else:
        printed = run_section(JOURNEYS[name], tmp_path)
    curve = rewards(place)
    half = len(curve) // 2
    assert sum(curve[half:]) / len(curve[half:]) > sum(curve[:half]) / half, printed
    for final in place.glob("runs/*/final"):
        assert (final / "README.md").is_file()
        assert (final.parent / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.parametrize("name", turn([path.stem for path in NOTEBOOKS]))
def test_a_notebook_runs_from_the_first_cell_to_the_last(name, tmp_path):
    pytest.importorskip("nbclient")
    shown = run_notebook(ROOT / f"examples/{name}.ipynb", tmp_path)
    assert any("<polyline" in output.get("data", {}).get("text/html", "") for output in shown)


def test_notebooks_are_kept_without_output():
    nbformat = pytest.importorskip("nbformat")
    assert len(NOTEBOOKS) >= 2
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert not [cell for cell in cells if cell.cell_type == "code" and cell.outputs], path.name
