"""What is wrong with a model folder is told in one line, whatever its family and layout, when it is loaded and by the
doctor."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from checkpoint_cases import write_chat_folder
from family_cases import VISION_MODELS, build_family
from safetensors.torch import load_file, save_file

from foveate.errors import DataError
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.safetensors_io import INDEX
from foveate.models.policy import load_policy
from foveate.tools.doctor import examine

SEEING = ("internvl-chat", "internvl-hf", "internvl-hf-old", *VISION_MODELS)
NAMES = (*SEEING, "qwen3", "qwen3_moe", "gpt_oss")
HEADS = dict.fromkeys(
    ("internvl-chat", "internvl-hf-old", "gemma3", "llava_onevision"), "language_model.lm_head.weight"
)
WORDS = {
    "internvl": "<IMG_CONTEXT>",
    "qwen": "<|image_pad|>",
    "gemma3": "<image_soft_token>",
    "glm": "<|image|>",
    "smol": "<image>",
    "idefics": "<image>",
    "llava": "<image>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny model by name, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in made:
            if name == "internvl-chat":
                made[name] = write_chat_folder(root / name, "300M-qwen3")
            elif name.startswith("internvl-"):
                convert(folder("internvl-chat"), root / name, name.removeprefix("internvl-"))
                made[name] = root / name
            else:
                made[name] = build_family(root / name, name)
        return made[name]

    return folder


@pytest.fixture
def damaged(folders, tmp_path):
    """damaged(name) -> a copy that a test may damage."""
    return lambda name: shutil.copytree(folders(name), tmp_path / "model")


def refusal(folder):
    with pytest.raises(DataError) as error:
        load_policy(str(folder))
    said = str(error.value)
    assert said.startswith(str(folder))
    assert "\n" not in said
    with pytest.raises(DataError) as told:  # by `foveate doctor`, which does not read the weights
        examine(str(folder))
    assert str(told.value) == said
    return said.removeprefix(str(folder))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_head(folder, name, change):
    weights = load_file(folder / "model.safetensors")
    change(weights, HEADS.get(name, "lm_head.weight"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_shard_is_named(name, damaged):
    folder = damaged(name)
    weights = sorted(load_file(folder / "model.safetensors").items())
    parts = {"model-00001-of-00002.safetensors": weights[::2], "model-00002-of-00002.safetensors": weights[1::2]}
    for file, part in parts.items():
        save_file(dict(part), folder / file, {"format": "pt"})
    placed = {key: file for file, part in parts.items() for key, _ in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "model.safetensors").unlink()
    assert load_policy(str(folder)).folder == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refusal(folder).startswith(": model-00002-of-00002.safetensors is missing, one of 2 shards")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(name, damaged):
    folder = damaged(name)
    rows, width = load_file(folder / "model.safetensors")[HEADS.get(name, "lm_head.weight")].shape
    change_head(folder, name, lambda weights, head: weights.update({head: weights[head][:10].clone()}))
    said = refusal(folder)
    assert f"lm_head.weight has shape (10, {width}), config.json asks for ({rows}, {width})" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(name, damaged):
    folder = damaged(name)
    change_head(folder, name, lambda weights, head: weights.pop(head))
    assert "the weights lack " in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_cut_off_are_told(name, damaged):
    folder = damaged(name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors: has " in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_architecture_is_told_with_those_that_are_known(name, damaged):
    folder = damaged(name)
    change_config(folder, model_type="llava")
    said = refusal(folder)
    assert "model_type is 'llava'" in said
    for known in ("internvl", "internvl_chat", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3", "gpt_oss"):
        assert known in said


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_exists_only_as_code_is_refused_and_its_code_is_not_run(name, damaged):
    folder = damaged(name)
    (folder / "modeling_new.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    code = {"AutoConfig": "modeling_new.Config", "AutoModel": "modeling_new.Model"}
    change_config(folder, model_type="new", auto_map=code)
    assert "only as code of its checkpoint, which is never run" in refusal(folder)


@pytest.mark.parametrize("template", ["{% for x in %}", "{{ messages[0]['content'] + 1 }}"])
@pytest.mark.parametrize("name", ["internvl-chat", "qwen3_vl", "qwen3"])
def test_a_chat_template_that_cannot_be_used_is_told(name, template, damaged):
    folder = damaged(name)
    (folder / "chat_template.jinja").write_text(template)
    assert "the chat template cannot be used" in refusal(folder)


@pytest.mark.parametrize("name", SEEING[:3])
def test_features_of_a_layer_that_the_tower_lacks_are_refused(name, damaged):
    folder = damaged(name)
    change_config(folder, select_layer=-4, vision_feature_layer=-4)
    assert "config.json: images are taken from layer -4 of a tower of 2 layers" in refusal(folder)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3"])
def test_a_configuration_of_a_far_larger_model_is_refused_before_memory_is_taken(name, damaged):
    folder = damaged(name)
    content = json.loads((folder / "config.json").read_text())
    text = content.get("text_config", content)
    change_config(
        folder, **({"text_config": {**text, "vocab_size": 10**9}} if text is not content else {"vocab_size": 10**9})
    )
    assert "the weights hold less than half of the" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_are_refused(name, damaged):
    folder, how = damaged(name), {"quant_method": "mxfp4"}
    part = {"internvl-chat": "llm_config", "internvl-hf": "text_config"}.get(name)
    content = json.loads((folder / "config.json").read_text()) if part else {}
    changes = {part: {**content[part], "quantization_config": how}} if part else {"quantization_config": how}
    change_config(folder, **changes)
    assert "config.json: the weights are quantised (mxfp4), which cannot be trained" in refusal(folder)


@pytest.mark.parametrize("name", ["internvl-chat", "qwen2_5_vl", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_without_a_word_in_the_configuration_are_refused(name, dtype, damaged):
    folder = damaged(name)
    change_head(folder, name, lambda weights, key: weights.update({key: weights[key].to(dtype)}))
    assert re.search(r"lm_head\.weight is (I8|F8_E4M3); quantised weights cannot be trained", refusal(folder))


@pytest.mark.parametrize("name", ["internvl-hf", "qwen3_vl", "gemma3", "qwen3"])
@pytest.mark.parametrize("setting", [{"return_dict": False}, {"output_attentions": True}])
def test_settings_that_change_what_a_model_returns_are_refused(name, setting, damaged):
    folder = damaged(name)
    change_config(folder, **setting)
    assert f"config.json: {min(setting)} is {setting[min(setting)]}; it changes what" in refusal(folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "gemma3", "llava_onevision", "smolvlm"])
def test_positions_that_depend_on_the_longest_row_are_refused(name, damaged):
    folder = damaged(name)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    more = {key: value for key, value in text["rope_parameters"].items() if key.startswith(("mrope", "partial"))}
    change_config(folder, text_config={**text, "rope_parameters": layers if name == "gemma3" else {**rope, **more}})
    assert re.search(
        r"config\.json: (rotary positions of type dynamic|(llama|qwen2) cannot be trained here)", refusal(folder)
    )


@pytest.mark.parametrize("name", NAMES)
def test_code_that_comes_beside_a_known_model_is_not_run(name, damaged):
    folder = damaged(name)
    for file in ("configuration_new", "modeling_new", "tokenization_new", "processing_new"):
        (folder / f"{file}.py").write_text("raise AssertionError('code of a checkpoint was run')\n")
    change_config(folder, auto_map={"AutoConfig": "configuration_new.Config", "AutoModel": "modeling_new.Model"})
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": ["tokenization_new.New", None]}}))
    assert load_policy(str(folder)).folder == folder


@pytest.mark.parametrize("name", SEEING)
def test_a_tokenizer_without_the_image_tokens_is_told(name, damaged):
    folder = damaged(name)
    word = next(word for start, word in WORDS.items() if name.startswith(start))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / file
        path.write_text(path.read_text().replace(word, "<|other|>"))
    assert f"the tokenizer lacks {word}" in refusal(folder)


@pytest.mark.parametrize("name", SEEING[1:])  # the GitHub format does not say it
def test_another_image_token_than_the_tokenizers_is_told(name, damaged):
    folder = damaged(name)
    change_config(folder, image_token_id=7)
    assert "image_token_id is 7, but the tokenizer's" in refusal(folder)


PROCESSORS = {
    "missing": (lambda path: path.unlink(), "no preprocessor_config.json; images cannot be prepared"),
    "not JSON": (lambda path: path.write_text("size: 3"), "preprocessor_config.json: not valid JSON"),
    "a list": (lambda path: path.write_text("[]"), "preprocessor_config.json: holds a list"),
    "without mean": (lambda path: change(path, image_mean=None), "preprocessor_config.json: lacks image_mean"),
    "box": (lambda path: change(path, resample=4), "resample is 4; only "),
    "mean of a wrong type": (lambda path: change(path, image_mean="bright"), "image_mean is 'bright'"),
    "two channels": (lambda path: change(path, image_std=[0.5, 0.5]), "image_std is [0.5, 0.5]"),
    "no deviation": (lambda path: change(path, image_std=[0.5, 0.5, 0]), "image_std is [0.5, 0.5, 0]"),
    "size of a wrong type": (lambda path: change(path, size="large"), "size"),
}


def change(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(("damage", "message"), PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("name", SEEING[1:])
def test_an_image_processor_that_cannot_be_built_is_an_error(name, damage, message, damaged):
    folder = damaged(name)
    damage(folder / "preprocessor_config.json")
    assert message in refusal(folder)


def test_images_of_a_least_number_of_tiles_are_refused(damaged):
    hf = damaged("internvl-hf")
    change(hf / "preprocessor_config.json", min_patches=2)
    assert "images of at least 2 tiles are not known" in refusal(hf)
    shutil.rmtree(hf)
    chat = damaged("internvl-chat")
    change_config(chat, min_dynamic_patch=2)
    assert "images of at least 2 tiles are not known" in refusal(chat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_thumbnail": False}, "use_thumbnail is False; the Hugging Face form knows only True"),
        ({"max_dynamic_patch": "many"}, "max_dynamic_patch"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch"),
        ({"pad2square": True}, "pad2square is True"),
        ({"force_image_size": 112}, "force_image_size is 112"),
    ],
)
def test_tiling_of_the_github_format_that_cannot_be_built_is_an_error(changes, message, damaged):
    folder = damaged("internvl-chat")
    change_config(folder, **changes)
    said = refusal(folder)
    assert message in said
    assert said.startswith("/config.json: ")


@pytest.mark.parametrize("content", [{"max_patches": "many"}, {"max_patches": 0}, {"image_processor": "fast"}])
def test_tiling_of_the_hf_format_that_makes_no_sense_is_an_error_of_convert(content, damaged, tmp_path):
    folder = damaged("internvl-hf")
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"preprocessor_config\.json: max_patches is"):
        convert(folder, tmp_path / "chat", "chat")
    assert not (tmp_path / "chat").exists()
