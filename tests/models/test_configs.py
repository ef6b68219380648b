from __future__ import annotations

import copy

import pytest
import torch
from checkpoint_cases import CASES
from transformers import InternVLConfig

from foveate.errors import DataError
from foveate.models.checkpoint.configs import (
    chat_preprocessor,
    chat_to_hf,
    hf_preprocessor,
    hf_to_chat,
    patched,
    tied,
    tile_preprocessor,
    with_dtype,
)
from foveate.models.sizes import PUBLISHED_SIZES, published_config
from foveate.plan.memory import parameter_counts
from foveate.plan.trace import traced_policy

VIT_300M, VIT_6B = 304_012_288, 5_536_496_000
EXACT = {  # parameters of the vision tower and of the language model
    "1B": (VIT_300M, 751_632_384),
    "2B": (VIT_300M, 2_031_739_904),
    "4B": (VIT_300M, 4_411_424_256),
    "8B": (VIT_300M, 8_190_735_360),
    "14B": (VIT_300M, 14_768_307_200),
    "38B": (VIT_6B, 32_762_123_264),
    "20B-A4B": (VIT_300M, 20_914_757_184),
    "30B-A3B": (VIT_300M, 30_532_122_624),
    "241B-A28B": (VIT_6B, 235_093_634_560),
}


@pytest.fixture(params=CASES)
def chat(request):
    return copy.deepcopy(CASES[request.param]["config"])


@pytest.fixture
def qwen3():
    return copy.deepcopy(CASES["300M-qwen3"]["config"])


def counts_of(config):
    return parameter_counts(traced_policy(config, torch.float32, "auto"))


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_a_published_size_has_its_published_number_of_parameters(size):
    config = published_config(size)
    counts = counts_of(config)
    assert (counts["vision"], counts["language"]) == EXACT[size]
    shuffled, width = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
    assert counts["projector"] == 2 * shuffled + (shuffled + 1) * width + (width + 1) * width


def test_every_published_size_is_known():
    assert EXACT.keys() == PUBLISHED_SIZES.keys()
    assert sum(counts_of(published_config("1B")).values()) == 1_060_897_792


def test_the_hugging_face_form_says_the_same_as_the_github_form(chat):
    hf = InternVLConfig.from_dict(chat_to_hf(copy.deepcopy(chat), 433))
    vision, text = chat["vision_config"], chat["llm_config"]
    assert hf.image_token_id == 433
    assert hf.image_seq_length == 4
    assert hf.tie_word_embeddings is False
    assert hf.text_config.tie_word_embeddings is False
    assert hf.vision_feature_layer == -1
    assert hf.dtype == torch.float32
    assert hf.vision_config.attention_bias == vision["qkv_bias"]
    assert hf.vision_config.use_qk_norm == vision["qk_normalization"]
    assert hf.vision_config.norm_type == vision["norm_type"]
    assert hf.vision_config.layer_scale_init_value == vision["initializer_factor"]
    assert list(hf.vision_config.image_size) == [56, 56]
    assert hf.text_config.model_type == text["model_type"]
    assert hf.text_config.rope_parameters["rope_theta"] == text["rope_theta"]
    assert (
        hf.text_config.rope_parameters["rope_type"] == (text["rope_scaling"] or {"rope_type": "default"})["rope_type"]
    )
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "eos_token_id",
    ):
        assert getattr(hf.text_config, key) == text[key], key


