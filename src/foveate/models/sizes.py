"""Sizes that configurations say, and published models as configurations, those of InternVL3.5 first.

Dimensions: InternVL3.5 (arXiv 2508.18265), table 1, and the configurations of Qwen3, GPT-OSS and InternViT. Every size
has untied embeddings, unlike the small Qwen3 models that they were made from.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from foveate.models.flash import internvl_class, mark_as_flash

_VISION_300M = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm",
}  # fmt: skip
_VISION_6B = {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
    "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm",
}  # fmt: skip

RECURRENT = "linear_attention"
"""How configurations call a layer with a state in place of keys and values."""
IMAGE_TOKEN_ID = 151671
"""<IMG_CONTEXT> of the Qwen3 models of InternVL3.5; GPT-OSS has another vocabulary, and its own id."""


def _qwen3(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ffn, **_QWEN3,
    }  # fmt: skip


def _qwen3_moe(hidden: int, layers: int, heads: int, ffn: int, expert_ffn: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": ffn, "moe_intermediate_size": expert_ffn,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, **_QWEN3,
    }  # fmt: skip


_QWEN3 = {
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643,
}  # fmt: skip
_GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
    "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128, "tie_word_embeddings": False,
}  # fmt: skip

PUBLISHED_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1B": (_VISION_300M, _qwen3(1024, 28, 16, 3072)),
    "2B": (_VISION_300M, _qwen3(2048, 28, 16, 6144)),
    "4B": (_VISION_300M, _qwen3(2560, 36, 32, 9728)),
    "8B": (_VISION_300M, _qwen3(4096, 36, 32, 12288)),
    "14B": (_VISION_300M, _qwen3(5120, 40, 40, 17408)),
    "38B": (_VISION_6B, _qwen3(5120, 64, 64, 25600)),
    "20B-A4B": (_VISION_300M, _GPT_OSS_20B),
    "30B-A3B": (_VISION_300M, _qwen3_moe(2048, 48, 32, 6144, 768)),
    "241B-A28B": (_VISION_6B, _qwen3_moe(4096, 94, 64, 12288, 1536)),
}
"""By the name after `InternVL3_5-`: vision_config and text_config."""


_QWEN25_VISION = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def _qwen25_vl(
    hidden: int, layers: int, heads: int, groups: int, ffn: int, words: int, *, tied: bool
) -> dict[str, Any]:
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "intermediate_size": ffn, "vocab_size": words, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {**_QWEN25_VISION, "out_hidden_size": hidden}
    return {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, "text_config": text, "vision_config": vision}


_QWEN25_VL_7B = _qwen25_vl(3584, 28, 28, 4, 18944, 152064, tied=False)
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": _qwen25_vl(2048, 36, 16, 2, 11008, 151936, tied=True),
    "Qwen2.5-VL-7B": _QWEN25_VL_7B,
    "OpenMMReasoner": _QWEN25_VL_7B,
    "Qwen3-VL-8B": {
        "model_type": "qwen3_vl", "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "out_hidden_size": 4096,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}  # fmt: skip
"""Configurations of other published models, by how their names begin: Qwen2.5-VL (arXiv 2502.13923, table 1), and
Qwen3-VL (arXiv 2511.21631)."""


def published_config(size: str, *, flash: bool = False) -> InternVLConfig:
    """The configuration of a published size, a key of `PUBLISHED_SIZES`; `flash`: of the Flash model that is made of
    it, with the thresholds of a new router."""
    vision, text = PUBLISHED_SIZES[size]
    config = InternVLConfig(
        vision_config=dict(vision), text_config=dict(text), image_token_id=IMAGE_TOKEN_ID, tie_word_embeddings=False
    )
    if flash:
        mark_as_flash(config)
    return config


def meta_model(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """The modules of a model with shapes but no memory, on the meta device."""
    with torch.device("meta"):
        return internvl_class(config)(config)


def head_width(text: Any) -> int:
    """Numbers of a head of attention; some configurations leave it to be divided out."""
    return text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads


def recurrent_layers(text: Any) -> int:
    """How many layers of a language model hold a state in place of keys and values."""
    return (text.to_dict().get("layer_types") or []).count(RECURRENT)


def key_value_numbers(text: Any) -> int:
    """Numbers that a token has as keys and values in all layers of a language model."""
    layers = text.num_hidden_layers - recurrent_layers(text)
    return 2 * layers * text.num_key_value_heads * head_width(text)


def state_numbers(text: Any) -> int:
    """Numbers, of float32, that a sequence of any length has as states of recurrent layers and their convolutions."""
    layers = recurrent_layers(text)
    if not layers:
        return 0
    keys, values = text.linear_num_key_heads * text.linear_key_head_dim, text.linear_num_value_heads
    channels = 2 * keys + values * text.linear_value_head_dim
    state = values * text.linear_key_head_dim * text.linear_value_head_dim
    return layers * (state + (text.linear_conv_kernel_dim - 1) * channels)
