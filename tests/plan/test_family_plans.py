"""Plans of every family from its folder: sizes, memory of a step, keys and values, states of recurrent layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_cases import build_family
from transformers import CONFIG_MAPPING

from foveate.config.recipe import read_recipe
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, DataError
from foveate.models.families import FAMILIES, family_class
from foveate.models.policy import load_policy
from foveate.models.sizes import RECURRENT, key_value_numbers, state_numbers
from foveate.plan.advice import plan
from foveate.plan.hardware import parse_machines
from foveate.plan.memory import activation_memory, memory_of, shallow, sizes_of
from foveate.plan.report import plan_text
from foveate.plan.time import active_parameters
from foveate.plan.trace import step_memory
from foveate.plan.workload import workload_of
from foveate.records import SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.batch import DecodeJob
from foveate.rollout.native.cache import cached_numbers
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.native.recurrent import Recurrence

QUICK = ("llama", "phi3", "gemma3", "qwen3_vl", "smolvlm")
TRACED_LONG = ("qwen2_vl", "glm4v", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "llava_onevision", "idefics3")


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TRACED_LONG)])
def policy(request, tmp_path_factory):
    return load_policy(str(build_family(tmp_path_factory.mktemp("plan") / request.param, request.param)))


def recipe(policy, *more):
    parts = [part for part in policy.family.parts if part != "head"]
    return read_recipe(
        "shapes_gspo",
        ["data.max_prompt_tokens=512", f"model.path={policy.folder}", f"model.trainable=[{', '.join(parts)}]", *more],
    )


def test_a_plan_counts_what_the_loaded_model_has(policy):
    work = workload_of(recipe(policy), 300, 20, int(policy.family.sees_images))
    assert sizes_of(work.config, work.trainable).total == sum(p.numel() for p in policy.model.parameters())
    text = policy.model.config.get_text_config()
    assert key_value_numbers(text) == cached_numbers(policy) > 0
    kept = {name: weight for name, weight in policy.part("language").named_parameters() if weight.ndim > 1}
    blocks = sum(weight.numel() for name, weight in kept.items() if "layers." in name)
    experts = sum(weight.numel() for name, weight in kept.items() if ".experts." in name)
    assert active_parameters(work.config) == blocks - experts // 2  # 2 of 4 experts
    made = plan(work, parse_machines("1x1xH100-80"))
    assert "tiles; an answer: 20" in plan_text(made)
    assert made.memory.fits(made.machines)


@pytest.mark.slow
def test_small_depths_of_each_kind_of_layer_carry_on_to_the_full_one(policy):
    work = workload_of(recipe(policy), 300, 20, int(policy.family.sees_images))
    counts = (5, 4) if state_numbers(work.config.get_text_config()) else (9, 0)
    deep = shallow(work.config, *counts, vision=3)
    how = {"dtype": torch.float32, "train": work.trainable}
    for checkpointing in (False, True):
        whole = step_memory(deep, work.row, checkpointing=checkpointing, **how)
        changed = replace(work, config=deep, checkpointing=checkpointing)
        assert activation_memory(changed).total == pytest.approx(whole.total, rel=0.02)


def test_states_are_those_of_the_engine(policy, make_task):
    text = policy.model.config.get_text_config()
    if RECURRENT not in (text.to_dict().get("layer_types") or ()):
        assert state_numbers(text) == 0
        return
    prompt = Encoder(policy.tokenizer, policy.family, policy.family.budget, 512)(make_task("What?"))
    engine = NativeEngine(policy, str)
    batch = engine.open(4096)
    batch.waiting.append(DecodeJob(0, Request(prompt, 1), SamplingParams(3, 8, temperature=1.0)))
    engine.step(batch)
    states = [state for state in batch.cache.states.values() if isinstance(state, Recurrence)]
    assert sum(tensor.numel() for state in states for tensor in state._kept) == 3 * state_numbers(text)
    one, two = (memory_of(workload_of(recipe(policy, f"rollout.max_tokens={n}"), 100, 20, 0)) for n in (100, 200))
    token = (two.keys_values - one.keys_values) / 100
    assert one.keys_values - 200 * token == 4 * state_numbers(text)


def test_a_text_model_is_planned_without_images(policy):
    if policy.family.sees_images:
        return
    with pytest.raises(ConfigError, match=r"3 tiles: .* is a text-only model and sees no images"):
        workload_of(recipe(policy), None, None, 3)
    work = workload_of(recipe(policy), None, None, None)
    assert (work.tiles, work.prompt) == (0, 100)
    settings = read_recipe("shapes_gspo", [f"model.path={policy.folder}"])
    with pytest.raises(DataError, match=r"cannot train 'vision': the parts of .* are language"):
        plan(workload_of(settings, 100, 20, None), parse_machines("1x1xH100-80"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_of_the_table_is_planned(model_type):
    layout = "internvl" if model_type == "internvl_chat" else model_type
    config = CONFIG_MAPPING[layout]()
    family = family_class(model_type).planned(config)
    assert family.piece(config).tokens > 0
