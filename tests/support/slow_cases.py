"""Cases of which few run in the quick suite."""

from __future__ import annotations

import pytest


def slow_but(quick, cases):
    """All cases as parameters; those that are not `quick` are slow."""
    return [pytest.param(case, marks=[] if case in quick else pytest.mark.slow) for case in cases]
