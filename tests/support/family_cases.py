"""Tiny random models of the families beside InternVL, as ordinary folders of transformers."""

from __future__ import annotations

import json

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GptOssConfig,
    GptOssForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from foveate.models.checkpoint.small_files import quiet_transformers
from foveate.models.families import family_class
from foveate.models.families.qwen_vl import QwenVL
from foveate.models.tiny import build_tiny, tiny_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION_3 = {**VISION, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
TEXT_3 = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
DELTA = {
    **TEXT_3,
    "num_hidden_layers": 4,
    "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
}
"""Qwen3.5: recurrent layers, one of them first, and gated attention whose heads are rotated in part."""
VISION_35 = {key: value for key, value in VISION_3.items() if key != "deepstack_visual_indexes"}
WINDOW = 12
"""The sliding window of the models that have one, shorter than prompts and answers of the tests."""

VISION_MODELS = {
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {"rope_parameters": MROPE, **TEXT},
        {**VISION, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, TEXT_3, VISION_3),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, {**TEXT_3, **EXPERTS}, VISION_3),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, DELTA, VISION_35),
    "qwen3_5_moe": (
        Qwen3_5MoeConfig,
        Qwen3_5MoeForConditionalGeneration,
        {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 40},
        VISION_35,
    ),
}
"""Configuration, class, text_config and vision_config by name."""

TEXT_MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, TEXT),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {**TEXT, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**TEXT, "head_dim": 16}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**TEXT, "head_dim": 16, **EXPERTS}),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {**TEXT, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
}


def plain_text(model_type):
    """A text model without a line in the table."""
    config = CONFIG_MAPPING[model_type]
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[config], {**TEXT, "head_dim": 16}


def build_family(folder, name, **changes):
    """Write a tiny model by its name in the tables, with weights that tell wrong masks and positions apart. `changes`
    are of the text configuration."""
    tokenizer = tiny_tokenizer(640)
    tokenizer.add_special_tokens({"extra_special_tokens": list(QwenVL.reserved)}, replace_extra_special_tokens=False)
    ids = tokenizer.get_vocab()
    vocabulary = {"vocab_size": 700, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    if name not in VISION_MODELS:
        assert name in TEXT_MODELS or not family_class(name).image_text, f"VISION_MODELS forgot {name}"
        kind, cls, text = TEXT_MODELS.get(name) or plain_text(name)
        config = kind(**text | vocabulary | changes)
    else:
        kind, cls, text, vision = VISION_MODELS[name]
        config = kind(
            text_config=text | vocabulary | changes,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=(text | changes)["tie_word_embeddings"],
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = cls(config).float()
    generator = torch.Generator().manual_seed(1)
    scale = 4 * (TEXT["hidden_size"] / config.get_text_config().hidden_size) ** 0.5
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.copy_(torch.empty_like(parameter).uniform_(0.7, 1.6, generator=generator))
            elif key.endswith("A_log"):  # a state that is not forgotten at once
                parameter.copy_(torch.empty_like(parameter).uniform_(-5, -1, generator=generator))
            elif key.endswith(("sinks", "bias", "conv1d.weight")):
                parameter.copy_(torch.empty_like(parameter).normal_(std=0.5, generator=generator))
            else:
                parameter.mul_(scale)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if name in VISION_MODELS:
        write_processor(folder, config.vision_config.patch_size)
    return folder


def build_internvl(folder, size, *, text, vision):
    """Write a tiny InternVL with these changes of its text and vision configurations; biases are not zero."""
    build_tiny(folder, size, padded_vocabulary=700)
    content = InternVLConfig.from_pretrained(folder).to_dict()
    content["text_config"] |= text
    content["vision_config"] |= vision
    content["tie_word_embeddings"] = content["text_config"]["tie_word_embeddings"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(InternVLConfig.from_dict(content)).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def write_processor(folder, patch, shortest_edge=3136, longest_edge=100_000):
    content = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.45, 0.4],
        "image_std": [0.5, 0.25, 0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
