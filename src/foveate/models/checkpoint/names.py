"""The names of InternVL's tensors in the three layouts that checkpoints come in, as pure functions.

`chat` is the GitHub format (`internvl_chat`): `vision_model.*` with fused query, key and value, `mlp1.*`,
`language_model.*`. `hf` is the layout of transformers 5, `hf-old` that of the released -HF checkpoints; they differ in
prefixes only. The `hf` name is the pivot: `to_hf` and `from_hf` lead from and to every layout.

The pairs of names are those of OpenGVLab/InternVL's `internvl_custom2hf.py` and of transformers'
`convert_internvl_weights_to_hf.py`.
"""

from __future__ import annotations

import re
from typing import Literal

from foveate.errors import DataError

CheckpointFormat = Literal["chat", "hf-old", "hf"]

CHECKPOINT_FORMATS: dict[CheckpointFormat, str] = {
    "chat": "GitHub (internvl_chat)",
    "hf": "Hugging Face",
    "hf-old": "Hugging Face, old layout",
}
"""The layouts, and what they are called in sentences."""

_SHARED = (
    ("language_model.lm_head", "lm_head"),
    ("language_model.model", "model.language_model"),
)
"""Modules that the chat and the hf-old layout call the same: there, in hf."""

_FLASH = (
    ("mlp2", "model.mlp2"),
    ("pooling_before_gating", "model.pooling_before_gating"),
    ("gating", "model.gating"),
)
"""Modules of Flash models, which no released folder has in a Hugging Face layout: in chat, and in the others."""

_OLD = (
    *_SHARED,
    *((hf, hf) for _, hf in _FLASH),
    ("vision_tower", "model.vision_tower"),
    ("multi_modal_projector", "model.multi_modal_projector"),
)

_CHAT_LAYER, _HF_LAYER = "vision_model.encoder.layers.#.", "model.vision_tower.encoder.layer.#."
_CHAT = (
    *_SHARED,
    *_FLASH,
    ("mlp1.0", "model.multi_modal_projector.layer_norm"),
    ("mlp1.1", "model.multi_modal_projector.linear_1"),
    ("mlp1.3", "model.multi_modal_projector.linear_2"),
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (f"{_CHAT_LAYER}attn.qkv", f"{_HF_LAYER}attention.q_proj"),
    (f"{_CHAT_LAYER}attn.qkv", f"{_HF_LAYER}attention.k_proj"),
    (f"{_CHAT_LAYER}attn.qkv", f"{_HF_LAYER}attention.v_proj"),
    (f"{_CHAT_LAYER}attn.proj", f"{_HF_LAYER}attention.projection_layer"),
    (f"{_CHAT_LAYER}attn.q_norm", f"{_HF_LAYER}attention.q_norm"),
    (f"{_CHAT_LAYER}attn.k_norm", f"{_HF_LAYER}attention.k_norm"),
    (f"{_CHAT_LAYER}norm1", f"{_HF_LAYER}layernorm_before"),
    (f"{_CHAT_LAYER}norm2", f"{_HF_LAYER}layernorm_after"),
    (f"{_CHAT_LAYER}ls1", f"{_HF_LAYER}lambda_1"),
    (f"{_CHAT_LAYER}ls2", f"{_HF_LAYER}lambda_2"),
    (f"{_CHAT_LAYER}mlp.fc1", f"{_HF_LAYER}mlp.fc1"),
    (f"{_CHAT_LAYER}mlp.fc2", f"{_HF_LAYER}mlp.fc2"),
)
_MODULES: dict[CheckpointFormat, tuple[tuple[str, str], ...]] = {
    "chat": _CHAT,
    "hf-old": _OLD,
    "hf": tuple((hf, hf) for _, hf in _OLD),
}
"""Modules and parameters: in the layout, in hf. `#` is the number of a vision layer. Several with one name in the
layout are fused there, in this order along the first axis."""

_VISION_LAYER = re.compile(r"(?<=\.encoder\.layers\.)\d+|(?<=\.encoder\.layer\.)\d+")


def to_hf(name: str, layout: CheckpointFormat) -> tuple[str, ...]:
    """The hf names of a tensor of another layout: one, or three where the tensor is fused along its first axis.

    Raises DataError for a name that the layout does not have.
    """
    names = tuple(_renamed(name, own, hf) for own, hf in _MODULES[layout] if _is_in(name, own))
    if not names:
        raise DataError(f"{name} is not a tensor of InternVL in the {CHECKPOINT_FORMATS[layout]} layout")
    return names


def from_hf(name: str, layout: CheckpointFormat) -> tuple[str, int, int]:
    """The name in another layout of the tensor called `name` in hf, which part of that tensor it is, and of how many.

    The parts follow each other along the first axis: (".. attn.qkv.weight", 1, 3) is the middle third.
    Raises DataError for a name that hf does not have.
    """
    for own, hf in _MODULES[layout]:
        if _is_in(name, hf):
            parts = [part for other, part in _MODULES[layout] if other == own]
            return _renamed(name, hf, own), parts.index(hf), len(parts)
    raise DataError(f"{name} is not a tensor of InternVL in the {CHECKPOINT_FORMATS['hf']} layout")


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module; a parameter is a module of one tensor."""
    return f"{_VISION_LAYER.sub('#', name)}.".startswith(f"{module}.")


def _renamed(name: str, module: str, to: str) -> str:
    """The name of a tensor of `module` with that module renamed."""
    number = _VISION_LAYER.search(name)
    renamed = to + _VISION_LAYER.sub("#", name).removeprefix(module)
    return renamed.replace("#", number[0]) if number else renamed
