"""Model folders and checkpoints give away nothing that is outside of them, and all readers refuse the same files."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
from checkpoint_cases import write_chat_folder
from safetensors import SafetensorError, safe_open
from toy import make_data, sft_settings

from foveate.errors import ConfigError, DataError
from foveate.models.checkpoint.convert import convert
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.checkpoint.safetensors_io import read_headers
from foveate.models.policy import load_on_meta, load_policy
from foveate.models.sharded import meta_policy
from foveate.tools.model_facts import model_facts
from foveate.train.export import export_checkpoint
from foveate.train.sft import run_sft

SECRET = "the secret of somebody else"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("chat") / "model", "300M-qwen3")


@pytest.fixture
def folder(tmp_path, chat):
    (tmp_path / "secret.json").write_text(json.dumps({"a": SECRET}))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text(SECRET)
    return shutil.copytree(chat, tmp_path / "model")


def link(folder, name, target):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("notes.json", "../secret.json"),
        ("generation_config.json", "../secret.json"),
        ("additional_chat_templates", "../private"),
        ("hf_format", "../private"),
        ("chat_format/notes.json", "../../secret.json"),
        ("hf_format/deep", "../../private"),
        ("gone.txt", "../nothing"),
        ("circle", "circle/../../circle"),
        (".hidden", "../private/key"),
    ],
)
def test_no_link_out_of_a_model_folder_is_followed(folder, tmp_path, name, target):
    link(folder, name, target)
    for read in (lambda: convert(folder, tmp_path / "out", "hf"), lambda: inspect_model_folder(str(folder))):
        with pytest.raises(DataError, match=r"is a link out of its folder, to .*; put the file itself there"):
            read()
    assert not (tmp_path / "out").exists()


def test_weights_elsewhere_are_loaded_and_not_converted(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "weights.safetensors")
    link(folder, "model.safetensors", tmp_path / "weights.safetensors")
    inspect_model_folder(str(folder))
    with pytest.raises(DataError, match="is a link out of its folder"):
        convert(folder, tmp_path / "out", "hf")


def test_doctor_names_the_weights_that_lie_elsewhere(folder, tmp_path):
    assert "weights elsewhere" not in model_facts(load_on_meta(str(folder)))
    shutil.move(folder / "model.safetensors", tmp_path / "weights.safetensors")
    link(folder, "model.safetensors", tmp_path / "weights.safetensors")
    said = model_facts(load_on_meta(str(folder)))["weights elsewhere"]
    assert said.startswith(f"model.safetensors is a link to {tmp_path}/weights.safetensors; loaded, but neither")


def test_links_within_a_folder_and_to_it_are_fine(folder, tmp_path):
    shutil.move(folder / "README.md", folder / "README.txt")
    link(folder, "README.md", "README.txt")
    (tmp_path / "name").symlink_to(folder)
    convert(tmp_path / "name", tmp_path / "out", "hf")
    assert (tmp_path / "out" / "README.md").read_text() == "# A model\n"


def test_the_cache_of_the_hub_is_read_as_it_is(folder, tmp_path):
    """Its snapshots are links to blobs beside them; a blob that leads on is refused."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "out", "hf")
    link(blobs, "0", tmp_path / "private" / "key")
    with pytest.raises(DataError, match="is a link out of its folder"):
        convert(snapshot, tmp_path / "other", "hf")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("runs")
    return run_sft(sft_settings(folder / "run", tiny_folder, make_data(folder / "data"), train={"steps": 1}))


def test_an_exported_checkpoint_is_one_of_its_run(run, tmp_path):
    other = shutil.copytree(run.path, tmp_path / "other", symlinks=True)
    (other / "checkpoints" / "mine").symlink_to(run.checkpoints / "step_000001")
    with pytest.raises(ConfigError, match="leads out of the folder of the run"):
        export_checkpoint(other / "checkpoints" / "mine", tmp_path / "out")
    (other / "config.yaml").unlink()
    (other / "config.yaml").symlink_to(run.config)
    with pytest.raises(ConfigError, match="leads out of the folder of the run"):
        export_checkpoint(other / "checkpoints" / "latest", tmp_path / "out")
    (tmp_path / "name").symlink_to(run.path)
    assert export_checkpoint(tmp_path / "name" / "checkpoints" / "latest", tmp_path / "out") == 1


