"""Whatever is in the files of a checkpoint, reading it runs none of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

import foveate
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError, DataError
from foveate.files import sealed
from foveate.train.checkpoint import load_checkpoint, load_weights, read_state, save_checkpoint, tensors_of
from foveate.train.optim import build_optimizer

MARK = "FOVEATE_A_PICKLE_RAN"


class Attack:
    """Leaves a mark in the environment when it is unpickled."""

    def __reduce__(self):
        return (os.putenv, (MARK, "1"))


class Subtle:
    """The same by a function that only looks harmless."""

    def __reduce__(self):
        return (eval, (f"__import__('os').environ.__setitem__({MARK!r}, '1')",))


def trained():
    model = nn.Linear(4, 3)
    return model, build_optimizer(model, OptimSettings(lr=0.1))


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path, 5, tensors_of({"": trained()}), {"stream": {"position": 3}}, keep=1)


def reseal(path: Path, **changes) -> None:
    """Give a checkpoint hashes that fit its files, as somebody who forges one would."""
    state = json.loads((path / "state.json").read_text())
    del state["checksum"]
    state["hashes"] = {
        file.name: sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.name != "state.json"
    }
    (path / "state.json").write_text(sealed({**state, **changes}))


def table_of(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def forge(path: Path, content: object) -> None:
    (path / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    reseal(path)


def refused(path: Path, *said: str) -> None:
    for read in (lambda: load_checkpoint(path, {"": trained()}), lambda: load_weights(path, nn.Linear(4, 3))):
        with pytest.raises(DataError) as caught:
            read()
        text = str(caught.value)
        assert text.startswith(f"{path}: this checkpoint cannot be read (")
        assert "\n" not in text
        assert len(text) < 800
        for part in said:
            assert part in text
    assert MARK not in os.environ


def test_a_checkpoint_with_a_fitting_seal_is_read(checkpoint):
    reseal(checkpoint)
    assert load_checkpoint(checkpoint, {"": trained()}) == {"step": 5, "stream": {"position": 3}}


@pytest.mark.parametrize("attack", [Attack, Subtle])
@pytest.mark.parametrize("place", ["whole", "entry", "planner_data", "version", "storage_meta"])
def test_a_forged_table_of_contents_runs_nothing(checkpoint, attack, place):
    content = table_of(checkpoint)
    if place == "entry":
        content.state_dict_metadata["model.weight"] = attack()
    forge(checkpoint, attack() if place == "whole" else content if place == "entry" else vary(content, place, attack()))
    refused(checkpoint, ".metadata", "which no checkpoint holds")


def vary(content: Metadata, field: str, value: object) -> Metadata:
    vars(content)[field] = value
    return content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(OrderedDict()),
        pickle.dumps([1] * 10_000),
        pickle.dumps(torch.float32),
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R.",
        b"\x80\x04ctorch.serialization\nload\n\x8c\x04file\x85R.",
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nos.system\n\x8c\x04true\x85R.",
    ],
)
def test_what_is_no_table_of_contents_is_refused_in_one_line(checkpoint, content):
    forge(checkpoint, content)
    refused(checkpoint, ".metadata")


@pytest.mark.parametrize("place", ["../other.distcp", "/etc/passwd", "__0_1.distcp", "state.json", ""])
def test_a_table_of_contents_names_files_of_its_folder_only(checkpoint, place):
    content = table_of(checkpoint)
    index = next(iter(content.storage_data))
    content.storage_data[index] = _StorageInfo(place, 0, 10)
    forge(checkpoint, content)
    refused(checkpoint, "which is no file of this checkpoint")


@pytest.mark.parametrize(
    "wrong",
    [
        {"storage_data": None},
        {"storage_data": {"model.weight": _StorageInfo("__0_0.distcp", 0, 1)}},
        {"storage_data": {MetadataIndex("model.weight"): _StorageInfo("__0_0.distcp", -1, 10)}},
        {"storage_data": {MetadataIndex("model.weight"): _StorageInfo("__0_0.distcp", 0, 1.5)}},
        {"storage_data": {MetadataIndex("model.weight"): _StorageInfo("__0_0.distcp", 0, 9, ["zstd"])}},
        {"state_dict_metadata": {3: TensorStorageMetadata(None, torch.Size([1]), [])}},
        {"state_dict_metadata": {"model.weight": 7}},
        {"state_dict_metadata": []},
    ],
)
def test_wrong_types_in_a_table_of_contents_are_refused(checkpoint, wrong):
    content = table_of(checkpoint)
    vars(content).update(wrong)
    forge(checkpoint, content)
    refused(checkpoint, ".metadata")


def test_a_value_that_is_a_pickle_with_code_runs_nothing(checkpoint):
    """The optimizer's numbers are small files of torch.save, which can hold any object."""
    data = checkpoint / "__0_0.distcp"
    raw, content = data.read_bytes(), table_of(checkpoint)
    buffer = io.BytesIO()
    torch.save(Attack(), buffer)
    place = next(place for index, place in content.storage_data.items() if index.fqn.endswith(".lr"))
    place.offset, place.length = len(raw), len(buffer.getvalue())
    data.write_bytes(raw + buffer.getvalue())
    forge(checkpoint, content)
    with pytest.raises(DataError, match="cannot be read"):
        load_checkpoint(checkpoint, {"": trained()})
    assert MARK not in os.environ


