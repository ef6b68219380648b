from __future__ import annotations

import io
import json
import os
import shutil

import pytest
import torch
from checkpoint_cases import CASES, write_chat_folder
from family_cases import VISION_MODELS, build_family
from rich.console import Console

from foveate.errors import DataError
from foveate.models.policy import load_on_meta, load_policy
from foveate.tools.doctor import environment, examine
from foveate.tools.model_facts import model_facts


def shown(what):
    output = io.StringIO()
    Console(file=output, width=200).print(what)
    return output.getvalue()


@pytest.fixture
def copied(tmp_path, tiny_folder):
    return shutil.copytree(tiny_folder, tmp_path / "a [bold] model")


def test_the_installation_is_told_by_its_versions_and_means():
    facts = environment()
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert facts["cpu"].startswith(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    assert facts["memory"].endswith(" GiB")
    assert all(facts.values())


def test_a_model_is_told_by_what_was_recognised(tiny_policy):
    facts = model_facts(tiny_policy)
    total = sum(p.numel() for p in tiny_policy.model.parameters())
    assert facts["parameters"] == f"{total:,}"
    assert (
        sum(int(facts[f"  {part}"].replace(",", "")) for part in ("vision", "projector", "language", "head")) == total
    )
    assert facts["family"] == "internvl, qwen3 language model"
    assert facts["image"] == "tiles of 56 pixels, 4 tokens each, at most 12 and a thumbnail"
    assert facts["chat template"] == "its own"
    assert facts["image tokens"].startswith("<IMG_CONTEXT> = ")
    assert facts["stop tokens"].startswith("<|im_end|> = ")
    assert facts["dtype"] == "F32"
    assert facts["boxes"] == "thousandths of the image's sides"
    assert facts["missing"] == "nothing"


@pytest.mark.parametrize(
    ("name", "image", "boxes"),
    [
        ("qwen2_5_vl", "28 x 28 pixels a token, 3,136 to 100,000 pixels an image", "pixels of the resized image"),
        ("qwen3_vl", "32 x 32 pixels a token, 3,136 to 100,000 pixels an image", "thousandths of the image's sides"),
        ("qwen3_5", "32 x 32 pixels a token, 3,136 to 100,000 pixels an image", "thousandths of the image's sides"),
        ("gpt_oss", "none, it is a text-only model", "thousandths of the image's sides"),
    ],
)
def test_other_families_are_told_too(name, image, boxes, tmp_path):
    policy = load_policy(str(build_family(tmp_path / name, name)))
    facts = model_facts(policy)
    assert facts["family"].startswith(f"{name}, {name}")
    assert facts["image"] == image
    assert facts["boxes"] == boxes
    parts = [int(facts[f"  {part}"].replace(",", "")) for part in policy.family.parts]
    assert sum(parts) == sum(p.numel() for p in policy.model.parameters())
    assert (facts["image tokens"] == "none") == (name == "gpt_oss")


@pytest.mark.parametrize("name", ["300M-qwen2", "6B-qwen3_moe", "6B-gpt_oss", *VISION_MODELS, "qwen3_moe", "gpt_oss"])
def test_a_model_is_told_without_reading_its_weights(name, tmp_path):
    folder = write_chat_folder(tmp_path / name, name) if name in CASES else build_family(tmp_path / name, name)
    seen = load_on_meta(str(folder))
    assert all(parameter.is_meta for parameter in seen.model.parameters())
    assert model_facts(seen) == model_facts(load_policy(str(folder)))


def test_a_missing_chat_template_is_told(copied):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = copied / name
        if name.endswith(".jinja"):
            path.unlink(missing_ok=True)
        else:
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    assert model_facts(load_policy(str(copied)))["chat template"].startswith("the corrected InternVL template")


def test_names_are_shown_as_they_are_and_not_as_markup(copied):
    assert f"{copied}" in shown(examine(str(copied)))


def test_nothing_asked_shows_the_installation():
    assert "transformers" in shown(examine(None))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="no config"):
        examine(str(tmp_path))
