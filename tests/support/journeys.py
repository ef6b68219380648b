"""What the pages tell a new user to type, run as it is printed: a journey is the code of a section, top to bottom.

A block with a title is written to a file of that name. A Python block named `make_...` or `train` runs, and so does a
`bash` block; other files are what these use.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("FOVEATE_JOURNEY_PYTHON", sys.executable))
"""The interpreter of the environment that foveate is installed in: by default this one."""

_BLOCK = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[\w.]+)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_RUN = re.compile(r"(make_\w+|train)\.py")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code of a page; `title` is the name of its file, empty where it has none."""

    language: str
    title: str
    code: str


def sections(page: Path) -> dict[str, list[Block]]:
    """The blocks of each section of a page that has any, by its heading."""
    found: dict[str, list[Block]] = {}
    for part in re.split(r"^##+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        blocks = [Block(one["language"], one["title"] or "", one["code"]) for one in _BLOCK.finditer(text)]
        if blocks:
            found[heading] = blocks
    return found


def run_section(blocks: list[Block], folder: Path) -> str:
    """Do in a folder what the blocks of a section say; returns all that was printed."""
    printed = ""
    for block in blocks:
        if block.title:
            (folder / block.title).write_text(block.code)
            if _RUN.fullmatch(block.title):
                printed += run([str(PYTHON), block.title], folder)
        elif block.language == "bash":
            printed += run(["bash", "-euc", block.code], folder)
    return printed


def run_in_clone(block: Block, folder: Path) -> str:
    """Do in a folder what a block says that begins with a clone, up to `make demo`; installed is what `PYTHON` has."""
    clone, demo, *_ = block.code.splitlines()
    assert clone.startswith("git clone <this repository> && cd foveate"), clone
    assert demo.startswith("make demo"), demo
    run(["git", "clone", "--quiet", str(ROOT), "foveate"], folder)
    installed = folder / "foveate/.venv"
    installed.mkdir()
    (installed / "bin").symlink_to(PYTHON.parent.absolute())
    (installed / "ready").touch()
    return run(["bash", "-euc", demo], folder / "foveate")


def run_notebook(path: Path, folder: Path) -> list[dict[str, Any]]:
    """The outputs of the cells of a notebook that is executed in a folder, texts in one piece."""
    (folder / "execute.py").write_text(
        "import nbclient, nbformat, sys\n"
        "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
        "nbclient.NotebookClient(notebook, timeout=600).execute()\n"
        "nbformat.write(notebook, 'done.ipynb')\n"
    )
    run([str(PYTHON), "-W", "ignore", "execute.py", str(path)], folder)
    cells = json.loads((folder / "done.ipynb").read_text())["cells"]
    return [_whole(output) for cell in cells for output in cell.get("outputs", ())]


def _whole(value: Any) -> Any:
    """An output as nbformat's readers give it: its file holds a text as a list of lines."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "".join(value)
    return value


def run(command: list[str], folder: Path) -> str:
    """What a command prints, with the environment of `PYTHON` first on its path. Raises AssertionError where it
    fails."""
    variables = {**os.environ, "PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout
