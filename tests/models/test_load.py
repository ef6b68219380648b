from __future__ import annotations

import json
import platform
import resource
import shutil
import statistics

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from foveate.encoding.chat import render
from foveate.errors import DataError
from foveate.models.checkpoint.formats import is_finite
from foveate.models.families.internvl import InternVL
from foveate.models.forward import token_logprobs
from foveate.models.policy import freeze_except, load_policy, save_policy
from foveate.parallel.packing import pack
from foveate.records import Message, PackedGroup


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change_json(path, **changes):
    """Set keys of a JSON file; `a__b` is key b of object a, None removes."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        target = content
        for name in outer:
            target = target[name]
        if value is None:
            del target[last]
        else:
            target[last] = value
    path.write_text(json.dumps(content))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def shard(folder):
    """Split the weights over several files with an index, as large models have them."""
    weights = sorted(load_file(folder / "model.safetensors").items())
    half = len(weights) // 2
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    placed = {}
    for name, part in zip(names, (weights[:half], weights[half:]), strict=True):
        save_file(dict(part), folder / name, {"format": "pt"})
        placed |= {key: name for key, _ in part}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return names


def remove_head(folder):
    change_weights(folder, lambda weights: weights.pop("language_model.lm_head.weight"))


def add_weight(folder):
    change_weights(folder, lambda weights: weights.update({"language_model.model.adapter.weight": torch.zeros(2)}))


def halve_head(folder):
    change_weights(
        folder, lambda w: w.update({"language_model.lm_head.weight": w["language_model.lm_head.weight"][:10].clone()})
    )


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def drop_shard(folder):
    (folder / shard(folder)[1]).unlink()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def strip_image_tokens(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<SOMETHING>"))
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<SOMETHING>"))


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def preprocessor(**changes):
    return lambda folder: change_json(folder / "preprocessor_config.json", **changes)


DAMAGE = {
    "no folder": (shutil.rmtree, "no config.json; a local model folder"),
    "no config": (remove("config.json"), "no config.json"),
    "config is not JSON": (write("config.json", "{"), "config.json: not valid JSON"),
    "config is a list": (write("config.json", "[]"), "config.json: holds a list, not a JSON object"),
    "another model": (config(model_type="llava"), "model_type is 'llava'; known are: internvl"),
    "no text config": (config(text_config=None), "text_config.model_type is None"),
    "another language model": (config(text_config__model_type="mistral"), "text_config.model_type is 'mistral'"),
    "config of wrong type": (config(text_config__hidden_size="wide"), "cannot be loaded .*hidden_size"),
    "config of another width": (config(text_config__intermediate_size=80), "has shape .*config.json asks for"),
    "another image token": (config(image_token_id=7), "image_token_id is 7, but the tokenizer's <IMG_CONTEXT> is"),
    "embedding too small": (config(text_config__vocab_size=100), "the tokenizer has .* tokens, the embedding 100 rows"),
    "no weights": (remove("model.safetensors"), "found no weights; weights must be"),
    "pickle": (only_pickle, "found pytorch_model.bin; weights must be .*pickle"),
    "missing shard": (drop_shard, "model-00002-of-00002.safetensors is missing, one of 2 shards"),
    "truncated weights": (cut_weights, "model.safetensors: has .* bytes where its header says"),
    "missing weight": (remove_head, "the weights lack .*lm_head.weight"),
    "unknown weight": (add_weight, "the weights also hold .*adapter.weight"),
    "wrong shape": (halve_head, r"lm_head.weight has shape \(10, 64\), config.json asks for \(700, 64\)"),
    "broken tokenizer": (write("tokenizer.json", "{}"), "cannot be loaded"),
    "tokenizer without image tokens": (strip_image_tokens, "the tokenizer lacks <IMG_CONTEXT>"),
    "no preprocessor config": (remove("preprocessor_config.json"), "no preprocessor_config.json"),
    "preprocessor config is not JSON": (write("preprocessor_config.json", "size: 3"), "not valid JSON"),
    "preprocessor config without mean": (preprocessor(image_mean=None), "preprocessor_config.json: lacks image_mean"),
    "another tile size": (preprocessor(size={"height": 448, "width": 448}), "is not the vision tower's 56 x 56"),
    "size as a number": (preprocessor(size=56), "size 56 is not the vision tower's"),
    "bilinear resize": (preprocessor(resample=2), "resample is 2; only 3 is known"),
    "pixels in 0..255": (preprocessor(do_rescale=False), "do_rescale is False; only True is known"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line_that_names_it(damage, message, folder):
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        load_policy(str(folder))
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_sharded_weights_load(folder, tiny_policy):
    shard(folder)
    loaded = load_policy(str(folder)).model.state_dict()
    for name, weight in tiny_policy.model.state_dict().items():
        assert torch.equal(loaded[name], weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_a_tensor(value, folder):
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights[name][3].__setitem__(5, value))
    with pytest.raises(
        DataError, match=r"/model: \S*layers\.1\.mlp\.down_proj\.weight holds numbers that are not finite"
    ):
        load_policy(str(folder))


def test_weights_that_are_too_large_for_a_dtype_are_refused(folder):
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights[name][3].__setitem__(5, 1e6))
    load_policy(str(folder))
    with pytest.raises(DataError, match=r"down_proj\.weight holds numbers that are not finite in float16; "):
        load_policy(str(folder), dtype="float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(dtype):
    numbers = torch.randn(3, 1001, dtype=torch.float32).to(dtype)
    assert is_finite(numbers)
    for place in (0, 1500, 3002):
        for value in (float("nan"), float("inf"), -float("inf")):
            damaged = numbers.clone()
            damaged.view(-1)[place] = value
            assert not is_finite(damaged)
            assert is_finite(damaged) == damaged.isfinite().all()
    assert is_finite(torch.zeros(0, 4))
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.zeros(2).to(torch.float8_e4m3fn))


def test_nothing_is_printed_and_transformers_settings_stay(folder, tmp_path, capfd):
    bars: list[str] = []
    mine = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bars.append(kwargs.get("desc")) or bar(*args))
    level = transformers_logging.get_verbosity()
    try:
        save_policy(load_policy(str(folder)), tmp_path / "copy")
        remove_head(folder)
        with pytest.raises(DataError):
            load_policy(str(folder))
        assert transformers_logging.get_verbosity() == level
        assert bars == []
        transformers_logging.tqdm([], desc="mine", disable=True)
        assert bars == ["mine"]
    finally:
        transformers_logging.set_tqdm_hook(mine)
    assert transformers_logging.is_progress_bar_enabled()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading" not in err
    assert "shards" not in err
    assert "REPORT" not in err


@pytest.fixture
def packed(encode, make_image, make_task):
    tasks = [make_task("<image>\nWhat is shown?", make_image(130, 60)), make_task("two and three")]
    return pack([PackedGroup.of_tokens(encode(task), ((5, 6, 7), (9,))) for task in tasks])


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_kernels_and_dtypes_give_the_same_logprobs(attention, dtype, tolerance, tiny_folder, tiny_policy, packed):
    with torch.no_grad():
        policy = load_policy(str(tiny_folder), attention=attention, dtype=dtype)
        assert policy.part("head").weight.dtype == getattr(torch, dtype)
        torch.testing.assert_close(
            token_logprobs(policy, packed)[0], token_logprobs(tiny_policy, packed)[0], rtol=0, atol=tolerance
        )


def test_a_saved_folder_is_one_of_plain_transformers(tiny_folder, tmp_path, encode, make_image, make_task):
    policy = load_policy(str(tiny_folder))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.01)
    save_policy(policy, tmp_path / "saved")
    plain = InternVLForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert processor.size == {"height": 56, "width": 56}

    prompt = encode(make_task("<image>\nWhat is shown?", make_image(130, 60)))
    answer = (5, 6, 7, 8)
    ids = torch.tensor([[*prompt.token_ids, *answer]])
    with torch.no_grad():
        logits = plain(input_ids=ids, pixel_values=prompt.pixels).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        got, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, (answer,))]))
        again, _ = token_logprobs(
            load_policy(str(tmp_path / "saved")), pack([PackedGroup.of_tokens(prompt, (answer,))])
        )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert torch.equal(again, got)


@pytest.mark.parametrize(
    "modules", [["vision"], ["projector"], ["language"], ["head"], ["projector", "language"], list(InternVL.parts), []]
)
def test_only_the_named_modules_get_gradients(modules, tiny_folder, packed):
    policy = load_policy(str(tiny_folder))
    freeze_except(policy, modules)
    logp, entropy = token_logprobs(policy, packed)
    assert logp.requires_grad == bool(modules)
    if modules:
        (logp.sum() + entropy.sum()).backward()
    trained = {*modules, *(["head"] if "language" in modules else [])}
    for name in InternVL.parts:
        for parameter in policy.part(name).parameters():
            assert parameter.requires_grad == (name in trained)
            assert (parameter.grad is not None) == (name in trained)
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        if name in trained:
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.part(name).parameters())


def test_the_four_parts_are_the_whole_model(tiny_policy):
    parts = [parameter for name in InternVL.parts for parameter in tiny_policy.part(name).parameters()]
    assert {id(p) for p in parts} == {id(p) for p in tiny_policy.model.parameters()}
    assert len(parts) == len({id(p) for p in parts})


def test_an_unknown_part_cannot_be_trained(tiny_policy):
    with pytest.raises(DataError, match="cannot train 'tower': the parts of internvl are vision, projector"):
        freeze_except(tiny_policy, ["vision", "tower"])


def test_images_are_tiled_whatever_crop_to_patches_says(folder, tiny_policy):
    change_json(folder / "preprocessor_config.json", crop_to_patches=False)
    assert load_policy(str(folder)).family == tiny_policy.family


def test_a_template_of_older_processors_is_the_checkpoints_own(folder):
    (folder / "chat_template.jinja").unlink()
    assert load_policy(str(folder)).tokenizer.chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}!"}))
    assert render((Message("user", "What?"),), load_policy(str(folder)).tokenizer) == "What?!"


def test_the_stop_tokens_are_the_end_of_turn_and_the_tokenizers_own(folder, tiny_policy):
    vocabulary = tiny_policy.tokenizer.get_vocab()
    assert tiny_policy.family.stop_ids == (vocabulary["<|im_end|>"],)
    change_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert load_policy(str(folder)).family.stop_ids == (vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"])


def test_image_words_may_not_be_sampled(tiny_policy):
    banned = tiny_policy.tokenizer.convert_ids_to_tokens(list(tiny_policy.family.placeholder_ids))
    assert set(banned) == {"<img>", "<IMG_CONTEXT>", "</img>"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's allocator")
def test_a_process_that_computes_on_a_processor_keeps_the_memory_of_its_last_step(tiny_policy):
    assert tiny_policy.device.type == "cpu"  # loaded, so that memory is kept from here on

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers = [torch.empty(6 << 20).fill_(1.0) for _ in range(2)]  # 24 MB each, 6,144 pages
        del buffers
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert statistics.median(faults() for _ in range(9)) < 6000  # of what lies between buffers, some pages are new
