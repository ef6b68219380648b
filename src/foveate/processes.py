"""Worker processes: they start without the script of their owner, and end with it."""

from __future__ import annotations

import codecs
import ctypes
import logging
import multiprocessing
import os
import pickle
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Self

from foveate.errors import ConfigError, printable
from foveate.registry import pickled

OUTPUT_BYTES, OUTPUT_S = 20_000, 60.0
"""Bytes that a process of `guarded` may print in so many seconds, with all that it starts. More is dropped."""
MOST_WORKERS = 8
"""Worker processes unless the caller says how many."""
MOST_MESSAGE = 2**30
"""Bytes of a message of a worker process."""
_LONG = b"\xff\xff\xff\xff"
_LEFT_TO_OWNER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _without_main():
            return ForkServerProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]


class _Context(ForkServerContext):
    Process = _Process  # pyright: ignore[reportAssignmentType]


def worker_context(preload: Sequence[str]) -> ForkServerContext:
    """A multiprocessing context whose processes come from a fork server that has imported the modules `preload`.

    They do not import the caller's `__main__`, so that a script needs no `if __name__ == "__main__":`. What they are
    sent must not be defined there, unless it is sent by value (`foveate.registry.pickled`)."""
    context = _Context()
    context.set_forkserver_preload([*preload])
    return context


_starting = threading.Lock()


@contextmanager
def _without_main() -> Iterator[None]:
    with _starting:  # or the module that one thread has put there would be taken for the caller's by another
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """The work of a `GuardedProcess`: an object by name with its settings, the folder that relative paths start from,
    the time limit of a piece of work in seconds, the memory limit in bytes, and the functions among the settings that
    Python code has passed (`foveate.registry.pickled`)."""

    name: str
    settings: Mapping[str, Any]
    folder: str
    time_limit: float
    memory_limit: int
    functions: bytes

    @classmethod
    def here(cls, group: str, name: str, settings: Mapping[str, Any], time_limit: float, memory_limit: float) -> Self:
        """In the present folder; the memory limit is in GB. group: of the run's settings, for messages."""
        functions = pickled(name, settings, group)
        return cls(name, dict(settings), os.getcwd(), time_limit, int(memory_limit * 2**30), functions)


def worker_count(
    kind: str, workers: int | None, time_limit: float, memory_limit: float, *, usual: int | None = None
) -> int:
    """How many processes: `workers`, or where it is None `usual`, by default one per CPU core and `MOST_WORKERS` at
    most. Raises ConfigError for limits that are none."""
    if time_limit <= 0 or memory_limit <= 0 or (workers or 0) < 0:
        raise ConfigError(f"{kind}: time_limit and memory_limit must be greater than 0, and workers at least 0")
    if workers is not None:
        return workers
    return min(os.cpu_count() or 1, MOST_WORKERS) if usual is None else usual


class BadMessage(EOFError):
    """Something that is no message has come from a process: its code has written to the pipe."""


