"""LLaVA-OneVision: tiles of a grid, features cut to the image, and templates that put images first."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from family_cases import build_family
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.models.policy import load_policy

SIZES = [(130, 70), (56, 56), (17, 300), (640, 480), (900, 31), (1, 400), (333, 1001), (168, 112), (60, 57)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_family(tmp_path_factory.mktemp("llava") / "model", "llava_onevision")


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(str(folder))


def picture(size):
    return PIL.Image.fromarray(np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pinpoints(family, budget):
    return [[56 * i, 56 * j] for i, j in family.grids if i * j <= budget]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers_processor(size, policy, folder):
    family, image = policy.family, picture(size)
    for budget in (6, 4, 1):
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(
            folder, image_grid_pinpoints=pinpoints(family, budget)
        )
        alone = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(family.pixels(image, budget), alone, rtol=0, atol=1e-6)
        assert family.shape(*size, budget).entries == len(alone)
    several = processor([[image, image]], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(family.pixels(image, family.share(6, 2)), several[:1], rtol=0, atol=1e-6)


def test_token_counts_from_sizes_equal_transformers_on_600_sizes(policy):
    family, generator = policy.family, np.random.default_rng(2)
    for budget in (6, 2):
        images = SimpleNamespace(image_grid_pinpoints=pinpoints(family, budget))
        peer = SimpleNamespace(image_processor=images, num_image_tokens=16, vision_aspect_ratio="anyres_max_2")
        peer._get_unpadded_features = MethodType(LlavaOnevisionProcessor._get_unpadded_features, peer)
        for _ in range(300):
            width, height = (int(2 ** generator.uniform(2, 11)) for _ in range(2))
            wanted = LlavaOnevisionProcessor._get_number_of_features(peer, height, width, 56, 56)
            assert family.shape(width, height, budget).tokens == wanted, (width, height)


@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_transformers(size, policy):
    family = policy.family
    shape, pixels = family.shape(*size, family.budget), family.pixels(picture(size), family.budget)
    with torch.no_grad():
        wanted = policy.model.get_image_features(
            pixel_values=pixels[None], image_sizes=torch.tensor([size[::-1]]), batch_num_images=torch.tensor([1])
        ).pooler_output[0]
        got = family.features(policy.model, pixels, [shape.layout]).embeddings
    assert len(got) == shape.tokens
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_images_stand_first_and_several_are_one_tile_each(policy, make_task, make_image):
    encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)
    one = encode(make_task("What is <image> here?", make_image(168, 112)))
    text = policy.tokenizer.decode(one.token_ids)
    images = "<image>" * one.slots[0].count
    assert text == f"<|im_start|>user {images}\nWhat is \n here?<|im_end|><|im_start|>assistant\n"
    two = encode(make_task("<image><image>Which?", make_image(168, 112), make_image(90, 300)))
    assert [(slot.count, slot.tiles) for slot in two.slots] == [(17, 1), (17, 1)]
    assert one.slots[0].tiles == 7
    frames = encode(make_task("Frame1: <image>\nFrame2: <image>", make_image(90, 90), make_image(90, 90)))
    assert [slot.tiles for slot in frames.slots] == [1, 1]


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'; anyres_max_N is known"),
        (
            "config.json",
            {"vision_feature_select_strategy": "default"},
            "'default' features of layer -1; only 'full'",
        ),
        ("config.json", {"image_grid_pinpoints": [[56, 57]]}, "image processor are not those of config.json"),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "is not the vision tower's 56 x 56"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2; only 3 is known"),
    ],
)
def test_what_is_not_built_is_refused(file, changes, said, folder, tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    (made / file).write_text(json.dumps(json.loads((made / file).read_text()) | changes))
    with pytest.raises(DataError, match=said):
        load_policy(str(made))


def test_grids_that_do_not_fit_tiles_are_refused(folder, tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    for sizes, said in (([[56, 57]], r"holds \[56, 57\]; two multiples of 56"), ([[56, 112]], r"lacks \[56, 56\]")):
        for file in ("config.json", "preprocessor_config.json"):
            content = json.loads((made / file).read_text()) | {"image_grid_pinpoints": sizes}
            (made / file).write_text(json.dumps(content))
        with pytest.raises(DataError, match=said):
            load_policy(str(made))


def test_the_word_image_in_a_row_is_an_error_of_the_row(policy, make_task):
    from foveate.data.conversations import IMAGE_WORD
    from foveate.records import Message

    task = replace(make_task("?"), messages=(Message("user", f"What is {IMAGE_WORD}?"),))
    with pytest.raises(DataError, match="row 3, field prompt: contains the placeholder of an image"):
        Encoder(policy.tokenizer, policy.family, 1, 2048)(task)
