"""The first block of docs/python.md runs as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/python.md"


@pytest.mark.slow
def test_the_example_of_the_page_runs_as_printed(tmp_path):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / "example.py").write_text(block[1])
    ended = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "'reward/mean'" in ended.stdout
    assert (tmp_path / "runs/brief/report.html").is_file()
