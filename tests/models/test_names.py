from __future__ import annotations

import pytest
from checkpoint_cases import CASES

from foveate.errors import DataError
from foveate.models.checkpoint.names import CHECKPOINT_FORMATS, from_hf, to_hf

TABLE = {
    "language_model.model.layers.3.self_attn.q_norm.weight": "model.language_model.layers.3.self_attn.q_norm.weight",
    "language_model.model.norm.weight": "model.language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "mlp1.0.bias": "model.multi_modal_projector.layer_norm.bias",
    "mlp1.1.weight": "model.multi_modal_projector.linear_1.weight",
    "mlp1.3.bias": "model.multi_modal_projector.linear_2.bias",
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.weight": (
        "model.vision_tower.embeddings.patch_embeddings.projection.weight"
    ),
    "vision_model.encoder.layers.11.attn.proj.bias": (
        "model.vision_tower.encoder.layer.11.attention.projection_layer.bias"
    ),
    "vision_model.encoder.layers.44.attn.k_norm.weight": "model.vision_tower.encoder.layer.44.attention.k_norm.weight",
    "vision_model.encoder.layers.0.norm1.weight": "model.vision_tower.encoder.layer.0.layernorm_before.weight",
    "vision_model.encoder.layers.0.norm2.bias": "model.vision_tower.encoder.layer.0.layernorm_after.bias",
    "vision_model.encoder.layers.0.ls1": "model.vision_tower.encoder.layer.0.lambda_1",
    "vision_model.encoder.layers.0.ls2": "model.vision_tower.encoder.layer.0.lambda_2",
    "vision_model.encoder.layers.0.mlp.fc1.weight": "model.vision_tower.encoder.layer.0.mlp.fc1.weight",
}


@pytest.mark.parametrize(("chat", "hf"), TABLE.items())
def test_a_github_name_has_one_hugging_face_name_and_back(chat, hf):
    assert to_hf(chat, "chat") == (hf,)
    assert from_hf(hf, "chat") == (chat, 0, 1)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_fused_qkv_is_query_key_and_value_in_this_order(leaf):
    chat = f"vision_model.encoder.layers.7.attn.qkv.{leaf}"
    parts = tuple(f"model.vision_tower.encoder.layer.7.attention.{x}_proj.{leaf}" for x in "qkv")
    assert to_hf(chat, "chat") == parts
    assert [from_hf(part, "chat") for part in parts] == [(chat, i, 3) for i in range(3)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("vision_tower.encoder.layer.0.lambda_1", "model.vision_tower.encoder.layer.0.lambda_1"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_the_old_layout_differs_in_prefixes_only(old, new):
    assert to_hf(old, "hf-old") == (new,)
    assert from_hf(new, "hf-old") == (old, 0, 1)
    assert to_hf(new, "hf") == (new,)
    assert from_hf(new, "hf") == (new, 0, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["chat", "hf-old", "hf"])
def test_every_official_name_goes_to_a_layout_and_back(case, layout):
    for name in CASES[case]["shapes"]:
        for hf in to_hf(name, "chat"):
            target, part, parts = from_hf(hf, layout)
            assert to_hf(target, layout)[part] == hf
            assert len(to_hf(target, layout)) == parts


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("vision_model.encoder.layers.0.attn.gate.weight", "chat"),
        ("vision_model.encoder.layers.x.ls1", "chat"),
        ("vision_model.head.weight", "chat"),
        ("mlp1.2.weight", "chat"),
        ("mlp1.10.weight", "chat"),
        ("language_model.base_model.model.lora_A.weight", "chat"),
        ("model.vision_tower.encoder.layer.0.lambda_1", "hf-old"),
        ("vision_tower.encoder.layer.0.lambda_1", "hf"),
    ],
)
def test_a_name_that_a_layout_does_not_have_is_refused(name, layout):
    with pytest.raises(DataError) as error:
        to_hf(name, layout)
    assert str(error.value) == f"{name} is not a tensor of InternVL in the {CHECKPOINT_FORMATS[layout]} layout"


@pytest.mark.parametrize("layout", ["chat", "hf-old", "hf"])
@pytest.mark.parametrize("name", ["mlp1.0.weight", "model.vision_model.weight"])
def test_a_name_that_hugging_face_does_not_have_goes_nowhere(name, layout):
    with pytest.raises(DataError, match="Hugging Face layout"):
        from_hf(name, layout)
