"""The rules that every row of `FAMILIES` keeps, on a tiny model of it. A failure names what a new family forgot."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from checkpoint_cases import write_chat_folder
from family_cases import build_family

from foveate.encoding.chat import render
from foveate.encoding.encode import Encoder
from foveate.encoding.family import Family, ServedAs
from foveate.errors import ConfigError, DataError
from foveate.models.checkpoint.safetensors_io import read_headers, weight_files
from foveate.models.families import FAMILIES, family_class, served_as
from foveate.models.families.text import TextOnly
from foveate.models.features import FeatureStore
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy, parameters_by_part, save_policy
from foveate.parallel.packing import pack
from foveate.records import Answer, Message, PackedGroup

SERVERS = {"vllm", "sglang"}


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tmp_path_factory, tiny_folder):
    """A tiny model of a row."""
    folder = tmp_path_factory.mktemp("family") / request.param
    if request.param == family_class(request.param).github_type:
        return load_policy(str(write_chat_folder(folder, "300M-qwen3")))
    return load_policy(str(tiny_folder if request.param == "internvl" else build_family(folder, request.param)))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_row_names_a_frozen_class_that_says_how_it_is_read(model_type):
    kind = family_class(model_type)
    assert issubclass(kind, Family), f"{FAMILIES[model_type]} is no Family"
    assert is_dataclass(kind), f"{kind.__name__} lacks @dataclass(frozen=True, slots=True, kw_only=True)"
    assert "__slots__" in vars(kind), f"{kind.__name__} lacks slots=True"
    assert "read" in {name for base in kind.__mro__[:-2] for name in vars(base)}, f"{kind.__name__} forgot read"
    assert not {field.name for field in fields(kind)} & {*Family.__annotations__} - {
        "name", "stop_ids", "image_token_id", "video_token_id", "placeholder_ids", "budget", "proof",
    }, f"{kind.__name__}: declarations are ClassVar, not fields"  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_declares_only_what_is_built(model_type):
    kind = family_class(model_type)
    assert kind.servers.keys() <= SERVERS, f"{kind.__name__}: servers are {SERVERS}"


def test_the_parts_hold_every_parameter(policy):
    parts = parameters_by_part(policy)
    expected = {"language", "head", *(("vision", "projector") if policy.family.sees_images else ())}
    assert parts.keys() == expected, "parts"
    assert all(parts.values()), f"parts: {[name for name, own in parts.items() if not own]} have no parameters"
    assert sum(map(len, parts.values())) == len([*policy.model.parameters()])


def test_tokens_are_declared_and_known(policy):
    family, vocabulary = policy.family, policy.tokenizer.get_vocab()
    assert family.stop_ids, "stop_ids"
    assert set(family.reserved) <= vocabulary.keys(), "reserved words are tokens"
    ids = policy.tokenizer.encode(family.image_text, add_special_tokens=False)
    if family.sees_images:
        assert ids.count(family.image_token_id) == 1, "image_text holds image_token_id once"
        assert {vocabulary[word] for word in family.reserved} <= {*family.placeholder_ids}, "placeholder_ids"
        words = {*ids} & policy.tokenizer.added_tokens_decoder.keys()
        assert words <= {*family.placeholder_ids}, "tokens of image_text are of placeholder_ids, never sampled"


def test_the_template_for_a_checkpoint_without_one_renders(policy):
    family, tokenizer = policy.family, policy.tokenizer
    assert family.template_name
    own, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        text = render((Message("user", "Hello"),), tokenizer, template=family.template)
    finally:
        tokenizer.chat_template = own
    assert family.template_token in text
    assert "Hello" in text


def test_images_have_the_tokens_and_entries_that_their_sizes_say(policy, make_image, make_task):
    family = policy.family
    assert bool(family.unit) == family.sees_images == (family.budget > 0) == (family.dummy_image is not None)
    assert isinstance(family.image_summary(), str)
    if not family.sees_images:
        for refused in (lambda: family.shape(56, 56, 1), lambda: family.features(policy.model, torch.zeros(1), [])):
            with pytest.raises(DataError, match="is a text-only model"):
                refused()
        return
    assert family.image_summary() != TextOnly.image_summary(family), "image_summary"
    encode = Encoder(policy.tokenizer, family, family.budget, 4096)
    prompt = encode(make_task("<image> and <image>", make_image(130, 70, 1), make_image(90, 200, 2)))
    grids = pack([PackedGroup(prompt, ())]).grids
    assert len(prompt.pixels) == sum(slot.tiles for slot in prompt.slots), "shape: entries"
    with torch.no_grad():
        seen = family.features(policy.model, prompt.pixels, grids)
        dummy = family.features(policy.model, family.dummy_image.pixels, family.dummy_image.grids)
    assert len(seen.embeddings) == sum(slot.count for slot in prompt.slots), "shape: tokens"
    assert len(dummy.embeddings) > 0, "dummy_image"
    assert all(deeper.shape == seen.embeddings.shape for deeper in seen.deeper)
    assert min(family.box_frame(130, 70, family.budget)) > 1, "box_frame"


def test_features_of_each_prompt_by_itself_are_those_of_a_whole_row(policy, make_image, make_task, tmp_path):
    if not policy.family.sees_images:
        with pytest.raises(ConfigError, match="sees no images"):
            FeatureStore(policy, tmp_path, 1e9)
        return
    encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 4096)
    tasks = (
        make_task("<image> and <image>", make_image(130, 70, 1), make_image(90, 200, 2)), make_task("nothing"),
        make_task("<image>", make_image(60, 200, 3)),
    )  # fmt: skip
    answers = [Answer.sampled([30, 31, 32], [0.0] * 3, "", "length", 0)] * 2
    row = pack([PackedGroup(encode(task), (*answers,)) for task in tasks])
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    policy.model.requires_grad_(False)
    kept = replace(policy, features=FeatureStore(policy, tmp_path, 1e9))
    with torch.no_grad():
        expected = token_logprobs(policy, row)
        for found in (token_logprobs(kept, row), token_logprobs(kept, row)):
            for one, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(one, wanted, rtol=1e-4, atol=2e-5)
    assert len([*kept.features.folder.iterdir()]) == 2
    for parameter in trained:
        parameter.requires_grad_(True)


def test_a_server_is_handed_what_the_family_declares(policy, make_image, make_task):
    family = policy.family
    for server in SERVERS - family.servers.keys():
        with pytest.raises(ConfigError, match=f"engine {server}: does not know {family.name}; it serves internvl, "):
            served_as(family, server)
    for server in family.servers:
        settings = served_as(family, server).tokenizer_config({"processor_class": "P", "kept": 1}, "<end>")
        assert settings["kept"] == 1
        names = [name for name, _ in policy.model.named_parameters()]
        assert len({served_as(family, server).weight_name(name) for name in names}) == len(names), "prefixes"
    if family.servers and family.sees_images:
        prompt = Encoder(policy.tokenizer, family, family.budget, 4096)(make_task("<image>", make_image(130, 70, 1)))
        slot = prompt.slots[0]
        pixels = prompt.pixels[: slot.tiles]
        if "vllm" in family.servers:
            values = family.vllm_fields(pixels, slot)
            assert {how for _, how in values.values()} <= {"flat", "batched", "shared"}
            assert len(values["pixel_values"][0]) == slot.tiles
        if "sglang" in family.servers:
            values = family.sglang_fields(pixels, slot)
            assert len(values.pop("feature")) == slot.tiles
            assert all(len(more) == 1 for more in values.values())


def test_weights_are_saved_as_they_were_stored(policy, tmp_path):
    save_policy(policy, tmp_path / "saved")
    before, after = (read_headers(weight_files(folder)) for folder in (policy.folder, tmp_path / "saved"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape, f"{name}: transposed_experts"


def test_packed_answers_have_the_logprobs_of_plain_rows(policy, make_task):
    """The forest kernels know the attention of the language model."""
    family = policy.family
    if family.github_type is not None:
        pytest.skip(
            "tests/models/test_load.py and test_convert.py compare InternVL with transformers and the official code"
        )
    prompt = Encoder(policy.tokenizer, family, family.budget, 4096)(make_task("What is two and three? Tell me."))
    answers = tuple(tuple(range(20 + 7 * i, 60 + 9 * i)) for i in range(3))
    plain = family.auto_class.from_pretrained(policy.folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        got, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, answers)]))
        rows = [plain(input_ids=torch.tensor([[*prompt.token_ids, *answer]])).logits[0] for answer in answers]
    expected = [
        torch.log_softmax(row[len(prompt) - 1 : -1], -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        for row, answer in zip(rows, answers, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_type_from_a_file_is_never_taken_for_a_path():
    with pytest.raises(KeyError):
        family_class("os:getcwd")


def test_a_server_gets_the_tokenizer_settings_that_it_can_read():
    served = ServedAs(hidden=("processor_class",), lent=("video_token", "other"))
    settings = {"processor_class": "P", "extra_special_tokens": {"other": "<o>"}}
    assert served.tokenizer_config(settings, "<end>") == {
        "extra_special_tokens": {"other": "<o>"}, "video_token": "<end>",
    }  # fmt: skip
    assert replace(served, lent=()).tokenizer_config({"a": 1}, "<end>") == {"a": 1}
