"""The command line as a user meets it: what goes wrong is one line, an exit code, and nothing half-written."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from safetensors.torch import load_file, save_file
from toy import HERE, make_data, settings_of
from typer.core import TyperGroup

from foveate.cli import app as cli
from foveate.data.table import open_tasks
from foveate.log import read_metrics


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb with its command, the verbs of groups too: ("prepare shapes", ...)."""
    for verb, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{name}{verb} ")
        else:
            yield f"{name}{verb}", command


VERBS = dict(commands(typer.main.get_command(cli.app)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def foveate(monkeypatch, capsys):
    """foveate(*arguments) -> (exit code, standard output, standard error) of the command, in this process."""
    logger = logging.getLogger("foveate")
    before = list(logger.handlers)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return code, *capsys.readouterr()

    yield run
    logger.handlers[:] = before


@pytest.fixture
def recipe(tmp_path, tiny_folder, data):
    """recipe(**changes) -> a file with the settings of one step without evaluation, in `tmp_path/run`."""

    def write(**changes: Any) -> Path:
        step = {"steps": 1, "prompts_per_step": 4, "threads": 1, "tokens_per_micro_batch": 256}
        values = settings_of(tmp_path / "run", tiny_folder, data, train=step, eval={"every": 0, "gallery": 0})
        for group, own in changes.items():
            values[group] = {**values.get(group, {}), **own} if isinstance(own, dict) else own
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def refused(ended: tuple[int, str, str], *said: object) -> None:
    """The command ended with code 1 and one line of an error, behind those of its progress; it holds all of `said`."""
    code, out, err = ended
    assert code == 1, err
    assert out == ""
    *progress, last = err.splitlines(keepends=True)
    assert all(" INFO " in line for line in progress), err
    assert re.fullmatch(r"error: [^\n]+\n", last), err
    for part in said:
        assert str(part) in last


# ----------------------------------------------------------------------------------------------------------- bad rows


def rows_with(folder: Path, data: Path, bad: dict[str, Any]) -> Path:
    """A file of four rows with pictures by path, the second of them changed."""
    lines = []
    for index, task in enumerate(open_tasks(data / "train.parquet").select(range(4))):
        (folder / f"{index}.png").write_bytes(task.images[0].data)
        row = {
            "data_source": "shapes",
            "prompt": [{"role": "user", "content": task.messages[0].content}],
            "images": [f"{index}.png"],
            "reward_model": {"style": "rule", "ground_truth": [1, 2, 300, 400]},
            "extra_info": {"response": "<box>[[1,2,300,400]]</box>"},
        }
        lines.append(json.dumps(row | (bad if index == 1 else {})))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def asks(text: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}]}


def answers(truth: object) -> dict[str, Any]:
    return {"reward_model": {"style": "rule", "ground_truth": truth}}


