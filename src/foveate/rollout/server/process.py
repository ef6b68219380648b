"""One server process on this machine: started, asked over HTTP, and killed with everything that it started."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from foveate.errors import EngineError

HOST = "127.0.0.1"
PORT = "{port}"
"""Stands in a command line for the port that the server gets at its start."""
_GUARD = '("$0" "$@" < /dev/null; kill -KILL 0) & cat > /dev/null; kill -KILL 0'
"""Runs a command in a process group that ends when the command ends, or when the pipe to its starter breaks: a trainer
that is killed leaves no server behind."""


class ReplicaLostError(Exception):
    """A server that does not answer any more; whoever asked starts it again."""


class Replica:
    """A server by its command line, in which PORT stands for its port; `incarnation` counts its starts."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, health: str) -> None:
        self.incarnation = 0
        self.port = 0
        self.log = log
        self._command, self._environment, self._health = command, environment, health
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, patience_s: float) -> None:
        """Start the server, or start it again, and wait until it answers. Raises EngineError with the last lines of
        its log where it ends or takes longer than `patience_s`."""
        self.kill()
        self.incarnation += 1
        self.port = _free_port()
        command = [str(self.port) if word == PORT else word for word in self._command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        give_up = time.monotonic() + patience_s
        while not self.healthy():
            if self._process.poll() is not None:
                raise EngineError(f"the server ended while it started; the end of {self.log}:\n{self.last_words()}")
            if time.monotonic() > give_up:
                self.kill()
                raise EngineError(f"the server was not ready after {patience_s:g} s; see {self.log}, or wait longer")
            time.sleep(0.2)

    def healthy(self) -> bool:
        """Whether the server runs and says that it is well."""
        try:
            self.call("GET", self._health, timeout_s=10)
        except (ReplicaLostError, EngineError):
            return False
        return True

    def kill(self) -> None:
        """End the server and all its processes at once."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """One request; returns the decoded JSON, or the text of anything else.

        Raises ReplicaLostError when there is no answer or the server says that it is broken (5xx), EngineError when it
        refuses the request (4xx)."""
        payload = None if body is None else json.dumps(body)
        headers = {} if payload is None else {"Content-Type": "application/json"}
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)) as connection:
            try:
                connection.request(method, path, payload, headers)
                answer = connection.getresponse()
                status, text = answer.status, answer.read().decode()
            except (OSError, http.client.HTTPException) as error:
                raise ReplicaLostError(f"{path}: {type(error).__name__} {error}") from error
        if status >= 500:
            raise ReplicaLostError(f"{path}: status {status}: {text[:500]}")
        if status >= 400:
            raise EngineError(f"the server refused {path} (status {status}): {text[:500]}")
        return json.loads(text) if text[:1] in ("{", "[") else text

    def last_words(self) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])


@contextmanager
def meanwhile(replica: Replica, path: str, body: Any, timeout_s: float) -> Iterator[None]:
    """Post a request that the server answers, within `timeout_s`, when the block has done its part. Where both fail,
    the server's reason is raised, since the other is its consequence. Whoever fails first ends the server, for which
    the other might wait."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(replica.call, "POST", path, body, timeout_s=timeout_s)
        answer.add_done_callback(lambda done: replica.kill() if done.exception() else None)
        try:
            yield
        except RuntimeError as error:
            if not answer.done():
                wait([answer], timeout=5)
            if not answer.done():
                replica.kill()
            failure = answer.exception()
            raise failure if failure is not None else ReplicaLostError(f"{path}: {error}") from error
        answer.result()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
