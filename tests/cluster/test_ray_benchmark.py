"""benchmarks/two_nodes.py: two nodes on this machine, on which a small model learns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_nodes.py"


@pytest.mark.slow
def test_two_nodes_train_together(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "--steps", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "reward/mean by step:" in done.stdout
