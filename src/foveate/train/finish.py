"""What the command line does when a run has ended: report, summary, and where the model is."""

from __future__ import annotations

from foveate.log import print_result
from foveate.report.page import write_and_print_report
from foveate.run_folder import RunFolder


def finish(run: RunFolder) -> None:
    """Write the report of a finished run and print its summary."""
    write_and_print_report(run.path)
    print_result(f"Model: {run.final}")
