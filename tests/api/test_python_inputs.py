"""What Python code passes to a run: rows, functions, settings by name."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from foveate.api.inputs import data_files, reward_settings
from foveate.api.trainer import RLTrainer
from foveate.api.training import rl_settings, train_rl
from foveate.config.elsewhere import ELSEWHERE, IN_WORDS
from foveate.config.recipe import flatten, load_recipe, settings_of
from foveate.config.runs import STAGES, MPOSettings, RLSettings, SFTSettings, walk
from foveate.errors import ConfigError, DataError
from foveate.records import Task
from foveate.registry import name_of
from foveate.rewards.build import build_reward
from foveate.rewards.pool import Graders
from foveate.run_folder import change_in_words, settings_changes

ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
NEEDED = {"run": "r", "model.path": "demo", "data.train": ["a.jsonl"], "steps": 3}


def right(answer, ground_truth, **columns):
    return float(answer == ground_truth) + 0 * len(columns)


def settings(**more):
    given = {"eval_data": None, "algorithm": "gspo", "config": None, "run_dir": None, "overrides": {"steps": 3}, **more}
    return rl_settings("demo", ["a.jsonl"], right, **given)


# --------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_written_once_and_paths_are_left_alone(tmp_path):
    file = tmp_path / "rows" / "train.parquet"
    assert data_files(ROWS, file) == [str(file)]
    assert pq.read_table(file).to_pylist() == ROWS
    before = file.stat().st_mtime_ns
    data_files(list(ROWS), file)
    assert file.stat().st_mtime_ns == before
    data_files(ROWS[:2], file)
    assert pq.read_table(file).num_rows == 2
    assert data_files("rows.jsonl", file) == ["rows.jsonl"]
    assert data_files([Path("a.parquet"), "owner/name@train"], file) == ["a.parquet", "owner/name@train"]


def test_images_among_the_rows_travel_as_png(tmp_path):
    image = PIL.Image.new("RGB", (3, 2), (255, 0, 0))
    [file] = data_files([{"image": image, "many": [image, image], "answer": "red"}], tmp_path / "rows.parquet")
    [row] = pq.read_table(file).to_pylist()
    assert row["image"]["bytes"].startswith(b"\x89PNG")
    assert len(row["many"]) == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "there are no rows"),
        ([1, 2], "row 0: must be a dict, found int"),
        ([{"a": 1}, {"a": "b"}], "the rows do not make a table"),
        (7, "rows must be a list of dicts, a datasets.Dataset, a DataFrame or paths, found int$"),
        (iter(ROWS), r"found list_iterator; give list\(\.\.\.\) of it"),
    ],
)
def test_what_is_no_rows_is_refused(tmp_path, data, said):
    with pytest.raises(DataError, match=said):
        data_files(data, tmp_path / "rows.parquet")
    assert not (tmp_path / "rows.parquet").exists()


class Frame:
    """As pandas has it."""

    def __init__(self, **columns):
        self.columns, self._columns = [*columns], columns

    def __getitem__(self, name):
        return self._columns[name]

    def to_dict(self, orient):
        assert orient == "records"
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self._columns.values(), strict=True)]

    def iterrows(self):
        raise NotImplementedError

    def to_parquet(self, path_or_buf):
        raise AssertionError(f"arrow takes no such objects: {path_or_buf}")


def test_images_of_pil_and_of_numpy_travel_in_a_data_frame_and_in_dicts(tmp_path):
    red = PIL.Image.new("RGB", (3, 2), (255, 0, 0))
    for images in ([red, red], [np.asarray(red)] * 2):
        for data in (
            Frame(image=images, answer=["a", float("nan")]),
            [{"image": images[0], "answer": "a"}, {"answer": None}],
        ):
            [file] = data_files(data, tmp_path / "rows.parquet")
            rows = pq.read_table(file).to_pylist()
            assert rows[0]["image"]["bytes"].startswith(b"\x89PNG")
            assert [row["answer"] for row in rows] == ["a", None]
    [file] = data_files([{"box": np.array([1.0, 2.0]), "level": np.int64(3)}], tmp_path / "rows.parquet")
    assert pq.read_table(file).to_pylist() == [{"box": [1.0, 2.0], "level": 3}]


def test_of_several_splits_one_is_asked_for(tmp_path):
    splits = {"test": Frame(answer=["a"]), "train": Frame(answer=["a"])}
    with pytest.raises(
        DataError, match=r"found dict with the splits test, train; give one of them: dataset\['train'\]"
    ):
        data_files(splits, tmp_path / "rows.parquet")


# ------------------------------------------------------------------------------------------------------------- rewards


def test_a_function_gets_a_name_that_changes_with_its_source():
    first, again, other = (name_of(make) for make in (lambda answer, _: float(len(answer)), right, right))
    assert first.startswith("passed:lambda-")
    assert again == other
    assert first != again


def test_what_a_function_holds_is_part_of_its_name():
    def weighted(weight):
        def own(answer, ground_truth):
            return weight * (answer == ground_truth)

        return own

    assert name_of(weighted(0.5)) == name_of(weighted(0.5))
    assert name_of(weighted(0.5)) != name_of(weighted(2.0))


def test_a_reward_is_a_name_a_function_a_weighted_list_or_settings():
    assert reward_settings("exact") == {"name": "exact"}
    assert reward_settings({"name": right, "workers": 0}) == {"name": name_of(right), "workers": 0}
    assert build_reward(reward_settings(right)["name"], {}).name == name_of(right)
    combined = reward_settings([(right, 1), ("exact", 0.5)])
    assert combined == {"name": "weighted_sum", "settings": {"weights": {name_of(right): 1.0, "exact": 0.5}}}


@pytest.mark.parametrize("bad", [[], [(right, 1, 2)], [("exact", 1.0), 3], 7])
def test_a_list_of_rewards_has_pairs(bad):
    with pytest.raises(ConfigError, match="or of \\(function or name, weight\\)"):
        reward_settings(bad)


def test_rewards_in_a_list_without_weights_count_once_each():
    weights = {"exact": 1.0, name_of(right): 1.0, "repetition": 0.5}
    assert reward_settings(["exact", right, ("repetition", 0.5)])["settings"] == {"weights": weights}
    with pytest.raises(ConfigError, match="exact is given twice"):
        reward_settings(["exact", ("exact", 2.0)])


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, completions, solution):
        return [self.by * (c == s) for c, s in zip(completions, solution, strict=True)]


def scaled(answer, ground_truth, *, by=1.0):
    return by * (answer == ground_truth)


@pytest.mark.parametrize("make", [Scaled, lambda by: functools.partial(scaled, by=by), lambda by: Scaled(by).__call__])
def test_what_can_be_called_is_a_reward_whose_name_changes_with_what_it_holds(make):
    one, again, other = (reward_settings(make(by))["name"] for by in (2.0, 2.0, 3.0))
    assert one == again != other
    task = Task("0", "s", (), (), "yes")
    assert [build_reward(name, {})(text, task).value for name in (one, other) for text in ("yes", "no")] == [2, 0, 3, 0]
    with Graders(one, {}, workers=1) as graders:
        assert graders.grade_many([("yes", task)])[0].value == 2.0


def test_async_code_and_what_cannot_be_called_are_refused():
    async def later(completions):
        return completions

    with pytest.raises(ConfigError, match="later is async"):
        reward_settings(later)
    with pytest.raises(ConfigError, match="a function, or an object that can be called, found 7"):
        reward_settings({"name": 7})


def test_a_function_that_was_not_passed_again_is_asked_for():
    with pytest.raises(ConfigError, match="the function mine was passed by Python code; pass it again, unchanged"):
        build_reward("passed:mine-0123456789ab", {})


@pytest.mark.parametrize("listed", [False, True])
def test_a_function_whose_source_changed_is_named_as_such(listed):
    def ra(answer, ground_truth):
        return float(answer == ground_truth)

    old = flatten({"reward": reward_settings([(ra, 1.0)] if listed else ra)})

    def ra(answer, ground_truth):
        return float(answer != ground_truth)

    new = flatten({"reward": reward_settings([(ra, 1.0)] if listed else ra)})
    [name, *_] = settings_changes(old, new)
    said = change_in_words(name, old, new)
    place = "reward.settings.weights.ra" if listed else "reward.name"
    assert said == f"{place}: the source of the function ra changed, or a value that it holds"


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_are_named_by_group_by_path_or_alone():
    found = settings_of({**NEEDED, "optim": {"lr": 1e-4}, "train.save_every": 7, "max_tokens": 9}, RLSettings)
    assert (found.optim.lr, found.train.save_every, found.rollout.max_tokens) == (1e-4, 7, 9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stepss": 3}, r"argument stepss: unknown setting stepss; did you mean train\.steps"),
        ({"optim": {"learning_rate": 1}}, r"argument optim: learning_rate: unknown setting optim\.learning_rate"),
        ({"samples": 4}, r"argument samples: is the name of several settings: eval\.samples, rollout\.samples"),
        ({"rollout": {"samples": "4"}}, r"rollout\.samples must be a whole number, found '4'"),
        ({"train.lr": 1}, r"unknown setting train\.lr; did you mean optim\.lr"),
    ],
)
def test_wrong_overrides_are_told_with_the_nearest(given, said):
    with pytest.raises(ConfigError, match=said):
        settings_of({**NEEDED, **given}, RLSettings)


def test_arguments_stand_over_a_recipe():
    found = settings(config="shapes_gspo", run_dir="x", overrides={"train.steps": 5}, algorithm="grpo")
    assert (found.run, found.train.steps, found.algorithm.name, found.optim.lr) == ("x", 5, "grpo", 3e-4)
    assert found.data.train == ("a.jsonl",)


def test_a_run_without_a_folder_gets_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [settings().run for _ in range(3)] == ["runs/rl-1", "runs/rl-2", "runs/rl-3"]
    with pytest.raises(ConfigError, match="argument stepss"):
        settings(overrides={"stepss": 3})
    assert not (tmp_path / "runs/rl-4").exists()
    with pytest.raises(ConfigError, match="from Python the folder of a run is run_dir"):
        settings(overrides={"steps": 3, "run": "x"})


@pytest.mark.parametrize("weight", ["x", float("nan"), None])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ConfigError, match="must be a finite number"):
        reward_settings([(right, weight)])


def test_names_of_other_trainers_are_told_by_ours():
    with pytest.raises(ConfigError, match=r"unknown setting num_generations; did you mean rollout\.samples"):
        settings(overrides={"steps": 3, "num_generations": 4})


def test_without_held_out_rows_nothing_is_evaluated():
    assert settings(run_dir="a").eval.every == 0
    assert settings(run_dir="a", eval_data="b.jsonl").eval.every == 20
    with pytest.raises(ConfigError, match=r"eval\.every is 5, but data\.test is empty"):
        settings(run_dir="a", overrides={"steps": 3, "eval": {"every": 5}})


def test_a_recipe_of_five_lines_is_whole(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "run: runs/mine\nmodel: {path: demo}\ndata: {train: rows.jsonl}\nreward: exact\ntrain: {steps: 9}\n"
    )
    found = load_recipe(recipe, [], RLSettings)
    assert (found.data.train, found.optim.lr, found.eval.every) == (("rows.jsonl",), 1e-6, 0)


def test_each_stage_has_its_own_usual_learning_rate():
    rates = [settings_of(NEEDED, cls).optim.lr for cls in (SFTSettings, MPOSettings, RLSettings)]
    assert rates == [1e-5, 2e-7, 1e-6]


# ----------------------------------------------------------------------------------------------------------- a script

SCRIPT = """
import foveate as fv

