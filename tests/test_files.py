from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.errors import ConfigError, DiskError
from foveate.files import LOCK_FILES, add_json_line, atomic_path, atomic_write_bytes, atomic_write_text, held
from foveate.log import read_metrics


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.txt"
    atomic_write_text(path, "old")
    atomic_write_text(path, "né\n")
    assert path.read_bytes() == "né\n".encode()
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with atomic_path(tmp_path / "step") as folder:
            (folder / "deep").mkdir(parents=True)
            (folder / "deep" / name).write_text("x")
            assert not (tmp_path / "step" / "deep" / "new").exists()
    assert os.listdir(tmp_path) == ["step"]
    assert os.listdir(tmp_path / "step" / "deep") == ["new"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").write_text("kept")
    with pytest.raises(DiskError, match=r"cannot write .*photos: Is a directory"):
        atomic_write_text(tmp_path / "photos", "page")
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    atomic_write_text(path, "old")

    def fail_half_way(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyError

    with pytest.raises(KeyError), atomic_path(path) as temporary:
        fail_half_way(temporary)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_full_disk_is_one_line_with_path_and_free_space_and_keeps_the_old_file(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from foveate.files import DiskError, atomic_write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic_write_bytes(Path(sys.argv[1]), bytes(2000))
except DiskError as error:
    print(error)
"""
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    ended = python(code, path)
    said = ended.stdout
    assert ended.stderr == ""
    assert said.startswith(f"cannot write {path}: {os.strerror(errno.EFBIG)} (")
    assert f" MiB free in {tmp_path}); nothing was left half-written; make room" in said
    assert said.count("\n") == 1
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_full_disk_reported_by_another_language_is_recognised(tmp_path):
    with pytest.raises(DiskError, match=r"cannot write .*: I/O error: No space left"), atomic_path(tmp_path / "x"):
        raise RuntimeError(f"I/O error:\n {os.strerror(errno.ENOSPC)} (os error 28)")


def test_an_error_about_another_file_passes_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        (tmp_path / "missing.png").read_bytes()


def test_the_folders_above_a_file_are_made(tmp_path):
    atomic_write_text(tmp_path / "deep" / "er" / "x", "whole")
    assert (tmp_path / "deep" / "er" / "x").read_text() == "whole"


def test_a_place_below_a_file_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=rf"cannot write {tmp_path}/file/x: .* free in {tmp_path}/file\)"):
        atomic_write_bytes(tmp_path / "file" / "x", b"")


def test_a_full_disk_while_copying_is_about_the_copy(tmp_path):
    code = """
import resource, shutil, sys
from pathlib import Path
from foveate.files import DiskError, atomic_path
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_path(Path(sys.argv[2])) as temporary:
        shutil.copyfile(sys.argv[1], temporary)
except DiskError as error:
    print(error)
"""
    (tmp_path / "source").write_bytes(bytes(2000))
    ended = python(code, tmp_path / "source", tmp_path / "copy")
    assert ended.stderr == ""
    assert ended.stdout.startswith(f"cannot write {tmp_path}/copy: {os.strerror(errno.EFBIG)} (")
    assert os.listdir(tmp_path) == ["source"]


def test_an_error_of_an_inner_file_is_not_told_of_the_outer_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=f"cannot write {tmp_path}/file/inner: "), atomic_path(tmp_path / "outer"):
        atomic_write_text(tmp_path / "file" / "inner", "")


def test_leftovers_of_a_killed_writer_go_and_those_of_a_living_one_stay(tmp_path):
    dead = python("import os; print(os.getpid())").stdout.strip()
    for owner in (dead, os.getppid()):
        (tmp_path / f".x.{owner}.tmp").write_text("half")
    atomic_write_text(tmp_path / "x", "whole")
    assert sorted(os.listdir(tmp_path)) == [f".x.{os.getppid()}.tmp", "x"]


def test_a_folder_is_held_by_one_and_free_when_its_block_ends(tmp_path):
    with held(tmp_path / "run", "another run="):
        assert (tmp_path / "run" / LOCK_FILES[1]).read_text() == f"{os.getpid()}\n"
        refusal = f"run is in use by process {os.getpid()}; wait for its end, or choose another run="
        with pytest.raises(ConfigError, match=refusal), held(tmp_path / "run", "another run="):
            pass
    with held(tmp_path / "run", "another run="):
        pass


def test_a_folder_left_by_a_killed_writer_goes_too(tmp_path):
    dead = python("import os; print(os.getpid())").stdout.strip()
    (tmp_path / f".x.{dead}.tmp" / "deep").mkdir(parents=True)
    with atomic_path(tmp_path / "x") as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path) == ["x"]


def test_lines_are_added_whole_whatever_they_hold(tmp_path):
    path = tmp_path / "changes.jsonl"
    records = [{"step": 1, "text": "a\u2028b\x85c"}, {"step": 2, "text": "\ud800"}]
    for record in records:
        add_json_line(path, record)
    assert read_metrics(path) == records
    assert os.listdir(tmp_path) == ["changes.jsonl"]
