from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foveate.config.recipe import load_recipe
from foveate.config.runs import RLSettings, SFTSettings
from foveate.errors import ConfigError, DataError, DiskError, UserError
from foveate.files import read_sealed, sealed, set_disk_wait
from foveate.run_folder import FREE, NEVER, SCHEMA, RunFolder, open_run


def settings(**changes: Any) -> RLSettings:
    values: dict[str, Any] = {
        "run": "runs/a",
        "model": {"path": "demo"},
        "data": {"train": ["a.parquet"], "test": ["b.parquet"]},
        "optim": {"lr": 1e-6},
        "train": {"steps": 10},
    }
    for group, own in changes.items():
        values[group] = {**values.get(group, {}), **own} if isinstance(own, dict) else own
    return RLSettings.model_validate(values)


def start(path: Path, **changes: Any) -> RunFolder:
    with open_run(path, settings(**changes)) as run:
        return run


def begin(path: Path, **changes: Any) -> RunFolder:
    run = start(path, **changes)
    run.metrics.write_text('{"step": 0}\n')
    return run


def refusal(path: Path, kind: type[UserError] = ConfigError, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        start(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------------------------------------------- runs and settings


def test_a_run_begins_with_its_settings_and_versions(tmp_path):
    run = start(tmp_path / "deep" / "run")
    assert load_recipe(run.config, [], RLSettings) == settings()
    versions = read_sealed(run.versions, SCHEMA)
    assert {"schema", "foveate", "git", "python", "torch", "transformers"} == set(versions)
    assert versions["python"] == sys.version.split()[0]
    assert run.rollouts.is_dir()
    assert run.checkpoints.is_dir()


def test_the_same_settings_continue_a_run_and_keep_what_is_there(tmp_path):
    begin(tmp_path)
    before = snapshot(tmp_path)
    start(tmp_path)
    assert snapshot(tmp_path) == before


def test_another_setting_is_refused_with_both_values_and_advice(tmp_path):
    begin(tmp_path)
    before = snapshot(tmp_path)
    assert refusal(tmp_path, optim={"lr": 2e-6}, model={"dtype": "bfloat16"}) == (
        f'{tmp_path} belongs to a run with other settings: model.dtype was "float32", now "bfloat16"'
        f" (and 1 more); choose another run=, or delete {tmp_path} to start over; free to change are {', '.join(FREE)}"
        f" and more train.steps at a constant learning rate; --accept-changes takes all others but {', '.join(NEVER)}; "
        f"`run=NEW model.path={tmp_path}/checkpoints/latest` begins from its weights under any settings"
    )
    after = snapshot(tmp_path)
    assert after == before


def test_a_setting_inside_a_free_mapping_is_compared_too(tmp_path):
    begin(tmp_path, algorithm={"name": "gspo", "loss": {"clip_low": 0.1}})
    assert "algorithm.loss was not set, now {}" in refusal(tmp_path)
    assert "algorithm.loss.clip_low was 0.1, now 0.2" in refusal(tmp_path, algorithm={"loss": {"clip_low": 0.2}})


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "elsewhere"},
        {"eval": {"every": 5, "prompts": 64, "samples": 2, "gallery": 3}},
        {"train": {"save_every": 7, "keep_checkpoints": 9, "save_async": True, "disk_wait": 3.0}},
        {"data": {"workers": 1, "image_workers": 2}, "reward": {"workers": 3}, "log": {"to": []}},
        {"train": {"steps": 11}},
    ],
)
def test_what_cannot_reach_the_weights_may_change(tmp_path, changes):
    begin(tmp_path)
    run = start(tmp_path, **changes)
    assert load_recipe(run.config, [], RLSettings) == settings(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"threads": 2}}, "train.threads was null, now 2"),
        ({"train": {"tokens_per_micro_batch": 9000}}, "train.tokens_per_micro_batch was 16384, now 9000"),
        ({"data": {"test": ["c.parquet"]}}, 'data.test was ["b.parquet"], now ["c.parquet"]'),
        ({"train": {"steps": 9}}, "train.steps was 10, now 9 (it can only grow)"),
    ],
)
def test_what_can_reach_the_weights_or_the_comparison_may_not_change(tmp_path, changes, said):
    begin(tmp_path)
    assert said in refusal(tmp_path, **changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_more_steps_are_refused_where_they_would_change_the_learning_rate(tmp_path, schedule):
    begin(tmp_path, optim={"schedule": schedule})
    said = refusal(tmp_path, optim={"schedule": schedule}, train={"steps": 11})
    assert f"train.steps was 10, now 11 (the {schedule} schedule ends at the last step); choose another run=" in said


def test_other_settings_are_taken_where_they_are_accepted(tmp_path):
    run = begin(tmp_path)
    with open_run(tmp_path, settings(seed=5, optim={"lr": 2e-6}), accept_changes=True):
        pass
    assert load_recipe(run.config, [], RLSettings).seed == 5
    with (
        pytest.raises(ConfigError, match=r"optim\.name was"),
        open_run(tmp_path, settings(seed=6, optim={"name": "muon"}), accept_changes=True),
    ):
        pass


def test_nothing_is_accepted_where_nothing_may_change(tmp_path):
    begin(tmp_path)
    with (
        pytest.raises(ConfigError, match="nothing may change here"),
        open_run(tmp_path, settings(seed=5), frozen=True, accept_changes=True),
    ):
        pass


def test_the_page_about_checkpoints_has_the_table_of_what_may_change():
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    for name in FREE:
        assert f"`{name}`" in rows["freely"], name
    for name in NEVER:
        assert f"`{name}`" in rows["only in a new run"], name


def test_another_kind_of_run_is_refused(tmp_path):
    begin(tmp_path)
    supervised = SFTSettings.model_validate(
        {
            "run": "runs/a",
            "model": {"path": "demo"},
            "data": {"train": ["a.parquet"]},
            "optim": {"lr": 1e-6},
            "train": {"steps": 10},
        }
    )
    with pytest.raises(ConfigError, match="belongs to a run with other settings"), open_run(tmp_path, supervised):
        pass


def test_settings_may_change_as_long_as_nothing_was_done(tmp_path):
    start(tmp_path)
    run = start(tmp_path, seed=5)
    run.metrics.write_text("")
    assert load_recipe(start(tmp_path, seed=6).config, [], RLSettings).seed == 6
    (run.checkpoints / "step_000001").write_text("weights")
    assert "seed was 6, now 7" in refusal(tmp_path, seed=7)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path} is not the folder of a run: it holds thesis.tex and no config.yaml; choose another run="
    )
    assert snapshot(tmp_path) == before
    assert refusal(tmp_path / "thesis.tex").endswith("is a file, not a folder; choose another run=")


