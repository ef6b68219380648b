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
    "qwen2_vl": "foveate.models.families.qwen_vl:Qwen2VL",
    "qwen2_5_vl": "foveate.models.families.qwen_vl:Qwen25VL",
    "qwen3_vl": "foveate.models.families.qwen_vl:Qwen3VL",
    "qwen3_vl_moe": "foveate.models.families.qwen_vl:Qwen3VLMoe",
    "qwen3_5": "foveate.models.families.qwen_vl:Qwen35",
    "qwen3_5_moe": "foveate.models.families.qwen_vl:Qwen35Moe",
    "glm4v": "foveate.models.families.glm_vl:Glm4V",
    "glm4v_moe": "foveate.models.families.glm_vl:Glm4VMoe",
    "smolvlm": "foveate.models.families.smolvlm:SmolVLM",
    "idefics3": "foveate.models.families.smolvlm:SmolVLM",
    "gemma3": "foveate.models.families.gemma3:Gemma3",
    "llava_onevision": "foveate.models.families.llava:LlavaOneVision",
    "qwen2": "foveate.models.families.text:ServedText",
    "qwen3": "foveate.models.families.text:ServedText",
    "llama": "foveate.models.families.text:ServedText",
    "qwen3_moe": "foveate.models.families.text:ServedMixture",
    "qwen3_5_text": "foveate.models.families.text:Qwen35Text",
    "qwen3_5_moe_text": "foveate.models.families.text:Qwen35Text",
    "gpt_oss": "foveate.models.families.text:TextOnly",
}
"""By `model_type` of config.json."""
_ANY_TEXT = "foveate.models.families.text:TextOnly"


def family_class(model_type: str) -> type[Family]:
    """The class of a family of the table, or of any causal text model of transformers. `model_type` may come from a
    file, so it is never taken for a path. Raises KeyError for one that is not known."""
    known = _ANY_TEXT if model_type not in FAMILIES and _is_causal_text(model_type) else FAMILIES[model_type]
    return resolve(FAMILIES, known, "model family")


def is_known(model_type: object) -> bool:
    """Whether there is a class for a `model_type`. Of text models, only their proof says whether they are trained."""
    return isinstance(model_type, str) and (model_type in FAMILIES or _is_causal_text(model_type))


def _is_causal_text(model_type: str) -> bool:
    """Whether transformers has a causal language model of that type that is no part of a model with images."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not CONFIG_MAPPING[model_type].sub_configs


def served_as(family: Family, server: str) -> ServedAs:
    """How a server takes a family. Raises ConfigError, with the families that it takes, for one that it does not."""
    if server not in family.servers:
        classes = {name: family_class(name) for name in FAMILIES}
        known = [name for name, kind in classes.items() if server in kind.servers and name != kind.github_type]
        raise ConfigError(f"engine {server}: does not know {family.name}; it serves {', '.join(known)}")
    return family.servers[server]
