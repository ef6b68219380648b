"""docs/families.md says what the families declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.models.families.table import family_table

DOCS = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.slow
def test_the_table_in_the_docs_is_made_from_the_families():
    assert family_table() in DOCS.read_text(encoding="utf-8"), "python -m foveate.models.families.table writes it"
