from __future__ import annotations

import pickle
from importlib.util import find_spec

import pytest

from foveate.records import Task
from foveate.registry import ConfigError, resolve
from foveate.rewards import REWARDS
from foveate.rewards.build import build_reward, truth_check
from foveate.rewards.combine import frame_doubts, unread_sources


def task(source="a", answer="7", **meta):
    return Task("t", source, (), (), answer, meta, "c.parquet, row 4")


def test_every_name_of_the_tables_can_be_built():
    for name, known in REWARDS.items():
        if name == "instruction_following" and not find_spec("if_verifiable"):
            continue
        for path in filter(None, (known.function, known.check)):
            assert callable(resolve({}, path, "reward"))


def test_a_weighted_sum_adds_values_and_keeps_all_parts():
    settings = {
        "weights": {"exact": 0.75, "repetition": 0.5, "format_tags": 0.25},
        "settings": {"repetition": {"size": 1}, "format_tags": {"tags": ["answer"]}},
    }
    score = build_reward("weighted_sum", settings)("<answer>7</answer>", task())
    assert score.value == 1.0
    assert score.parts == {
        "exact": 1.0, "exact/accuracy": 1.0, "exact/parsed": 1.0, "repetition": 0.0, "repetition/repeated": 0.0,
        "format_tags": 1.0, "format_tags/format": 1.0,
    }  # fmt: skip
    repeated = build_reward("weighted_sum", settings)("no no", task())
    assert repeated.value == -0.25


def test_a_sum_with_a_part_that_is_not_graded_is_not_graded(tmp_path):
    (tmp_path / "part.py").write_text(
        "def only_a(completions, data_source):\n    return [1.0 if data_source == ['a'] else None]\n"
    )
    part = f"{tmp_path}/part.py:only_a"
    reward = build_reward("weighted_sum", {"weights": {"exact": 1.0, part: 2.0}})
    assert reward("7", task("a")).value == 3.0
    score = reward("7", task("b"))
    assert (score.value, score.parts) == (None, {})
    assert score.note == f"the reward does not apply to this row (part {part})"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("weighted_sum", {"weights": {}}, "weights must have at least 1 entry"),
        ("weighted_sum", {"weights": {"exakt": 1.0}}, "unknown reward 'exakt'; did you mean 'exact'"),
        ("weighted_sum", {"weights": {"exact": "1"}}, "weights must be a number, found '1'"),
        (
            "weighted_sum",
            {"weights": {"exact": 1}, "settings": {"exat": {}}},
            "settings for 'exat', which is not in weights",
        ),
        ("weighted_sum", {"weights": {"exact": 1}, "settings": {"exact": {"size": 1}}}, "unknown setting 'size'"),
        ("by_source", {"rewards": {"a": "exakt"}}, "did you mean 'exact'"),
        ("by_source", {"rewards": {"a": "exact"}, "settings": {"b": {}}}, "settings for 'b', which is not in rewards"),
        ("by_source", {}, "setting 'rewards' is missing"),
    ],
)
def test_a_wrong_combination_is_refused_before_any_answer(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_reward(name, settings)


def test_each_source_has_its_reward():
    settings = {
        "rewards": {"a": "exact", "b": "repetition", "*": "weighted_sum"},
        "settings": {"b": {"size": 1}, "*": {"weights": {"exact": 2.0}}},
    }
    reward = build_reward("by_source", settings)
    assert [reward("7", task(source)).value for source in ("a", "c")] == [1.0, 2.0]
    assert reward("7 7", task("b")).value == -0.5


def test_a_source_without_reward_is_a_fault_of_the_row():
    settings = {"rewards": {"a": "exact", "boxes": "grounding"}}
    check = truth_check("by_source", settings)
    assert check is not None
    assert check(task("a")) == []
    assert check(task("a", None))[0][0] == "reward_model.ground_truth"
    assert [field for field, _ in check(task("boxes"))] == ["reward_model.ground_truth", "images"]
    ((field, what),) = check(task("box"))
    assert field == "data_source"
    assert "no reward for source 'box'; did you mean 'boxes'? Known: a, boxes" in what
    assert "no reward for source 'box'" in build_reward("by_source", settings)("7", task("box")).note


def test_the_checks_of_all_summed_rewards_are_made():
    check = truth_check("weighted_sum", {"weights": {"grounding": 1.0, "exact": 1.0, "repetition": 1.0}})
    assert check is not None
    assert len(check(task(answer=None))) == 3
    assert check(task(answer="[1,2,3,4]", width=5, height=5)) == []


def test_a_source_that_no_row_has_is_told():
    check = truth_check("weighted_sum", {"weights": {"by_source": 1.0}, "settings": {"by_source": {
        "rewards": {"count": "exact", "chioce": "exact", "*": "exact"}}}})  # fmt: skip
    (line,) = unread_sources(check, ["count", "choice", "count"])
    assert "'chioce', and no row has this source; did you mean 'choice'? There are count, choice" in line
    assert unread_sources(check, ["count", "chioce", "other"]) == unread_sources(None, ["a"]) == []


@pytest.mark.parametrize(
    ("answer", "side", "settings", "doubted"),
    [
        ([50, 50, 90, 90], 100, {}, True),
        ([[50, 50, 90, 90], [1, 1, 9, 9]], 100, {}, True),
        ([50, 50, 90, 90], 100, {"truth_frame": "pixels"}, False),
        ([50, 50, 590, 90], 100, {}, False),
        ([50, 50, 90, 90], 1000, {}, False),
    ],
)
def test_boxes_in_pixels_that_count_as_thousandths_are_told(answer, side, settings, doubted):
    reward = "grounding" if isinstance(answer[0], int) else "boxes"
    routed = {"rewards": {"a": reward, "b": "exact"}, "settings": {"a": settings}}
    tasks = [task(name, answer, width=side, height=side) for name in ("a", "b") for _ in range(20)]
    told = frame_doubts(truth_check("by_source", routed), tasks)
    assert len(told) == doubted
    assert all("source 'a'" in line and "all 20" in line and "truth_frame: pixels" in line for line in told)
    assert not frame_doubts(truth_check("by_source", routed), tasks[1:]), "too few rows say nothing"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("weighted_sum", {"weights": {"math": 1.0, "format_tags": 0.1}}),
        ("by_source", {"rewards": {"a": "grounding", "*": "exact"}}),
    ],
)
def test_the_check_of_a_combined_reward_can_be_sent_to_other_processes(name, settings):
    check = truth_check(name, settings)
    bad = Task("0", "a", (), (), None, {}, "x.parquet, row 0")
    sent = pickle.loads(pickle.dumps(check))
    assert sent(bad) == check(bad) != []
