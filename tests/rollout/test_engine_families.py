"""Real servers on models beside the one of the conformance test: other families, and InternVL in the GitHub layout.

Needs the environments that tests/rollout/test_engine_conformance.py needs. A server for each pair, so that this takes
minutes.
"""

from __future__ import annotations

import pytest
import torch
from family_cases import build_family, build_internvl
from test_engine_conformance import NINE_HEADS, SAMPLING, SIZE, Case, make_likely_answers_differ, start

from foveate.encoding.encode import Encoder
from foveate.errors import EngineError
from foveate.models.checkpoint.convert import convert
from foveate.models.policy import load_policy
from foveate.records import SamplingParams
from foveate.rollout.check import check_engine
from foveate.rollout.native.engine import NativeEngine

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
SIZES = {  # heads of 32, the smallest that vLLM computes on CPUs
    "qwen2_5_vl": {**HEADS, "rope_parameters": ROTARY},
    "qwen3_vl": {**HEADS, "head_dim": 32, "rope_parameters": {**ROTARY, "mrope_interleaved": True}},
    "qwen2": HEADS,  # has biases
    "qwen3": {**HEADS, "head_dim": 32},  # has none
    "llama": {**HEADS, "head_dim": 32},
    "qwen3_moe": {**HEADS, "head_dim": 32},  # experts 48 wide, which vLLM pads
}
RECURRENT = {
    **HEADS,
    "head_dim": 32,
    "rope_parameters": {**ROTARY, "mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}
VLLM_SIZES = {
    "qwen2_vl": {**HEADS, "rope_parameters": ROTARY},
    "smolvlm": HEADS,
    "idefics3": HEADS,
    "qwen3_vl_moe": SIZES["qwen3_vl"],
    "qwen3_5": RECURRENT,
    "qwen3_5_moe": RECURRENT,
    "qwen3_5_text": RECURRENT,
    "qwen3_5_moe_text": RECURRENT,
}
"""Those that vLLM alone takes."""
MODELS = {
    **{name: (name, size) for name, size in (SIZES | VLLM_SIZES).items()},
    **{f"{name}-tied": (name, {**size, **TIED}) for name, size in SIZES.items()},
    "qwen2-nine": ("qwen2", NINE_HEADS),
    "qwen2-nine-tied": ("qwen2", {**NINE_HEADS, **TIED}),
    "qwen3-biases": ("qwen3", {**NINE_HEADS, "attention_bias": True, **TIED}),
}
"""Family and changes of its text configuration by name."""
CHAT = {"chat": {}, "chat-tied": TIED}
"""InternVL in the GitHub layout, with changes of its text configuration."""
NO_VLLM = ("qwen3-biases",)
"""Models that vLLM has no place for."""
PAIRS = [
    *(("vllm", name) for name in (*CHAT, *MODELS) if name not in NO_VLLM),
    *(("sglang", name) for name in (*CHAT, *MODELS) if name not in VLLM_SIZES),
]
THROUGH_A_FILE = ("qwen3", "qwen3-tied", "qwen3_moe-tied")
"""Whose weights travel through a file."""
pytestmark = pytest.mark.slow


def build(folder, name):
    """The folder of a model."""
    if name in CHAT:
        build_internvl(folder / "hf", SIZE, text=CHAT[name], vision={})
        convert(folder / "hf", folder / "model", "chat")
        return folder / "model"
    family, changes = MODELS[name]
    return build_family(folder, family, **changes)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def case(request, tmp_path_factory, make_image, make_task):
    engine, name = request.param
    folder = tmp_path_factory.mktemp(name)
    policy = load_policy(str(build(folder, name)))
    assert policy.is_tied == name.endswith(("tied", "biases"))
    if name in CHAT:
        make_likely_answers_differ(policy)
    encoder = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
    tasks = [make_task("the big blue square"), make_task("a red circle above it")]
    if policy.family.unit:
        tasks += [
            make_task("<image>\nWhat is shown?", make_image(168, 56, 1)),
            make_task("<image> above <image>\nthe circle", make_image(56, 112, 3), make_image(224, 168, 4)),
        ]
    transfer = "disk" if name in THROUGH_A_FILE else "broadcast"
    running = start(engine, policy, encoder, transfer=transfer)
    yield Case(running, policy, encoder, [encoder(task) for task in tasks])
    running.close()


def test_the_engine_reads_the_prompts_of_the_trainer(case):
    assert [case.engine.prompt_ids(prompt) for prompt in case.prompts] == [prompt.token_ids for prompt in case.prompts]


def test_logprobs_are_the_trainers_before_and_after_changes_of_all_weights(case):
    assert case.largest_difference() < 1e-4
    for _ in range(5):
        case.change_weights(0.01)
        case.publish()
        assert case.largest_difference(SamplingParams(4, 16, temperature=0.7)) < 1e-4


def test_every_change_of_a_part_shows_and_arrives(case):
    for part in case.policy.family.parts:
        with torch.no_grad():
            for parameter in case.policy.part(part).parameters():
                parameter.mul_(1.3)
        assert case.largest_difference() > 1e-3, part
        case.publish()
        assert case.largest_difference() < 1e-4, part


def test_greedy_answers_are_the_native_engines(case):
    native = NativeEngine.copy_of(case.policy, case.encoder.decode)
    greedy = SamplingParams(samples=2, max_tokens=12, temperature=0.0)
    found, expected = (engine.generate(case.requests(), greedy) for engine in (case.engine, native))
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]


def test_the_parity_check_passes(case):
    assert check_engine(case.engine, case.policy, case.encoder, 1.0, case.version) < 1e-5


def test_groups_are_complete(case):
    assert [len(group) for group in case.engine.generate(case.requests(), SAMPLING)] == [4] * len(case.prompts)


@pytest.mark.parametrize("name", NO_VLLM)
def test_a_weight_without_a_place_in_the_model_of_the_server_is_named(name, tmp_path):
    policy = load_policy(str(build(tmp_path, name)))
    encoder = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
    with pytest.raises(EngineError, match=r"has no place for model\.layers\.0\.self_attn\.o_proj\.bias"):
        start("vllm", policy, encoder)
