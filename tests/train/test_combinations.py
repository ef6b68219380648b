"""Every vision tower with every language model of InternVL, in the GitHub format, and Qwen-VL: rows of a batch do not
touch each other, what is named learns and nothing else does, and adapters are in the weights that are saved."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from checkpoint_cases import CASES, write_chat_folder
from family_cases import VISION_MODELS, build_family
from slow_cases import slow_but

from foveate.config.model import LoraSettings
from foveate.encoding.encode import Encoder
from foveate.models.checkpoint.formats import detect_format
from foveate.models.forward import token_logprobs
from foveate.models.lora import add_adapters, merged_state
from foveate.models.policy import freeze_except, load_policy, parameters_by_part, save_policy
from foveate.parallel.packing import pack
from foveate.records import PackedGroup

PARTS = ("vision", "projector", "language")
SUBSETS = [subset for count in (1, 2, 3) for subset in combinations(PARTS, count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a case, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("chat"), {}

    def folder(case):
        if case not in made:
            made[case] = write_chat_folder(root / case, case) if case in CASES else build_family(root / case, case)
        return made[case]

    return folder


@pytest.fixture
def trees_of(make_task, make_image):
    """Rows without a picture, with one, with three of unlike shapes."""

    def packed_groups(policy):
        encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)
        tasks = [
            make_task("What is two and three?"),
            make_task("<image>\nWhat is shown?", make_image(130, 70, 1)),
            make_task("<image> and <image>, not <image>", *(make_image(90 * i, 200 - 40 * i, i) for i in (1, 2, 3))),
        ]
        return [PackedGroup.of_tokens(encode(task), ((20, 30, 40 + i), (50,))) for i, task in enumerate(tasks)]

    return packed_groups


@pytest.mark.parametrize("case", CASES)
def test_mixed_batches_give_each_row_the_loss_that_it_has_alone(case, folders, trees_of):
    policy = load_policy(str(folders(case)))
    packed_groups = trees_of(policy)
    assert [len(packed.prompt.slots) for packed in packed_groups] == [0, 1, 3]
    with torch.no_grad():
        together = token_logprobs(policy, pack(packed_groups))[0].split(
            [packed.trained_tokens for packed in packed_groups]
        )
        for packed, found in zip(packed_groups, together, strict=True):
            alone = token_logprobs(policy, pack([packed]))[0]
            torch.testing.assert_close(found.mean(), alone.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
@pytest.mark.parametrize("case", slow_but(["300M-qwen3", "qwen3_5"], [*CASES, *VISION_MODELS]))
def test_gradients_are_where_they_should_be_and_nowhere_else(case, modules, folders, trees_of):
    policy = load_policy(str(folders(case)))
    freeze_except(policy, modules)
    token_logprobs(policy, pack(trees_of(policy)))[0].sum().backward()
    learns = {*modules, *(["head"] if "language" in modules else [])}
    for part, parameters in parameters_by_part(policy).items():
        for name, parameter in parameters.items():
            read = case != "llava_onevision" or ".post_layernorm." not in name  # it takes the states before that
            assert (parameter.grad is not None) == (part in learns and read), name
            if parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), name
                # a bias of all keys alike changes no attention
                assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_in_the_weights_that_are_saved_in_the_github_format(case, folders, trees_of, tmp_path):
    policy = load_policy(str(folders(case)))
    modules = ("vision", "language")
    freeze_except(policy, modules)
    add_adapters(policy, LoraSettings(rank=2), modules)
    batch, generator = pack(trees_of(policy)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        start = token_logprobs(policy, batch)[0]
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
        learned = token_logprobs(policy, batch)[0]
        assert (learned - start).abs().max() > 1e-2
        save_policy(policy, tmp_path / "saved", merged_state(policy.model))
        again = token_logprobs(load_policy(str(tmp_path / "saved")), batch)[0]
    assert detect_format(tmp_path / "saved") == "chat"
    torch.testing.assert_close(again, learned, rtol=0, atol=5e-5)
