"""The configurations of InternVL in the GitHub (chat) and the Hugging Face form, as pure functions on JSON objects.

Either form has keys that the other has no place for. `patched` carries them through a round trip: from the original
file, and from what changed since.

Sources: OpenGVLab/InternVL, `configuration_internvl_chat.py` and `configuration_intern_vit.py` (names and defaults);
transformers, `configuration_internvl.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, InternVLVisionConfig

from foveate.errors import DataError
from foveate.models.flash import FLASH_KEYS, is_flash

Json = dict[str, Any]

TEXT_ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
}
"""`llm_config.architectures` of the chat form, and `text_config.model_type` of the Hugging Face form."""

_INTERNLM2 = "InternLM2ForCausalLM"

TEMPLATES = {"gpt_oss": "internvl3_5_gpt_oss"}
"""The name of the conversation template by language model; every other one has internvl2_5."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_VISION = (
    ("hidden_size", "hidden_size", 3200),
    ("num_hidden_layers", "num_hidden_layers", 48),
    ("num_attention_heads", "num_attention_heads", 25),
    ("intermediate_size", "intermediate_size", 12800),
    ("num_channels", "num_channels", 3),
    ("hidden_act", "hidden_act", "gelu"),
    ("norm_type", "norm_type", "rms_norm"),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("initializer_range", "initializer_range", 0.02),
    ("initializer_factor", "layer_scale_init_value", 0.1),
    ("qkv_bias", "attention_bias", False),
    ("qk_normalization", "use_qk_norm", True),
    ("attention_dropout", "attention_dropout", 0.0),
    ("dropout", "projection_dropout", 0.0),
)
"""Keys of vision_config: chat, Hugging Face, and the chat form's default."""

_QK_NORM_EPS = 1e-6
"""transformers normalises queries and keys with this epsilon, not with layer_norm_eps."""

_CHAT_ONLY_VALUES = {"ps_version": ("v1", "v2"), "pad2square": (False, False)}
"""Chat keys with one value that the Hugging Face form means, too: (the default, that value)."""

_HF_ONLY_VALUES = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
_HF_VISION_ONLY_VALUES = {
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
    "hidden_dropout_prob": 0.0,
}
"""Hugging Face keys with one value that the chat form means, too."""

_NOT_ARCHITECTURE = {"attn_implementation", *GenerationConfig().to_dict()} - {
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
}  # fmt: skip
"""What old transformers wrote into every configuration; generation settings live in generation_config.json."""


def chat_to_hf(config: Mapping[str, Any], image_token_id: int) -> Json:
    """The Hugging Face form of a chat configuration. `image_token_id` is the tokenizer's id of <IMG_CONTEXT>.

    Raises DataError for an unknown language model, and for a value that the Hugging Face form cannot express.
    """
    for key, (default, only) in _CHAT_ONLY_VALUES.items():
        _require(key, config.get(key, default), only, "the Hugging Face form")
    vision, side = _vision_to_hf(config)
    text = _text_to_hf(config)
    ratio = float(config.get("downsample_ratio", 0.5))
    hf = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": ratio,
        "image_seq_length": int((side * ratio) ** 2),
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": vision,
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        **_flash(config),
    }
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {**hf, "torch_dtype": dtype} if dtype else hf


def _flash(config: Mapping[str, Any]) -> Json:
    """The settings of a Flash model, which both forms call the same; none of any other."""
    return {key: config[key] for key in FLASH_KEYS if key in config} if is_flash(config) else {}


def _vision_to_hf(config: Mapping[str, Any]) -> tuple[Json, int]:
    """vision_config, and the number of patches along a side of a tile."""
    chat: Mapping[str, Any] = config.get("vision_config") or {}
    vision: Json = {"model_type": InternVLVisionConfig.model_type}
    vision |= {hf: chat.get(name, default) for name, hf, default in _VISION}
    image, patch = chat.get("image_size", 224), chat.get("patch_size", 14)
    forced = config.get("force_image_size") or image
    _require("force_image_size", forced, image, "the Hugging Face form (vision_config.image_size)")
    if vision["use_qk_norm"]:
        _require("vision_config.layer_norm_eps", vision["layer_norm_eps"], _QK_NORM_EPS, "transformers (qk norm)")
    vision |= {"image_size": [image, image], "patch_size": [patch, patch], **_HF_VISION_ONLY_VALUES}
    return vision, image // patch


def _text_to_hf(config: Mapping[str, Any]) -> Json:
    chat: Mapping[str, Any] = config.get("llm_config") or {}
    architecture = (chat.get("architectures") or [None])[0]
    if architecture not in TEXT_ARCHITECTURES:
        known = ", ".join(TEXT_ARCHITECTURES)
        why = ""
        if "auto_map" in chat:
            why = ", which exists only as code that comes with the checkpoint (foveate never runs such code)"
        if architecture == _INTERNLM2:
            why += (
                "; take the same model in transformers' format, where it is a llama: the folder whose name ends in -hf "
                "(OpenGVLab/InternVL3-9B-hf), or transformers' convert_internvl_weights_to_hf.py"
            )
        raise DataError(f"llm_config.architectures is {architecture}{why}; known are: {known}")
    kept = {key: value for key, value in chat.items() if key not in _NOT_ARCHITECTURE and not key.startswith("_")}
    return {"tie_word_embeddings": False, **kept, "model_type": TEXT_ARCHITECTURES[architecture]}


