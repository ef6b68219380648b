"""Flash models against the modelling code that is released beside their checkpoints, which foveate itself never runs.

FOVEATE_FLASH names a folder with its files: modeling_internvl_chat.py of an InternVL3_5-*-Flash, and those beside it.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import types

import numpy as np
import PIL.Image
import pytest
import torch

from foveate.encoding.encode import Encoder
from foveate.models.checkpoint.small_files import quiet_transformers, write_json
from foveate.models.flash_routes import with_router
from foveate.models.forward import embed, token_logprobs
from foveate.models.policy import load_policy, save_policy
from foveate.models.tiny import tiny_tokenizer
from foveate.parallel.packing import pack
from foveate.records import Image, PackedGroup

FOLDER = os.environ.get("FOVEATE_FLASH")
SIZES = [(64, 64)], [(250, 70)], [(128, 190), (64, 64)], [(64, 64), (64, 70), (130, 64)], [(128, 128), (200, 60)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="FOVEATE_FLASH does not name the modelling code of a Flash checkpoint"),
]


@pytest.fixture(scope="module")
def released():
    """The module with the model, imported as a package without running anything else of the folder."""
    package = types.ModuleType("released_flash")
    package.__path__ = [FOLDER]
    layers, einops = types.ModuleType("timm.layers"), types.ModuleType("einops")
    layers.DropPath, einops.rearrange = torch.nn.Identity, None  # of training, and of a kernel for GPUs
    with pytest.MonkeyPatch.context() as patch:
        beside = {"released_flash": package, "timm": types.ModuleType("timm"), "timm.layers": layers, "einops": einops}
        for name, module in beside.items():
            patch.setitem(sys.modules, name, module)
        module = importlib.import_module("released_flash.modeling_internvl_chat")
        module.InternVLChatModel.all_tied_weights_keys = {}  # transformers 5 wants to read it
        yield module


@pytest.fixture(scope="module")
def model(released):
    """A random model that attends sharply, and whose router says as much of some tiles as little of others."""
    vision = {
        "architectures": ["InternVisionModel"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 128, "image_size": 64, "patch_size": 2, "norm_type": "layer_norm", "qkv_bias": True,
        "qk_normalization": False, "drop_path_rate": 0.1,
    }  # fmt: skip
    language = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tiny_tokenizer(640)) + 4,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    config = released.InternVLChatConfig(
        vision_config=vision, llm_config=language, force_image_size=64, template="internvl2_5", ps_version="v2",
        dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=12,
        flash_mode=True, flash_relative_threshold=0.2, flash_absolute_threshold=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = released.InternVLChatModel(config).eval()
        for name, parameter in made.named_parameters():
            if name.endswith(("ls1", "ls2")):
                parameter.fill_(0.7)
            elif name.startswith(("mlp", "pooling", "gating")):
                scale = 0.1 if name.startswith("mlp") else 0.3
                parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name and name.endswith("weight")))
            elif parameter.ndim > 1:
                parameter.mul_(3)
    return made


def asked_of(model, prompt, image_id):
    """What `generate_flash` hands to the language model for a prompt, the tokens that it keeps, and the log-probs of
    the next token."""
    handed, kept = {}, []
    compress = model.compress_visual_tokens_in_sentence

    def compressed(**given):
        kept.append(compress(**given)[3])
        return compress(**given)

    ids = torch.tensor([prompt.token_ids])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "compress_visual_tokens_in_sentence", compressed)
        patch.setattr(model.language_model, "generate", lambda **given: handed.update(given))
        patch.setattr(model.gating, "use_checkpoint", False)  # else a warning
        model.img_context_token_id = image_id
        model.generate(pixel_values=prompt.pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    embeddings, mask = handed["inputs_embeds"], handed["attention_mask"]
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    return embeddings[0], mask, ids[0][kept[0]], logits[0, -1].log_softmax(-1)


def picture(width, height, seed):
    """An image of blots, since tiles of noise are all alike."""
    blots = np.random.default_rng(seed).integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(blots).resize((width, height), PIL.Image.Resampling.BICUBIC).save(buffer, "PNG")
    return Image(None, buffer.getvalue(), width, height)


def require_same_prompts(model, folder, make_task):
    policy = load_policy(str(folder))
    plain = Encoder(policy.tokenizer, policy.family, 12, 8192)
    encode, mixed = with_router(plain, policy), 0
    for seed, sizes in enumerate(SIZES):
        images = [picture(*size, 10 * seed + number) for number, size in enumerate(sizes)]
        task = make_task(" or ".join("<image>" for _ in images) + "?", *images)
        routed = encode(task)
        embeddings, mask, ids, logprobs = asked_of(model, plain(task), policy.family.image_token_id)
        assert routed.token_ids == tuple(ids.tolist())
        assert torch.equal(mask, torch.ones(1, len(routed)))
        batch = pack([PackedGroup.of_tokens(routed, [(token,) for token in range(len(logprobs))])])
        with torch.no_grad():
            torch.testing.assert_close(embed(policy, batch)[0][: len(routed)], embeddings, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(token_logprobs(policy, batch)[0], logprobs, rtol=1e-5, atol=1e-4)
        mixed += len({side for slot in routed.slots for side in slot.sides}) == 2
    assert mixed >= 3


def test_a_model_that_the_released_code_saved_has_its_prompts_and_back(released, model, make_task, tmp_path):
    with quiet_transformers():
        model.save_pretrained(tmp_path / "released")
    tiny_tokenizer(640).save_pretrained(tmp_path / "released")
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    write_json(tmp_path / "released" / "preprocessor_config.json", {"crop_size": 64, "size": 64, **means})
    require_same_prompts(model, tmp_path / "released", make_task)

    policy = load_policy(str(tmp_path / "released"))
    save_policy(policy, tmp_path / "same")
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    save_policy(policy, tmp_path / "trained")
    with quiet_transformers():
        same, trained = (
            released.InternVLChatModel.from_pretrained(tmp_path / name).eval() for name in ("same", "trained")
        )
    wanted = model.state_dict()
    assert same.state_dict().keys() == wanted.keys()
    for name, tensor in same.state_dict().items():  # dead weights among them
        assert torch.equal(tensor, wanted[name]), name
    require_same_prompts(trained, tmp_path / "trained", make_task)
