"""SmolVLM and Idefics3: tiles in runs of tokens, and a chat template that knows parts alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from family_cases import PARTED, build_family
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from foveate.data.conversations import IMAGE_WORD
from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.models.policy import load_policy
from foveate.records import Message


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: build_family(tmp_path_factory.mktemp("parted") / name, name) for name in PARTED}
    return made.__getitem__


@pytest.mark.parametrize("name", PARTED)
@pytest.mark.parametrize("size", [(130, 70), (56, 56), (17, 300), (640, 480), (900, 31), (1, 400), (333, 1001)])
def test_tiles_and_text_of_smolvlm_equal_transformers(name, size, folders):
    family = load_policy(str(folders(name))).family
    image = PIL.Image.fromarray(np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for budget in (9, 4, 1):
        processor = Idefics3ImageProcessorPil.from_pretrained(
            folders(name), size={"longest_edge": 56 * math.isqrt(budget)}, return_row_col_info=True
        )
        wanted = processor(image, return_tensors="pt")
        torch.testing.assert_close(family.pixels(image, budget), wanted["pixel_values"][0], rtol=0, atol=1e-6)
        rows, columns = wanted["rows"][0][0], wanted["cols"][0][0]
        words = "<fake_token_around_image>", "<image>", "<global-img>"
        assert family.written(*size, budget) == get_image_prompt_string(rows, columns, 1, *words)
        shape = family.shape(*size, budget)
        assert (shape.runs, shape.entries, shape.tokens) == (n := rows * columns + 1, n, 4 * n)


@pytest.mark.parametrize("name", PARTED)
def test_a_template_of_parts_gets_parts(name, folders, make_task, make_image):
    policy = load_policy(str(folders(name)))
    encode = Encoder(policy.tokenizer, policy.family, 1, 2048)
    text = policy.tokenizer.decode(encode(make_task("<image>What is shown?", make_image(56, 56))).token_ids)
    image = policy.family.image_text.replace("<image>", 4 * "<image>")
    assert text == f"<|im_start|>User:{image}What is shown?<|im_end|>\nAssistant:"
    assert "User: What?" in policy.tokenizer.decode(encode(make_task("What?")).token_ids)


def test_the_word_image_in_a_row_is_an_error_of_the_row(folders, make_task):
    policy = load_policy(str(folders("smolvlm")))
    task = make_task("What?")
    task = replace(task, messages=(Message("user", f"What is {IMAGE_WORD}?"),))
    with pytest.raises(DataError, match="row 3, field prompt: contains the placeholder of an image"):
        Encoder(policy.tokenizer, policy.family, 1, 2048)(task)
