from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from foveate.config.algorithm import TeacherSettings
from foveate.datasets.shapes import KINDS, shape_rows
from foveate.environments.calls import hermes_call
from foveate.models import tiny
from foveate.models.policy import load_policy
from foveate.models.tiny import CALL_WORDS, SPECIALS, TinySize, add_call_words, build_tiny, tiny_config, tiny_tokenizer
from foveate.train.teacher import check_teachers

SMALL = TinySize(tile=56, vision_width=32, vision_layers=1, vision_ffn=64, width=64, layers=2, head_dim=16, ffn=96)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(640)


def test_the_same_seed_gives_the_same_files(tmp_path):
    first = build_tiny(tmp_path / "first", SMALL, seed=3)
    second = build_tiny(tmp_path / "second", SMALL, seed=3)
    other = build_tiny(tmp_path / "other", SMALL, seed=4)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_the_student_has_a_quarter_of_the_parameters_of_the_demo_and_its_tokens(tmp_path):
    student, teacher = load_policy(str(build_tiny(tmp_path, tiny.SMALL))), load_policy("demo")
    sizes = [sum(parameter.numel() for parameter in policy.model.parameters()) for policy in (student, teacher)]
    assert sizes[0] == pytest.approx(sizes[1] / 4, rel=0.01)
    check_teachers(TeacherSettings(path="demo"), str(tmp_path), 1.0)


def test_building_leaves_the_global_generator_alone_and_prints_nothing(tmp_path, capfd):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    build_tiny(tmp_path, SMALL)
    assert torch.equal(torch.rand(3), wanted)
    assert capfd.readouterr() == ("", "")


def test_the_folder_is_an_ordinary_one_of_the_family(tmp_path):
    folder = build_tiny(tmp_path, SMALL)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert model.config.text_config.model_type == "qwen3"
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    features = model.get_image_features(torch.zeros(2, 3, 56, 56)).pooler_output
    assert features.shape == (2, model.config.image_seq_length, 64)
    assert load_policy(str(folder)).family.tokens_per_tile == model.config.image_seq_length
    content = json.loads((folder / "config.json").read_text())
    assert content["tie_word_embeddings"] is False
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer(640).get_vocab()


def test_words_for_calls_leave_the_others_what_they_were(tmp_path):
    before = load_policy(str(build_tiny(tmp_path / "before", SMALL)))
    add_call_words(build_tiny(tmp_path / "after", SMALL))
    after = load_policy(str(tmp_path / "after"))
    call = hermes_call("zoom", {"image": 1, "box": [100, 200, 345, 999]})
    ids = after.tokenizer.encode(call)
    assert len(ids) == 2 + 3 + 12 < len(before.tokenizer.encode(call)) / 3
    click = after.tokenizer.encode(hermes_call("click", {"x": 740, "y": 917}))
    assert len(click) == 3 + 6
    assert {*after.tokenizer.convert_tokens_to_ids([*CALL_WORDS[2:]])} <= {*ids, *click}
    other = hermes_call("mark", {"box": [1, 2]})
    assert after.tokenizer.decode(after.tokenizer.encode(other), skip_special_tokens=True) == other
    assert after.tokenizer.decode(ids, skip_special_tokens=True) == call
    assert after.family.stop_ids == (after.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    prompt = "<|im_start|>user\nLocate <ref>the left red circle</ref><|im_end|>\n<|im_start|>assistant\n[[1,2"
    old, new = (torch.tensor([policy.tokenizer.encode(prompt)]) for policy in (before, after))
    known = before.tokenizer.get_vocab()
    assert before.tokenizer.convert_ids_to_tokens(old[0]) == after.tokenizer.convert_ids_to_tokens(new[0])
    with torch.no_grad():
        first, second = (
            AutoModelForImageTextToText.from_pretrained(tmp_path / name)(input_ids=ids).logits
            for name, ids in (("before", old), ("after", new))
        )
    kept = {word: number for word, number in after.tokenizer.get_vocab().items() if word in known}
    assert len(kept) > 0.95 * len(known)
    torch.testing.assert_close(second[..., [*kept.values()]], first[..., [known[word] for word in kept]])


def test_a_padded_vocabulary_widens_embedding_and_head(tmp_path):
    policy = load_policy(str(build_tiny(tmp_path, SMALL, padded_vocabulary=900)))
    assert policy.part("head").weight.shape == (900, 64)
    assert len(policy.tokenizer) < 900


@pytest.mark.parametrize("size", [TinySize(), SMALL, TinySize(tile=448)])
def test_a_tile_gives_the_tokens_that_the_docstring_says(size, tokenizer):
    config = tiny_config(size, tokenizer)
    assert config.image_seq_length == (size.tile / size.patch / 2) ** 2


def test_the_default_size_is_small(tmp_path):
    folder = build_tiny(tmp_path)
    assert (folder / "model.safetensors").stat().st_size < 10_000_000


@pytest.mark.parametrize(
    "text", ["the small red circle", "naïve 狐 🦊", "  two  spaces\n\n\ttab", "don't 12345 x=3.5%", "\x00\x7f"]
)
def test_the_tokenizer_can_spell_any_text(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_one_token_and_words_of_the_task_are_few(tokenizer):
    assert tokenizer.tokenize("[[123,45,6,1000]]")[:4] == ["[[", "1", "2", "3"]
    for row in shape_rows(0, "train", 50, kinds=KINDS):
        question = row["extra_info"]["question"]
        assert len(tokenizer.encode(question)) == len(question.split())


def test_special_tokens_stand_alone_and_have_the_familys_names(tokenizer):
    vocabulary = tokenizer.get_vocab()
    for word in SPECIALS:
        assert tokenizer.encode(f"a{word}b")[1] == vocabulary[word]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.start_image_token == "<img>"
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.end_image_token == "</img>"
    assert len(tokenizer) <= 640
