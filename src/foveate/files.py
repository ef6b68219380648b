"""Whole files or none: everything that foveate writes is written beside its place, synced, and renamed into it."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from foveate.errors import ConfigError, DataError, DiskError, DiskFull, one_line

LOCK_FILES = (".lock", ".holder")
"""Names of the files in a folder that is `held`: the lock, and the number of the process that holds it."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FULL = (*_NO_ROOM, errno.EFBIG)
MOST_READ, MOST_ROWS = 64 * 2**20, 8 * 2**30
"""Bytes that are read of a file in a folder that somebody else may have made; of one that is read row by row."""
_MOST_DIGITS = 300
_NO_FILES = tuple(map(Path, ("/dev", "/proc", "/sys")))
_RETRY = 5.0
"""Seconds between looks at a full disk."""
_held: dict[Path, dict[Path, tuple[int, int] | None]] = {}
"""The folders that this process holds, each with the files that must stay in it."""
_disk_wait = 0.0
"""Seconds that this process waits for room on a full disk; `set_disk_wait` sets it."""

logger = logging.getLogger(__name__)
Written = TypeVar("Written")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, to write a file or a folder to; the folder above is made as needed.

    When the block ends well, it is synced to disk and takes the place of `path`; otherwise it is removed and `path`
    stays as it was. (A folder that replaces a folder leaves a moment without either.)

    Raises:
        DiskError: the disk is full, or the path cannot be written, such as a file where a folder is. Errors about
            other files pass through.
        ConfigError: as `require_file`.
    """
    path = Path(path)
    require_file(path)
    require_held(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield temporary
        for entry in (temporary, *temporary.rglob("*")):
            _sync(entry)
        if path.is_dir() and temporary.is_dir():  # a file never takes the place of a folder
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except DiskError:
        raise
    except Exception as error:
        if _is_about(error, temporary):
            raise disk_error(path, error) from error
        raise
    finally:
        with suppress(OSError):  # which would hide the error before; the next process removes it
            remove(temporary)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file or nothing; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing; see `atomic_path`. Halves of surrogate pairs, which UTF-8 cannot hold, are
    written as the escapes that JSON has for them."""
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def require_file(path: Path) -> None:
    """Raise ConfigError for a path at which there is a device, a pipe or a socket, which a file would take the place
    of, and for one in /dev, /proc or /sys."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = stat.S_IFREG
    folder = Path(os.path.realpath(path.parent))
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        in_memory = folder.is_relative_to("/dev/shm")
        if in_memory or not any(folder.is_relative_to(place) for place in _NO_FILES):
            return
    raise ConfigError(f"cannot write {path}: it is no place for a file ({_kind(mode)}); give the path of a file")


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return "its folder is of the system"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def inside(path: Path, folder: Path, most: int = MOST_READ) -> Path:
    """The real path of a file that is read from a folder which somebody else may have made, such as that of a run.
    Raises DataError for what is not a regular file, lies outside of the folder or has more than `most` bytes."""
    real = Path(os.path.realpath(path))
    try:
        found = real.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from None
    if not real.is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{path}: is a link out of {folder}, to {real}; put the file itself there, or remove the link")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: is not a regular file; remove it")
    if found.st_size > most:
        raise DataError(f"{path}: has {found.st_size:,} bytes; {most:,} are read at most")
    return real


def read_inside(path: Path, folder: Path, most: int = MOST_READ) -> bytes:
    """The content of such a file; raises as `inside`."""
    with open(inside(path, folder, most), "rb") as file:
        return file.read(min(os.fstat(file.fileno()).st_size, most))  # as it is now, if it grows


def strict_json(text: str | bytes) -> Any:
    """The value of JSON text. Raises ValueError for NaN and infinities, numbers that are too large for a float or have
    more than 300 digits, and for nesting too deep for Python."""
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_short)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def _short(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; {_MOST_DIGITS} are allowed")
    return int(digits)


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add an object to a file of few lines, which is written anew. Waits for room on a full disk; see `with_room`."""
    former = path.read_text(encoding="utf-8") if path.exists() else ""
    line = json.dumps(record, ensure_ascii=False)
    with_room(lambda: atomic_write_text(path, f"{former}{line}\n"))


class OtherSchema(ValueError):
    """A sealed file of another version of foveate."""

    def __init__(self, found: Any) -> None:
        super().__init__(f"schema {found}")
        self.found = found


