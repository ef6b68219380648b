"""Any causal text model of transformers: what is accepted at load, and that it trains, samples and saves as it came."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from family_cases import WINDOW, build_family
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.models.attention import kernels
from foveate.models.checkpoint.inspect import hub_task
from foveate.models.checkpoint.safetensors_io import read_headers, weight_files
from foveate.models.families.proof import MOST_NATS, forest_difference
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy, save_policy
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.tools.model_facts import model_facts

NAMED = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
    "phi3": {},
    "olmo2": {},
    "glm": {},
    "qwen3_5_text": {},
}
"""Changes of the tiny configurations."""


@pytest.fixture(scope="module", params=NAMED)
def folder(request, tmp_path_factory):
    return build_family(tmp_path_factory.mktemp("text") / request.param, request.param, **NAMED[request.param])


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(str(folder))


def test_the_hub_is_told_of_a_text_model_and_of_an_adapter_for_one(folder, tiny_folder, tmp_path):
    assert hub_task(folder) == "text-generation"
    assert hub_task(tiny_folder) == "image-text-to-text"
    for base, task in ((folder, "text-generation"), (tiny_folder, "image-text-to-text")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        assert hub_task(tmp_path) == task


@pytest.fixture
def group(policy, make_task):
    prompt = Encoder(policy.tokenizer, policy.family, 0, 2048)(make_task("What is two and three? Tell me more."))
    return PackedGroup.of_tokens(prompt, [range(20, 24), range(40, 41), range(60, 90)])


def test_a_forest_has_the_logprobs_and_gradients_of_plain_rows(policy, folder, group):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    wanted = []
    for answer in group.answers:
        ids = torch.tensor([[*group.prompt.token_ids, *answer.token_ids]])
        logp = torch.log_softmax(plain(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1], -1)
        wanted.append(logp.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0])
    got, weights = token_logprobs(policy, pack([group]))[0], torch.linspace(-1, 2, group.trained_tokens)
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    policy.model.zero_grad()
    (weights * got).sum().backward()
    (weights * torch.cat(wanted)).sum().backward()
    theirs = dict(plain.named_parameters())
    norm = torch.stack([p.grad.norm() for p in theirs.values() if p.grad is not None]).norm()
    for name, ours in policy.model.named_parameters():
        assert (ours.grad - theirs[name].grad).norm() <= 1e-4 * theirs[name].grad.norm() + 1e-6 * norm, name


def test_sampled_answers_carry_the_trainers_logprobs(policy, group):
    engine = NativeEngine(policy, str)
    answers = engine.generate([Request(group.prompt, 3)], SamplingParams(4, 30, temperature=1.0))[0]
    with torch.no_grad():
        got, _ = token_logprobs(policy, pack([PackedGroup(group.prompt, tuple(answers))]))
    sampled = torch.tensor([value for answer in answers for value in answer.logprobs])
    torch.testing.assert_close(sampled, got, rtol=0, atol=2e-5)


def test_it_is_saved_in_the_layout_that_it_came_in_and_the_doctor_says_the_proof(policy, tmp_path):
    save_policy(policy, tmp_path / "saved")
    before, after = (read_headers(weight_files(folder)) for folder in (policy.folder, tmp_path / "saved"))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert load_policy(str(tmp_path / "saved")).family == policy.family
    assert policy.family.proof <= MOST_NATS
    facts = model_facts(policy)
    assert facts["proof"] == f"{policy.family.proof:.1e} nats from transformers at most"
    assert facts["stop tokens"].startswith("<|im_end|> = ")


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LONGER = r"differ from transformers' by up to \d"
REFUSED = {
    "scores are capped": ("gemma2", {}, r"log-probs in a forest differ from transformers' by up to \d"),
    "logits are scaled": ("cohere", {}, r"differ from transformers' by up to \d"),
    "not attention alone": ("jamba", {}, r"differ from transformers' by up to \d|its stand-in fails"),
    "positions of the longest row": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        r"differ from transformers' by up to \d",
    ),
    "positions of the longest row, in some of the layers": (
        "gemma3_text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6},
            },
        },
        r"differ from transformers' by up to \d",
    ),
    "positions of long rows": (
        "llama",
        {"head_dim": 96, "rope_parameters": {**LONG, "factor": 4.0, "original_max_position_embeddings": 4096}},
        LONGER,
    ),
    "positions of long rows, as Phi-3 has them": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072},
        LONGER,
    ),
    "a head with a bias": ("phi", {}, "its head has a bias"),
    "two sets of keys in a layer": ("diffllama", {}, "its layers do not have one set of keys and values each"),
    "dropout": ("opt", {"dropout": 0.1}, "it computes otherwise while it is trained"),
    "other modules": ("gpt2", {}, "its modules are not called model and lm_head"),
}


@pytest.mark.parametrize(("model_type", "changes", "said"), REFUSED.values(), ids=REFUSED)
def test_the_proof_refuses_what_the_kernels_do_not_know(model_type, changes, said):
    with pytest.raises(DataError, match=f"^{model_type} cannot be trained here: .*(?:{said})"):
        forest_difference(CONFIG_MAPPING[model_type](**changes))


def test_a_window_longer_than_any_row_of_the_proof_is_seen(monkeypatch):
    """Kernels that drop the window stand for a mask that they do not honour."""
    config = CONFIG_MAPPING["mistral"](sliding_window=4096)
    assert forest_difference(config) <= MOST_NATS
    monkeypatch.setattr(kernels, "AttentionOptions", lambda *_: kernels.PLAIN)
    with pytest.raises(DataError, match="differ from transformers'"):
        forest_difference(CONFIG_MAPPING["mistral"](sliding_window=4095))


def test_what_is_refused_is_told_with_its_file(tmp_path):
    folder = build_family(tmp_path / "model", "llama")
    content = json.loads((folder / "config.json").read_text())
    content["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"config\.json: llama cannot be trained here: log-probs in a forest differ"):
        load_policy(str(folder))


TEMPLATES = {
    "<|eot_id|>": "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot_id|>{% endfor %}[assistant]",
    "<|user|>": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>",
}


@pytest.mark.parametrize("word", TEMPLATES)
def test_an_answer_ends_where_the_template_ends_a_turn(word, tmp_path):
    """Also where that is no end token of the tokenizer, as in Gemma 3 and GLM."""
    folder = build_family(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # one of the words of its vocabulary becomes this one
        path = folder / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|plain|>").replace("<|video_pad|>", word))
    (folder / "chat_template.jinja").write_text(TEMPLATES[word])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 10**6]}))
    policy = load_policy(str(folder))
    ids = policy.tokenizer.get_vocab()
    assert policy.family.stop_ids == (ids[word], ids["<|plain|>"], 3)


def test_a_folder_without_a_template_is_told_in_one_line(tmp_path):
    folder = build_family(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"no chat template, .* add chat_template\.jinja"):
        load_policy(str(shutil.copytree(folder, tmp_path / "copy")))
