from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from family_cases import QUICK, TEXT_MODELS, VISION_MODELS, build_family, plain_inputs
from safetensors.torch import load_file, save_file
from slow_cases import slow_but
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from foveate.algorithms.policy_losses import grpo
from foveate.algorithms.supervised import sft_total
from foveate.algorithms.targets import Totals
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.data.images import read_image
from foveate.encoding.encode import Encoder
from foveate.encoding.family import budget_of
from foveate.errors import DataError
from foveate.models.checkpoint.convert import convert
from foveate.models.families.qwen_vl import QwenVL
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy, parameters_by_part, save_policy
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, SamplingParams
from foveate.rewards.boxes import grounding_reward
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.targets import PolicyRow
from foveate.train.worker import Worker

NAMES = [*VISION_MODELS, *TEXT_MODELS]
PHOTOS = Path(__file__).parent.parent / "data/refphotos/images"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny model by name, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name):
        if name not in made:
            made[name] = build_family(root / name, name)
        return made[name]

    return folder


def plain_model(folder, name):
    auto = AutoModelForImageTextToText if name in VISION_MODELS else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def encoder_of(policy):
    return Encoder(policy.tokenizer, policy.family, policy.family.budget, 2048)


def alone(model, policy, packed):
    """Log-probs of the answers of a tree in plain transformers, each answer in its own row, with its own pixels and the
    positions that the model computes itself."""
    family, prompt, found = policy.family, packed.prompt, []
    for answer in (one.token_ids for one in packed.answers):
        ids = torch.tensor([[*prompt.token_ids, *answer]])
        logits = model(input_ids=ids, use_cache=False, **plain_inputs(family, prompt, ids)).logits[
            0, len(prompt) - 1 : -1
        ]
        found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


def random_answers(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(20, 400, (n,), generator=generator).tolist()) for n in lengths)


@pytest.fixture
def trees_for(make_task, make_image):
    """Packed rows for a policy: without images, with one, with three of unlike shapes."""

    def packed_groups(policy):
        encode = encoder_of(policy)
        tasks = [make_task("What is two and three? Tell me more about the numbers, please.")]
        if policy.family.unit:
            tasks += [
                make_task("<image>\nWhat is shown?", make_image(130, 70, 1)),
                make_task(
                    "<image> and <image>, not <image>", *(make_image(90 * i, 200 - 40 * i, i) for i in (1, 2, 3))
                ),
            ]
        tasks += [make_task("again no image")]
        return [PackedGroup.of_tokens(encode(task), random_answers(i, (4, 1, 19, 30))) for i, task in enumerate(tasks)]

    return packed_groups


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_groups_give_the_logprobs_of_plain_rows(name, attention, folders, trees_for):
    policy = load_policy(str(folders(name)), attention=attention)
    model = plain_model(folders(name), name)
    packed_groups = trees_for(policy)
    with torch.no_grad():
        got, _ = token_logprobs(policy, pack(packed_groups))
        wanted = torch.cat([alone(model, policy, packed) for packed in packed_groups])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_groups_give_the_gradients_of_plain_rows(name, folders, trees_for):
    policy, model = load_policy(str(folders(name))), plain_model(folders(name), name)
    packed_groups = trees_for(policy)
    weights = torch.linspace(-1, 2, sum(packed.trained_tokens for packed in packed_groups)).roll(7)
    (weights * token_logprobs(policy, pack(packed_groups))[0]).sum().backward()
    (weights * torch.cat([alone(model, policy, packed) for packed in packed_groups])).sum().backward()
    plain = dict(model.named_parameters())
    pairs = {key: (p.grad, plain[key].grad) for key, p in policy.model.named_parameters()}
    norm = torch.stack([b.norm() for _, b in pairs.values() if b is not None]).norm()
    for key, (ours, theirs) in pairs.items():
        assert (ours is None) == (theirs is None), key
        if ours is not None:
            assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-6 * norm, key


