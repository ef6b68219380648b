"""The table of model families. A family's class declares all that differs (`foveate.encoding.family.Family`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.errors import ConfigError
from foveate.registry import resolve

if TYPE_CHECKING:
    from foveate.encoding.family import Family, ServedAs

FAMILIES = {
    "internvl": "foveate.models.families.internvl:InternVL",
    "internvl_chat": "foveate.models.families.internvl:InternVL",
    "qwen2_5_vl": "foveate.models.families.qwen_vl:Qwen25VL",
    "qwen3_vl": "foveate.models.families.qwen_vl:Qwen3VL",
    "qwen3_vl_moe": "foveate.models.families.qwen_vl:Qwen3VLMoe",
    "qwen3_5": "foveate.models.families.qwen_vl:Qwen35",
    "qwen3_5_moe": "foveate.models.families.qwen_vl:Qwen35Moe",
    "qwen2": "foveate.models.families.text:ServedText",
    "qwen3": "foveate.models.families.text:ServedText",
    "qwen3_moe": "foveate.models.families.text:TextOnly",
    "gpt_oss": "foveate.models.families.text:TextOnly",
}
"""By `model_type` of config.json."""


def family_class(model_type: str) -> type[Family]:
    """The class of a family of the table. `model_type` may come from a file, so it is never taken for a path."""
    return resolve(FAMILIES, FAMILIES[model_type], "model family")


def served_as(family: Family, server: str) -> ServedAs:
    """How a server takes a family. Raises ConfigError, with the families that it takes, for one that it does not."""
    if server not in family.servers:
        classes = {name: family_class(name) for name in FAMILIES}
        known = [name for name, kind in classes.items() if server in kind.servers and name != kind.github_type]
        raise ConfigError(f"engine {server}: does not know {family.name}; it serves {', '.join(known)}")
    return family.servers[server]
