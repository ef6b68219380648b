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

from torch import Tensor

from foveate.errors import DataError

CheckpointFormat = Literal["chat", "hf-old", "hf"]

CHECKPOINT_FORMATS: dict[CheckpointFormat, str] = {
    "chat": "GitHub (internvl_chat)",
    "hf": "Hugging Face",
    "hf-old": "Hugging Face, old layout",
}
"""The layouts, and what they are called in sentences."""

_HF_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Beginnings of names: hf-old, hf. The first two are those of the chat layout, too."""

_CHAT_MODULES = (
    ("mlp1.0", "model.multi_modal_projector.layer_norm"),
    ("mlp1.1", "model.multi_modal_projector.linear_1"),
    ("mlp1.3", "model.multi_modal_projector.linear_2"),
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
)
"""Modules and parameters outside of the vision layers: chat, hf."""

_CHAT_LAYER, _HF_LAYER = "vision_model.encoder.layers.", "model.vision_tower.encoder.layer."
_LAYER_MODULES = (
    ("attn.proj", "attention.projection_layer"),
    ("attn.q_norm", "attention.q_norm"),
    ("attn.k_norm", "attention.k_norm"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
"""Modules and parameters of one vision layer: chat, hf. The fused `attn.qkv` is not among them."""

_QKV = "attn.qkv"
_THIRDS = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
"""The rows of the fused projection, in this order."""


def to_hf(name: str, layout: CheckpointFormat) -> tuple[str, ...]:
    """The hf names of a tensor of another layout: one, or three where the tensor is fused along its first axis.

    Raises DataError for a name that the layout does not have.
    """
    names = {"chat": _chat_to_hf, "hf-old": _old_to_hf, "hf": _known_hf}[layout](name)
    if not names:
        raise DataError(f"{name} is not a tensor of InternVL in the {CHECKPOINT_FORMATS[layout]} layout")
    return names


def from_hf(name: str, layout: CheckpointFormat) -> tuple[str, int, int]:
    """The name in another layout of the tensor called `name` in hf, which part of that tensor it is, and of how many.

    The parts follow each other along the first axis: (".. attn.qkv.weight", 1, 3) is the middle third.
    Raises DataError for a name that hf does not have.
    """
    found = {"chat": _hf_to_chat, "hf-old": _hf_to_old, "hf": _same}[layout](name)
    if found is None:
        raise DataError(f"{name} is not a tensor of InternVL in the {CHECKPOINT_FORMATS['hf']} layout")
    return found


def split_parts(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The parts of a fused tensor (parts * R, ...): views of shape (R, ...)."""
    return tensor.tensor_split(parts) if parts > 1 else (tensor,)


def _chat_to_hf(name: str) -> tuple[str, ...]:
    for chat, hf in _HF_PREFIXES[:2]:
        if name.startswith(chat):
            return (hf + name.removeprefix(chat),)
    if match := re.fullmatch(re.escape(_CHAT_LAYER) + r"(\d+)\.(.+)", name):
        number, rest = match.groups()
        if rest.startswith(_QKV + "."):
            return tuple(f"{_HF_LAYER}{number}.{third}{rest.removeprefix(_QKV)}" for third in _THIRDS)
        found = _renamed(rest, _LAYER_MODULES)
        return (f"{_HF_LAYER}{number}.{found}",) if found else ()
    found = _renamed(name, _CHAT_MODULES)
    return (found,) if found else ()


def _hf_to_chat(name: str) -> tuple[str, int, int] | None:
    for chat, hf in _HF_PREFIXES[:2]:
        if name.startswith(hf):
            return chat + name.removeprefix(hf), 0, 1
    if match := re.fullmatch(re.escape(_HF_LAYER) + r"(\d+)\.(.+)", name):
        number, rest = match.groups()
        for part, third in enumerate(_THIRDS):
            if rest.startswith(third + "."):
                return f"{_CHAT_LAYER}{number}.{_QKV}{rest.removeprefix(third)}", part, len(_THIRDS)
        found = _renamed(rest, [(hf, chat) for chat, hf in _LAYER_MODULES])
        return (f"{_CHAT_LAYER}{number}.{found}", 0, 1) if found else None
    found = _renamed(name, [(hf, chat) for chat, hf in _CHAT_MODULES])
    return (found, 0, 1) if found else None


def _old_to_hf(name: str) -> tuple[str, ...]:
    return tuple(hf + name.removeprefix(old) for old, hf in _HF_PREFIXES if name.startswith(old))


def _hf_to_old(name: str) -> tuple[str, int, int] | None:
    return next(((old + name.removeprefix(hf), 0, 1) for old, hf in _HF_PREFIXES if name.startswith(hf)), None)


def _known_hf(name: str) -> tuple[str, ...]:
    return (name,) if any(name.startswith(hf) for _, hf in _HF_PREFIXES) else ()


def _same(name: str) -> tuple[str, int, int] | None:
    return (name, 0, 1) if _known_hf(name) else None


def _renamed(name: str, modules: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str | None:
    """`name` with the module at its beginning renamed; a parameter is a module of one tensor."""
    for old, new in modules:
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return None