class _Incoming:
    """The messages that come through a pipe of multiprocessing: four bytes of size, then a pickle; of a size of -1 the
    next eight bytes are the size. They are read as they come, so that half of one holds nobody up."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._head, self._body, self._size = pipe, b"", bytearray(), -1

    def take(self) -> list[Any]:
        """The next message, once it is complete. Nothing behind it is read."""
        while self._pipe.poll(0):
            if self._size < 0:
                wanted = 12 if self._head[:4] == _LONG else 4
                self._head += self._read(wanted - len(self._head))
                if len(self._head) == 12 or (len(self._head) == 4 and self._head != _LONG):
                    self._size = int.from_bytes(self._head[4:] or self._head, "big")
                if self._size > MOST_MESSAGE:
                    raise BadMessage("it sent what is no message")
            else:
                self._body += self._read(min(self._size - len(self._body), 2**20))
            if len(self._body) == self._size:
                body = bytes(self._body)
                self._head, self._body, self._size = b"", bytearray(), -1
                try:
                    return [pickle.loads(body)]
                except Exception as error:
                    raise BadMessage(f"it sent what is no message: {type(error).__name__}") from error
        return []

    def _read(self, count: int) -> bytes:
        data = os.read(self._pipe.fileno(), count)
        if not data:
            raise EOFError
        return data


def send_by(pipe: Connection, message: Any, deadline: float) -> None:
    """Send a message as `Connection.send` does, until `deadline` at most. Raises TimeoutError, and OSError."""
    body = ForkingPickler.dumps(message)
    size = len(body)
    head = size.to_bytes(4, "big") if size < 2**31 else _LONG + size.to_bytes(8, "big")
    with socket.socket(fileno=os.dup(pipe.fileno())) as end, selectors.DefaultSelector() as selector:
        selector.register(end, selectors.EVENT_WRITE)
        for part in (memoryview(head), memoryview(body)):
            while len(part):
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    raise TimeoutError("the process reads nothing")
                part = part[end.send(part[: 2**20], socket.MSG_DONTWAIT) :]


class GuardedProcess:
    """A worker process that runs the code of others, as its owner sees it: a pipe to it, and its end.

    `target` is called in it as target(job, pipe, owner) and calls `confine` first. It must be known by import."""

    def __init__(
        self, target: Callable[[WorkerJob, Connection, Connection], None], job: WorkerJob, preload: Sequence[str]
    ) -> None:
        processes = worker_context(preload)
        self.pipe, theirs = processes.Pipe()
        self._incoming = _Incoming(self.pipe)
        owner, self._lifeline = lifeline()
        self._process = processes.Process(target=target, args=(job, theirs, owner), daemon=True)
        self._process.start()
        self.is_alive = True
        theirs.close()
        owner.close()

    def receive_message(self) -> list[Any]:
        """The message of the process, where all of it has come; nothing yet where a part of it has. Does not wait.
        Raises EOFError where the process has ended, and BadMessage for what is no message."""
        return self._incoming.take()

    def send_message(self, message: Any, deadline: float) -> None:
        """Send a message, which a process that reads nothing would hold up: until `deadline` at most (monotonic
        seconds), when it raises TimeoutError. Raises OSError where the process has ended."""
        send_by(self.pipe, message, deadline)

    def kill(self) -> None:
        """End the process, even one that hangs, and what it has started."""
        self._lifeline.close()
        self._process.join(1.0)  # one that waits for a dead disk ends when the disk does
        if self._process.exitcode is None or self._process.exitcode < 0:  # the guardian may have had no time to do it
            with suppress(OSError):
                os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self.pipe.close()
        self.is_alive = False

    def end(self) -> str:
        """How it ended by itself, in words."""
        self._process.join(1.0)
        code = self._process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def confine(job: WorkerJob, pipe: Connection, owner: Connection) -> None:
    """In a `GuardedProcess`, before it runs the code of others: `guarded`, silent, in the folder that relative paths
    start from, and with no more memory than its job allows."""
    guarded(owner, pipe)
    logging.disable()  # an error travels back as a note
    os.chdir(job.folder)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = job.memory_limit if hard == resource.RLIM_INFINITY else min(job.memory_limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def lifeline() -> tuple[Connection, Connection]:
    """The end of a pipe for workers, and the one that their owner keeps."""
    return multiprocessing.Pipe(duplex=False)


def end_with(owner: Connection) -> None:
    """End this process, and all that it starts, when the other end of a `lifeline` is closed. Signals that a terminal
    or a supervisor sends to all processes of a run are left to its owner.

    A worker of a fork server is no child of its owner, and what it grades or decodes may never return to Python. So the
    system itself ends it: it sends a signal when the pipe to the owner breaks."""
    import fcntl

    for number in _LEFT_TO_OWNER:
        signal.signal(number, signal.SIG_IGN)
    os.setpgrp()
    own = os.open(f"/dev/fd/{owner.fileno()}", os.O_RDONLY)  # opened anew: workers that share one share its signal
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC)
    if owner.poll():  # it was closed before it could tell
        os._exit(1)


def guarded(owner: Connection, pipe: Connection) -> None:
    """`end_with` for a process that runs the code of others: with it also end those of its children that have left its
    group (`setsid`, daemons), and what they all print goes to standard error, in measure and made printable.

    It returns in a child of this process, which becomes its guardian: children that have lost their parent become the
    guardian's (PR_SET_CHILD_SUBREAPER), and so are found. Only the child keeps `pipe`, which breaks when it ends. Linux
    only; elsewhere it is `end_with`."""
    if sys.platform == "linux":
        _fork_guarded(owner, pipe)
    end_with(owner)


def _fork_guarded(owner: Connection, pipe: Connection) -> None:
    for number in _LEFT_TO_OWNER:
        signal.signal(number, signal.SIG_IGN)
    os.setpgrp()
    system = ctypes.CDLL(None)
    system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guardian, (output, printed) = os.getpid(), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(printed)
        pipe.close()
        _guard(child, owner, output)
    system.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:  # it ended before it could tell
        os._exit(1)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(printed)
    os.close(output)


def _guard(child: int, owner: Connection, output: int) -> NoReturn:
    """Pass on what is printed until the child or the owner has ended; then end whatever is left, and as the child."""
    ends, ended = os.pipe()
    os.set_blocking(ended, False)
    os.set_blocking(output, False)
    signal.set_wakeup_fd(ended)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    relay = _Relay(output)
    status = _reap(child)
    with selectors.DefaultSelector() as selector:
        for file in (ends, owner.fileno(), output):
            selector.register(file, selectors.EVENT_READ)
        while status is None:
            ready = {key.fd for key, _ in selector.select()}
            if output in ready and not relay.pass_on():
                selector.unregister(output)
            if owner.fileno() in ready:
                break
            if ends in ready:
                os.read(ends, 512)
                status = _reap(child)
    if status is None:
        status = _end(child)
    _end_children()
    while relay.pass_on():
        pass
    _end_as(status)


class _Relay:
    """Passes on what stands in a pipe, up to `OUTPUT_BYTES` in each `OUTPUT_S`."""

    def __init__(self, output: int) -> None:
        self._output, self._left, self._until = output, 0, 0.0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_on(self) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(self._output, 2**16)
        except BlockingIOError:
            return False
        now = time.monotonic()
        if now >= self._until:
            self._left, self._until = OUTPUT_BYTES, now + OUTPUT_S
        if self._left:
            shown = printable(self._decoder.decode(data[: self._left]))
            self._left -= len(data[: self._left])
            more = "" if self._left else f"\n... (a worker prints more than {OUTPUT_BYTES:,} bytes in {OUTPUT_S:g} s)\n"
            with suppress(OSError):  # nobody reads it
                os.write(2, (shown + more).encode("utf-8", "replace"))
        return bool(data)


def _reap(child: int) -> int | None:
    """Take the ends of children; that of `child` if it is among them."""
    status = None
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            status = found[1] if found[0] == child else status
    return status


def _end(child: int) -> int:
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _end_children() -> None:
    """End the children of this process, and theirs, which become its own, until there are none."""
    with suppress(ChildProcessError):
        while True:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                for pid in _children():
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                os.waitpid(-1, 0)


def _children() -> Iterator[int]:
    own = os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if int(stat.read_bytes().rpartition(b")")[2].split()[1]) == own:
                yield int(stat.parent.name)


def _end_as(status: int) -> NoReturn:
    """End this process as another one ended."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # some cannot be set, and need not
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(max(code, 0))
