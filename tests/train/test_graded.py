"""Answers that could not be graded, and truncated ones: what is compared, what is trained on, and what is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from light_rewards import PLACE
from test_rl import a_worker, change, groups, learn, method_of, metrics_of, same, weights  # noqa: F401
from toy import make_data, rl_settings

from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import AlgorithmSettings
from foveate.errors import DataError
from foveate.parallel.balance import Costs
from foveate.records import Group, Score, Task
from foveate.report.page import write_report
from foveate.rewards.build import build_reward, not_graded
from foveate.train.algorithm import build_algorithm
from foveate.train.rl import run_rl
from foveate.train.rollout_records import rollout_metrics
from foveate.train.rollouts import resample_groups
from foveate.train.update import compute_advantages
from foveate.train.waste import WasteWatch

HERE = str(Path(__file__))
LOST = not_graded("ValueError: cannot read")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


def lines_of(path: Path) -> list[dict]:
    return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []


def with_scores(group: Group, values: list[float | None], baseline: Score | None = None) -> Group:
    scores = tuple(LOST if value is None else Score(value) for value in values)
    return replace(group, scores=scores, baseline=baseline)


def without(group: Group, *places: int) -> Group:
    kept = [place for place in range(len(group.answers)) if place not in places]
    answers, scores = (tuple(some[place] for place in kept) for some in (group.answers, group.scores))
    return replace(group, answers=answers, scores=scores)


def truncated(group: Group, *places: int) -> Group:
    answers = [replace(one, finish="length") if i in places else one for i, one in enumerate(group.answers)]
    return replace(group, answers=tuple(answers))


def advantages(worker, groups, name):  # noqa: F811
    algorithm = build_algorithm(AlgorithmSettings(name=name), 16)
    return compute_advantages(LocalWorkers(worker), groups, algorithm, 1, Costs(0.01, 1.0))


# ----------------------------------------------------------------------------------------------------- missing grades


@pytest.mark.parametrize(
    "name", ["gspo", "rloo", "dr_grpo", "gpg", "opo", "grpo_passk", "reinforce_plus_plus_baseline"]
)
def test_an_answer_without_a_grade_is_as_if_it_had_not_been_sampled(tiny_folder, groups, name):  # noqa: F811
    lost = [with_scores(groups[0], [0.0, None, -1.0, 1.0]), with_scores(groups[2], [None, 0.9, -0.5, 0.4])]
    absent = [without(lost[0], 1), without(lost[1], 0)]
    changes = []
    for some in (lost, absent):
        worker = a_worker(tiny_folder)
        learn(worker, some, method_of(name), 1)
        changes.append(change(worker, tiny_folder))
    assert changes[0].norm() > 0
    assert torch.equal(*changes)


def test_a_failed_grade_does_not_beat_minus_one(tiny_folder, groups):  # noqa: F811
    batch, said = advantages(a_worker(tiny_folder), [with_scores(groups[0], [-1.0, None, -1.0, None])], "grpo")
    assert batch.answer_advantages == [[0.0, None, 0.0, None]]
    assert said["rollout/groups_without_advantage"] == 1
    assert not batch.policy_rows


@pytest.mark.parametrize(("name", "kept"), [("gspo", 1), ("rloo", 1), ("reinforce_plus_plus", 2)])
def test_a_group_with_too_few_grades_is_dropped_and_counted(tiny_folder, groups, name, kept):  # noqa: F811
    alone = with_scores(groups[0], [None, 2.0, None, None])
    batch, said = advantages(a_worker(tiny_folder), [alone, groups[2]], name)
    assert len(batch.groups) == kept
    assert said["rollout/groups_not_graded"] == 2 - kept
    assert (batch.answer_advantages[0] == [None] * 4) is (kept == 1)


def test_a_greedy_answer_without_a_grade_leaves_its_group_nothing_to_compare_with(tiny_folder, groups):  # noqa: F811
    lost = with_scores(groups[0], [0.0, 1.0, 0.5, 0.0], baseline=LOST)
    other = with_scores(groups[2], [0.2, 0.9, 0.0, None], baseline=Score(0.5))
    batch, said = advantages(a_worker(tiny_folder), [lost, other], "remax")
    assert said["rollout/groups_not_graded"] == 1
    assert batch.answer_advantages[1][:3] == pytest.approx([-0.3, 0.4, -0.5])
    assert batch.answer_advantages[1][3] is None


def test_dropped_groups_leave_the_others_in_their_updates(tiny_folder, groups):  # noqa: F811
    """Two updates on three groups: one takes one group, the other two."""
    lost = with_scores(groups[1], [None] * 4)
    said = learn(a_worker(tiny_folder), [groups[0], lost, groups[2], with_scores(groups[3], [0.0, 1.0, 0.0, 1.0])],
                 method_of("rloo"), 2, 1e-3)  # fmt: skip
    assert said["optim/updates"] == 2


def test_a_step_of_dropped_groups_makes_no_update(tiny_folder, groups):  # noqa: F811
    alone = [with_scores(group, [1.0, None, None, None]) for group in groups[:2]]
    worker = a_worker(tiny_folder)
    said = learn(worker, alone, method_of("gspo"), 2)
    assert (said["optim/updates"], said["rollout/groups_not_graded"]) == (0, 2)
    assert same(worker.policy.model.state_dict(), weights(tiny_folder))


def test_a_step_without_any_grade_ends_with_the_first_traceback(tiny_folder, groups):  # noqa: F811
    def breaks(_text: str, task: Task) -> float:
        raise ValueError(f"no truth in {task.id}")

    file_score = broken_score(breaks)
    lost = [replace(group, scores=(LOST, file_score, LOST, LOST)) for group in groups[:2]]
    with pytest.raises(DataError) as caught:
        advantages(a_worker(tiny_folder), lost, "gspo")
    assert "none of the 8 answers of a step could be graded" in str(caught.value)
    assert "Traceback" in str(caught.value)
    assert 'raise ValueError(f"no truth in {task.id}")' in str(caught.value)


def broken_score(function) -> Score:
    from foveate.rewards.build import adapt

    return adapt("breaks", function, {})("an answer", Task("7", "s", (), (), "1", where="row 7"))


def test_groups_without_a_difference_among_their_grades_are_replaced(groups):  # noqa: F811
    lost = with_scores(groups[0], [1.0, None, 1.0, None])
    one = with_scores(groups[0], [1.0, None, None, None])
    good = with_scores(groups[2], [1.0, None, 0.0, None])
    drawn = iter([[lost, one], [good]])
    chosen, every = resample_groups(lambda _have, _more: next(drawn), 2, 1)
    assert (chosen, every) == ([good, lost], [lost, one, good])


def test_the_metrics_are_those_of_the_graded_answers(groups):  # noqa: F811
    some = [with_scores(groups[0], [-1.0, None, -0.5, None]), with_scores(groups[1], [None] * 4)]
    said = rollout_metrics(some)
    assert said["reward/mean"] == -0.75
    assert said["reward/failed"] == 6


def sometimes_unreadable(text: str, _: Task) -> Score:
    """A signed reward whose grader cannot read some answers."""
    if len(text) % 3 == 0:
        raise ValueError("cannot read")
    return Score(1.0 if len(text) % 3 == 1 else -1.0)


def test_a_run_says_which_answers_were_not_graded(tmp_path, tiny_folder, data):
    reward = {"name": f"{HERE}:sometimes_unreadable"}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, reward=reward))
    rows = [row for file in sorted(run.rollouts.glob("*.jsonl")) for row in lines_of(file)]
    answers = [answer for row in rows for answer in row["answers"]]
    lost = [answer for answer in answers if answer["score"] is None]
    assert 0 < len(lost) < len(answers)
    assert all(answer["note"] == "grader failed: ValueError: cannot read" for answer in lost)
    assert not any("advantage" in answer for answer in lost)
    assert sum(record["reward/failed"] for record in metrics_of(run)) == len(lost)
    summary = json.loads((run.path / "evals" / "step_000000.summary.json").read_text())
    held_out = lines_of(run.path / "evals" / "step_000000.jsonl")
    not_graded = sum(answer["score"] is None for row in held_out for answer in row["answers"])
    assert summary.get("not_graded", 0) == not_graded
    assert "not graded" in write_report(run.path).read_text() or not any(
        row["answers"][0]["score"] is None for row in held_out
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_fails_on_every_answer_ends_the_run(tmp_path, tiny_folder, data, workers):
    reward = {"name": f"{PLACE}:never_readable", "workers": workers}
    with pytest.raises(DataError, match=r"could be graded; the first(?s:.*)in never_readable(?s:.*)KeyError"):
        run_rl(rl_settings(tmp_path / "run", tiny_folder, data, reward=reward, eval={"every": 0}))


def test_a_sum_of_rewards_is_not_graded_where_one_of_them_is_not():
    settings = {"weights": {f"{HERE}:sometimes_unreadable": 1.0, f"{HERE}:none_given": 1.0}}
    total = build_reward("weighted_sum", settings)
    assert total("ab", Task("t", "s", (), (), "1", where="row 0")) == Score(
        None, {}, f"the judge is silent (part {HERE}:none_given)"
    )


def none_given(_text: str, _: Task) -> Score:
    return Score(None, {}, "the judge is silent")


# -------------------------------------------------------------------------------------------------- truncated answers


@pytest.mark.parametrize("name", ["gspo", "dapo", "rloo", "grpo"])
def test_masked_truncated_answers_count_in_the_baseline_and_in_nothing_else(tiny_folder, groups, name):  # noqa: F811
    method = replace(method_of(name), mask_truncated=True)
    cut = [truncated(groups[0], 1, 2), truncated(groups[2], 0)]
    batch, _ = compute_advantages(LocalWorkers(a_worker(tiny_folder)), cut, method, 1, Costs(0.01, 1.0))
    plain, _ = compute_advantages(
        LocalWorkers(a_worker(tiny_folder)), cut, replace(method, mask_truncated=False), 1, Costs(0.01, 1.0)
    )
    expected = [list(own) for own in plain.answer_advantages]
    expected[0][1] = expected[0][2] = expected[1][0] = None
    assert batch.answer_advantages == expected
    assert [group.lengths for group in batch.groups] == [[12, 9], [20, 11, 7]]


def test_a_group_of_truncated_answers_leaves_the_totals(tiny_folder, groups):  # noqa: F811
    """The mean over answers is the same with and without a group that is all masked."""
    method = replace(method_of("gspo"), mask_truncated=True)
    changes = []
    for some in ([groups[0], truncated(groups[2], 0, 1, 2, 3)], [groups[0]]):
        worker = a_worker(tiny_folder)
        learn(worker, some, method)
        changes.append(change(worker, tiny_folder))
    assert changes[0].norm() > 0
    assert torch.equal(*changes)


def test_masking_holds_with_a_kl_in_the_reward(tiny_folder, groups):  # noqa: F811
    settings = AlgorithmSettings(name="gspo", mask_truncated=True, reward_kl={"coefficient": 0.1})
    algorithm = build_algorithm(settings, 32)
    worker = a_worker(tiny_folder, reference=True)
    said = learn(worker, [truncated(groups[0], 0), groups[2]], algorithm)
    assert said["optim/updates"] == 1


# ------------------------------------------------------------------------------------------------------ silent waste


def always_nothing(_text: str, _: Task) -> Score:
    return Score(0.0, {"parsed": 0.0})


def enormous(text: str, _: Task) -> Score:
    return Score(1e31 * len(text))


def warnings_of(run) -> dict[str, dict]:
    return {told["name"]: told for told in lines_of(run.warnings)}


def test_a_run_that_wastes_its_steps_says_so_once_with_cause_and_remedy(tmp_path, tiny_folder, data, caplog):
    changes = {"reward": {"name": f"{HERE}:always_nothing"}, "rollout": {"max_tokens": 2}, "eval": {"every": 0}}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, train={"steps": 4}, **changes))
    told = warnings_of(run)
    assert set(told) == {"truncated", "not_parsed", "no_advantage", "no_update", "constant_reward"}
    assert "rollout.max_tokens=2" in told["truncated"]["text"]
    assert "raise these limits" in told["truncated"]["text"]
    assert {name: one["step"] for name, one in told.items() if one["step"] > 1} == {"constant_reward": 3}
    assert sum("no update was made" in message for message in caplog.messages) == 1
    assert all(one["text"].split(";")[0].split(":")[0] in write_report(run.path).read_text() for one in told.values())


def test_a_resumed_run_tells_no_warning_again(tmp_path, tiny_folder, data):
    changes = {"reward": {"name": f"{HERE}:always_nothing"}, "eval": {"every": 0}}
    for steps in (1, 2):
        run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, train={"steps": steps}, **changes))
    assert [told["name"] for told in lines_of(run.warnings)].count("no_advantage") == 1


def test_enormous_rewards_are_told(tmp_path, tiny_folder, data):
    changes = {"reward": {"name": f"{HERE}:enormous"}, "eval": {"every": 0}, "train": {"steps": 1}}
    told = warnings_of(run_rl(rl_settings(tmp_path / "run", tiny_folder, data, **changes)))
    assert "huge_reward" in told
    assert "bound or scale the reward" in told["huge_reward"]["text"]


ORDINARY = {
    "answer/truncated": 0.1, "answer/timed_out": 0.0, "reward/mean": 0.5, "reward/std": 0.2, "reward/parsed": 0.4,
    "rollout/groups_without_advantage": 1.0, "rollout/groups_not_graded": 0.0,
    "optim/updates": 2.0, "optim/update_skipped": 0.0, "optim/lr": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "steps", "told"),
    [
        ({}, 5, set()),
        ({"answer/truncated": 1.0}, 2, set()),
        ({"answer/truncated": 1.0}, 3, {"truncated"}),
        ({"answer/truncated": 0.75, "answer/timed_out": 0.25, "optim/updates": 0.0}, 1, {"truncated", "no_update"}),
        ({"optim/updates": 0.0, "optim/lr": 0.0}, 4, set()),  # the critic is warmed up alone
        ({"optim/update_skipped": 2.0}, 1, {"updates_skipped"}),
        ({"optim/update_skipped": 1.0}, 1, set()),
        ({"reward/math/parsed": 0.0}, 1, {"not_parsed"}),
        ({"reward/std": 0.0}, 2, set()),
        ({"reward/std": 0.0}, 3, {"constant_reward"}),
        ({"rollout/groups_without_advantage": 3.0, "rollout/groups_not_graded": 1.0}, 1, {"no_advantage"}),
    ],
)
def test_each_kind_of_waste_is_told_where_it_shows(tmp_path, tiny_folder, data, groups, changes, steps, told):  # noqa: F811
    path = tmp_path / "warnings.jsonl"
    watch = WasteWatch(path, rl_settings(tmp_path / "run", tiny_folder, data))
    for step in range(1, steps + 1):
        watch.observe(step, ORDINARY | changes, groups)
    assert {one["name"] for one in lines_of(path)} == told
    assert len(lines_of(path)) == len(told)


def test_rewards_that_change_from_step_to_step_are_not_constant(tmp_path, tiny_folder, data, groups):  # noqa: F811
    path = tmp_path / "warnings.jsonl"
    watch = WasteWatch(path, rl_settings(tmp_path / "run", tiny_folder, data))
    for step, mean in enumerate([0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0], start=1):
        watch.observe(step, ORDINARY | {"reward/std": 0.0, "reward/mean": mean}, groups)
    assert not lines_of(path)
    watch.observe(8, ORDINARY | {"reward/std": 0.0, "reward/mean": 1.0}, groups)
    assert [one["name"] for one in lines_of(path)] == ["constant_reward"]


def test_an_ordinary_run_has_no_warnings(tmp_path, tiny_folder, data):
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, eval={"every": 0}, train={"steps": 2}))
    assert not warnings_of(run)
    assert 'id="warnings"' not in write_report(run.path).read_text()