def test_a_start_that_was_killed_early_can_be_repeated_and_its_leftovers_go(tmp_path):
    run = start(tmp_path)
    run.config.unlink()
    run.versions.unlink()
    (tmp_path / ".config.yaml.1.tmp").write_text("half")
    (run.checkpoints / ".step_1.1.tmp").mkdir()
    start(tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_config_damaged_by_hand_is_named_with_its_line(tmp_path):
    run = begin(tmp_path)
    run.config.write_text("run: a\nrun: b\n")
    assert f"{run.config}:2: run is set twice" in refusal(tmp_path)


def test_other_versions_are_reported_when_a_run_continues(tmp_path, caplog):
    run = begin(tmp_path)
    versions = read_sealed(run.versions, SCHEMA)
    run.versions.write_text(sealed({**versions, "torch": "1.0"}))
    with caplog.at_level(logging.WARNING, "foveate"):
        start(tmp_path)
    assert caplog.messages == [
        f"{tmp_path} continues with other versions, so maybe not bit for bit: torch 1.0 -> {versions['torch']}"
    ]
    assert read_sealed(run.versions, SCHEMA) == versions


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"schema": 2}', "[" * 100_000, '{"schema": 2, "checksum": "%064d"}']
)
def test_versions_that_were_edited_are_refused_in_one_line(tmp_path, text):
    run = begin(tmp_path)
    run.versions.write_text(text)
    said = refusal(tmp_path, DataError)
    assert said.startswith(f"{run.versions}: cannot be read (versions.json ")
    assert said.endswith("; put back what the run wrote, or choose another run=")
    edited = json.dumps(json.loads(sealed({"schema": SCHEMA, "torch": "2"})) | {"torch": "3"})
    run.versions.write_text(edited)
    assert "is not as it was written" in refusal(tmp_path, DataError)


@pytest.mark.parametrize("schema", [None, 0, SCHEMA + 1])
def test_a_run_of_another_layout_is_refused_in_one_line(tmp_path, schema):
    run = begin(tmp_path)
    versions = read_sealed(run.versions, SCHEMA)
    assert versions.pop("schema") == SCHEMA
    run.versions.write_text(json.dumps(versions if schema is None else {**versions, "schema": schema}))
    assert refusal(tmp_path) == (
        f"{tmp_path} has the layout (schema {schema or 0}) of another version of foveate, this one continues schema "
        f"{SCHEMA}; choose another run=, delete {tmp_path} to start over, or continue it with that version"
    )
    run.metrics.unlink()
    start(tmp_path)  # nothing is in it that could be continued


def test_a_run_folder_is_held_by_one_process_and_free_after_a_kill(tmp_path):
    code = """
import sys
from foveate.config.recipe import load_recipe
from foveate.config.runs import RLSettings
from foveate.files import set_disk_wait
from foveate.run_folder import open_run
with open_run(sys.argv[1], load_recipe(sys.argv[2], [], RLSettings)):
    print("open", flush=True)
    sys.stdin.read()
"""
    config = start(tmp_path / "recipe").config
    with python(code, tmp_path / "run", config) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        said = refusal(tmp_path / "run")
        holder.kill()
    assert said == (f"{tmp_path}/run is in use by process {holder.pid}; wait for its end, or choose another run=")
    start(tmp_path / "run")


def test_a_full_disk_is_waited_for_within_a_run_and_no_longer(tmp_path):
    outer = set_disk_wait(0.0)
    with open_run(tmp_path, settings(), disk_wait=9.0):
        assert set_disk_wait(9.0) == 9.0
    assert set_disk_wait(outer) == 0.0


def test_a_run_folder_is_free_again_after_a_refusal(tmp_path):
    begin(tmp_path)
    refusal(tmp_path, seed=5)
    start(tmp_path)


def test_a_run_folder_below_a_file_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=f"cannot write {tmp_path}/file/run: Not a directory"):
        start(tmp_path / "file" / "run")


def test_a_start_that_fails_before_it_has_left_anything_leaves_no_folder(tmp_path):
    def fail(**changes: Any) -> None:
        with open_run(tmp_path / "run", settings(**changes)) as run:
            run.metrics.write_text("")
            run.skipped.write_text("row 3: a bad one")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with pytest.raises(ConfigError):
        fail(seed=5)
    assert snapshot(tmp_path / "run").keys() == before.keys()


def test_a_run_that_fails_after_its_first_line_keeps_its_folder(tmp_path):
    def fail() -> None:
        with open_run(tmp_path / "run", settings()) as run:
            run.metrics.write_text('{"step": 1}\n')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "seed was 0, now 5" in refusal(tmp_path / "run", seed=5)
