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
from foveate.tools.import_verl import easyr1_table, import_script, mapping_table
from foveate.tools.import_verl.defaults import VERSIONS, Version
from foveate.tools.import_verl.given import Given
from foveate.tools.import_verl.launch import read_launch
from foveate.tools.import_verl.settings import _cluster

GROUNDING = """#!/usr/bin/env bash
export PROJECT="boxes"
export OUT="${OUT:-runs/${PROJECT}}"
export BATCH="${BATCH:-64}"
SPREAD=4
if [ "$1" = wide ]; then
    SPREAD=2
fi
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


def launch_of(tmp_path, *settings, program="verl.trainer.main_ppo", before="", options=""):
    """A script that launches with these settings, and what a recipe needs."""
    path = tmp_path / "launch.sh"
    needed = ["actor_rollout_ref.model.path=m", "data.train_files=a.parquet", "data.val_files=b.parquet"]
    usual = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8", "actor_rollout_ref.rollout.name=vllm"]
    usual += ["data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=64"]
    words = " ".join([*needed, *usual, *settings])
    path.write_text(f"{before}\npython3 -m {program} {options} {words}\n")
    return path


def settings_of(tmp_path, *settings, rows=640, version=None, **more):
    """The settings that such a script becomes, and what it says cannot be honoured."""
    imported = import_script(launch_of(tmp_path, *settings, **more), {}, rows, version=version)
    return recipe_of(imported, tmp_path), imported


A, R = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."


def test_a_script_becomes_a_recipe_with_its_values(script, tmp_path):
    imported = import_script(script, {"WORLD_SIZE": "2"}, 1000, arguments=["wide"])
    settings = recipe_of(imported, tmp_path)
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
    assert (settings.cluster.nodes, settings.cluster.gpus_per_node) == (2, 4)
    assert settings.cluster.engines * settings.cluster.engine_tensor_parallel == 8
    assert settings.cluster.offload
    assert settings.cluster.sequence_parallel == 2
    assert (settings.eval.every, settings.algorithm.resample_rounds, settings.rollout.engine) == (5, 3, "vllm")


def test_every_key_is_accounted_for_once(script):
    imported = import_script(script, {}, 1000)
    keys = [word.text.lstrip("+").partition("=")[0] for word in read_launch(script, {}, []).arguments]
    told = [
        line.partition("=")[0].partition(":")[0] for line in (*imported.mapped, *imported.no_effect, *imported.refused)
    ]
    given = [key for key in told if key in keys]
    assert sorted(given) == sorted(keys)
    refused = "\n".join(imported.refused)
    assert "trainer.nnodes: needs $WORLD_SIZE, which neither the script nor the environment sets" in refused
    assert "actor_rollout_ref.actor.clip_ratio_low=0.2: gspo has its own clip range" in refused
    assert "algorithm.filter_groups.metric=acc" in refused


def test_a_number_that_was_not_read_is_not_written(script, tmp_path):
    imported = import_script(script, {}, 1000)
    assert "cluster" not in imported.recipe
    assert recipe_of(imported, tmp_path).cluster == ClusterSettings()
    with pytest.raises(ConfigError, match=r"data.train_batch_size was not read \(line 2: the output of nproc\)"):
        settings_of(tmp_path, "data.train_batch_size=$(nproc)")


def test_a_path_with_an_unset_variable_is_what_bash_passes_and_is_named(tmp_path):
    settings, imported = settings_of(tmp_path, "data.train_files=$DATA/train.parquet")
    assert settings.data.train == ("/train.parquet",)
    assert any(line.startswith("data.train_files: needs $DATA") for line in imported.refused)


def test_the_environment_comes_before_a_default_of_the_script(script, tmp_path):
    settings = recipe_of(import_script(script, {"OUT": "elsewhere", "BATCH": "128"}, 1000), tmp_path)
    assert (settings.train.prompts_per_step, settings.run) == (128, "elsewhere")


def test_epochs_need_to_know_the_rows(script, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.total_epochs=3 counts passes over the data, a recipe counts steps"):
        import_script(script, {}, None)
    settings, imported = settings_of(tmp_path, "trainer.total_training_steps=70", rows=None)
    assert settings.train.steps == 70
    assert any("--rows says when" in line for line in imported.refused)


def test_a_run_ends_at_the_earlier_of_epochs_and_steps(tmp_path):
    both = ["trainer.total_epochs=2", "trainer.total_training_steps=7"]
    assert settings_of(tmp_path, *both, rows=640)[0].train.steps == 7
    assert settings_of(tmp_path, *both, rows=128)[0].train.steps == 4


@pytest.mark.parametrize(("filtered", "sizes"), [(False, (96, 3, 12)), (True, (32, 1, 12))])
def test_a_step_has_the_prompts_that_are_drawn_at_once_unless_groups_are_filtered(tmp_path, filtered, sizes):
    sized = ["data.gen_batch_size=96", "data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=32"]
    sized += ["trainer.total_epochs=2", f"algorithm.filter_groups.enable={filtered}"]
    settings, _ = settings_of(tmp_path, *sized, rows=640)
    assert (settings.train.prompts_per_step, settings.train.updates_per_step, settings.train.steps) == sizes


def test_verls_defaults_are_filled_in_and_named(tmp_path):
    settings, imported = settings_of(tmp_path)
    assert settings.algorithm.loss == {"aggregate": "token-mean", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    assert settings.model.trainable == ("vision", "projector", "language")
    assert settings.model.gradient_checkpointing
    assert (settings.optim.weight_decay, settings.optim.betas) == (0.01, (0.9, 0.999))
    assert settings.train.steps == 30 * 10
    assert settings.reward.name == "by_source"
    assert settings.reward.settings["rewards"]["hiyouga/geometry3k"] == "geo3k"
    named = {line.partition("=")[0] for line in imported.filled}
    assert {A + "clip_ratio_c", A + "loss_agg_mode", "vision tower", "reward by data_source", A + "optim.lr"} <= named
    assert any("defaults are those of verl 0.10" in line for line in imported.notes)


def test_a_mini_batch_that_is_not_given_has_256_prompts(tmp_path):
    path = launch_of(tmp_path, "data.train_batch_size=1024")
    path.write_text(path.read_text().replace("actor_rollout_ref.actor.ppo_mini_batch_size=64", ""))
    assert recipe_of(import_script(path, {}, 4096), tmp_path).train.updates_per_step == 4


def test_defaults_are_those_of_the_version(tmp_path):
    old, new = (settings_of(tmp_path, version=version)[0].algorithm.loss for version in ("0.3", "0.5"))
    assert old["entropy_coefficient"] == 0.001
    assert "dual_clip" not in old
    assert "entropy_coefficient" not in new
    assert all(Version(name, "").defaults for name in VERSIONS)
    with pytest.raises(ConfigError, match=r"verl 7\.1: the known versions are 0\.2, "):
        settings_of(tmp_path, version="7.1")


def test_a_checkout_around_the_script_says_its_version_and_defaults(tmp_path):
    config = tmp_path / "verl" / "trainer" / "config"
    config.mkdir(parents=True)
    (tmp_path / "verl" / "version").mkdir()
    (tmp_path / "verl" / "version" / "version").write_text("0.7.0.dev\n")
    (config / "ppo_trainer.yaml").write_text("trainer:\n  total_epochs: 4\ndata:\n  train_files: x\n")
    folder = tmp_path / "examples"
    folder.mkdir()
    imported = import_script(launch_of(folder), {}, 640)
    assert recipe_of(imported, tmp_path).train.steps == 4 * 10
    assert any("verl 0.7 (0.7.0.dev, the checkout in" in line for line in imported.notes)


def test_internvl_has_its_vision_tower_frozen_as_in_the_fork(tmp_path):
    settings, imported = settings_of(tmp_path, "actor_rollout_ref.model.path=OpenGVLab/InternVL3_5-8B-MPO")
    assert settings.model.trainable == ("projector", "language")
    assert any(line.startswith("vision tower=frozen") for line in imported.filled)
    settings, _ = settings_of(tmp_path, A + "freeze_vision_tower=true")
    assert settings.model.trainable == ("projector", "language")


@pytest.mark.parametrize("no", ["false", "False", "FALSE", "'false '"])
def test_a_boolean_is_false_in_any_case(tmp_path, no):
    keys = [
        A + "use_kl_loss",
        "algorithm.use_kl_in_reward",
        A + "fsdp_config.param_offload",
        "algorithm.filter_groups.enable",
    ]
    settings, _ = settings_of(tmp_path, *[f"{key}={no}" for key in keys], A + "kl_loss_coef=0.01")
    assert "kl_coefficient" not in settings.algorithm.loss
    assert (settings.algorithm.reward_kl, settings.algorithm.resample_rounds) == (None, None)
    assert not settings.cluster.offload


@pytest.mark.parametrize(
    ("kind", "estimator", "named"),
    [
        ("k3", "k3", "not clamped"),
        ("low_var_kl", "k3", "not clamped"),
        ("mse", "k2", ""),
        ("k3+", "k2", "gradient is that of k2"),
    ],
)
def test_the_kl_term_is_mapped_and_the_clamp_of_k3_named(tmp_path, kind, estimator, named):
    settings, imported = settings_of(tmp_path, A + "use_kl_loss=True", f"{A}kl_loss_type={kind}")
    assert settings.algorithm.loss["kl_coefficient"] == 0.001
    assert settings.algorithm.loss["kl_estimator"] == estimator
    assert named in "\n".join(line for line in imported.refused if "kl_loss_type" in line)


@pytest.mark.parametrize(
    ("advantage", "mode", "name", "loss"),
    [
        ("rloo", "vanilla", "rloo", {"aggregate": "token-mean"}),
        ("remax", "vanilla", "remax", {"aggregate": "token-mean"}),
        ("opo", "vanilla", "opo", {"aggregate": "token-mean"}),
        ("gpg", "gpg", "gpg", {"aggregate": "token-mean"}),
        ("grpo", "sapo", "sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
        ("grpo", "cispo", "cispo", {"aggregate": "token-mean", "clip_low": 0.2, "clip_high": 0.2}),
        (
            "grpo", "kl_cov", "kl_cov",
            {"aggregate": "token-mean", "share": 0.0002, "penalty": 0.1},
        ),
        (
            "grpo", "dppo_kl", "dppo",
            {"aggregate": "token-mean", "divergence": "kl", "limit_low": 0.2, "limit_high": 0.2, "ratio_max": 3.0},
        ),
        (
            "grpo", "clip_cov", "clip_cov",
            {
                "aggregate": "token-mean", "clip_low": 0.2, "clip_high": 0.2,
                "share": 0.0002, "cov_low": 1.0, "cov_high": 5.0,
            },
        ),
    ],
)  # fmt: skip
def test_an_algorithm_that_is_here_is_mapped_with_verls_settings(tmp_path, advantage, mode, name, loss):
    given = [f"algorithm.adv_estimator={advantage}", f"{A}policy_loss.loss_mode={mode}"]
    algorithm = settings_of(tmp_path, *given)[0].algorithm
    assert (algorithm.name, algorithm.loss) == (name, loss)


def test_ppo_has_the_critic_of_the_launch(tmp_path):
    given = ["algorithm.adv_estimator=gae", "algorithm.lam=0.9", "critic.optim.lr=2e-5", "trainer.critic_warmup=3"]
    algorithm = settings_of(tmp_path, *given)[0].algorithm
    assert (algorithm.name, algorithm.advantage) == ("ppo", {"gamma": 1.0, "lam": 0.9})
    critic = algorithm.critic
    assert critic is not None
    assert (critic.lr, critic.warmup_steps, critic.clip, critic.lam) == (2e-5, 3, 0.5, 0.9)


@pytest.mark.parametrize(
    "given", ["algorithm.adv_estimator=gdpo", A + "policy_loss.loss_mode=dro", A + "loss_agg_mode=token-sum"]
)
def test_an_algorithm_that_is_not_here_is_refused(tmp_path, given):
    with pytest.raises(ConfigError, match=r"line 2: \S+=\w\S+ has no counterpart here"):
        settings_of(tmp_path, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.train_batch_size=99999999999999999999", "is not a whole number"),
        ("data.train_batch_size=many", "=many is not a whole number of at least 1"),
        (A + "optim.lr=[1]", "is not a number"),
        (A + "optim.betas=0.9", "is not a list of 2 numbers"),
        (A + "use_kl_loss=perhaps", "is not true or false"),
        (R + "name='[a,b]'", "is not a text"),
        ("custom_reward_function.path='{a:1}'", "is not a text"),
        ("algorithm.adv_estimator=$(cat name)", "was not read"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_key(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message) as refused:
        settings_of(tmp_path, given)
    assert given.partition("=")[0] in str(refused.value)


def test_a_loss_without_a_ratio_names_that_verl_clips_one(tmp_path):
    _, imported = settings_of(tmp_path, "algorithm.adv_estimator=rloo", A + "ppo_mini_batch_size=16")
    assert any("exact for one update of a step only" in line for line in imported.refused)


def test_lora_decay_schedule_and_seed_are_mapped(tmp_path):
    model = "actor_rollout_ref.model."
    given = [f"{model}lora_rank=8", f"{model}lora_alpha=24", f"{model}target_modules=[q_proj,v_proj]", "data.seed=5"]
    given += [A + "optim.weight_decay=0.1", A + "optim.lr_warmup_steps_ratio=0.1", A + "optim.lr_scheduler_type=cosine"]
    settings, _ = settings_of(tmp_path, *given)
    lora = settings.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (8, 24, ("q_proj", "v_proj"))
    assert (settings.optim.weight_decay, settings.optim.warmup_steps, settings.optim.schedule) == (0.1, 30, "cosine")
    assert settings.seed == 5


def test_a_tracker_is_mapped_where_it_is_installed(tmp_path):
    settings, imported = settings_of(tmp_path, """trainer.logger='["console","tensorboard","clearml"]'""")
    assert settings.log.to == ("tensorboard",)
    assert any("clearml is not known here" in line for line in imported.refused)


def test_an_asynchronous_run_counts_in_mini_batches(tmp_path):
    given = [
        "data.train_batch_size=0",
        "async_training.require_batches=2",
        "async_training.trigger_parameter_sync_step=3",
    ]
    program = "verl.experimental.fully_async_policy.fully_async_main"
    settings, imported = settings_of(tmp_path, *given, "rollout.total_rollout_steps=7680", program=program)
    train = settings.train
    assert (train.prompts_per_step, train.updates_per_step, train.steps) == (64 * 6, 6, 20)
    assert any("set rollout.staleness" in line for line in imported.refused)


def test_a_gpu_budget_holds_the_longest_row(tmp_path):
    given = [A + "use_dynamic_bsz=True", A + "ppo_max_token_len_per_gpu=512", "data.max_response_length=4096"]
    settings, imported = settings_of(tmp_path, *given)
    assert settings.train.tokens_per_micro_batch == 512 + 4096
    assert any("is raised to hold one longest prompt and answer" in line for line in imported.refused)


def test_a_file_that_launches_nothing_is_refused(tmp_path):
    path = tmp_path / "other.sh"
    path.write_text("echo hello\n")
    with pytest.raises(DataError, match="no line launches verl"):
        import_script(path, {}, 10)
    path.write_text("torchrun -m verl.trainer.fsdp_sft_trainer data.train_files=x\n")
    with pytest.raises(DataError, match=r"launches verl\.trainer\.fsdp_sft_trainer, which is no reinforcement"):
        import_script(path, {}, 10)


def test_a_reward_function_of_a_file_is_named_by_its_path(script, tmp_path):
    script.write_text(GROUNDING.replace("anywhere/verl/utils/reward_score/grounding.py", "mine.py"))
    reward = recipe_of(import_script(script, {}, 1000), tmp_path).reward
    assert reward.name == "mine.py:compute_score"
    assert reward.settings == {"reward_type": "mix"}


def test_the_command_writes_the_recipe_and_prints_the_account(script, tmp_path):
    out = tmp_path / "made.yaml"
    command = ["import-verl", str(script), "wide", "--rows", "1000", "--out", str(out)]
    result = CliRunner().invoke(app, command, env={"WORLD_SIZE": "2"})
    assert result.exit_code == 0
    assert load_recipe(out, [], RLSettings).cluster.sequence_parallel == 2


def test_the_log_probs_of_the_engine_are_the_old_ones_where_verl_takes_them(script, tmp_path):
    given = "algorithm.rollout_correction."
    script.write_text(GROUNDING.replace("algorithm.adv_estimator", f"{given}bypass_mode=True algorithm.adv_estimator"))
    assert recipe_of(import_script(script, {"WORLD_SIZE": "2"}, 1000), tmp_path).algorithm.old_logprobs == "engine"
    text = script.read_text().replace(f"{given}bypass", f"{given}rollout_is=token {given}bypass")
    script.write_text(text)
    imported = import_script(script, {"WORLD_SIZE": "2"}, 1000)
    assert any(f"{given}rollout_is" in line and "the ratio of the loss has these" in line for line in imported.refused)


def test_the_docs_hold_the_tables_of_the_code():
    docs = (Path(__file__).parent.parent.parent / "docs" / "recipes.md").read_text()
    assert mapping_table() in docs
    assert easyr1_table() in docs


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
    prefix = "actor_rollout_ref."
    given = {
        "trainer.nnodes": nodes, "trainer.n_gpus_per_node": gpus,
        f"{prefix}actor.ulysses_sequence_parallel_size": row, f"{prefix}rollout.tensor_model_parallel_size": joined,
    }  # fmt: skip
    launch = Given("launch", given, {}, Version("0.10", "").defaults)
    cluster = ClusterSettings(**_cluster(launch))
    found = (cluster.nodes, cluster.gpus_per_node, cluster.engines, cluster.sequence_parallel)
    assert (*found, cluster.engine_tensor_parallel) == expected
    assert len(launch.refused) == (row, joined).count(8) * (nodes == 1)
