"""A launch script becomes a recipe that loads, and every key of the script is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.config.cluster import ClusterSettings
from foveate.config.recipe import load_recipe
from foveate.config.runs import RLSettings
from foveate.errors import ConfigError, DataError
from foveate.tools.import_verl import _cluster, import_script, mapping_table, read_overrides

GROUNDING = """#!/usr/bin/env bash
export PROJECT="boxes"
export OUT="${OUT:-runs/${PROJECT}}"
export BATCH="${BATCH:-64}"
<<<<<<< HEAD
SPREAD=4
=======
SPREAD=2
>>>>>>> 1a2b3c4
ray job submit --address=${RAY_ADDRESS} \\
    -- python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=[a.parquet,b.parquet] \\
    data.val_files=c.parquet \\
    data.train_batch_size="${BATCH}" \\
    data.max_prompt_length=1000 \\
    data.max_response_length=24 \\
    data.truncation='error' \\
    custom_reward_function.path=anywhere/verl/utils/reward_score/grounding.py \\
    +custom_reward_function.reward_kwargs.reward_type=mix \\
    actor_rollout_ref.model.path=models/m \\
    actor_rollout_ref.actor.optim.lr=3e-6 \\
    actor_rollout_ref.actor.optim.warmup_style=cosine \\
    actor_rollout_ref.actor.optim.lr_warmup_steps=30 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \\
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048 \\
    actor_rollout_ref.actor.entropy_coeff=0.01 \\
    actor_rollout_ref.actor.clip_ratio_low=0.2 \\
    actor_rollout_ref.actor.policy_loss.loss_mode=gspo \\
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=${SPREAD} \\
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True  \\
    actor_rollout_ref.rollout.name=vllm \\
    actor_rollout_ref.rollout.top_k=-1 \\
    actor_rollout_ref.rollout.n=8 \\
    algorithm.filter_groups.enable=True \\
    algorithm.filter_groups.max_num_gen_batches=4 \\
    algorithm.filter_groups.metric=acc \\
    trainer.default_local_dir=${OUT} \\
    trainer.nnodes=${WORLD_SIZE} \\
    trainer.n_gpus_per_node=8 \\
    trainer.test_freq=5 \\
    trainer.total_epochs=3 2>&1 | tee "${OUT}/log"
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "boxes.sh"
    path.write_text(GROUNDING)
    return path


def recipe_of(imported, tmp_path) -> RLSettings:
    path = tmp_path / "recipe.yaml"
    path.write_text(imported.recipe)
    return load_recipe(path, [], RLSettings)


def test_a_script_becomes_a_recipe_with_its_values(script, tmp_path):
    settings = recipe_of(import_script(script, {"WORLD_SIZE": "2"}, 1000), tmp_path)
    assert (settings.run, settings.model.path) == ("runs/boxes", "models/m")
    assert settings.data.train == ("a.parquet", "b.parquet")
    assert (settings.train.prompts_per_step, settings.train.updates_per_step) == (64, 4)
    assert settings.train.steps == 3 * (1000 // 64)
    assert (settings.optim.lr, settings.optim.warmup_steps, settings.optim.schedule) == (3e-6, 30, "cosine")
    assert (settings.rollout.samples, settings.rollout.top_k, settings.rollout.max_tokens) == (8, 0, 24)
    assert settings.algorithm.name == "gspo"
    assert settings.algorithm.loss == {"entropy_coefficient": 0.01}
    assert settings.reward.name == "grounding"
    assert settings.reward.settings == {"kind": "mix"}
    assert (settings.cluster.nodes, settings.cluster.gpus_per_node, settings.cluster.engines) == (2, 4, 8)
    assert settings.cluster.offload
    assert settings.cluster.sequence_parallel == 2
    assert (settings.eval.every, settings.algorithm.resample_rounds, settings.rollout.engine) == (5, 3, "vllm")


def test_every_key_is_mapped_idle_or_named_as_not_honoured(script):
    imported = import_script(script, {}, 1000)
    keys, unset = read_overrides(script, {})
    told = [line.partition("=")[0].partition(":")[0] for line in imported.account.splitlines() if line.startswith("  ")]
    assert sorted(key.strip() for key in told) == sorted([*keys, *unset])
    refused = "\n".join(imported.refused)
    assert "trainer.nnodes: needs $WORLD_SIZE, which neither the script nor the environment sets" in refused
    assert "actor_rollout_ref.actor.clip_ratio_low=0.2: gspo has its own clip range" in refused
    assert "algorithm.filter_groups.metric=acc" in refused


def test_the_environment_comes_before_a_default_of_the_script(script):
    keys, _ = read_overrides(script, {"OUT": "elsewhere", "BATCH": "128"})
    assert keys["data.train_batch_size"] == 128
    assert keys["trainer.default_local_dir"] == "elsewhere"


def test_epochs_need_to_know_the_rows(script):
    with pytest.raises(ConfigError, match=r"trainer.total_epochs=3 counts passes over the data, a recipe counts steps"):
        import_script(script, {}, None)


def test_a_file_that_launches_nothing_is_refused(tmp_path):
    path = tmp_path / "other.sh"
    path.write_text("echo hello\n")
    with pytest.raises(DataError, match="no line launches verl"):
        import_script(path, {}, 10)


def test_a_reward_function_of_a_file_is_named_by_its_path(script, tmp_path):
    script.write_text(GROUNDING.replace("anywhere/verl/utils/reward_score/grounding.py", "mine.py"))
    reward = recipe_of(import_script(script, {}, 1000), tmp_path).reward
    assert reward.name == "mine.py:compute_score"
    assert reward.settings == {"reward_type": "mix"}


def test_the_command_writes_the_recipe_and_prints_the_account(script, tmp_path):
    out = tmp_path / "made.yaml"
    result = CliRunner().invoke(app, ["import-verl", str(script), "--rows", "1000", "--out", str(out)])
    assert result.exit_code == 0
    assert load_recipe(out, [], RLSettings).rollout.samples == 8


def test_the_docs_hold_the_table_of_the_code():
    docs = (Path(__file__).parent.parent.parent / "docs" / "recipes.md").read_text()
    assert mapping_table() in docs


@pytest.mark.parametrize(
    ("nodes", "gpus", "row", "joined", "expected"),
    [
        (1, 8, 4, 1, (1, 4, 4, 4, 1)),
        (32, 8, 4, 8, (16, 8, 16, 4, 8)),  # an engine takes a whole machine
        (1, 8, 8, 8, (1, 4, 1, 4, 4)),  # what does not fit into half is lowered, and named
        (1, 1, 1, 1, (1, 1, 0, 1, 1)),  # one GPU does both
    ],
)
def test_half_of_the_gpus_learn_and_half_answer(nodes, gpus, row, joined, expected):
    refused: list[str] = []
    prefix = "actor_rollout_ref."
    given = {
        "trainer.nnodes": nodes, "trainer.n_gpus_per_node": gpus,
        f"{prefix}actor.ulysses_sequence_parallel_size": row, f"{prefix}rollout.tensor_model_parallel_size": joined,
    }  # fmt: skip
    values = {name.partition(".")[2]: value for name, value in _cluster(given, refused).items()}
    cluster = ClusterSettings(**values)
    found = (cluster.nodes, cluster.gpus_per_node, cluster.engines, cluster.sequence_parallel)
    assert (*found, cluster.engine_tensor_parallel) == expected
    assert len(refused) == (row, joined).count(8) * (nodes == 1)