def test_nothing_in_the_package_opens_a_pickle_of_a_file():
    """But for what its own processes send each other."""
    own = {"cluster/ray.py", "cluster/worker_process.py", "processes.py", "rollout/vllm/plugin.py"}
    package = Path(foveate.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        loads = re.findall(r"torch\.load\((?!.*weights_only=True)", text)
        loads += re.findall(r"weights_only=False|\bpickle\.loads?\(|\bmarshal\.|\bshelve\.|joblib|dill\.", text)
        loads += re.findall(
            r"allow_pickle=True|yaml\.(?:unsafe_|full_)?load\((?!.*Loader=_Loader)|trust_remote_code=True", text
        )
        assert not loads or file.relative_to(package).as_posix() in own, f"{file}: {loads}"


# ------------------------------------------------------------------------------------------- state.json and its hashes


@pytest.mark.parametrize(
    "change",
    [
        {"step": 6},
        {"stream": {"position": 30}},
        {"score": 9.0},
        {"hashes": {}},
        {"added": 1},
        {"checksum": "0" * 64},
        {"checksum": None},
        {"checksum": 7},
    ],
)
def test_an_edited_state_is_refused(checkpoint, change):
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, **change}))
    refused(checkpoint, "state.json is not as it was written")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hashes": {}}, "no hashes"),
        ({"hashes": None}, "no hashes"),
        ({"hashes": []}, "no hashes"),
        ({"hashes": {".metadata": "0" * 64}}, "no hashes"),
        ({"hashes": {".metadata": "", "__0_0.distcp": ""}}, "as the hash of"),
        ({"hashes": {".metadata": None, "__0_0.distcp": "0" * 64}}, "as the hash of"),
        ({"hashes": {".metadata": "0" * 64, "../../etc/passwd": "0" * 64}}, "as the hash of"),
        ({"step": "5"}, "step '5'"),
        ({"step": True}, "step True"),
        ({"step": -1}, "step -1"),
        ({"step": 4}, "step 4"),
        ({"ranks": 0}, "ranks 0"),
        ({"ranks": "many"}, "ranks 'many'"),
        ({"score": "good"}, "score 'good'"),
        ({"score": float("inf")}, "score inf"),
    ],
)
def test_a_state_of_wrong_types_is_refused_also_with_a_fitting_seal(checkpoint, change, said):
    reseal(checkpoint, **change)
    refused(checkpoint, said)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '{"step": 5', "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")]
)
def test_a_state_that_is_no_object_is_refused(checkpoint, text):
    (checkpoint / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((DataError, ConfigError)) as caught:
        read_state(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_link_in_the_place_of_a_file_is_refused(checkpoint, file, tmp_path):
    shutil.move(checkpoint / file, tmp_path / "elsewhere")
    (checkpoint / file).symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, f"{file} is not as it was written")


def test_a_damaged_older_checkpoint_does_not_end_the_run_that_saves_the_next(tmp_path):
    first = save_checkpoint(tmp_path, 1, tensors_of({"": trained()}), {"score": 0.5}, keep=3)
    (first / "state.json").write_text("{}")
    save_checkpoint(tmp_path, 2, tensors_of({"": trained()}), {"score": 0.2}, keep=3)
    assert (tmp_path / "best").resolve().name == "step_000002"


def test_a_weight_file_that_holds_code_is_no_way_in_either(checkpoint):
    """The data of tensors are zip files with a pickle in them."""
    data = checkpoint / "__0_0.distcp"
    content = table_of(checkpoint)
    place = next(place for index, place in content.storage_data.items() if index.fqn == "model.weight")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Subtle()))
        archive.writestr("archive/version", "3\n")
    raw = data.read_bytes()
    place.offset, place.length = len(raw), len(buffer.getvalue())
    data.write_bytes(raw + buffer.getvalue())
    forge(checkpoint, content)
    refused(checkpoint)