def right(answer, ground_truth, **columns):
    return {{"right": float(answer == ground_truth), "long": len(answer) / 100}}

rows = [{{"question": f"What is {{n}} plus 1?", "answer": str(n + 1)}} for n in range(8)]
columns = {{"prompt": "question", "answer": "answer", "source": "=sums"}}
run = fv.train_rl(
    "demo", rows, right, run_dir={folder!r}, steps=2, max_tokens=8, prompts_per_step=2,
    rollout={{"samples": 4}}, **{{"data.columns": columns, "reward.workers": 1}},
)
print(len(run.metrics), run.model.is_dir(), run.report.is_file(), "reward/long" in run.metrics.column_names)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_trains_with_its_own_function_in_workers(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "run")))
    for _ in range(2):  # the second time there is nothing left to do
        ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == "2 True True True"
    script.write_text(script.read_text().replace("/ 100", "/ 50"))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "reward.name: the source of the function right changed" in ended.stderr


NONE = {"run": "r", "model.path": "demo", "data.train": ["a.jsonl"], "steps": 1}


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        (RLSettings, {"peft_config": 1}, r"unknown setting peft_config; did you mean model\.lora\?"),
        (RLSettings, {"num_train_epochs": 1}, r"num_train_epochs; a run is as long as train\.steps says"),
        (RLSettings, {"optim": {"save_steps": 5}}, r"optim\.save_steps; did you mean train\.save_every\?"),
        (RLSettings, {"clip_low": 0.2}, r"did you mean algorithm\.loss\.clip_low\?"),
        (SFTSettings, {"num_generations": 4}, r"rollout\.samples is a setting of foveate rl, cascade, and not of"),
        (SFTSettings, {"max_tokens": 4}, r"max_tokens is a setting of foveate rl, cascade, and not"),
        (RLSettings, {"train.pairs_per_step": 4}, r"train\.pairs_per_step is a setting of foveate mpo, and not"),
        (
            RLSettings,
            {"a_b": 1, "report_to": "x", "q": 2},
            r"setting a_b; .*setting report_to; .*setting q;",
        ),
        (RLSettings, {"steps": None}, r"train\.steps must be a whole number"),
    ],
)
def test_an_unknown_name_says_what_it_is_here_or_whose_it_is(stage, given, said):
    with pytest.raises(ConfigError, match=said):
        settings_of({**NONE, **given}, stage)


