"""Vero's routed reward: the type of a row chooses, and the form counts beside it."""

from __future__ import annotations

import pytest

from foveate.errors import ConfigError
from foveate.records import Task
from foveate.rewards.build import build_reward, truth_check
from foveate.rewards.vero import TYPES, vero_form


def task(answer, kind, **meta):
    return Task("t", "s", (), (), answer, {"reward_type": kind, **meta}, "c.parquet, row 4")


def said(answer: str) -> str:
    return f"<think>so</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("value", "kind", "truth", "text"),
    [
        (1.0, "numeric", "5", said("It is \\boxed{5}.")),
        (0.9, "numeric", "5", said("It is 5")),  # right, without its box: 0.8 + 0.2 * 0.5
        (0.2, "numeric", "5", said("\\boxed{6}")),
        (0.0, "numeric", "5", "\\boxed{5}"),  # without form nothing counts
        (1.0, "list_string_match", "['a', 'b']", said("\\boxed{b}")),
        (1.0, "multiple_choice", "B", said("\\boxed{B}")),
        (1.0, "clicking", [0, 0, 9, 9], said("[4, 4]")),
        (1.0, "grounding", '[{"bbox_2d": [10, 10, 90, 90]}]', said('[{"bbox_2d": [10, 10, 90, 90]}]')),
    ],
)
def test_a_row_is_scored_by_its_type_and_its_form(value, kind, truth, text):
    row = task(truth, kind, width=1000, height=1000)
    score = build_reward("vero", {})(text, row)
    assert score.value == pytest.approx(value)
    assert {"accuracy", "format"} <= score.parts.keys()
    assert truth_check("vero", {})(row) == []


@pytest.mark.parametrize(
    ("form", "kind", "text"),
    [
        (1.0, "counting", said("\\boxed{3}")),
        (0.5, "counting", said("\\boxed{3} \\boxed{4}")),
        (0.5, "counting", said("\\boxed{ }")),
        (0.5, "counting", said("\\boxed{3} \\boxed{}")),
        (0.5, "counting", said("\\boxed{3")),
        (1.0, "counting", said("\\boxed{\\text{3}}")),
        (1.0, "counting", said("\\boxed{\\boxed{3}}")),
        (0.5, "grounding", said("\\boxed{a}\\boxed{b}")),
        (1.0, "grounding", said("\\boxed[a]")),
        (1.0, "llm_judge", said("a picture")),
        (0.0, "llm_judge", "<think> </think><answer>a</answer>"),
        (0.0, "llm_judge", "<think>a</think><answer> </answer>"),
        (0.0, "llm_judge", said("a") + " b"),
        (0.0, "llm_judge", "<answer>a</answer><think>b</think>"),
        (0.0, "llm_judge", "<think>a<think></think><answer>b</answer>"),
    ],
)
def test_the_form_is_two_sections_that_hold_something_and_one_box(form, kind, text):
    assert vero_form(text, kind) == form


def test_rows_of_no_type_and_rows_to_judge_without_a_judge_are_faults():
    check = truth_check("vero", {})
    [(field, fault)] = check(task("5", "numerik"))
    assert field == "extra_info.reward_type"
    assert "did you mean 'numeric'" in fault
    assert "give the reward vero its setting judge" in check(task("5", "llm_judge"))[0][1]
    judged = truth_check("vero", {"judge": {"url": "http://localhost:1/v1", "model": "m"}})
    assert judged(task("5", "llm_judge")) == []
    assert check(task("Asia", "numeric"))[0][0] == "reward_model.ground_truth"
    with pytest.raises(ConfigError, match=r"format_weight must be at most 1.0, found 1.5"):
        build_reward("vero", {"format_weight": 1.5})


def test_the_judge_sees_the_answer_and_counts_beside_the_instructions(monkeypatch):
    import foveate.rewards.vero as module

    class Judge:
        fetch = None
        reads_text = True

        def score(self, text, _task):
            from foveate.records import Score

            assert text == "a picture"
            return Score(0.5)

    original = build_reward
    monkeypatch.setattr(module, "build_reward", lambda name, s: Judge() if name == "judge" else original(name, s))
    reward = build_reward("vero", {"judge": {"url": "x", "model": "m"}})
    score = reward(said(" a picture "), task("ref", "llm_judge"))
    assert score.value == pytest.approx(0.8 * 0.5 + 0.2)
    assert score.parts == {"accuracy": 0.5, "format": 1.0, "judge": 0.5}


def test_every_type_has_a_reward():
    assert all(name == "judge" or truth_check(name, {}) for kind, name in TYPES.items() if "instruction" not in kind)


def test_rewards_may_be_chosen_by_a_field_of_extra_info():
    settings = {"rewards": {"count": "counting", "*": "exact"}, "field": "extra_info.kind"}
    reward = build_reward("by_source", settings)
    rows = [Task("t", "s", (), (), "7", {"kind": kind}, "row") for kind in ("count", "text")]
    assert [reward("There are 7.", row).value for row in rows] == [1.0, 0.0]
    only = {"rewards": {"count": "counting"}, "field": "extra_info.kind"}
    assert truth_check("by_source", only)(rows[1])[0][0] == "extra_info.kind"
    with pytest.raises(ConfigError, match=r"neither data_source nor extra_info\.NAME"):
        build_reward("by_source", {**only, "field": "ability"})