def hf_to_chat(config: Mapping[str, Any], max_tiles: int) -> Json:
    """The chat form of a Hugging Face configuration. `max_tiles` of one image is in the preprocessor's settings.

    Raises DataError for an unknown language model, and for a value that the chat form cannot express.
    """
    for key, only in _HF_ONLY_VALUES.items():
        _require(key, config.get(key, only), only, "the GitHub form")
    vision = _vision_to_chat(config)
    text = _text_to_chat(config)
    chat = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "dynamic_image_size": max_tiles > 1,
        "force_image_size": vision["image_size"],
        "llm_config": text,
        "max_dynamic_patch": max_tiles,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": config.get("vision_feature_layer", -1),
        "template": TEMPLATES.get(text["model_type"], "internvl2_5"),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
        **_flash(config),
    }
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {**chat, "torch_dtype": dtype} if dtype else chat


def _vision_to_chat(config: Mapping[str, Any]) -> Json:
    hf = {**InternVLVisionConfig().to_dict(), **(config.get("vision_config") or {})}
    for key, only in _HF_VISION_ONLY_VALUES.items():
        _require(f"vision_config.{key}", hf[key], only, "the GitHub form")
    sizes = {}
    for key in ("image_size", "patch_size"):
        value = hf[key]
        height, width = value if isinstance(value, list | tuple) else (value, value)
        _require(f"vision_config.{key}", [height, width], [height, height], "the GitHub form")
        sizes[key] = height
    chat = {name: hf[key] for name, key, _ in _VISION}
    return {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **chat, **sizes}


def _text_to_chat(config: Mapping[str, Any]) -> Json:
    hf = config.get("text_config") or {}
    kind = hf.get("model_type")
    architectures = {model_type: name for name, model_type in TEXT_ARCHITECTURES.items()}
    if kind not in architectures:
        raise DataError(f"text_config.model_type is {kind!r}; known are: {', '.join(architectures)}")
    text = {**hf, "architectures": [architectures[kind]], "tie_word_embeddings": tied(config)}
    # The code of the GitHub form runs on transformers 4, which reads these two instead of rope_parameters and dtype.
    if rope := hf.get("rope_parameters"):
        rest = {key: value for key, value in rope.items() if key != "rope_theta"}
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = None if rest.get("rope_type", "default") == "default" else rest
    if dtype := hf.get("dtype"):
        text["torch_dtype"] = dtype
    return text


def tied(config: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face configuration ties the head to the embedding. Where the outer one says nothing the text
    model's counts; transformers 5 would assume True then, which no InternVL3.5 is."""
    return bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)))


def with_tied(config: Mapping[str, Any], is_tied: bool) -> Json:
    """A configuration, of any layout, that says in the whole and in its text model whether the embeddings are tied:
    programs differ in which of the two they read, and in what they assume where it is silent."""
    texts = {key: config[key] for key in ("text_config", "llm_config") if config.get(key)}
    parts = {key: {**text, "tie_word_embeddings": is_tied} for key, text in texts.items()}
    return {**config, **parts, "tie_word_embeddings": is_tied}


def with_dtype(config: Mapping[str, Any], dtype: str) -> Json:
    """A configuration of weights in another dtype ("bfloat16"), wherever it or a part of it names one."""
    parts = {key: with_dtype(value, dtype) for key, value in config.items() if key.endswith("_config") and value}
    named = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return {**config, **parts, **(named or ({} if "hidden_size" in config else {"torch_dtype": dtype}))}


def hf_preprocessor(config: Mapping[str, Any]) -> Json:
    """`preprocessor_config.json` of the Hugging Face form for a chat configuration: square tiles, bicubic, ImageNet.

    Raises DataError for tiles without a thumbnail, which transformers' processor cannot be told.
    """
    dynamic = bool(config.get("dynamic_image_size", False))
    if dynamic:
        _require("use_thumbnail", config.get("use_thumbnail", False), True, "the Hugging Face form")
    vision = config.get("vision_config") or {}
    tile = config.get("force_image_size") or vision.get("image_size", 224)
    least, most = (config.get("min_dynamic_patch", 1), config.get("max_dynamic_patch", 6)) if dynamic else (1, 1)
    if not isinstance(least, int) or not isinstance(most, int) or not 1 <= least <= most:
        raise DataError(
            f"min_dynamic_patch is {least!r} and max_dynamic_patch {most!r}; they must be whole numbers above 0, the "
            "smaller one first"
        )
    return tile_preprocessor(tile, most, least)


def tile_preprocessor(tile: int, max_tiles: int, min_tiles: int = 1) -> Json:
    """`preprocessor_config.json` of transformers' processor for tiles of `tile` pixels: the official preprocessing."""
    return {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": list(IMAGENET_STD),
        "max_patches": max_tiles,
        "min_patches": min_tiles,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": tile, "width": tile},
    }


def chat_preprocessor(tile: int) -> Json:
    """`preprocessor_config.json` of the chat form: one tile. (Its code tiles by config.json.)"""
    return {
        "crop_size": tile,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "size": tile,
    }


def patched(original: Mapping[str, Any], unchanged: Mapping[str, Any], now: Mapping[str, Any]) -> Json:
    """`original` with the keys that differ between `unchanged` (what its round trip gives) and `now`.

    So a configuration that went into the other form and back keeps every key that the other form does not have, and
    takes over every change made there.
    """
    result = copy.deepcopy(dict(original))
    for key in unchanged:
        if key not in now:
            result.pop(key, None)
    for key, value in now.items():
        before = unchanged.get(key)
        if key in unchanged and before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict) and isinstance(result.get(key), dict):
            result[key] = patched(result[key], before, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _require(key: str, found: Any, only: Any, form: str) -> None:
    if found != only:
        raise DataError(f"{key} is {found!r}; {form} knows only {only!r}")
