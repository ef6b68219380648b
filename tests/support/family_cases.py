"""Tiny random models of the families beside InternVL, as ordinary folders of transformers."""

from __future__ import annotations

import json

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
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
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
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

GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

GLM = {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
VISION_GLM = {**VISION, "patch_size": 14, "image_size": 112}

VISION_SMOL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip

QUICK = ("internvl-chat", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "smolvlm", "gpt_oss")
"""One of each kind, where a test of all families is slow."""
VISION_MODELS = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        {"rope_parameters": MROPE, **TEXT},
        {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {"rope_parameters": MROPE, **TEXT},
        {**VISION, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
    "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration, {**TEXT, **GLM}, VISION_GLM),
    "glm4v_moe": (
        Glm4vMoeConfig,
        Glm4vMoeForConditionalGeneration,
        {
            **TEXT,
            **GLM,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        VISION_GLM,
    ),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, {**TEXT, "model_type": "llama"}, VISION_SMOL),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, {**TEXT, "model_type": "llama"}, VISION_SMOL),
    "gemma3": (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        {**TEXT, **GEMMA},
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vision_use_head": False,
            "image_size": 56,
            "patch_size": 14,
        },
    ),
    "llava_onevision": (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        {**TEXT, "model_type": "qwen2"},
        {**VISION_SMOL, "model_type": "siglip_vision_model", "vision_use_head": False},
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


IMAGE_TOKENS = {
    "qwen": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "glm4v": {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    "smolvlm": {"image_token_id": "<image>", "scale_factor": 2},
    "idefics3": {"image_token_id": "<image>", "scale_factor": 2},
    "llava_onevision": {
        "image_token_index": "<image>",
        "video_token_index": "<video>",
        "image_grid_pinpoints": [[56 * i, 56 * j] for i in (1, 2, 3) for j in (1, 2, 3) if i * j < 7],
        "vision_aspect_ratio": "anyres_max_2",
    },
    "gemma3": {
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "mm_tokens_per_image": 4,
    },
}
"""Settings of configurations that name tokens, or count them."""


PARTED = ("smolvlm", "idefics3")
PARTED_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""A template that knows contents as lists of parts alone, as those of SmolVLM."""
IMAGES_FIRST = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The same as LLaVA-OneVision has it: the images of a message stand before its text."""
TEMPLATES = {"smolvlm": PARTED_TEMPLATE, "idefics3": PARTED_TEMPLATE, "llava_onevision": IMAGES_FIRST}
"""By name, of models whose placeholder of images is the word <image>."""


def plain_inputs(family, prompt, ids):
    """The images of a prompt as transformers' own model takes them beside the token ids (1, L) of a row."""
    kinds = (ids == family.image_token_id).int()
    kinds[:, len(prompt) :] = 0
    return {} if prompt.pixels is None else plain_images(family, prompt.pixels, prompt.slots, kinds)


def plain_images(family, pixels, slots, kinds):
    """Images as transformers' own model takes them, with the `kinds` of tokens: 1 for those of images."""
    if family.name in PARTED:
        return {"pixel_values": pixels[None]}
    if family.image_layouts:  # the images of one sample, of which several are one tile each
        parts = pixels.split([slot.tiles for slot in slots])
        entries = max(map(len, parts))
        stacked = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, entries - len(part))) for part in parts]
        return {
            "pixel_values": torch.stack(stacked),
            "image_sizes": torch.tensor([slot.layout[3:1:-1] for slot in slots]),
            "batch_num_images": torch.tensor([len(parts)] if entries == 1 else [1] * len(parts)),
        }
    if not isinstance(family, QwenVL):
        return {"pixel_values": pixels, **({"token_type_ids": kinds} if family.bidirectional_images else {})}
    return {
        "pixel_values": pixels[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1),
        "image_grid_thw": torch.tensor([[1, slot.grid[0] * 2, slot.grid[1] * 2] for slot in slots]),
        "mm_token_type_ids": kinds,
    }


def plain_text(model_type):
    """A text model without a line in the table."""
    config, text = CONFIG_MAPPING[model_type], {**TEXT, "head_dim": 16}
    if model_type.startswith("qwen3_5"):
        text |= DELTA | (EXPERTS | {"shared_expert_intermediate_size": 40} if "moe" in model_type else {})
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[config], text


def build_family(folder, name, **changes):
    """Write a tiny model by its name in the tables, with weights that tell wrong masks and positions apart. `changes`
    are of the text configuration."""
    tokenizer = tiny_tokenizer(640)
    own = family_class(name).reserved if name in VISION_MODELS else ()
    words = list(dict.fromkeys((*QwenVL.reserved, *own, *(["<image>"] if name in TEMPLATES else []))))
    tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    tokenizer.add_special_tokens({"extra_special_tokens": words}, replace_extra_special_tokens=False)
    ids = tokenizer.get_vocab()
    vocabulary = {"vocab_size": 700, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    if name not in VISION_MODELS:
        assert name in TEXT_MODELS or not family_class(name).image_text, f"VISION_MODELS forgot {name}"
        kind, cls, text = TEXT_MODELS.get(name) or plain_text(name)
        config = kind(**text | vocabulary | changes)
    else:
        kind, cls, text, vision = VISION_MODELS[name]
        words = IMAGE_TOKENS.get(name.removesuffix("_moe"), IMAGE_TOKENS["qwen"])
        config = kind(
            text_config=text | vocabulary | changes,
            vision_config=vision,
            tie_word_embeddings=(text | changes)["tie_word_embeddings"],
            **{key: ids.get(word, word) if isinstance(word, str) else word for key, word in words.items()},
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
            elif key.endswith(("sinks", "bias", "conv1d.weight", "mm_input_projection_weight")):
                parameter.copy_(torch.empty_like(parameter).normal_(std=0.5, generator=generator))
            else:
                parameter.mul_(scale)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if name in PARTED:
        edges = {"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 56}}
        processor = {"image_processor_type": "Idefics3ImageProcessor", "resample": 1, **edges}
        means = {"image_mean": [0.5, 0.45, 0.4], "image_std": [0.5, 0.25, 0.3]}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | means))
    elif name in ("gemma3", "llava_onevision"):
        is_llava = name == "llava_onevision"
        more = {"image_grid_pinpoints": config.image_grid_pinpoints, "resample": 3} if is_llava else {"resample": 2}
        kind = "LlavaOnevisionImageProcessor" if is_llava else "Gemma3ImageProcessor"
        write_squares(folder, config.vision_config.image_size, image_processor_type=kind, **more)
    elif name in VISION_MODELS:
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


def write_squares(folder, side, **more):
    content = {
        **more,
        "size": {"height": side, "width": side},
        "image_mean": [0.5, 0.45, 0.4],
        "image_std": [0.5, 0.25, 0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


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