def test_every_name_of_another_trainer_leads_to_a_setting():
    nested = {"algorithm.loss", "model.lora"}
    known = {path for cls in STAGES.values() for path, _ in walk(cls)}
    assert {path for path in ELSEWHERE.values() if path not in known and path.rpartition(".")[0] not in nested} == set()
    assert not ELSEWHERE.keys() & IN_WORDS.keys()


def test_a_missing_number_of_steps_is_named_as_it_is_given():
    with pytest.raises(ConfigError, match=r"^settings: train\.steps is missing; give steps=\.\.\.$"):
        settings_of({key: value for key, value in NONE.items() if key != "steps"}, RLSettings)


def test_names_are_in_any_case_and_one_text_stands_for_a_list_of_one():
    found = settings_of({**NONE, "algorithm": "GRPO", "trainable": "language", "log.to": "tensorboard"}, RLSettings)
    assert (found.algorithm.name, found.model.trainable, found.log.to) == ("grpo", ("language",), ("tensorboard",))


@pytest.mark.parametrize(
    ("arguments", "more", "said"),
    [
        (
            ("demo", ROWS, "exact"),
            {"model": {"lora": {"rank": 4}}},
            "argument model: is given twice; .* lora=",
        ),
        (("demo", ROWS), {"reward_funcs": right}, "argument reward_funcs: it is called reward here"),
        (("demo", ROWS), {}, r"argument reward is missing; call it with \(model, train_data, reward, steps=100\)"),
        ((object(), ROWS, "exact"), {}, "argument model: must be a model folder or a name, found object; write"),
    ],
)
def test_a_call_that_python_would_refuse_says_what_to_do(arguments, more, said):
    for call in (train_rl, RLTrainer):
        with pytest.raises(ConfigError, match=said):
            call(*arguments, **more)
