from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foveate.data.videos import NO_VIDEO_FILES
from foveate.errors import ConfigError, DataError
from foveate.records import Answer, Message, Score, Task, Video
from foveate.rewards import REWARDS, KnownReward
from foveate.rewards.build import build_reward, truth_check
from foveate.rewards.pool import Graders

FUNCTIONS = """
import functools

from foveate.records import Score


def plain(text, task, *, scale: float = 1.0):
    return scale * (text == task.answer)


def record(answer, task, *, limit: int = 3):
    return {"score": len(answer.token_ids), "cut": answer.finish == "length", "fits": len(answer.token_ids) <= limit}


def truth(answer, ground_truth, level, *, scale: float = 1.0):
    return {"right": scale * (answer == ground_truth), "level": level}


def any_column(answer, ground_truth, **columns):
    return sorted(columns) == ["data_source", "level", "solution"]


def trl(completions, level, ground_truth=None, **kwargs):
    return [float(c == t) + l for c, t, l in zip(completions, ground_truth, level)]


def trl_settings(completions, *, level: int = 1, **kwargs):
    return [float(level)]


def trl_prompts(prompts, completions):
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions)]


def trl_of_some(completions, level, **kwargs):
    return [1.0 if c == "yes" else None for c in completions]


def trl_messages(completions: list[list[dict[str, str]]], prompts, solution: list[str], **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [float(t == s and p[0]["role"] == "user") for t, s, p in zip(texts, solution, prompts)]


def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0, **kwargs):
    extra_info["level"] += 1
    parts = {"acc": solution_str == ground_truth, "pred": solution_str, "source": data_source == "s", **kwargs}
    return {"score": parts["acc"] + bonus + extra_info["level"], **parts}


def strict(data_source, solution_str, ground_truth, extra_info, *, weight: float = 1.0):
    return weight * ground_truth.sum()


def easyr1(text, task):
    return {"overall": 0.55, "accuracy": 0.5, "format": 1.0}


def batch(data_sources, solution_strs, ground_truths, extra_infos, bonus=0.0):
    return [float(s == t) + bonus for s, t in zip(solution_strs, ground_truths)]


def one_input(reward_input, weight: float = 0.5):
    return {"overall": weight * reward_input["response_length"], "accuracy": 1.0}


def some_inputs(reward_inputs, weight=0.5):
    return [{"overall": weight, "accuracy": one["response"] == one["ground_truth"]} for one in reward_inputs]


class Named:
    scale = 2.0

    def __call__(self, completions, solution, **kwargs):
        return [self.scale * (c == s) for c, s in zip(completions, solution)]


half = functools.partial(plain, scale=0.5)


def with_state(completions, trainer_state=None, **kwargs):
    return [1.0]


def with_ids(completions, completion_ids):
    return [1.0]


def with_router(data_source, solution_str, ground_truth, extra_info, reward_router_address):
    return 1.0


def wordy(text, task):
    return {"acc": 1.0, "why": "fine"}


def nothing(text, task):
    return None


def bare(completions):
    return 0.5


def two(prompt, response):
    return 1.0


async def later(text, task):
    return 1.0


TASK_FREE = 7
"""

