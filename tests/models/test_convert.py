from __future__ import annotations

import hashlib
import json
import shutil
import struct

import pytest
import torch
from checkpoint_cases import (
    CASES,
    PYTHON_FILES,
    STRIDE,
    official_pixels,
    read_json,
    weights,
    write_chat_folder,
    write_json,
)
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.errors import DataError, DiskError
from foveate.models.checkpoint import convert as convert_module
from foveate.models.checkpoint.configs import chat_to_hf
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.formats import detect_format
from foveate.models.checkpoint.safetensors_io import INDEX
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy, save_policy
from foveate.parallel.packing import pack
from foveate.records import ImageSlot, PackedGroup, Prompt


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """chat_folder(case) -> a GitHub-format folder, shared: copy it before changing anything."""
    made = {}

    def make(case="300M-qwen3"):
        if case not in made:
            made[case] = write_chat_folder(tmp_path_factory.mktemp("chat") / case, case)
        return made[case]

    return make


@pytest.fixture(scope="session")
def hf_folder(chat_folder, tmp_path_factory):
    """hf_folder(case) -> that checkpoint in the Hugging Face layout."""
    made = {}

    def make(case="300M-qwen3"):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("hf") / case
            convert(chat_folder(case), made[case], "hf")
        return made[case]

    return make


@pytest.fixture
def damaged(chat_folder, tmp_path):
    """A GitHub-format folder that a test may damage."""
    return shutil.copytree(chat_folder(), tmp_path / "model")


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(folder, other):
    mine, theirs = tensors(folder), tensors(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name


def official_logprobs(case):
    return torch.tensor(CASES[case]["logprobs"])


def official_ids(case, image_token_id):
    return [image_token_id if token == -1 else token for token in CASES[case]["token_ids"]]


def checksums(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("case", CASES)
def test_chat_to_hf_and_back_gives_the_same_tensors_and_config(case, chat_folder, hf_folder, tmp_path):
    result = convert(hf_folder(case), tmp_path / "chat", "chat")
    assert (result.source, result.target, result.tensors) == ("hf", "chat", len(CASES[case]["shapes"]))
    assert_same_tensors(tmp_path / "chat", chat_folder(case))
    assert read_json(tmp_path / "chat/config.json") == CASES[case]["config"]
    assert detect_format(tmp_path / "chat") == "chat"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["hf", "hf-old"])
def test_hf_to_chat_and_back_gives_the_same_tensors_and_config(case, layout, chat_folder, tmp_path):
    """From a folder that transformers itself has written, which never was in the GitHub format."""
    convert(chat_folder(case), tmp_path / "made", layout)
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "made")
    hf = shutil.copytree(tmp_path / "made", tmp_path / "hf", ignore=shutil.ignore_patterns("chat_format"))
    model.save_pretrained(hf)
    assert detect_format(hf) == layout
    convert(hf, tmp_path / "chat", "chat")
    convert(tmp_path / "chat", tmp_path / "back", layout)
    assert_same_tensors(tmp_path / "back", hf)
    assert_same_tensors(tmp_path / "chat", chat_folder(case))
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_text().strip() == (hf / name).read_text().strip(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["hf", "hf-old"])
def test_the_hf_form_in_plain_transformers_gives_the_official_logprobs(case, layout, chat_folder, hf_folder, tmp_path):
    folder = hf_folder(case)
    if layout == "hf-old":
        folder = tmp_path / "old"
        convert(chat_folder(case), folder, layout)
    model, info = InternVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert model.dtype == torch.float32
    ids = official_ids(case, model.config.image_token_id)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=official_pixels()).logits[0]
    got = torch.log_softmax(logits.double(), -1)[:, ::STRIDE]
    torch.testing.assert_close(got.float(), official_logprobs(case), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["chat", "hf"])
def test_the_loaded_policy_gives_the_official_logprobs(case, layout, chat_folder, hf_folder):
    policy = load_policy(str(chat_folder(case) if layout == "chat" else hf_folder(case)))
    assert policy.format == layout
    assert policy.family.budget == 12
    ids = official_ids(case, policy.family.image_token_id)
    slots = (ImageSlot(3, 4, 1), ImageSlot(7, 4, 1))
    prompt = Prompt(tuple(ids), slots, official_pixels(), tuple(ids))
    candidates = list(range(0, 704, STRIDE))
    with torch.no_grad():
        got, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, tuple((token,) for token in candidates))]))
    torch.testing.assert_close(got, official_logprobs(case)[-1], rtol=0, atol=1e-5)