@pytest.mark.parametrize(
    "text", ["model: &a [*a]", "model: {path: " + "{a: " * 5000, "[]", "model: 3", "a: b: c", "\x00"]
)
def test_a_configuration_that_is_none_is_one_line(run, tmp_path, text):
    other = shutil.copytree(run.path, tmp_path / "other", symlinks=True)
    (other / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(other / "checkpoints" / "latest", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------- headers of weights


def entry(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def write(path, header, data=b"\0" * 16):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


BAD_HEADERS = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 8), "c": entry(12, 16)},
    "one in another": {"a": entry(0, 8), "b": entry(2, 6), "c": entry(12, 16)},
    "the same twice": {"a": entry(0, 8), "b": entry(0, 8)},
    "gap": {"a": entry(0, 4), "b": entry(8, 16)},
    "late": {"a": entry(4, 16)},
    "past the end": {"a": entry(0, 32)},
    "backwards": {"a": entry(8, 0, [0])},
    "negative": {"a": entry(-4, 12)},
    "fractions": {"a": {"dtype": "U8", "shape": [16.0], "data_offsets": [0.0, 16.0]}},
    "truth": {"a": {"dtype": "U8", "shape": [True, 16], "data_offsets": [0, 16]}},
    "shape": {"a": entry(0, 16, [4])},
    "negative shape": {"a": entry(0, 16, [-4, -4])},
    "huge shape": {"a": entry(0, 16, [2**62, 2**62])},
    "no dtype": {"a": {"shape": [16], "data_offsets": [0, 16]}},
    "other dtype": {"a": entry(0, 16, dtype="PICKLE")},
    "no object": [1, 2],
    "no entry": {"a": 3},
    "a name twice": b'{"a": 3, "a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}',
    "deep": b"[" * 100_000,
    "many digits": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "no text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_every_reader_refuses_the_same_headers(tmp_path, name):
    file = write(tmp_path / "model.safetensors", BAD_HEADERS[name])
    with pytest.raises(DataError, match="copy or download it again") as caught:
        read_headers([file])
    assert "\n" not in str(caught.value)
    if name not in ("truth", "a name twice"):  # which the library's own reader takes for 1, and for the last
        with pytest.raises((SafetensorError, OverflowError)):
            safe_open(file, "pt").__enter__()


@pytest.mark.parametrize("name", ["overlap", "gap", "a name twice", "deep"])
def test_a_model_with_such_a_header_is_neither_loaded_nor_converted(folder, tmp_path, name):
    write(folder / "model.safetensors", BAD_HEADERS[name])
    for read in (
        lambda: convert(folder, tmp_path / "out", "hf"),
        lambda: inspect_model_folder(str(folder)),
        lambda: load_policy(str(folder)),
        lambda: meta_policy(str(folder)),
    ):
        with pytest.raises(DataError, match=r"model.safetensors: .*copy or download it again"):
            read()


def test_a_good_header_is_read_by_both(tmp_path):
    header = {"b": entry(8, 16), "a": entry(0, 8), "none": entry(16, 16, [0, 4]), "__metadata__": {"format": "pt"}}
    file = write(tmp_path / "model.safetensors", header)
    assert [*read_headers([file])] == ["a", "b", "none"]
    with safe_open(file, "pt") as tensors:
        assert sorted(tensors.keys()) == ["a", "b", "none"]


def test_reading_a_header_takes_no_more_than_it_says(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 99_999_999))
    os.truncate(file, 1000)
    with pytest.raises(DataError, match="its header is not that of safetensors"):
        read_headers([file])
