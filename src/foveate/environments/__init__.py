"""Environments: several turns of one answer. `ENVIRONMENTS` is the table of the known ones."""

from __future__ import annotations

ENVIRONMENTS: dict[str, str] = {}