@pytest.mark.parametrize("key", ["head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_what_the_experts_need_arrives(key):
    chat = CASES["6B-qwen3_moe"]["config"]
    assert getattr(InternVLConfig.from_dict(chat_to_hf(chat, 433)).text_config, key) == chat["llm_config"][key]


def test_sinks_and_sliding_windows_of_gpt_oss_arrive():
    chat = CASES["6B-gpt_oss"]["config"]
    text = InternVLConfig.from_dict(chat_to_hf(chat, 433)).text_config
    assert text.layer_types == ["sliding_attention", "full_attention"]
    assert text.sliding_window == 4
    assert text.rope_parameters["original_max_position_embeddings"] == 4096


def test_generation_settings_and_attention_kernels_do_not_enter_the_language_model(qwen3):
    text = chat_to_hf(qwen3, 433)["text_config"]
    assert qwen3["llm_config"].keys() - text.keys() == {
        "attn_implementation",
        "num_beams",
        "temperature",
        "_name_or_path",
    }


def test_a_round_trip_through_hugging_face_gives_the_same_github_form(chat):
    before = chat_to_hf(copy.deepcopy(chat), 433)
    assert patched(chat, hf_to_chat(before, 12), hf_to_chat(copy.deepcopy(before), 12)) == chat


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_a_round_trip_through_github_means_the_same_model(size):
    hf = published_config(size)
    again = InternVLConfig.from_dict(chat_to_hf(hf_to_chat(hf.to_dict(), 12), hf.image_token_id))
    for part in ("vision_config", "text_config"):
        old, new = getattr(hf, part).to_dict(), getattr(again, part).to_dict()
        ignored = {"architectures", "dtype", "_name_or_path", "transformers_version"}
        assert {k: v for k, v in old.items() if k not in ignored} == {k: v for k, v in new.items() if k not in ignored}
    assert again.image_seq_length == hf.image_seq_length
    assert again.tie_word_embeddings is False


def test_transformers_4_finds_rope_and_dtype_where_it_looks_for_them():
    text = {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "dtype": "bfloat16"}
    llm = hf_to_chat({"text_config": text, "vision_config": {}}, 12)["llm_config"]
    assert llm["rope_theta"] == 5e6
    assert llm["rope_scaling"] is None
    assert llm["torch_dtype"] == "bfloat16"
    text["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6}
    assert hf_to_chat({"text_config": text}, 12)["llm_config"]["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(("language", "template"), [("qwen3", "internvl2_5"), ("gpt_oss", "internvl3_5_gpt_oss")])
def test_the_conversation_template_is_that_of_the_language_model(language, template):
    assert hf_to_chat({"text_config": {"model_type": language}}, 12)["template"] == template


@pytest.mark.parametrize(
    ("outer", "inner", "wanted"),
    [({}, {}, False), ({}, {"tie_word_embeddings": True}, True), ({"tie_word_embeddings": False}, {}, False),
     ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True)],
)  # fmt: skip
def test_embeddings_are_tied_only_where_a_configuration_says_so(outer, inner, wanted):
    config = {**outer, "text_config": {"model_type": "qwen3", **inner}}
    assert tied(config) == wanted
    chat = hf_to_chat(config, 12)
    assert chat["tie_word_embeddings"] == chat["llm_config"]["tie_word_embeddings"] == wanted
    assert chat_to_hf(chat, 1)["tie_word_embeddings"] == wanted


def test_a_change_made_in_the_other_form_is_taken_over_and_the_rest_stays():
    original = {"a": 1, "only_here": [1], "part": {"b": 2, "only_here": 3}, "gone": 4}
    before = {"a": 1, "part": {"b": 2}, "gone": 4}
    now = {"a": 5, "part": {"b": 6, "c": 7}}
    assert patched(original, before, now) == {"a": 5, "only_here": [1], "part": {"b": 6, "only_here": 3, "c": 7}}
    assert original["part"] == {"b": 2, "only_here": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'; the Hugging Face form knows only 'v2'"),
        ({"pad2square": True}, "pad2square is True; the Hugging Face form knows only False"),
        ({"force_image_size": 112}, "force_image_size is 112; the Hugging Face form .* knows only 56"),
        (
            {"llm_config": {"architectures": ["LlamaForCausalLM"]}},
            "is LlamaForCausalLM; known are: Qwen2For",
        ),
        ({"llm_config": {}}, "llm_config.architectures is None; known are"),
        (
            {"llm_config": {"architectures": ["InternLM2ForCausalLM"], "auto_map": {}}},
            "InternLM2ForCausalLM, which exists only as code that comes with the checkpoint",
        ),
    ],
)
def test_a_github_form_that_hugging_face_cannot_express_is_refused(changes, message, qwen3):
    with pytest.raises(DataError, match=message):
        chat_to_hf(qwen3 | changes, 433)


def test_an_epsilon_that_transformers_would_ignore_is_refused():
    chat = copy.deepcopy(CASES["6B-qwen3"]["config"])
    chat["vision_config"]["layer_norm_eps"] = 1e-5
    with pytest.raises(DataError, match=r"layer_norm_eps is 1e-05; transformers \(qk norm\) knows only 1e-06"):
        chat_to_hf(chat, 433)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; the GitHub form knows only 'gelu'"),
        ({"vision_config": {"use_mean_pooling": False}}, "vision_config.use_mean_pooling is False"),
        ({"vision_config": {"image_size": [448, 224]}}, r"image_size is \[448, 224\]; the GitHub form knows only"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'; known are: qwen2, qwen3"),
    ],
)
def test_a_hugging_face_form_that_github_cannot_express_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        hf_to_chat({"text_config": {"model_type": "qwen3"}, **changes}, 12)


def test_the_tile_settings_follow_the_github_form(qwen3):
    assert hf_preprocessor(qwen3) == tile_preprocessor(56, 12)
    assert hf_preprocessor(qwen3 | {"max_dynamic_patch": 6, "min_dynamic_patch": 2}) == tile_preprocessor(56, 6, 2)
    assert hf_preprocessor(qwen3 | {"dynamic_image_size": False})["max_patches"] == 1
    with pytest.raises(DataError, match="use_thumbnail is False"):
        hf_preprocessor(qwen3 | {"use_thumbnail": False})
    assert hf_to_chat({"text_config": {"model_type": "qwen3"}}, 1)["dynamic_image_size"] is False
    assert chat_preprocessor(448)["crop_size"] == 448


def test_another_dtype_is_written_wherever_one_is_named():
    config = {"torch_dtype": "bfloat16", "text_config": {"hidden_size": 1, "dtype": "bfloat16"}, "x": 1}
    changed = {"torch_dtype": "float32", "text_config": {"hidden_size": 1, "dtype": "float32"}, "x": 1}
    assert with_dtype(config, "float32") == changed
    assert with_dtype({"text_config": {"hidden_size": 1}}, "float32")["torch_dtype"] == "float32"
