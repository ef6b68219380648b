"""Launches of EasyR1: a YAML file and its overrides become a recipe."""

from __future__ import annotations

import pytest

from foveate.config.recipe import load_recipe
from foveate.config.runs import RLSettings
from foveate.errors import ConfigError
from foveate.tools.import_verl import import_script

CONFIG = """
data: {train_files: a.parquet, val_files: b.parquet, rollout_batch_size: 128, max_response_length: 1024, seed: 3}
algorithm: {adv_estimator: grpo, use_kl_loss: true, kl_penalty: low_var_kl, kl_coef: 1.0e-2}
worker:
  actor:
    global_batch_size: 32
    model: {model_path: m, freeze_vision_tower: true, lora: {rank: 0}}
    optim: {lr: 2e-6, weight_decay: 1.0e-2, lr_warmup_ratio: 0.1}
    offload: {offload_params: true}
  rollout: {n: 5, tensor_parallel_size: 1, limit_images: 4}
  reward: {reward_function: ./score.py:judge}
trainer: {total_epochs: 2, max_steps: null, save_checkpoint_path: null, val_freq: 5, save_freq: -1, logger: [console]}
"""


def imported(tmp_path, *overrides, rows=1280):
    (tmp_path / "config.yaml").write_text(CONFIG)
    script = tmp_path / "launch.sh"
    script.write_text(f"python3 -m verl.trainer.main config=config.yaml {' '.join(overrides)}\n")
    found = import_script(script, {"PWD": str(tmp_path)}, rows)
    (tmp_path / "recipe.yaml").write_text(found.recipe)
    return load_recipe(tmp_path / "recipe.yaml", [], RLSettings), found


def test_the_file_and_its_overrides_become_a_recipe(tmp_path):
    settings, _ = imported(tmp_path, "worker.rollout.n=8", "trainer.nnodes=1", "worker.actor.clip_ratio_low=0.1")
    assert (settings.model.path, settings.model.trainable) == ("m", ("projector", "language"))
    assert (settings.data.train, settings.data.test) == (("a.parquet",), ("b.parquet",))
    assert (settings.rollout.samples, settings.rollout.engine, settings.rollout.max_tokens) == (8, "vllm", 1024)
    train = settings.train
    assert (train.prompts_per_step, train.updates_per_step, train.steps, train.save_every) == (128, 4, 20, 0)
    assert (settings.optim.lr, settings.optim.weight_decay, settings.optim.warmup_steps) == (2e-6, 0.01, 2)
    assert settings.algorithm.loss == {
        "aggregate": "token-mean", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0,
        "kl_coefficient": 0.01, "kl_estimator": "k3",
    }  # fmt: skip
    assert settings.algorithm.reward_kl is None
    assert (settings.reward.name, settings.seed, settings.cluster.offload) == ("./score.py:judge", 3, True)


def test_the_kl_is_in_the_reward_in_the_loss_or_nowhere(tmp_path):
    settings, _ = imported(tmp_path, "algorithm.use_kl_loss=false", "algorithm.kl_penalty=kl")
    reward_kl = settings.algorithm.reward_kl
    assert reward_kl is not None
    assert (reward_kl.coefficient, reward_kl.estimator) == (0.01, "k1")
    assert "kl_coefficient" not in settings.algorithm.loss
    settings, _ = imported(tmp_path, "algorithm.disable_kl=true")
    assert settings.algorithm.reward_kl is None
    assert "kl_coefficient" not in settings.algorithm.loss


@pytest.mark.parametrize(
    ("loss", "name", "average", "aggregate"),
    [
        ("gspo", "gspo", "token", "token-mean"), ("cispo", "cispo", "token", "token-mean"),
        ("default", "grpo", "seq", "seq-mean-token-mean"),
    ],
)  # fmt: skip
def test_losses_have_the_names_of_easyr1(tmp_path, loss, name, average, aggregate):
    given = [f"worker.actor.loss_type={loss}", f"worker.actor.loss_avg_mode={average}"]
    algorithm = imported(tmp_path, *given)[0].algorithm
    assert (algorithm.name, algorithm.loss.get("aggregate")) == (name, aggregate)


def test_steps_come_before_epochs(tmp_path):
    assert imported(tmp_path, "trainer.max_steps=77")[0].train.steps == 77
    with pytest.raises(ConfigError, match=r"trainer.total_epochs=2 counts passes over the data"):
        imported(tmp_path, rows=None)


def test_what_has_no_counterpart_keeps_its_name(tmp_path):
    _, found = imported(tmp_path)
    assert "worker.rollout.limit_images=4: has no counterpart here" in found.refused
    assert any(line.startswith("worker.actor.clip_ratio_high=0.3") for line in found.filled)
    assert any(line.startswith("algorithm.kl_coef=0.01 -> ") for line in found.mapped)


def test_a_file_that_is_not_there_is_named(tmp_path):
    script = tmp_path / "launch.sh"
    script.write_text("python3 -m verl.trainer.main config=other.yaml data.train_files=x\n")
    with pytest.raises(ConfigError, match=r"takes its settings from .*other\.yaml, which cannot be read"):
        import_script(script, {"PWD": str(tmp_path)}, 10)
