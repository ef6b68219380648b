"""A run continues with what it was made from, or says what is different; what is accepted is written down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from slow_cases import slow_but
from toy import make_data, rl_settings, sft_settings

from foveate.api.training import Recipe
from foveate.config.recipe import to_yaml
from foveate.data.table import open_tasks, write_rows
from foveate.errors import ConfigError, DataError
from foveate.log import read_metrics
from foveate.models.checkpoint.small_files import content_of
from foveate.train.checkpoint import checkpoints
from foveate.train.inputs import Inputs
from foveate.train.sft import run_sft

REWARD = "from helper import worth\n\ndef score(text, task):\n    return worth(text)\n"
HELPER = "def worth(text):\n    return float(len(text))\n"


@pytest.fixture
def made(tmp_path, tiny_folder):
    """Data, model and code that may be changed."""
    make_data(tmp_path / "data")
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "reward.py").write_text(REWARD)
    (tmp_path / "code" / "helper.py").write_text(HELPER)
    return tmp_path


def supervised(made: Path, **changes):
    return sft_settings(made / "run", made / "model", made / "data", **changes)


def reverse(file: Path) -> None:
    """The same rows in another order: as many, of the same sizes."""
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(len(table)))[::-1]), file)


def change_template(made: Path) -> None:
    file = made / "model" / "chat_template.jinja"
    file.write_text(file.read_text() + "\n")


CHANGES = {
    "rows reversed": (lambda made: reverse(made / "data" / "train.parquet"), "data.train sampled rows was "),
    "template": (change_template, "model chat_template.jinja was "),
    "weights": (
        lambda made: (made / "model" / "model.safetensors").write_bytes(
            (made / "model" / "model.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "model model.safetensors was ",
    ),
}


@pytest.mark.parametrize("kind", slow_but([*CHANGES][:3], CHANGES))
def test_other_content_under_the_same_name_is_refused_or_accepted_and_kept(made, kind):
    act, said = CHANGES[kind]
    run = run_sft(supervised(made, train={"steps": 2}))
    act(made)
    settings = supervised(made, train={"steps": 3})
    with pytest.raises(DataError) as caught:
        run_sft(settings)
    assert said in str(caught.value)
    assert "by --accept-changes, or begin from its weights: run=NEW model.path=" in str(caught.value)
    assert len(read_metrics(run.metrics)) == 2
    run_sft(settings, accept_changes=True)
    [record] = [json.loads(line) for line in run.changes.read_text().splitlines()]
    assert record["step"] == 2
    assert any(said in change for change in record["changes"])
    run_sft(supervised(made, train={"steps": 4}))  # they are its own now
    assert len(run.changes.read_text().splitlines()) == 1


def test_what_was_accepted_once_is_accepted_also_before_the_next_checkpoint(made):
    run = run_sft(supervised(made, train={"steps": 1}))
    change_template(made)
    shutil.copytree(run.path, made / "before", symlinks=True)
    run_sft(supervised(made, train={"steps": 2}), accept_changes=True)
    changes = run.changes.read_text()
    shutil.rmtree(run.path)
    shutil.copytree(made / "before", run.path, symlinks=True)
    run.changes.write_text(changes)  # as after a kill in the first step
    run_sft(supervised(made, train={"steps": 2}))
    assert run.changes.read_text() == changes


def test_a_setting_that_was_changed_in_both_places_is_noticed(made):
    run = run_sft(supervised(made, train={"steps": 1}))
    other = supervised(made, optim={"lr": 0.5}, train={"steps": 2})
    run.config.write_text(to_yaml(other))
    with pytest.raises(DataError, match=r"was made from other inputs: optim.lr was 0.001, now 0.5;"):
        run_sft(other)


def test_more_rows_than_before_are_accepted_from_the_first_on(made):
    run = run_sft(supervised(made, train={"steps": 2}))
    table = pq.read_table(made / "data" / "train.parquet")
    pq.write_table(table.slice(0, 10), made / "data" / "train.parquet")
    settings = supervised(made, train={"steps": 3})
    with pytest.raises(DataError, match=r"data.train .*16"):
        run_sft(settings)
    run_sft(settings, accept_changes=True)
    assert [row["data/epoch"] for row in read_metrics(run.metrics)] == [0.25, 0.5, 0.4]


def inputs_of(made: Path) -> dict:
    settings = rl_settings(
        made / "run", made / "model", made / "data", reward={"name": f"{made}/code/reward.py:score", "workers": 0}
    )
    tables = {"data.train": open_tasks(made / "data" / "train.parquet"), "data.test": None}
    return dict(Inputs.of(settings, tables, accept_changes=False).found)


def test_code_is_told_by_its_content_with_what_it_imports_from_its_folder(made):
    before = inputs_of(made)
    assert {name for name in before if name.startswith("code ")} == {"code reward: reward.py", "code reward: helper.py"}
    (made / "code" / "helper.py").write_text(HELPER.replace("len(text)", "len(text) + 1"))
    now = inputs_of(made)
    assert [name for name in now if now[name] != before[name]] == ["code reward: helper.py"]


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("from lib import worth", ["lib/__init__.py"]),
        ("import lib.deep.worth", ["lib/__init__.py", "lib/deep/__init__.py", "lib/deep/worth.py"]),
        ("from lib.deep import worth", ["lib/__init__.py", "lib/deep/__init__.py", "lib/deep/worth.py"]),
        ("import lib.relative", ["lib/__init__.py", "lib/relative.py", "lib/deep/__init__.py", "lib/deep/worth.py"]),
        ("from lib.upwards import x", ["lib/__init__.py", "lib/upwards.py", "helper.py"]),
        ("from loose.part import x", ["loose/part.py"]),
    ],
)
def test_packages_and_relative_imports_are_followed(made, line, files):
    code = made / "code"
    texts = {
        "lib/__init__.py": "", "lib/deep/__init__.py": "", "lib/deep/worth.py": "import json\n", "loose/part.py": "",
        "lib/relative.py": "from .deep import worth\n", "lib/upwards.py": "from helper import worth\nimport lib\n",
    }  # fmt: skip
    for name, text in texts.items():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text(text)
    (code / "reward.py").write_text(f"{line}\n\ndef score(text, task):\n    return 0.0\n")
    if line == "from lib.upwards import x":  # a script that puts its own folder on the path
        (code / "reward.py").write_text(f"{line}\nfrom helper import worth\n")
    before = inputs_of(made)
    assert {name for name in before if name.startswith("code ")} == {f"code reward: {n}" for n in ("reward.py", *files)}
    (code / files[-1]).write_text("changed = True\n")
    assert inputs_of(made)[f"code reward: {files[-1]}"] != before[f"code reward: {files[-1]}"]


@pytest.mark.parametrize("content", [b'print "python 2"\n', b'x = "\xff"\n', b"\0", b"(" * 5000, b"-" * 20000 + b"1"])
def test_code_that_is_no_python_3_is_told_by_its_bytes(made, content):
    (made / "code" / "helper.py").write_bytes(content)
    before = inputs_of(made)
    (made / "code" / "helper.py").write_bytes(content + b"\n")
    assert inputs_of(made)["code reward: helper.py"] != before["code reward: helper.py"]


def test_an_image_that_changes_on_disk_is_noticed(made):
    task = open_tasks(made / "data" / "train.parquet")[0]
    schema = pq.read_schema(made / "data" / "train.parquet")
    rows = pq.read_table(made / "data" / "train.parquet").to_pylist()[:3]
    for number, row in enumerate(rows):
        (made / "data" / f"{number}.png").write_bytes(task.images[0].data)
        row["images"] = [{"bytes": None, "path": f"{number}.png"}]
    write_rows(made / "data" / "train.parquet", rows, schema)
    before = inputs_of(made)
    assert inputs_of(made) == before
    with (made / "data" / "1.png").open("ab") as file:
        file.write(b"\0")
    now = inputs_of(made)
    assert [name for name in now if now[name] != before[name]] == ["data.train sampled rows"]


def test_a_moved_folder_has_the_same_content(made):
    before = inputs_of(made)
    settings = {name for name in before if name.startswith("setting ")}
    (made / "there").mkdir()
    for name in ("data", "model", "code"):
        shutil.move(made / name, made / "there" / name)
    now = inputs_of(made / "there")
    assert {name: before[name] for name in before.keys() - settings} == {
        name: now[name] for name in now.keys() - settings
    }


def test_a_large_file_is_told_by_its_size_and_by_blocks_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.models.checkpoint.small_files.WHOLE_BYTES", 1000)
    file = tmp_path / "large"
    file.write_bytes(bytes(10_000_000))
    before = content_of(file)
    for start, end in ((0, 1), (5_000_000, 5_200_000), (9_999_999, 10_000_000)):
        content = bytearray(10_000_000)
        content[start:end] = b"1" * (end - start)
        file.write_bytes(content)
        assert content_of(file) != before
    file.write_bytes(bytes(10_000_001))
    assert content_of(file) != before


def test_a_new_run_begins_from_the_weights_of_a_checkpoint_under_other_settings(made):
    old = run_sft(supervised(made, train={"steps": 2, "keep_checkpoints": 5}))
    settings = supervised(made, optim={"lr": 0.01}, train={"steps": 1}).model_copy(
        update={"run": str(made / "new"), "model": supervised(made).model.model_copy(
            update={"path": str(old.checkpoints / "latest"), "dtype": "bfloat16"})}
    )  # fmt: skip
    new = Recipe(settings).train()
    assert (old.path / "exports" / "step_000002" / "config.json").is_file()
    assert f"path: {old.path}/exports/step_000002" in new.folder.config.read_text()
    assert [step for step, _ in checkpoints(new.folder.checkpoints)] == [1]
    Recipe(settings).train()  # the same command goes on
    (made / "fake").mkdir()
    (made / "fake" / "state.json").write_text("{}")
    fake = settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(made / "fake")})})
    with pytest.raises(ConfigError, match="is no checkpoint of a run"):
        Recipe(fake).train()
