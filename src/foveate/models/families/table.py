"""The table of families in docs/families.md, made from what the families declare:

python -m foveate.models.families.table
"""

from __future__ import annotations

import sys

from transformers import CONFIG_MAPPING

from foveate.encoding.family import Family
from foveate.errors import ConfigError
from foveate.models.families import FAMILIES, family_class
from foveate.models.families.proof import MOST_NATS, forest_difference
from foveate.models.families.text import TextOnly

NAMED_TEXT = ("mistral", "gemma3_text", "smollm3", "phi3", "olmo2", "glm")
"""Text models without a row of their own that the tests train, sample and save."""
_HEAD = ("`model_type`", "images", "trains", "served by", "planned", "proof")


def family_table() -> str:
    """A Markdown table with a row for each `model_type`. The proof is a bound, in nats."""
    lines = [_HEAD, tuple("---" for _ in _HEAD)]
    for model_type in (*FAMILIES, *NAMED_TEXT):
        kind = family_class(model_type)
        parts = ", ".join(part for part in kind.parts if part != "head")
        servers = ", ".join(("native", *kind.servers))
        proof = _bound(model_type) if issubclass(kind, TextOnly) else "tests"
        lines.append((f"`{model_type}`", _images(kind), parts, servers, _is_planned(model_type, kind), proof))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _is_planned(model_type: str, kind: type[Family]) -> str:
    layout = "internvl" if model_type == kind.github_type else model_type  # of one model in two layouts
    try:
        kind.planned(CONFIG_MAPPING[layout]())
    except ConfigError:
        return "no"
    return "yes"


def _images(kind: type[Family]) -> str:
    if kind.bidirectional_images:
        return "fixed size, seen both ways"
    return {"tiles": "`model.max_tiles`", "pixels": "`model.max_pixels`", "": "none"}[kind.unit]


def _bound(model_type: str) -> str:
    """Of transformers' default configuration of that type."""
    found = forest_difference(CONFIG_MAPPING[model_type]())
    return f"{min(bound for bound in (MOST_NATS / 2, MOST_NATS) if found <= bound):.0e}"


if __name__ == "__main__":
    sys.stdout.write(family_table())
