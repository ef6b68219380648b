"""What the command line does when a run has ended: report, summary, and where the model is."""

from __future__ import annotations

from foveate.log import say
from foveate.report.page import conclude
from foveate.run_folder import RunFolder


def finish(run: RunFolder) -> None:
    """Write the report of a finished run and print its summary."""
    conclude(run.path)
    say(f"Model: {run.final}")