BAD_ROWS = {
    "missing image": ({"images": ["gone.png"]}, "field images", "no such file: gone.png"),
    "truncated image": ({"images": ["half.png"]}, "field images", "half.png is truncated"),
    "more marks": (asks("<image><image> what?"), "field images", "2 <image> marks for 1 images"),
    "fewer marks": (asks("what?"), "field images", "0 <image> marks for 1 images"),
    "three numbers": (answers([1, 2, 3]), "field reward_model.ground_truth", "[1, 2, 3] is not a box: it must be four"),
    "no numbers": (answers("a cat"), "field reward_model.ground_truth", "'a cat' is not a box: it must be four"),
    "outside": (answers([0, 0, 1001, 9]), "field reward_model.ground_truth", "lies outside the image"),
    "too long": (asks("<image>" + " red" * 200), "field prompt", "the limit is 128"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_by_file_row_and_field(tmp_path, foveate, recipe, data, name):
    bad, *said = BAD_ROWS[name]
    rows = rows_with(tmp_path, data, bad)
    (tmp_path / "half.png").write_bytes((tmp_path / "0.png").read_bytes()[:-20])
    path = recipe(data={"train": [str(rows)]}, reward={"name": "grounding"})
    refused(foveate("rl", path), f"{rows}, row 1 (line 2), ", *said, "--on-bad-row skip")
    assert not (tmp_path / "run").exists()


def test_a_mended_file_starts_the_run_that_was_refused(tmp_path, foveate, recipe, data):
    rows = rows_with(tmp_path, data, {"images": ["gone.png"]})
    path = recipe(data={"train": [str(rows)]})
    refused(foveate("rl", path), "gone.png")
    rows_with(tmp_path, data, {})
    code, _, err = foveate("rl", path, "seed=5", "data.max_prompt_tokens=100")
    assert code == 0, err


def test_bad_rows_can_be_left_out_counted_and_listed(tmp_path, foveate, recipe, data):
    rows = rows_with(tmp_path, data, {"images": ["gone.png"]})
    code, _, err = foveate("rl", recipe(data={"train": [str(rows)]}), "--on-bad-row", "skip")
    assert code == 0, err
    assert "1 of 4 rows are left out; the first: " in err
    [line] = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert line.startswith(f"{rows}, row 1 (line 2), field images: no such file: gone.png")
    assert "gone.png" in (tmp_path / "run" / "report.html").read_text()
    assert [record["data/epoch"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [4 / 3]


def test_a_skipping_start_that_fails_later_leaves_nothing_either(tmp_path, foveate, recipe, data):
    rows = rows_with(tmp_path, data, {"images": ["gone.png"]})
    bad_test = {"train": [str(rows)], "test": [str(tmp_path / "gone.parquet")], "on_bad_row": "skip"}
    code, _, err = foveate("rl", recipe(data=bad_test, eval={"every": 1, "gallery": 0}))
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/gone.parquet: no such file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["sft", "eval"])
def test_the_other_verbs_refuse_bad_rows_too(tmp_path, foveate, recipe, data, tiny_folder, verb):
    rows = rows_with(tmp_path, data, {"images": ["gone.png"]})
    values = yaml.safe_load(recipe(data={"train": [str(rows)]}).read_text())
    settings = {name: values[name] for name in ("run", "model", "optim")}
    settings |= {"data": {"train": [str(rows)]}, "train": {"steps": 1}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    arguments: dict[str, list[object]] = {
        "sft": [tmp_path / "sft.yaml"],
        "eval": ["--model", tiny_folder, "--data", rows, "--out", tmp_path / "run"],
    }
    refused(foveate(verb, *arguments[verb]), f"{rows}, row 1 (line 2), field images: no such file: gone.png")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"bbox": [1, 2, 3]}, "field bbox: [1, 2, 3] is not a box"),
        ({"bbox": [10, 10, 70, 20]}, "field bbox: [10, 10, 70, 20] lies outside the image of 56 x 56 pixels"),
        ({"image": "gone.png"}, "field image: no such file: gone.png"),
    ],
)
def test_preparing_refuses_bad_rows_and_writes_nothing(tmp_path, foveate, data, bad, said):
    (tmp_path / "0.png").write_bytes(open_tasks(data / "train.parquet")[0].images[0].data)
    good = {"image": "0.png", "sent": "the circle", "bbox": [1, 2, 30, 40]}
    rows = tmp_path / "refs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (good, good | bad)))
    out = tmp_path / "made"
    refused(foveate("prepare", "grounding", rows, "--out", out), f"{rows}, row 1 (line 2), {said}")
    assert not out.exists()
    code, said_out, _ = foveate(
        "prepare", "grounding", rows, "--out", out, "--on-bad-row", "skip", "--test-fraction", 0
    )
    assert code == 0
    assert f"left out: {rows}, row 1 (line 2), {said}" in said_out
    assert len(open_tasks(out / "train.parquet")) == 1