@pytest.mark.parametrize("name", NAMES)
def test_sampled_answers_carry_the_trainers_logprobs(name, folders, trees_for):
    policy = load_policy(str(folders(name)))
    encode = encoder_of(policy)
    prompts = [packed.prompt for packed in trees_for(policy)]
    engine = NativeEngine(policy, encode.decode)
    requests = [Request(prompt, 11 + i) for i, prompt in enumerate(prompts)]
    answers = engine.generate(requests, SamplingParams(3, 40, temperature=1.0))
    packed_groups = [
        PackedGroup.of_tokens(p, tuple(a.token_ids for a in group)) for p, group in zip(prompts, answers, strict=True)
    ]
    assert max(packed.trained_tokens for packed in packed_groups) > 40
    with torch.no_grad():
        got, _ = token_logprobs(policy, pack(packed_groups))
    sampled = torch.tensor([value for group in answers for answer in group for value in answer.logprobs])
    torch.testing.assert_close(sampled, got, rtol=0, atol=2e-5)
    words = {token for group in answers for answer in group for token in answer.token_ids}
    assert not words & set(policy.family.placeholder_ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_has_the_same_tensors_and_loads_again(name, folders, tmp_path):
    policy = load_policy(str(folders(name)))
    save_policy(policy, tmp_path / "saved")
    again = load_policy(str(tmp_path / "saved"))
    assert again.family == policy.family
    for key, tensor in policy.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_belongs_to_one_part(name, folders):
    policy = load_policy(str(folders(name)))
    parts = parameters_by_part(policy)
    names = [key for part in parts.values() for key in part]
    assert sorted(names) == sorted(key for key, _ in policy.model.named_parameters())
    assert all(parts.values())
    if isinstance(policy.family, QwenVL):
        assert all("merger" in key or "downsample" in key for key in parts["projector"])
        assert not any("merger" in key for key in parts["vision"])


def peer(folder):
    kind = Glm4vImageProcessorPil if folder.name == "glm4v" else Qwen2VLImageProcessorPil
    return kind.from_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
@pytest.mark.parametrize("size", [(130, 70), (56, 56), (17, 300), (640, 480), (900, 31), (28, 28), (333, 1001)])
def test_qwen_patches_equal_transformers_processor(name, size, folders):
    family = load_policy(str(folders(name))).family
    pixels = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    wanted = peer(folders(name))(PIL.Image.fromarray(pixels), return_tensors="pt")
    got = family.pixels(PIL.Image.fromarray(pixels), family.budget)
    frames = got[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1)
    torch.testing.assert_close(frames, wanted["pixel_values"], rtol=0, atol=1e-6)
    shape = family.shape(*size, family.budget)
    assert [1, shape.grid[0] * 2, shape.grid[1] * 2] == wanted["image_grid_thw"][0].tolist()
    assert shape.entries == len(got) == shape.tokens * 4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_qwen_token_counts_from_sizes_equal_transformers_on_600_sizes(name, folders):
    family, processor = load_policy(str(folders(name))).family, peer(folders(name))
    generator = np.random.default_rng(2)
    for _ in range(600):
        width, height = (int(2 ** generator.uniform(4, 12)) for _ in range(2))
        if max(width, height) > 200 * min(width, height):
            continue
        budget = int(2 ** generator.uniform(13, 24))
        limits = {"max_pixels": budget, "min_pixels": family.min_pixels}
        if name == "glm4v":  # of an image twice, as frames of a video
            limits = {"size": {"shortest_edge": 2 * family.min_pixels, "longest_edge": 2 * budget}}
        patches = processor.get_number_of_image_patches(height, width, limits)
        assert family.shape(width, height, budget).entries == patches, (width, height, budget)


@pytest.mark.parametrize("name", ["internvl", *(name for name in VISION_MODELS if name != "llava_onevision")])
def test_the_length_from_random_sizes_and_of_photographs_is_the_length_of_the_prompt(
    name, folders, tiny_policy, make_task
):
    """What the headers say against what comes out of the decoded pictures."""
    policy = tiny_policy if name == "internvl" else load_policy(str(folders(name)))
    encode, generator = encoder_of(policy), np.random.default_rng(8)
    pictures = [read_image(str(path), []) for path in sorted(PHOTOS.glob("*.jpg"))]
    for width, height in (2 ** generator.uniform(4, 9.5, (150, 2))).astype(int).tolist():
        file = io.BytesIO()
        PIL.Image.new("L", (width, height)).save(file, "PNG", compress_level=1)
        pictures.append(read_image(file.getvalue(), []))
    assert len(pictures) > 150
    for picture in pictures:
        task = make_task("<image>\nWhat?", picture)
        prompt = encode(task)
        entries = len(prompt.pixels)
        if isinstance(policy.family, QwenVL):
            tokens = entries // policy.family.merge**2
        else:
            tokens = entries * (policy.family.tokens_per_tile if name == "internvl" else policy.family.tokens)
        text = len(prompt.engine_ids) - len(prompt.slots)
        assert encode.length(task) == len(prompt) == text + tokens, (picture.width, picture.height)


@pytest.mark.parametrize("size", [(130, 70), (56, 56), (17, 300), (640, 480)])
def test_gemma3_squares_equal_transformers_processor(size, folders):
    family = load_policy(str(folders("gemma3"))).family
    image = PIL.Image.fromarray(np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    wanted = Gemma3ImageProcessorPil.from_pretrained(folders("gemma3"))(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(family.pixels(image, 1), wanted, rtol=0, atol=1e-6)


def test_boxes_of_qwen2_5_vl_are_pixels_of_the_resized_picture(folders):
    old, new = (load_policy(str(folders(name))).family for name in ("qwen2_5_vl", "qwen3_vl"))
    assert old.box_frame(640, 480, 10**6) == (644, 476)
    assert new.box_frame(640, 480, 10**6) == (1000, 1000)


def test_a_picture_that_is_too_narrow_is_an_error_of_its_row(folders, make_image, make_task):
    encode = encoder_of(load_policy(str(folders("qwen3_vl"))))
    task = make_task("<image>", make_image(2010, 10))
    with pytest.raises(DataError, match="row 3, field images: an image of 2010 x 10 pixels is too narrow"):
        encode(task)
    assert encode.validation_errors(task)[0][0] == "images"


def test_a_text_model_refuses_images_and_their_limits(folders, make_image, make_task):
    policy = load_policy(str(folders("qwen3")))
    with pytest.raises(DataError, match="row 3, field images: qwen3 is a text-only model"):
        encoder_of(policy)(make_task("<image> what?", make_image(56, 56)))
    with pytest.raises(DataError, match="max_tiles is 4, but qwen3 has no limit in tiles; it sees no images"):
        budget_of(policy.family, max_tiles=4, max_pixels=None)


def test_a_limit_in_another_unit_is_refused(folders, tiny_policy):
    qwen = load_policy(str(folders("qwen3_vl"))).family
    with pytest.raises(DataError, match="max_tiles is 4, but qwen3_vl has no limit in tiles; set max_pixels"):
        budget_of(qwen, max_tiles=4, max_pixels=None)
    with pytest.raises(DataError, match="internvl has no limit in pixels; set max_tiles"):
        budget_of(tiny_policy.family, max_tiles=None, max_pixels=100)
    assert budget_of(qwen, max_tiles=None, max_pixels=5000) == 5000
    assert budget_of(tiny_policy.family, max_tiles=None, max_pixels=None) == 12


def test_the_grounding_reward_reads_boxes_in_the_frame_of_the_family(folders, make_image, make_task):
    encode = encoder_of(load_policy(str(folders("qwen2_5_vl"))))
    task = replace(make_task("<image>Where?", make_image(640, 480)), answer=[250, 250, 500, 500])
    framed = encode.for_graders(task)
    width, height = framed.meta["box_frame"]
    assert (width, height) == encode.family.box_frame(640, 480, encode.budget) != (640, 480)
    text = f"[{width / 4}, {height / 4}, {width / 2}, {height / 2}]"
    assert grounding_reward(text, framed, answer_frame="model").parts["iou"] == 1.0
    assert grounding_reward(text, framed, answer_frame="pixels").parts["iou"] < 0.5
    with pytest.raises(DataError, match="nothing says the frame"):
        grounding_reward(text, task, answer_frame="model")


def _train_group(packed, advantage_G):
    lengths = torch.tensor([len(answer) for answer in packed.answers])
    advantage = advantage_G.repeat_interleave(lengths)
    return PolicyRow(packed, torch.zeros(packed.trained_tokens), advantage, None, None, None)


@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_supervised_and_rl_steps_change_the_parts_that_train_and_no_others(name, folders, trees_for):
    whole = [
        part for part in ("vision", "projector", "language") if part in load_policy(str(folders(name))).family.parts
    ]
    for trained in (whole, whole[:1]):
        worker = Worker(ModelSettings(path=str(folders(name)), trainable=tuple(trained)), OptimSettings(lr=1e-3), 4096)
        packed_groups = trees_for(worker.policy)
        before = {key: tensor.clone() for key, tensor in worker.policy.model.state_dict().items()}
        first = worker.update_sft(packed_groups, "token", sft_total(packed_groups, "token"), 1e-3)
        groups = [_train_group(packed, torch.tensor([1.0, -1.0, 0.5, -0.5])) for packed in packed_groups]
        totals = Totals(
            sum(packed.trained_tokens for packed in packed_groups), 4 * len(packed_groups), len(packed_groups)
        )
        second = worker.update_policy(groups, grpo, totals, 1e-3)
        assert first["optim/grad_norm"] > 0
        assert second["optim/grad_norm"] > 0
        assert second["optim/update_skipped"] == 0
        after = worker.policy.model.state_dict()
        changed = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
        for part, parameters in parameters_by_part(worker.policy).items():
            share = len(changed & parameters.keys()) / len(parameters)
            learns = part in trained or (part == "head" and "language" in trained)
            assert share > 0.6 if learns else share == 0, (part, share)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_batches_give_each_row_the_loss_that_it_has_alone(name, folders, trees_for):
    policy = load_policy(str(folders(name)))
    packed_groups = trees_for(policy)
    with torch.no_grad():
        together = token_logprobs(policy, pack(packed_groups))[0].split(
            [packed.trained_tokens for packed in packed_groups]
        )
        for packed, found in zip(packed_groups, together, strict=True):
            torch.testing.assert_close(
                found.mean(), token_logprobs(policy, pack([packed]))[0].mean(), rtol=1e-5, atol=1e-5
            )


DAMAGE = {
    "wrong shape": ("lm_head.weight", lambda t: t[:10].clone(), r"lm_head.weight has shape \(10, 64\), .* \(700, 64\)"),
    "missing weight": ("lm_head.weight", None, "the weights lack lm_head.weight"),
    "unknown weight": ("extra.weight", lambda _: torch.zeros(2), "the weights also hold extra.weight"),
}


@pytest.mark.parametrize(("key", "change", "said"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3"])
def test_weights_that_do_not_fit_are_refused_in_one_line(name, key, change, said, folders, tmp_path):
    folder = shutil.copytree(folders(name), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    made = None if change is None else change(weights.get(key))
    weights = {other: tensor for other, tensor in weights.items() if other != key} | (
        {} if made is None else {key: made}
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=said) as error:
        load_policy(str(folder))
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_what_a_qwen_folder_lacks_is_named(folders, tmp_path):
    folder = shutil.copytree(folders("qwen3_vl"), tmp_path / "model")
    processor = folder / "preprocessor_config.json"
    content = json.loads(processor.read_text())
    for change, said in (
        ({"size": {}}, "says neither min_pixels and max_pixels nor a size"),
        ({"patch_size": 14}, "patch_size of the image processor is 14, the vision tower's is 16"),
        ({"resample": 2}, "resample is 2; only 3 is known"),
    ):
        processor.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=said):
            load_policy(str(folder))
    processor.unlink()
    with pytest.raises(DataError, match=r"no preprocessor_config\.json; images cannot be prepared"):
        load_policy(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"found pytorch_model\.bin; weights must be"):
        load_policy(str(folder))
    with pytest.raises(DataError, match="model_type is 'qwen3_vl', which has one layout; convert InternVL only"):
        convert(folders("qwen3_vl"), tmp_path / "out", "chat")