TASK = Task("0", "s", (Message("user", "<image>\nHow?"),), (), "yes", {"level": 2}, "r.parquet, row 0")
YES = Answer.sampled((5, 6, 7, 8), (0.0,) * 4, "yes", "length", 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


FORMS = {
    "plain": ({"scale": 2.0}, Score(2.0)),
    "record": ({"limit": 4}, Score(4.0, {"cut": 1.0, "fits": 1.0})),
    "truth": ({"scale": 0.5}, Score(2.5, {"right": 0.5, "level": 2.0})),
    "any_column": ({}, Score(1.0)),
    "trl": ({}, Score(3.0)),
    "batch": ({"bonus": 0.5}, Score(1.5)),
    "one_input": ({"weight": 0.25}, Score(1.0, {"accuracy": 1.0})),
    "some_inputs": ({}, Score(0.5, {"accuracy": 1.0})),
    "Named": ({}, Score(2.0)),
    "half": ({}, Score(0.5)),
    "easyr1": ({}, Score(0.55, {"accuracy": 0.5, "format": 1.0})),
    "trl_settings": ({"level": 5}, Score(5.0)),
    "trl_prompts": ({}, Score(7.0)),
    "trl_messages": ({}, Score(1.0)),
    "compute_score": ({"bonus": 0.25, "share": 0.5}, Score(4.25, {"acc": 1.0, "source": 1.0, "share": 0.5})),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_function_of_each_signature_is_a_reward(file, name):
    settings, score = FORMS[name]
    assert build_reward(f"{file}:{name}", settings)(YES, TASK) == score
    assert TASK.meta == {"level": 2}


def test_none_of_a_trl_reward_is_an_answer_that_is_not_graded(file):
    reward = build_reward(f"{file}:trl_of_some", {})
    assert reward("yes", TASK) == Score(1.0)
    assert reward("no", TASK) == Score(None, note="the reward does not apply to this row")
    with Graders(f"{file}:trl_of_some", {}, workers=1) as graders:
        assert [score.value for score in graders.grade_many([("yes", TASK), ("no", TASK)])] == [1.0, None]


@pytest.mark.parametrize("name", ["record", "truth", "trl", "compute_score", "some_inputs", "Named"])
def test_each_signature_works_in_worker_processes(file, name):
    settings, score = FORMS[name]
    with Graders(f"{file}:{name}", settings, workers=1) as graders:
        assert graders.grade_many([(YES, TASK)] * 3) == [score] * 3


def test_a_worker_is_sent_no_more_than_the_reward_reads(file):
    for name in FORMS:
        assert build_reward(f"{file}:{name}", {}).read(YES) == (
            YES if name in ("record", "one_input", "some_inputs") else "yes"
        )
    weights = {f"{file}:plain": 1.0, "exact": 1.0}
    assert build_reward("weighted_sum", {"weights": weights}).read(YES) == "yes"
    mixed = build_reward("weighted_sum", {"weights": {**weights, f"{file}:record": 0.5}})
    assert mixed.read(YES) is YES
    assert mixed(YES, TASK).value == 4.0
    with pytest.raises(DataError, match="takes \\(answer, task\\), but only the text"):
        mixed("yes", TASK)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "two",
            {},
            r"two: parameters \(prompt, response\) fit no known signature; write \(answer, task\), \(text, task\)",
        ),
        ("later", {}, "later is async, and rewards are called one by one"),
        ("TASK_FREE", {}, "must be a function, or an object that can be called, found 7"),
        ("with_router", {}, "reward_router_address is not passed by foveate: the reward judge"),
        ("FILE", {}, "has no 'FILE'"),
        ("plain", {"scael": 1.0}, "unknown setting 'scael'; did you mean 'scale'"),
        ("record", {"limit": 1.5}, "limit must be a whole number, found 1.5"),
        ("truth", {"level": 1}, "unknown setting 'level'"),
        ("trl", {"level": 1}, "unknown setting 'level'; it has no settings"),
        ("strict", {"bonus": 1}, "extra_info, bonus .*got an unexpected keyword argument 'bonus'"),
        ("strict", {"weight": "1"}, "weight must be a number, found '1'"),
        ("compute_score", {"ground_truth": 1}, "multiple values"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_any_answer(file, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_reward(f"{file}:{name}", settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wordy", r"wordy returned dict \{'acc': 1.0, 'why': 'fine'\}; it must return a number"),
        ("nothing", "nothing returned NoneType None; it must return"),
        ("bare", r"bare returned 0\.5 for one completion; it must return \[score\]"),
    ],
)
def test_what_is_no_score_is_refused_by_name_and_value(file, name, message):
    with pytest.raises(DataError, match=message):
        build_reward(f"{file}:{name}", {})("yes", TASK)
    with pytest.raises(DataError, match=message):
        build_reward("weighted_sum", {"weights": {f"{file}:{name}": 1.0}})("yes", TASK)


def test_a_ground_truth_comes_as_it_is_stored(file):
    row = Task("0", "s", (), (), np.array([1, 2]), {})
    assert build_reward(f"{file}:strict", {"weight": 2.0})("7", row).value == 6.0
    assert build_reward(f"{file}:compute_score", {})("7", row).note.startswith("grader failed: KeyError: 'level'")


def test_rows_without_a_column_that_a_reward_names_are_reported(file):
    check = truth_check(f"{file}:truth")
    assert check is not None
    assert check(TASK) == []
    bad = Task("1", "s", (), (), "yes")
    assert pickle.loads(pickle.dumps(check))(bad) == [
        ("extra_info.level", "is missing; the reward has a parameter of this name")
    ]
    assert truth_check(f"{file}:plain") is None
    for name in ("trl_messages", "compute_score"):
        needs = truth_check(f"{file}:{name}")
        assert needs is not None
        assert needs(TASK) == []
        assert needs(Task("1", "s", (), (), None)) == [
            ("reward_model.ground_truth", "is missing; the reward compares answers with it")
        ]


def test_a_new_reward_is_a_function_with_its_check_and_one_line_of_the_table(tmp_path, monkeypatch):
    file = tmp_path / "vowels.py"
    file.write_text(
        "def vowels(text, task, *, least: int = 1):\n"
        "    return sum(letter in 'aeiou' for letter in text) >= least\n\n"
        "def check_vowels(task, *, least: int = 1):\n"
        "    return [] if task.meta['vowels'] >= least else [('extra_info.vowels', 'are too few')]\n"
    )
    monkeypatch.setitem(REWARDS, "vowels", KnownReward(f"{file}:vowels", f"{file}:check_vowels", quick=True))
    with Graders(
        "weighted_sum", {"weights": {"vowels": 2.0}, "settings": {"vowels": {"least": 2}}}, workers=0
    ) as graders:
        assert [score.value for score in graders.grade_many([("a", TASK), ("aye", TASK)])] == [0.0, 2.0]
    assert build_reward("vowels", {})("a", TASK).value == 1.0
    check = truth_check("vowels", {"least": 3})
    assert check is not None
    assert check(Task("0", "s", (), (), None, {"vowels": 2})) == [("extra_info.vowels", "are too few")]
    with pytest.raises(ConfigError, match="unknown reward 'vowel'; did you mean 'vowels'"):
        build_reward("vowel", {})


def test_what_other_trainers_pass_and_foveate_does_not_is_said_before_a_run(file, caplog):
    check = truth_check(f"{file}:with_ids")
    assert check is not None
    [(field, fault)] = check(TASK)
    assert (field, fault[:62]) == (
        "extra_info.completion_ids",
        "is no column, and not passed by foveate: a function (answer, t",
    )
    build_reward(f"{file}:with_state", {})
    build_reward(f"{file}:with_state", {})
    assert caplog.text.count("trainer_state is not passed by foveate: a reward does not depend on the step") == 1


def test_a_trl_reward_gets_messages_where_the_prompt_is_messages(file):
    talk = replace(TASK, conversational=True)
    assert build_reward(f"{file}:trl", {})("yes", talk).value == 2.0  # no text is equal to a list of messages
    prompts = build_reward(f"{file}:trl_prompts", {})
    assert prompts("yes", talk).value == 2.0  # a message each
    assert prompts("yes", TASK).value == 7.0


@pytest.mark.parametrize(
    "name", sorted({name for name, one in REWARDS.items() if not one.builds} - {"instruction_following"})
)
def test_a_row_without_an_answer_is_one_fault_where_the_reward_reads_it_and_none_where_not(name):
    bare = Task("0", "s", (Message("user", "Hi"),), (), None, {})
    check = truth_check(name)
    if not REWARDS[name].check:
        assert check is None
        return
    assert check is not None
    fault = dict(check(bare)).get("reward_model.ground_truth", "")
    assert fault.startswith(f"is missing; the reward {name}")
    assert ("name another one with reward.name" in fault) == (name == "grounding")


def test_a_judge_needs_the_ground_truth_that_it_is_shown():
    bare = Task("0", "s", (), (), None, {})
    needs = truth_check("judge", {})
    assert needs is not None
    assert needs(bare)
    assert truth_check("judge", {"prompt": "{answer}"}) is None


def test_a_judge_that_sees_images_refuses_rows_with_video_files():
    clip = Task("0", "s", (), (), "1", {}, videos=(Video(Path("a.mp4"), None, 64, 64, 4, 2.0),))
    needs = truth_check("judge", {"images": True})
    assert needs is not None
    assert needs(clip) == [("videos", "the judge " + NO_VIDEO_FILES)]
    assert needs(replace(clip, videos=())) == []
    alone = truth_check("judge", {})
    assert alone is not None
    assert alone(clip) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("numeric", {"tolerance": -1}, "tolerance must be at least 0.0, found -1"),
        ("numeric", {"tolerance": float("nan")}, "tolerance must be"),
        ("number_list", {"partial": 2.0}, "partial must be at most 1.0, found 2.0"),
        ("grounding", {"threshold": 2.0}, "threshold must be at most 1.0"),
        ("boxes", {"alpha": -0.5}, "alpha must be at least 0.0"),
        ("repetition", {"size": 0}, "size must be at least 1"),
        ("weighted_sum", {"weights": {"exact": float("inf")}}, "weights must be a finite number"),
    ],
)
def test_a_setting_outside_its_range_is_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_reward(name, settings)