def test_shards_of_any_size_hold_the_same_tensors(chat_folder, tmp_path):
    source, parts = chat_folder(), []
    for name, limit in (("one", 10**9), ("some", 100_000), ("each", 1)):
        convert(source, tmp_path / name, "hf", shard_bytes=limit)
        parts.append(len(list((tmp_path / name).glob("*.safetensors"))))
        assert_same_tensors(tmp_path / name, tmp_path / "one")
        convert(tmp_path / name, tmp_path / f"{name}-back", "chat")
        assert_same_tensors(tmp_path / f"{name}-back", source)
    assert parts[0] == 1
    assert 1 < parts[1] < parts[2] == len(tensors(tmp_path / "each"))
    index = read_json(tmp_path / "some" / INDEX)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "one").values())
    for file in (tmp_path / "some").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= max(100_000, 704 * 48 * 4)
    InternVLForConditionalGeneration.from_pretrained(tmp_path / "some")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_passes_bit_for_bit(dtype, tmp_path):
    made = {name: tensor.to(dtype) for name, tensor in weights("6B-qwen3").items()}
    made["mlp1.0.weight"] = made["mlp1.0.weight"].float()
    source = write_chat_folder(tmp_path / "chat", "6B-qwen3", made)
    convert(source, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "chat")
    assert_same_tensors(tmp_path / "back", source)


# --------------------------------------------------------------------------------------------------------- files


