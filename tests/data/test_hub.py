"""Models and datasets by their names on the Hugging Face Hub, against a small copy of its HTTP interface."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT

from foveate.data.hub import _choose, is_hub_name
from foveate.errors import DataError
from foveate.models.checkpoint.inspect import resolve_folder

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    model = folder / "models/acme/tiny-vl"
    shutil.copytree(resolve_folder("demo"), model)
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "modeling_tiny.py").write_text("raise SystemExit")
    for split, rows in (("train", 6), ("test", 2)):
        path = folder / f"datasets/acme/sums/data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"question": [f"{n} + 1?" for n in range(rows)], "answer": ["1"] * rows}), path)
    return folder


class Client:
    """Runs code in a process of its own, whose cache is `home`, against a hub."""

    def __init__(self, address: str, home: Path) -> None:
        self.variables = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        self.variables.pop("HF_HUB_OFFLINE", None)
        self.home = home

    def run(self, code: str, **more: str) -> subprocess.CompletedProcess[str]:
        begin = "import warnings; warnings.simplefilter('ignore')\n"
        command = [sys.executable, "-c", begin + code]
        return subprocess.run(command, capture_output=True, text=True, env={**self.variables, **more}, check=False)

    def value(self, expression: str, **more: str):
        ended = self.run(f"import json\nfrom foveate.data.hub import *\nprint(json.dumps({expression}))", **more)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    def error(self, expression: str, **more: str) -> str:
        code = "from foveate.data.hub import *\nfrom foveate.errors import DataError\n"
        ended = self.run(
            f"{code}try:\n    print({expression})\nexcept DataError as error:\n    print('error:', error)", **more
        )
        assert "error: " in ended.stdout, ended.stdout + ended.stderr
        return ended.stdout.split("error: ")[1].strip()


@pytest.fixture
def hub(root, tmp_path):
    yield from served(root, tmp_path)


def served(root, tmp_path, *arguments):
    command = [sys.executable, str(HERE.parent / "support/fake_hub.py"), str(root), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Client(process.stdout.readline().strip(), tmp_path / "home")
        process.kill()


def test_a_name_is_of_the_hub_where_it_is_no_path_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("acme/tiny-vl")
    assert is_hub_name("acme/sums:main@train")
    assert not is_hub_name("demo")
    assert not is_hub_name("/acme/tiny")
    assert not is_hub_name("a/b/c")
    assert not is_hub_name("../models/a")
    (tmp_path / "acme/tiny-vl").mkdir(parents=True)
    assert not is_hub_name("acme/tiny-vl")


@pytest.mark.slow
def test_a_model_comes_with_safetensors_alone_and_is_there_offline_then(hub):
    folder = Path(hub.value("str(model_folder('acme/tiny-vl'))"))
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".py")]
    assert hub.value("str(model_folder('acme/tiny-vl'))", HF_HUB_OFFLINE="1") == str(folder)
    code = (
        "from foveate.models.checkpoint.inspect import inspect_model_folder as f; print(f('acme/tiny-vl').family.name)"
    )
    assert hub.run(code, HF_HUB_OFFLINE="1").stdout.strip() == "internvl"


def test_an_interrupted_download_is_resumed(root, tmp_path):
    for hub in served(root, tmp_path, "100000"):
        folder = Path(hub.value("str(model_folder('acme/tiny-vl'))"))
        weights = (folder / "model.safetensors").read_bytes()
        assert weights == (root / "models/acme/tiny-vl/model.safetensors").read_bytes()


def test_a_wrong_name_is_told_with_the_nearest(hub):
    said = hub.error("model_folder('acme/tiny-vll')")
    assert said.startswith(
        "acme/tiny-vll: no such folder here, and no model acme/tiny-vll on the hub; did you mean 'acme/tiny-vl'?"
    )
    assert "has no such revision" in hub.error("model_folder('acme/tiny-vl@v9')")
    assert "no dataset acme/sum on the hub; did you mean 'acme/sums'?" in hub.error("dataset_files('acme/sum@train')")
    assert "is not in the cache" in hub.error("model_folder('acme/tiny-vl')", HF_HUB_OFFLINE="1")
    assert "cannot be downloaded" in hub.error("model_folder('acme/tiny-vl')", HF_ENDPOINT="http://127.0.0.1:9")


def test_a_split_of_a_dataset_is_chosen_by_name(hub):
    [file] = hub.value("[str(path) for path in dataset_files('acme/sums@train')]")
    assert pq.read_table(file).num_rows == 6
    assert "has the splits test, train; choose one: acme/sums@train" in hub.error("dataset_files('acme/sums')")
    assert "no split 'trian'; did you mean 'train'?" in hub.error("dataset_files('acme/sums@trian')")
    assert hub.value("len(dataset_files('acme/sums@train'))", HF_HUB_OFFLINE="1") == 1
    everything = Path(hub.value("str(dataset_folder('acme/sums'))"))
    assert {file.name.split("-")[0] for file in everything.rglob("*.parquet")} == {"train", "test"}
    assert "all of the dataset is read; write acme/sums" in hub.error("dataset_folder('acme/sums@train')")


def test_rows_of_the_hub_become_tasks(hub):
    code = (
        "from foveate.data.table import open_tasks\n"
        "t = open_tasks('acme/sums@test', columns={'prompt': 'question', 'answer': 'answer', 'source': '=sums'})\n"
        "print(len(t), t[1].messages[0].content)"
    )
    assert hub.run(code).stdout.strip() == "2 1 + 1?"


def test_a_trained_model_is_uploaded_whole_and_is_private_at_first(root, hub):
    folder = root / "models/acme/tiny-vl"
    code = "from foveate.api.run import Run; from pathlib import Path\n"
    code += f"print(Run(Path({str(folder.parent)!r})).push_to_hub('me/mine'))"
    (folder.parent / "final").symlink_to(folder)
    said = hub.run(code, HF_TOKEN="hf_x")
    assert said.stdout.strip().endswith("/me/mine"), said.stderr
    there = root / "models/me/mine"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (there / name).read_bytes() == (folder / name).read_bytes()


def test_an_upload_that_would_fail_is_refused_before_the_run(hub):
    assert "may not be written to; log in with `hf auth login`" in hub.error("prepare_upload('me/other')", HF_TOKEN="")
    assert "must be owner/name" in hub.error("prepare_upload('mine')", HF_TOKEN="hf_x")
    assert "cannot be uploaded" in hub.error(
        "prepare_upload('me/mine')", HF_TOKEN="hf_x", HF_ENDPOINT="http://127.0.0.1:9"
    )


@pytest.mark.parametrize(
    ("files", "config", "split", "chosen"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0-of-1.parquet"],
         None, "train", [0, 1]),
        (["math/train-00000-of-00001.parquet", "geo/train-00000-of-00001.parquet"], "geo", None, [1]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], None, "test", [1]),
        (["train.parquet", "validation.parquet"], None, "validation", [1]),
        (["en/partial-train/0000.parquet", "de/train/0000.parquet"], "en", None, [0]),
        (["data/train-00000-of-00001-1a2b3c4d5e6f7a8b.parquet"], None, None, [0]),
    ],
)  # fmt: skip
def test_files_are_told_apart_by_the_conventions_of_the_hub(files, config, split, chosen):
    assert _choose("o/n", files, config, split) == [files[i] for i in chosen]


def test_a_configuration_has_to_be_chosen_where_there_are_several():
    with pytest.raises(DataError, match=r"has the configurations a, b; choose one: owner/name:config@split"):
        _choose("o/n", ["a/train/0000.parquet", "b/train/0000.parquet"], None, "train")
