"""Online RL step by step."""

import pytest

import foveate as fv
from foveate.errors import ConfigError
from foveate.evaluate.predictions import read_evaluations

ROWS = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(8)]


def digits(answer, ground_truth):
    return sum(map(str.isdigit, answer)) / 8 + (ground_truth in answer)


def trainer_of(folder, tiny_folder, **more):
    given = {"steps": 3, "max_tokens": 4, "prompts_per_step": 2, "rollout": {"samples": 2}, "lr": 1e-3, **more}
    return fv.RLTrainer(str(tiny_folder), ROWS, {"name": digits, "workers": 0}, run_dir=folder, **given)


def test_a_loop_over_steps_is_a_whole_run(tmp_path, tiny_folder):
    trainer = trainer_of(tmp_path / "run", tiny_folder)
    steps = [(step.number, step.metrics["reward/mean"], len(step.groups)) for step in trainer]
    assert [(number, groups) for number, _, groups in steps] == [(1, 2), (2, 2), (3, 2)]
    assert [row["reward/mean"] for row in trainer.run.rows] == [reward for _, reward, _ in steps]
    assert trainer.run.model.is_dir()
    assert trainer.run.report.is_file()


def test_within_the_loop_the_policy_answers_and_is_evaluated(tmp_path, tiny_folder):
    trainer = trainer_of(tmp_path / "run", tiny_folder, eval_data=ROWS[:2], **{"eval.every": 100})
    for step in trainer:
        answers = trainer.generate("What is 2 plus 2?", n=3, temperature=1.0)
        assert len(answers) == 3
        assert trainer.generate("What is 2 plus 2?") == trainer.generate("What is 2 plus 2?")
        if step.number == 2:
            assert "eval/greedy_score" in trainer.evaluate()
    with pytest.raises(ConfigError, match="generate: only within the loop"):
        trainer.generate("?")
    assert trainer.run.evaluate() == tmp_path / "run/eval/report.html"
    [after] = read_evaluations(tmp_path / "run/eval")
    last = read_evaluations(tmp_path / "run")[-1]
    assert [row.shown.text for row in after.predictions] == [row.shown.text for row in last.predictions]
    assert [row.shown.score for row in after.predictions] == [row.shown.score for row in last.predictions]


def test_a_loop_that_is_left_early_continues_after_what_was_saved(tmp_path, tiny_folder):
    whole = [step.metrics["reward/mean"] for step in trainer_of(tmp_path / "whole", tiny_folder)]
    trainer = trainer_of(tmp_path / "run", tiny_folder)
    for step in trainer:
        if step.number == 2:
            trainer.save()
            break
    assert not trainer.run.folder.final.exists()
    again = [(step.number, step.metrics["reward/mean"]) for step in trainer_of(tmp_path / "run", tiny_folder)]
    assert again == [(3, whole[2])]


def test_without_held_out_rows_there_is_nothing_to_evaluate_on(tmp_path, tiny_folder):
    trainer = trainer_of(tmp_path / "run", tiny_folder)
    for _ in trainer:
        with pytest.raises(ConfigError, match="give eval_data"):
            trainer.evaluate()
        break


def test_what_cannot_be_asked_is_refused_in_a_line(tmp_path, tiny_folder):
    trainer = trainer_of(tmp_path / "run", tiny_folder)
    for _ in trainer:
        for wrong in ({"n": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"max_tokens": 0}, {"seed": -1}):
            with pytest.raises(ConfigError, match="generate: "):
                trainer.generate("?", **wrong)
        with pytest.raises(ConfigError, match="generate: the question"):
            trainer.generate("a\ud800")
        break


def test_two_trainers_without_a_folder_do_not_share_one(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = (trainer_of(None, tiny_folder) for _ in range(2))
    assert one.run.path != other.run.path