def test_what_came_along_is_carried_and_restored(chat_folder, hf_folder, tmp_path):
    source, hf = chat_folder(), hf_folder()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "eval_notes.json", "README.md"):
        assert (hf / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(hf.glob("*.py"))
    assert {path.name for path in (hf / "chat_format").iterdir()} == {
        "config.json", "preprocessor_config.json", "tokenizer_config.json", *PYTHON_FILES,
    }  # fmt: skip
    convert(hf, tmp_path / "back", "chat")
    for path in source.iterdir():
        if path.name != "model.safetensors":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_hf_folder_prepares_images_and_knows_its_image_tokens(hf_folder):
    tokenizer = AutoTokenizer.from_pretrained(hf_folder())
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.start_image_token_id == tokenizer.convert_tokens_to_ids("<img>")
    processor = AutoImageProcessor.from_pretrained(hf_folder(), backend="pil")
    assert processor.size == {"height": 56, "width": 56}
    assert processor.crop_to_patches
    assert processor.max_patches == 12
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_a_change_of_the_hf_config_reaches_the_github_config(hf_folder, tmp_path):
    hf = shutil.copytree(hf_folder(), tmp_path / "hf")
    config, processor = read_json(hf / "config.json"), read_json(hf / "preprocessor_config.json")
    config["text_config"]["rms_norm_eps"] = 1e-5
    write_json(hf / "config.json", config)
    write_json(hf / "preprocessor_config.json", processor | {"max_patches": 6})
    convert(hf, tmp_path / "chat", "chat")
    wanted = json.loads(json.dumps(CASES["300M-qwen3"]["config"]))
    wanted["llm_config"]["rms_norm_eps"] = 1e-5
    wanted["max_dynamic_patch"] = 6
    assert read_json(tmp_path / "chat/config.json") == wanted


def test_a_model_that_never_was_in_github_format_says_that_it_lacks_the_code(hf_folder, tmp_path, caplog):
    hf = shutil.copytree(hf_folder(), tmp_path / "hf", ignore=shutil.ignore_patterns("chat_format"))
    convert(hf, tmp_path / "chat", "chat")
    assert "no Python files of the GitHub format came along" in caplog.text
    assert "auto_map" not in read_json(tmp_path / "chat/config.json")
    assert read_json(tmp_path / "chat/preprocessor_config.json")["crop_size"] == 56
    assert load_policy(str(tmp_path / "chat")).format == "chat"


def test_the_source_stays_as_it_was(chat_folder, tmp_path):
    before = checksums(chat_folder())
    convert(chat_folder(), tmp_path / "hf", "hf")
    assert checksums(chat_folder()) == before


# ------------------------------------------------------------------------------------------------- load and save


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["chat", "hf", "hf-old"])
def test_a_policy_is_saved_in_the_layout_it_came_in(case, layout, chat_folder, tmp_path):
    source = chat_folder(case)
    if layout != "chat":
        source = tmp_path / "source"
        convert(chat_folder(case), source, layout)
    policy = load_policy(str(source))
    save_policy(policy, tmp_path / "same")
    assert detect_format(tmp_path / "same") == layout
    assert_same_tensors(tmp_path / "same", source)
    assert read_json(tmp_path / "same/config.json") == read_json(source / "config.json")
    names = {path.relative_to(source) for path in source.rglob("*")}
    assert {path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*")} >= names
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert read_text(tmp_path / "same" / name) == read_text(source / name), name
    if layout == "chat":
        assert (tmp_path / "same" / PYTHON_FILES[0]).read_bytes() == (source / PYTHON_FILES[0]).read_bytes()
        assert not (tmp_path / "same/hf_format").exists()


def read_text(path):
    return path.read_text().strip()


def test_trained_weights_and_their_dtype_are_what_is_saved(chat_folder, tmp_path):
    policy = load_policy(str(chat_folder()), dtype="bfloat16")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(2)
    save_policy(policy, tmp_path / "trained")
    saved, before = tensors(tmp_path / "trained"), weights("300M-qwen3")
    assert saved.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(saved[name], tensor.bfloat16() * 2), name
    config = read_json(tmp_path / "trained/config.json")
    assert config["torch_dtype"] == config["llm_config"]["torch_dtype"] == "bfloat16"
    assert config["auto_map"] == CASES["300M-qwen3"]["config"]["auto_map"]


def test_untied_weights_stay_untied_where_the_outer_config_is_silent(hf_folder, tmp_path):
    hf = shutil.copytree(hf_folder(), tmp_path / "hf")
    config = read_json(hf / "config.json")
    del config["tie_word_embeddings"]
    write_json(hf / "config.json", config)
    policy = load_policy(str(hf))
    assert policy.model.config.tie_word_embeddings is False
    assert torch.equal(policy.part("head").weight, tensors(hf)["lm_head.weight"])


# --------------------------------------------------------------------------------------------------------- errors


def change_weights(folder, change):
    made = load_file(folder / "model.safetensors")
    change(made)
    save_file(made, folder / "model.safetensors", {"format": "pt"})


def change_config(**changes):
    return lambda folder: write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def drop_shard(folder):
    convert(folder, folder.parent / "sharded", "chat", shard_bytes=100_000)
    (folder / "model.safetensors").unlink()
    shutil.copy(folder.parent / "sharded" / INDEX, folder)
    shutil.copy(min((folder.parent / "sharded").glob("*.safetensors")), folder)


def drop_index(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00002.safetensors")


def two_copies(folder):
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    names = dict(zip(tensors(folder), ("model.safetensors", "b.safetensors"), strict=False))
    write_json(folder / INDEX, {"weight_map": names})


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def strip_image_tokens(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<SOMETHING>"))


def narrow_qkv(folder):
    name = "vision_model.encoder.layers.1.attn.qkv.weight"
    change_weights(folder, lambda w: w.update({name: w[name][:90].clone()}))


def wrong_range(folder):
    """A header in which the first tensor lacks the bytes of a number, which the second one has more."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    first, second = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")[:2]
    assert first[1] == second[0]
    first[1] = second[0] = first[1] - 4
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def link_to_nowhere(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")


def change_part(part, **changes):
    def change(folder):
        config = read_json(folder / "config.json")
        config[part] |= changes
        write_json(folder / "config.json", config)

    return change


def unset(key):
    def change(folder):
        config = read_json(folder / "config.json")
        del config[key]
        write_json(folder / "config.json", config)

    return change


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json; a local model folder"),
    "another model": (
        change_config(model_type="llava", auto_map=None),
        r"is 'llava', .* never run; known are: internvl \(Hugging Face format\), internvl_chat \(GitHub format\)",
    ),
    "no model type": (unset("model_type"), "model_type is None"),
    "code of the checkpoint": (
        change_config(llm_config={"architectures": ["InternLM2ForCausalLM"], "auto_map": {"AutoConfig": "x"}}),
        "InternLM2ForCausalLM, which exists only as code .* known are: Qwen2ForCausalLM",
    ),
    "pickle": (only_pickle, "found pytorch_model.bin; weights must be .*a pickle can run code"),
    "missing shard": (drop_shard, r"model-0000\d-of-0000\d.safetensors is missing, one of \d shards"),
    "no index": (drop_index, "2 .*safetensors files but no model.safetensors.index.json"),
    "broken index": (lambda folder: write_json(folder / INDEX, {}), "index.json: not an index of safetensors"),
    "index of files elsewhere": (
        lambda folder: write_json(folder / INDEX, {"weight_map": {"a": "../b.safetensors"}}),
        "../b.safetensors is no file",
    ),
    "index of numbers": (lambda folder: write_json(folder / INDEX, {"weight_map": {"a": 1}}), "not an index of safe"),
    "link to nowhere": (link_to_nowhere, "found no weights"),
    "ranges that shapes do not have": (wrong_range, "model.safetensors: its header is not that of safetensors"),
    "no heads": (change_part("vision_config", num_attention_heads=0), "config.json: cannot be loaded .ZeroDivision"),
    "unknown activation": (change_part("llm_config", hidden_act="blub"), "config.json: cannot be loaded .*'blub'"),
    "a tensor twice": (two_copies, "is in b.safetensors, too; one of them is old"),
    "cut off": (cut, r"model.safetensors: has [\d,]+ bytes where its header says [\d,]+"),
    "pointer of git-lfs": (lfs_pointer, "bytes that are not safetensors"),
    "wrong shape": (narrow_qkv, r"1.attn.qkv.weight has shape \(90, 32\), config.json asks for \(96, 32\)"),
    "missing tensor": (
        lambda folder: change_weights(folder, lambda w: (w.pop("mlp1.3.bias"), w.pop("mlp1.3.weight"))),
        "the weights lack mlp1.3.bias and 1 more; they do not fit config.json",
    ),
    "unknown tensor": (
        lambda folder: change_weights(folder, lambda w: w.update({"mlp2.weight": torch.zeros(2)})),
        "the weights also hold mlp2.weight; they do not fit config.json",
    ),
    "a layer too many": (
        lambda folder: change_weights(
            folder, lambda w: w.update({"vision_model.encoder.layers.2.ls1": torch.zeros(32)})
        ),
        "the weights also hold vision_model.encoder.layers.2.ls1",
    ),
    "tokenizer without image tokens": (strip_image_tokens, "the tokenizer lacks <IMG_CONTEXT>; InternVL cannot see"),
    "no tokenizer": (lambda folder: [p.unlink() for p in folder.glob("token*")], "cannot be loaded"),
    "config of wrong type": (change_config(downsample_ratio="half"), "config.json: cannot be loaded .*'half'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("use", ["convert", "load"])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_nothing_is_written(damage, message, use, damaged, tmp_path):
    damage(damaged)
    with pytest.raises(DataError, match=message) as error:
        convert(damaged, tmp_path / "out", "hf") if use == "convert" else load_policy(str(damaged))
    assert str(error.value).startswith(str(damaged))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*out*"))


def test_query_key_and_value_of_different_dtypes_cannot_be_fused(hf_folder, tmp_path):
    hf = shutil.copytree(hf_folder(), tmp_path / "hf")
    name = "model.vision_tower.encoder.layer.0.attention.k_proj.weight"
    change_weights(hf, lambda w: w.update({name: w[name].half()}))
    with pytest.raises(DataError, match=r"attn.qkv.weight would join tensors of dtype F16 and F32"):
        convert(hf, tmp_path / "chat", "chat")
    assert not (tmp_path / "chat").exists()


def test_a_folder_that_holds_something_is_not_replaced(chat_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    with pytest.raises(DataError, match="out: exists; choose another folder"):
        convert(chat_folder(), tmp_path / "out", "hf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_disk_without_room_is_told_before_anything_is_written(chat_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"needed, 0.0 free in"):
        convert(chat_folder(), tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_the_command_converts_and_says_what_it_did(chat_folder, tmp_path):
    runner = CliRunner()
    result = runner.invoke(app, ["convert", str(chat_folder()), str(tmp_path / "hf"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    assert "GitHub (internvl_chat) -> Hugging Face" in result.output.replace("\n", " ")
    assert detect_format(tmp_path / "hf") == "hf"
    refused = runner.invoke(app, ["convert", str(chat_folder()), str(tmp_path / "hf"), "--to", "hf"])
    assert isinstance(refused.exception, DataError)


def test_the_configuration_of_transformers_reads_what_is_written(hf_folder):
    config = InternVLConfig.from_pretrained(hf_folder())
    wanted = InternVLConfig.from_dict(chat_to_hf(CASES["300M-qwen3"]["config"], config.image_token_id))
    assert config.to_diff_dict() == wanted.to_diff_dict()