def test_an_empty_dataset_is_refused(tmp_path, foveate, recipe):
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(
        foveate("rl", recipe(data={"train": [str(tmp_path / "empty.jsonl")]})), f"{tmp_path}/empty.jsonl", "no rows"
    )
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.learning_rate=1e-6", "override 'optim.learning_rate=1e-6': unknown setting optim.learning_rate"),
        ("rollout.sample=4", "unknown setting rollout.sample; did you mean rollout.samples"),
        ("train.steps=many", "override 'train.steps=many': train.steps must be a whole number, found 'many'"),
        ("optim.lr=-1", "optim.lr must be greater than 0.0, found -1"),
        ("steps", "an override is written group.name=value"),
        ("algorithm=gsop", "unknown algorithm 'gsop'; did you mean 'gspo'?"),
        ("reward.settings={scael: 1.0}", "unknown setting 'scael'; did you mean 'scale'?"),
    ],
)
def test_a_bad_setting_is_refused_with_advice(tmp_path, foveate, recipe, override, said):
    refused(foveate("rl", recipe(), override), said)
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_in_a_file_is_named_with_its_line(foveate, recipe):
    path = recipe()
    path.write_text(path.read_text() + "trian:\n  steps: 3\n")
    line = len(path.read_text().splitlines()) - 1
    refused(foveate("rl", path), f"{path}:{line}: unknown setting trian; did you mean train?")


def test_a_missing_recipe_is_refused_with_the_shipped_ones(foveate):
    refused(foveate("rl", "shapes_gsop"), "no recipe 'shapes_gsop'; did you mean 'shapes_gspo'?")


def test_the_folder_of_another_run_is_refused_and_left_alone(tmp_path, foveate, recipe):
    assert foveate("rl", recipe())[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix}
    refused(
        foveate("rl", recipe(), "seed=9"), f"{tmp_path}/run belongs to a run with other settings: seed was 0, now 9"
    )
    assert {path: path.read_bytes() for path in before} == before


def test_an_evaluation_never_writes_into_a_run(tmp_path, foveate, recipe, data, tiny_folder):
    assert foveate("rl", recipe())[0] == 0
    out = ["--model", tiny_folder, "--data", data / "test.parquet", "--out", tmp_path / "run"]
    refused(foveate("eval", *out), f"--out {tmp_path}/run is the folder of a run")


# ------------------------------------------------------------------------------------------------------------- models


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copied(tmp_path, tiny_folder):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_weights_that_are_not_internvl_are_refused(tmp_path, foveate, recipe, copied):
    change_json(copied / "config.json", model_type="llava")
    refused(foveate("rl", recipe(model={"path": str(copied)})), f"{copied}", "llava", "internvl")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_refused(foveate, recipe, copied):
    weights = load_file(copied / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if "vision" in name))
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    refused(foveate("rl", recipe(model={"path": str(copied)})), f"{copied}", "vision")


def test_a_folder_without_a_model_is_refused(tmp_path, foveate, recipe):
    refused(foveate("rl", recipe(model={"path": str(tmp_path / "nothing")})), f"{tmp_path}/nothing")
    refused(foveate("doctor", tmp_path / "nothing"), f"{tmp_path}/nothing")