def sealed(content: Mapping[str, Any]) -> str:
    """A JSON object as text, with its checksum in it: what is edited or damaged later is noticed by `read_sealed`."""
    content = json.loads(json.dumps(content))
    return json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n"


def read_sealed(path: Path, schema: int) -> dict[str, Any]:
    """The object that was `sealed`. Raises OtherSchema for one of another version, ValueError for one that is not as it
    was written."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a JSON object")
    checksum, found = content.pop("checksum", None), content.get("schema", 0)
    if checksum is None and found != schema:  # of the time before checksums
        raise OtherSchema(found)
    if checksum != _checksum(content):
        raise ValueError(f"{path.name} is not as it was written")
    if found != schema:
        raise OtherSchema(found)
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def held(folder: Path, other: str) -> Iterator[None]:
    """Make a folder and hold it alone until the block ends; the system releases it when the process ends, however it
    ends. Raises ConfigError that proposes `other` where another process holds it, and DiskError."""
    from filelock import FileLock, Timeout  # takes long to import, and few commands need it

    path, holder = (folder / name for name in LOCK_FILES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path).acquire(blocking=False)
    except Timeout:
        owner = holder.read_text().strip() if holder.exists() else "unknown"
        raise ConfigError(f"{folder} is in use by process {owner}; wait for its end, or choose {other}") from None
    except OSError as error:
        raise disk_error(path, error) from error
    with lock:
        place = folder.absolute()
        _held[place] = {path.absolute(): _identity(path)}
        try:
            atomic_write_text(holder, f"{os.getpid()}\n")
            yield
        finally:
            del _held[place]


def keep(file: Path) -> None:
    """From now on `file` must stay in the folder that this process holds, too."""
    for folder, files in _held.items():
        if file.absolute().parent == folder:
            files[file.absolute()] = _identity(file)


def require_held(path: Path) -> None:
    """Raise DiskError for a path in a folder that this process held and that was renamed or deleted since: writing
    there would make a folder that looks like the other one and lacks what was in it."""
    place = path.absolute()
    for folder, files in _held.items():
        if place.is_relative_to(folder) and any(_identity(file) != kept for file, kept in files.items()):
            raise gone(folder)


def gone(folder: Path) -> DiskError:
    """The error about a folder that is not there any more while its run goes on."""
    return DiskError(
        f"{folder} was renamed, emptied or deleted while the run wrote to it; the run stops and writes nothing more. "
        "Bring the folder back, and the same command continues from its last checkpoint"
    )


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def remove(path: Path) -> None:
    """Delete a file or a whole folder; nothing there is fine."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:  # below a file there is nothing
            return


def set_disk_wait(seconds: float) -> float:
    """Set how long `with_room` waits in this process, in seconds; 0: not at all. Returns the value of before."""
    global _disk_wait
    before, _disk_wait = _disk_wait, seconds
    return before


def with_room(write: Callable[[], Written], needed: int = 0) -> Written:
    """Call `write` and return its result. Where the disk is full, wait for room as long as `set_disk_wait` allows, and
    write again. `needed`: its size in bytes, 0 where unknown. Raises DiskFull when the time is over."""
    deadline = time.monotonic() + _disk_wait
    while True:
        try:
            return write()
        except DiskFull as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            size = f"; it needs {needed / 2**20:,.0f} MiB" if needed else ""
            logger.warning("%s%s; waiting for room, %.0f s more (train.disk_wait)", error, size, left)
            time.sleep(min(_RETRY, left))


def disk_error(path: Path, error: Exception) -> DiskError:
    """The error that tells a user that `path` could not be written because of `error`. Raises that of `require_held`
    where this is the reason."""
    require_held(path)
    kind = DiskFull if isinstance(error, OSError) and error.errno in _NO_ROOM else DiskError
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[-300:]
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return kind(
        f"cannot write {path}: {reason} ({free:,.0f} MiB free in {existing}); nothing was left half-written; make room "
        "or allow writing there, then run the same command again"
    )


def _is_about(error: Exception, temporary: Path) -> bool:
    """Whether writing below `temporary`, or making its folder, failed. An error without a name is about the file that
    is open; a copy names two. Libraries in other languages report a full disk by errors of their own."""
    if not isinstance(error, OSError):
        return any(os.strerror(number) in str(error) for number in _FULL)
    if error.errno in _FULL:
        return True
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    ours = (name.is_relative_to(temporary) or temporary.is_relative_to(name) for name in names)
    return error.errno is not None and (not names or any(ours))


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if owner.isdecimal() and not _is_alive(int(owner)):
            remove(leftover)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
