"""Whole runs of online reinforcement learning, tiny, and what its update promises."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from light_rewards import PLACE
from toy import HERE, make_data, rl_settings
from transformers import AutoModelForImageTextToText, AutoTokenizer

from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import AlgorithmSettings
from foveate.config.model import ModelSettings
from foveate.config.recipe import load_recipe
from foveate.config.runs import RLSettings
from foveate.config.train import OptimSettings
from foveate.data.table import open_tasks
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, DataError
from foveate.evaluate.predictions import read_evaluations
from foveate.log import read_metrics
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy
from foveate.parallel.balance import Costs
from foveate.parallel.packing import pack
from foveate.records import Answer, Group, PackedGroup, Score
from foveate.report.page import write_report
from foveate.run_folder import RunFolder
from foveate.train.algorithm import ResolvedAlgorithm, build_algorithm
from foveate.train.rl import run_rl
from foveate.train.rollout_records import rollout_metrics
from foveate.train.update import compute_advantages, update
from foveate.train.worker import Worker


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, data):
    """A finished run of three steps, with its report."""
    settings = rl_settings(tmp_path_factory.mktemp("runs") / "whole", tiny_folder, data, reward={"name": "grounding"})
    run = run_rl(settings)
    write_report(run.path)
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(str(folder)).model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics_of(run: RunFolder) -> list[dict[str, Any]]:
    return read_metrics(run.metrics)


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_settings_and_versions(whole):
    assert load_recipe(whole.config, [], RLSettings).train.steps == 3
    assert json.loads(whole.versions.read_text())["torch"] == torch.__version__


def test_a_run_leaves_one_line_of_metrics_per_step(whole):
    assert [record["step"] for record in metrics_of(whole)] == [1, 2, 3]


@pytest.mark.parametrize(
    "names",
    [
        ("reward/mean", "reward/std", "reward/iou", "reward/hit", "reward/parsed", "reward/failed"),
        ("answer/length", "answer/length_max", "answer/truncated"),
        ("time/generate", "time/reward", "time/update", "time/step"),
        ("time/generate_tokens_per_second", "time/update_tokens_per_second"),
        ("optim/update_skipped", "optim/updates", "rollout/groups_without_advantage", "optim/lr", "data/epoch"),
    ],
)
def test_every_step_says(whole, names):
    for record in metrics_of(whole):
        assert set(names) <= set(record)


def test_a_step_that_learned_says_how(tmp_path, tiny_folder, data):
    record = metrics_of(run_rl(rl_settings(tmp_path / "run", tiny_folder, data, train={"steps": 1})))[0]
    learned = {
        "loss/policy",
        "loss/entropy",
        "loss/clip_fraction",
        "loss/ratio_min",
        "loss/ratio_max",
        "loss/approx_kl",
        "optim/grad_norm",
    }
    assert learned | {"engine/logprob_difference", "engine/logprob_difference_max"} <= set(record)
    assert record["engine/logprob_difference_max"] < 1e-4
    assert record["engine/ratio_beyond_2"] == 0
    assert record["loss/ratio_min"] == record["loss/ratio_max"] == 1.0
    assert record["loss/entropy"] > 0


def test_a_run_leaves_its_answers_with_scores_and_advantages(whole):
    for step in (1, 2, 3):
        lines = (whole.rollouts / f"step_{step:06d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [len(row["answers"]) for row in rows] == [4, 4, 4, 4]
        assert all("train.parquet, row " in row["where"] for row in rows)
        answer = rows[0]["answers"][0]
        assert {"text", "tokens", "finish", "score", "parts", "note", "advantage"} <= set(answer)
        assert answer["version"] == step - 1


def test_a_run_is_evaluated_before_every_second_and_after_the_last_step(whole):
    evaluations = read_evaluations(whole.path)
    assert [one.step for one in evaluations] == [0, 2, 3]
    assert all(len(row.sampled) == 2 for one in evaluations for row in one.predictions)
    assert [record["step"] for record in metrics_of(whole) if "eval/greedy_score" in record] == [2, 3]


def test_a_run_leaves_a_report_with_curves_and_pictures(whole):
    page = whole.report.read_text()
    assert "reward" in page
    assert len(list((whole.path / "gallery").glob("*.jpg"))) == 2


def test_a_run_leaves_a_model_that_plain_transformers_loads(whole, tiny_folder):
    model = AutoModelForImageTextToText.from_pretrained(whole.final)
    tokenizer = AutoTokenizer.from_pretrained(whole.final)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_folder).chat_template
    assert model.config.model_type == "internvl"
    assert same(model.state_dict(), weights(whole.final))


def test_old_checkpoints_go(whole):
    kept = ["best", "latest", "step_000002", "step_000003"]
    assert sorted(path.name for path in whole.checkpoints.iterdir()) == kept


def test_the_same_settings_give_the_same_weights_and_answers(tmp_path, tiny_folder, data):
    runs = [run_rl(rl_settings(tmp_path / name, tiny_folder, data)) for name in ("a", "b")]
    assert same(*[weights(run.final) for run in runs])
    assert not same(weights(runs[0].final), weights(tiny_folder))
    for file in runs[0].rollouts.iterdir():
        assert file.read_bytes() == (runs[1].rollouts / file.name).read_bytes()


def test_another_seed_gives_other_answers(tmp_path, tiny_folder, data):
    one, other = (
        run_rl(rl_settings(tmp_path / str(seed), tiny_folder, data, seed=seed, train={"steps": 1})) for seed in (0, 1)
    )
    first = "step_000001.jsonl"
    assert (one.rollouts / first).read_text() != (other.rollouts / first).read_text()


# ---------------------------------------------------------------------------------------------------- what is refused


def test_an_engine_with_old_weights_is_refused(tmp_path, tiny_folder, data):
    settings = rl_settings(tmp_path / "run", tiny_folder, data, rollout={"engine": f"{HERE}:StaleEngine"})
    with pytest.raises(DataError, match=r"weights of step \[0\], the policy is at step 1"):
        run_rl(settings)
    assert [record["step"] for record in metrics_of(RunFolder(tmp_path / "run"))] == [1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": "gsop"}, "unknown algorithm 'gsop'; did you mean 'gspo'"),
        ({"algorithm": {"name": "gspo", "loss": {"clip": 1}}}, "algorithm gspo, loss: unknown setting 'clip'"),
        ({"algorithm": {"name": "gspo", "loss": {"clip_low": 0.2}}}, "use 3e-4 and 4e-4, or set allow_wide_clip"),
        ({"algorithm": {"name": "grpo", "loss": {"kl_estimator": "k2"}}}, "loss.kl_coefficient is 0; set both"),
        ({"algorithm": "ppo"}, "algorithm ppo needs a critic, and there is none: set algorithm.critic.lr"),
        ({"algorithm": {"name": "gspo", "critic": {"lr": 1e-5}}}, "algorithm gspo reads no values; leave it out"),
        ({"algorithm": {"name": "ppo", "critic": {"lr": 1e-5, "warmup_steps": 3}}}, "the policy would never learn"),
        ({"algorithm": "dapo", "rollout": {"top_k": 1}}, "rollout.top_k is 1, so that the rewards of a group"),
        (
            {"algorithm": {"name": "remax", "resample_rounds": 2}, "rollout": {"samples": 1}},
            "rollout.samples is 1, so that",
        ),
        ({"algorithm": {"name": "gspo", "correction": {"mode": "token-truncate", "low": 0.5}}}, "no lower bound"),
        ({"algorithm": f"{HERE}:text_length"}, "is a function, not a foveate.algorithms.table.Algorithm"),
        ({"reward": {"name": "groundin"}}, "unknown reward 'groundin'; did you mean 'grounding'"),
        ({"reward": {"name": "grounding", "settings": {"kind": "best"}}}, "reward grounding: kind must be "),
        ({"rollout": {"engine": "vlm"}}, "unknown engine 'vlm'"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, tiny_folder, data, changes, said):
    with pytest.raises((ConfigError, DataError)) as caught:
        run_rl(rl_settings(tmp_path / "run", tiny_folder, data, **changes))
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_returns_no_score_ends_the_run(tmp_path, tiny_folder, data):
    settings = rl_settings(tmp_path / "run", tiny_folder, data, reward={"name": f"{HERE}:a_word"})
    with pytest.raises(DataError, match=r"a_word returned str 'right'; it must return a number, a dict of numbers"):
        run_rl(settings)


@pytest.mark.slow
def test_a_grader_that_hangs_costs_its_limit_and_its_answers_are_not_graded(tmp_path, tiny_folder, data):
    limits = {"name": f"{PLACE}:sleeps_for_ever", "workers": 4, "time_limit": 3.0}
    changes = {"train": {"steps": 1, "prompts_per_step": 16}, "eval": {"every": 0}}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, reward=limits, **changes))
    record = metrics_of(run)[0]
    assert record["reward/failed"] == 4
    lines = (run.rollouts / "step_000001.jsonl").read_text().splitlines()
    answers = [a for line in lines for a in json.loads(line)["answers"]]
    assert sum("timed out after 3 s" in answer["note"] for answer in answers) == 4
    assert sum(answer["score"] is None and "advantage" not in answer for answer in answers) == 4
    assert record["rollout/groups_not_graded"] == 1


# ------------------------------------------------------------------------------------------------- what the run does


def test_equal_rewards_leave_the_weights_as_they_are(tmp_path, tiny_folder, data):
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, reward={"name": f"{HERE}:always_one"}))
    assert same(weights(run.final), weights(tiny_folder))
    for record in metrics_of(run):
        assert (record["optim/updates"], record["rollout/groups_without_advantage"], record["optim/tokens"]) == (
            0,
            4,
            0,
        )


def test_gradients_that_are_not_finite_are_skipped_and_counted(tmp_path, tiny_folder, data, caplog):
    changes = {"algorithm": f"{HERE}:EXPLODING", "train": {"steps": 2, "updates_per_step": 2}}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, **changes))
    assert [record["optim/update_skipped"] for record in metrics_of(run)] == [2, 2]
    assert [record["nonfinite"] for record in metrics_of(run)] == [["optim/grad_norm"]] * 2
    assert same(weights(run.final), weights(tiny_folder))
    assert sum("is not finite" in message for message in caplog.messages) == 4


def test_the_kl_to_the_frozen_start_grows_from_zero(tmp_path, tiny_folder, data):
    loss = {"kl_coefficient": 0.1}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm={"name": "gspo", "loss": loss}))
    divergence = [record["loss/kl_ref"] for record in metrics_of(run)]
    assert divergence[0] == pytest.approx(0.0, abs=1e-9)
    assert divergence[2] > 1e-6
    assert all(record["optim/tokens"] > 0 for record in metrics_of(run))


def test_the_reference_stays_frozen_when_a_run_continues(tmp_path, tiny_folder, data):
    """The reference is the model that the run began with, not the checkpoint that it continues from."""
    algorithm = {"name": "gspo", "loss": {"kl_coefficient": 0.1}}
    run_rl(rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm))
    settings = rl_settings(tmp_path / "run", tiny_folder, data, algorithm=algorithm, train={"steps": 4})
    assert metrics_of(run_rl(settings))[3]["loss/kl_ref"] > 1e-6


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_the_named_part_of_the_model_learns_and_the_others_stay(tmp_path, tiny_folder, data, part):
    settings = rl_settings(tmp_path / "run", tiny_folder, data, model={"trainable": [part]}, train={"steps": 1})
    before, after = weights(tiny_folder), weights(run_rl(settings).final)
    prefix = {"vision": "model.vision_tower", "projector": "model.multi_modal", "language": ("model.language", "lm_")}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(prefix[part]) for name in changed)


def test_rows_without_and_with_two_pictures_are_learned_from_together(tmp_path, tiny_folder, data):
    pictures = [open_tasks(data / "train.parquet")[i].images[0].data for i in range(2)]
    for i, picture in enumerate(pictures):
        (tmp_path / f"{i}.png").write_bytes(picture)
    rows = [("no picture at all", []), ("<image> above <image>", ["0.png", "1.png"]), ("<image>\none", ["1.png"])]
    lines = [
        {
            "data_source": "mixed",
            "prompt": [{"role": "user", "content": text}],
            "images": images,
            "reward_model": {"style": "rule", "ground_truth": "x"},
        }
        for text, images in rows
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixed = {"train": [str(tmp_path / "mixed.jsonl")], "test": [str(tmp_path / "mixed.jsonl")]}
    settings = rl_settings(tmp_path / "run", tiny_folder, data, data=mixed, train={"steps": 2, "prompts_per_step": 3})
    assert metrics_of(run_rl(settings))[1]["engine/logprob_difference_max"] < 1e-4


def test_sampling_filters_and_temperature_reach_the_engine(tmp_path, tiny_folder, data):
    settings = rl_settings(tmp_path / "run", tiny_folder, data, rollout={"top_k": 1}, train={"steps": 1})
    lines = (run_rl(settings).rollouts / "step_000001.jsonl").read_text().splitlines()
    assert all(len({answer["text"] for answer in json.loads(line)["answers"]}) == 1 for line in lines)


# ------------------------------------------------------------------------------------------------------- the update


class CountingWorkers(LocalWorkers):
    """Remembers what was asked of the worker."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.asked: list[str] = []

    def call(self, method: Callable[..., Any], per_rank_arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.asked.append(method.__name__)
        return super().call(method, per_rank_arguments)


def a_worker(folder: Path, budget: int = 4096, reference: bool = False) -> Worker:
    """A worker whose steps are the gradient itself: plain descent with learning rate 1, nothing clipped."""
    optim = OptimSettings(lr=1.0, max_grad_norm=1e9)
    worker = Worker(ModelSettings(path=str(folder)), optim, budget, reference=reference)
    worker.optimizer = torch.optim.SGD(worker.policy.model.parameters(), lr=1.0)  # type: ignore[assignment]
    return worker


LENGTHS = ((12, 5, 20, 9), (8, 8, 16, 4), (3, 20, 11, 7), (15, 6, 6, 14))
VALUES = ((0.0, 1.0, 0.5, 0.0), (1.0,) * 4, (0.2, 0.9, 0.0, 0.4), (0.0,) * 4)


@pytest.fixture(scope="module")
def groups(tiny_policy, data):
    """Four groups of four answers of known lengths; those of the second and the last are all worth the same."""
    encoder = Encoder(tiny_policy.tokenizer, tiny_policy.family, 1, 128)
    tasks = [open_tasks(data / "train.parquet")[i] for i in range(4)]
    generator = torch.Generator().manual_seed(0)
    made = []
    for task, lengths, values in zip(tasks, LENGTHS, VALUES, strict=True):
        ids = [tuple(torch.randint(300, (length,), generator=generator).tolist()) for length in lengths]
        prompt = encoder(task)
        logp_M, _ = token_logprobs(tiny_policy, pack([PackedGroup.of_tokens(prompt, tuple(ids))]))
        logprobs = [tuple(values.tolist()) for values in logp_M.detach().split(list(lengths))]
        answers = tuple(Answer.sampled(own, sampled, "", "stop", 0) for own, sampled in zip(ids, logprobs, strict=True))
        made.append(Group(task, prompt, answers, tuple(Score(value) for value in values)))
    return made


def learn(
    worker: Worker | LocalWorkers, groups: Sequence[Group], method: ResolvedAlgorithm, updates: int = 1, lr: float = 1.0
) -> dict[str, float]:
    workers = worker if isinstance(worker, LocalWorkers) else LocalWorkers(worker)
    costs = Costs(0.01, 1.0)
    examples, said = compute_advantages(workers, groups, method, updates, costs)
    return {**said, **update(workers, examples, method, updates, {"optim/lr": lr, "critic/lr": lr}, costs)}


def change(worker: Worker, folder: Path) -> torch.Tensor:
    start = weights(folder)
    trained = worker.policy.model.state_dict()
    return torch.cat([(trained[name] - start[name]).flatten() for name in start])


def method_of(name: str, **loss: Any) -> ResolvedAlgorithm:
    return build_algorithm(AlgorithmSettings(name=name, loss=loss), 16)


@pytest.mark.parametrize("name", ["gspo", "grpo", "dapo", "dr_grpo"])
def test_leaving_out_groups_of_equal_rewards_changes_no_gradient(tiny_folder, groups, name):
    method = method_of(name)
    changes = []
    for keeps in (False, True):
        worker = a_worker(tiny_folder)
        said = learn(worker, groups, replace(method, keeps_equal_groups=keeps))
        assert said["rollout/groups_without_advantage"] == 2
        changes.append(change(worker, tiny_folder))
    assert changes[0].norm() > 0
    assert (changes[0] - changes[1]).norm() <= 1e-5 * changes[1].norm()


@pytest.mark.parametrize(("name", "updates"), [("gspo", 1), ("grpo", 1), ("dapo", 1), ("gspo", 2)])
def test_the_token_budget_changes_no_gradient(tiny_folder, groups, name, updates):
    """The budgets hold no whole group, two of them, and all."""
    method = method_of(name, kl_coefficient=0.1, entropy_coefficient=0.01)
    sizes = [len(group.prompt) + sum(len(answer.token_ids) for answer in group.answers) for group in groups]
    assert 50 < min(sizes) < max(sizes) < 90
    changes, said = [], []
    for budget in (50, 180, 4096):
        worker = a_worker(tiny_folder, budget, reference=True)
        said.append(learn(worker, groups, method, updates, lr=1e-3))
        changes.append(change(worker, tiny_folder))
    for other, record in zip(changes[:2], said[:2], strict=True):
        assert (other - changes[2]).norm() <= 2e-4 * changes[2].norm()
        for metric in ("loss/policy", "loss/entropy", "loss/kl_ref", "loss/ratio_max", "loss/ratio_min"):
            assert record[metric] == pytest.approx(said[2][metric], rel=1e-3, abs=1e-6)


def test_one_update_needs_no_pass_for_the_old_policy(tiny_folder, groups):
    method = method_of("gspo")
    workers = CountingWorkers(a_worker(tiny_folder))
    said = learn(workers, groups, method, 1, 1e-3)
    assert workers.asked == ["update_policy"]
    assert said["loss/ratio_max"] == said["loss/ratio_min"] == 1.0


def test_several_updates_hold_on_to_the_policy_that_sampled(tiny_folder, groups):
    method = method_of("grpo")
    workers = CountingWorkers(a_worker(tiny_folder))
    said = learn(workers, groups, method, 2, 1e-2)
    assert workers.asked == ["logprobs", "update_policy", "update_policy"]
    assert said["optim/updates"] == 2
    assert said["loss/ratio_max"] > 1 + 1e-4
    assert said["engine/logprob_difference_max"] < 1e-4


def test_updates_share_the_prompts_in_order_and_evenly(tiny_folder, groups):
    """REINFORCE's gradient asks no old policy, so two updates are two steps on the halves."""
    method = method_of("rloo")
    together, apart = a_worker(tiny_folder), a_worker(tiny_folder)
    learn(together, groups, method, 2, 1e-3)
    for half in (slice(0, 2), slice(2, 4)):
        learn(apart, groups[half], method, 1, 1e-3)
    assert change(together, tiny_folder).norm() > 0
    assert same(together.policy.model.state_dict(), apart.policy.model.state_dict())


@pytest.mark.parametrize(
    ("name", "loss", "keeps"),
    [
        ("gspo", {}, False),
        ("gspo", {"entropy_coefficient": 0.01}, True),
        ("gspo", {"kl_coefficient": 0.01}, True),
        (f"{HERE}:OWN", {}, True),
    ],
)
def test_equal_groups_are_computed_where_the_loss_may_have_other_terms(name, loss, keeps):
    assert method_of(name, **loss).keeps_equal_groups is keeps


def test_a_kl_that_is_on_by_default_gets_its_reference(tmp_path):
    code = tmp_path / "own.py"
    code.write_text(
        "from foveate.algorithms.table import Algorithm\n"
        "from foveate.algorithms.policy_losses import gspo\n"
        "def loss(logp_M, entropy_M, batch, targets, totals, *, kl_coefficient: float = 0.1):\n"
        "    return gspo(logp_M, entropy_M, batch, targets, totals, kl_coefficient=kl_coefficient)\n"
        f"ROW = Algorithm(advantage='grpo', loss={f'{code}:loss'!r}, source='')\n"
    )
    assert method_of(f"{code}:ROW").needs_reference


def test_rewards_of_one_answer_have_no_spread(groups):
    alone = Group(groups[0].task, groups[0].prompt, groups[0].answers[:1], groups[0].scores[:1])
    assert rollout_metrics([alone])["reward/std"] == 0.0


def test_several_sources_have_metrics_of_their_own(groups):
    assert not any(name.startswith("source/") for name in rollout_metrics(groups))
    other = replace(groups[1], task=replace(groups[1].task, source="other"))
    metrics = rollout_metrics([groups[0], other])
    for group in (groups[0], other):
        source, scores = group.task.source, [score.value for score in group.scores]
        assert metrics[f"source/{source}/reward"] == pytest.approx(sum(scores) / len(scores))
        assert metrics[f"source/{source}/answers"] == len(scores)