# ---------------------------------------------------------------------------------------------- a whole process at work


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LIMITED = """
import resource
import foveate.train.worker
from foveate.cli.app import main
original = foveate.train.worker.{function}
def limited(*arguments, **keywords):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return original(*arguments, **keywords)
foveate.train.worker.{function} = limited
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "path"), [("save_checkpoint", "checkpoints/step_000001"), ("save_policy", "final")]
)
def test_a_full_disk_while_saving_is_one_line_and_the_next_start_ends_the_run(
    tmp_path, foveate, recipe, function, path
):
    run = process(LIMITED.format(function=function), "rl", recipe())
    out, err = run.communicate()
    *progress, last = err.splitlines(keepends=True)
    assert all(" INFO " in line for line in progress), err
    refused(
        (run.returncode, out, last), f"cannot write {tmp_path}/run/{path}: ", "MiB free", "nothing was left half-wr"
    )
    assert not (tmp_path / "run" / path).exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert foveate("rl", recipe())[0] == 0


@pytest.mark.slow
def test_ctrl_c_ends_with_code_130_and_says_how_to_go_on(tmp_path, recipe):
    path = recipe(train={"steps": 1000, "save_every": 1, "prompts_per_step": 2, "tokens_per_micro_batch": 256})
    run = process("from foveate.cli.app import main; main()", "rl", path)
    for _ in range(1200):
        if list((tmp_path / "run" / "checkpoints").glob("step_*")) or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; the same command continues from what is saved"
    assert "Traceback" not in err


def test_ctrl_c_is_told_in_words_that_fit_the_verb(monkeypatch, foveate, recipe):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foveate.train.rl.run_rl", interrupt)
    monkeypatch.setattr("foveate.datasets.shapes.prepare_shapes", lambda *_, **__: interrupt())
    ended = foveate("rl", recipe())
    assert ended == (130, "", "interrupted; the same command continues from what is saved\n")
    assert foveate("prepare", "shapes", "nowhere") == (130, "", "interrupted; nothing is half-written\n")


# ------------------------------------------------------------------------------------------------------ what goes well


def test_a_run_prints_its_result_and_nothing_of_transformers(tmp_path, foveate, recipe):
    code, out, err = foveate("rl", recipe(eval={"every": 1, "samples": 1, "gallery": 2}))
    assert code == 0, err
    assert out.count(f"Report: {tmp_path}/run/report.html\n") == 1
    assert f"Model: {tmp_path}/run/final" in out
    assert not re.search(r"%\||it/s|Loading|Writing|warning", err, re.IGNORECASE)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in err.splitlines())


def test_every_verb_of_the_pipeline_works_after_the_other(tmp_path, foveate, recipe):
    made = tmp_path / "made"
    assert foveate("prepare", "shapes", made, "--train", 8, "--test", 4, "--side", 56, "--shortcut", 0.4)[0] == 0
    assert foveate("prepare", "tiny", tmp_path / "tiny", "--tile", 56)[0] == 0
    train = {"train": [str(made / "train.parquet")], "test": [str(made / "test.parquet")]}
    path = recipe(model={"path": str(tmp_path / "tiny")}, data=train, reward={"name": f"{HERE}:text_length"})
    assert foveate("rl", path)[0] == 0
    out = ["--data", made / "test.parquet", "--out", tmp_path / "eval", "--max-tokens", 8, "--threads", 1]
    code, said, err = foveate("eval", "--model", tmp_path / "run" / "final", *out)
    assert code == 0, err
    assert "4 held-out questions" in said
    assert foveate("report", tmp_path / "run")[0] == 0
    code, said, _ = foveate("doctor", tmp_path / "run" / "final")
    assert code == 0
    assert "tiles of 56 pixels" in said


def test_preparing_nothing_and_unknown_kinds_are_refused(tmp_path, foveate):
    refused(foveate("prepare", "shapes", tmp_path / "x", "--train", 0, "--test", 0), "--train and --test are both 0")
    refused(foveate("prepare", "shapes", tmp_path / "x", "--kinds", "pears"), "unknown kind 'pears'; allowed: ")
    refused(foveate("prepare", "tiny", tmp_path / "x", "--tile", 100), "--tile 100: must be a multiple of 28")
    refused(
        foveate("prepare", "tiny", tmp_path / "x", "--small", "--from", "demo"),
        "--small has random weights, and those of --from demo",
    )
    assert not (tmp_path / "x").exists()


def test_the_verbs_are_all_there():
    prepared = {f"prepare {what}" for what in ("shapes", "grounding", "tiny")}
    assert {"demo", "sft", "rl", "eval", "report", "doctor"} | prepared <= VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_its_options(foveate, verb):
    code, out, err = foveate(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Usage: foveate {verb}" in out
    assert VERBS[verb].help.endswith(".")
    for parameter in VERBS[verb].params:
        assert parameter.help, f"{verb}: {parameter.name} says nothing about itself"


def test_a_command_that_is_not_one_is_refused_with_its_usage(foveate):
    code, out, err = foveate("eval", "--model", "demo")
    assert (code, out) == (2, "")
    assert "Usage: foveate eval" in err


def test_a_start_without_a_verb_shows_the_verbs(foveate):
    _, out, _ = foveate()
    for verb in VERBS:
        assert verb.split()[0] in out


def test_the_command_is_installed_as_a_script():
    text = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text()
    assert 'foveate = "foveate.cli.app:main"' in text
    assert os.environ.get("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE"
